# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""The package as it is installed: built as a wheel, and into a fresh environment that borrows this one's packages."""

import importlib.util
import os
import pkgutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from environments import ENVIRONMENT, install, make_environment, output_of

ROOT = Path(__file__).parents[2]
HOOK_FILES = ("anomalib_osdirf.pth", "anomalib_osdirf.start")

# Imports the heavy packages below anomalib once, then lets forks of itself go on: one for each module of anomalib or
# ours to be imported first, and one without the hook for our command line. Prints those that went wrong.
IMPORT_ORDERS = """
import importlib, os, sys, warnings
import torch, torchvision, lightning, timm, jsonargparse, omegaconf
assert "anomalib" not in sys.modules

def command_line():
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ModelsFinder"]
    sys.stdout = open(os.devnull, "w")
    from anomalib_osdirf.__main__ import main
    try:
        main(["fit", "--model.help", "OSDIRF"])
    except SystemExit as end:
        assert not end.code

for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", category=RuntimeWarning)
        status = 1
        try:
            command_line() if first == "command_line" else importlib.import_module(first)
            models = importlib.import_module("anomalib.models")
            status = 0 if "OSDIRF" in models.list_models("pascal") and hasattr(models, "OSDIRF") else 2
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        print(first)
"""

FOUND_BY_NAME = """
import pickle, sys, warnings
warnings.filterwarnings("error", category=RuntimeWarning)
assert "torch" not in sys.modules
exec(sys.argv[1])
import anomalib.models as models
names = {case: models.list_models(case) for case in ("snake", "pascal")}
assert "OSDIRF" in names["pascal"] and "osdirf" in {name.replace("_", "") for name in names["snake"]}
assert "anomalib_osdirf" in models.ALLOWED_MODULES
assert pickle.loads(pickle.dumps(models.OSDIRF)) is models.OSDIRF
from anomalib_osdirf import OSDIRF
assert OSDIRF is models.OSDIRF
print("diffusers" in sys.modules)
"""

QUICK_START = """
import sys
from pathlib import Path
from anomalib.engine import Engine
from anomalib_osdirf.quickstart import run_category

def train(self, model, datamodule):
    print(type(model).__name__, type(datamodule).__name__)
    sys.exit()

Engine.train = train
run_category("weave", Path("results"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT)
    (file,) = directory.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def wheel_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = make_environment(tmp_path_factory.mktemp("from_wheel"))
    install(python, wheel)
    return python


@pytest.fixture(scope="module")
def editable_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = make_environment(tmp_path_factory.mktemp("editable"))
    install(python, "--editable", ROOT)
    return python


def test_wheel_has_the_hook_files_at_its_root(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert set(HOOK_FILES) <= set(names)
    assert {"anomalib_osdirf/_autoload.py", "anomalib_osdirf/py.typed"} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"anomalib_osdirf", *HOOK_FILES}


def test_hook_files_name_one_existing_callable() -> None:
    pth, start = ((ROOT / "src" / name).read_text(encoding="ascii").splitlines() for name in HOOK_FILES)
    (entry_point,) = start
    module, _, function = entry_point.partition(":")
    assert callable(pkgutil.resolve_name(entry_point))
    assert pth == [f"import {module}; {module}.{function}()"]


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ("wheel_environment", "import anomalib.models"),
        ("editable_environment", "from anomalib_osdirf import OSDIRF"),
    ],
)
def test_anomalib_finds_our_model_by_name(
    environment: str,
    first: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    python = request.getfixturevalue(environment)
    assert output_of(python, "-c", FOUND_BY_NAME, first, cwd=tmp_path).splitlines()[-1] == "False"


def test_editable_install_uses_the_source_tree(editable_environment: Path, tmp_path: Path) -> None:
    code = "import anomalib_osdirf; print(anomalib_osdirf.__file__)"
    assert Path(output_of(editable_environment, "-c", code, cwd=tmp_path)).is_relative_to(ROOT / "src")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the import orders are tried in forks")
def test_models_are_there_whatever_is_imported_first(wheel_environment: Path, tmp_path: Path) -> None:
    orders = (
        "anomalib_osdirf.models",
        "anomalib_osdirf.registration",
        "anomalib.models.image",
        "anomalib.data",
        "anomalib.engine",
        "anomalib.cli",
        "command_line",
    )
    assert not output_of(wheel_environment, "-c", IMPORT_ORDERS, *orders, cwd=tmp_path)


def test_start_imports_the_hook_and_nothing_else(wheel_environment: Path, bare_environment: Path) -> None:
    code = "import sys; print(*sys.modules)"
    with_hook, without = (
        set(output_of(python, "-c", code).split()) for python in (wheel_environment, bare_environment)
    )
    assert with_hook - without == {"anomalib_osdirf", "anomalib_osdirf._autoload"}


def test_start_costs_little(
    wheel_environment: Path,
    bare_environment: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds: dict[Path, list[float]] = {wheel_environment: [], bare_environment: []}
    for _ in range(40):
        for python, runs in seconds.items():
            begin = time.perf_counter()
            subprocess.run([python, "-c", "pass"], env=ENVIRONMENT, check=True)
            runs.append(time.perf_counter() - begin)
    cost = 1000 * (statistics.median(seconds[wheel_environment]) - statistics.median(seconds[bare_environment]))
    record_property("start_up_cost_ms", round(cost, 2))
    with capsys.disabled():
        print(f"\nstart-up cost of the import hook: {cost:.2f} ms (median of 40 interleaved pairs)")
    assert cost < 20


def test_target_install_has_no_hook_and_the_doctor_says_so(wheel: Path, bare_environment: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    install(bare_environment, "--target", target, wheel)
    code = "from anomalib_osdirf.doctor import check_hook; print(check_hook())"
    found = output_of(bare_environment, "-c", code, PYTHONPATH=str(target))
    assert f"Python reads no .pth file in {target}" in found
    assert "python -m anomalib_osdirf" in found


def test_quick_start_needs_no_hook(wheel: Path, bare_environment: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    install(bare_environment, "--target", target, wheel)
    output = output_of(bare_environment, "-c", QUICK_START, cwd=tmp_path, PYTHONPATH=str(target))
    assert output.splitlines()[-1] == "OSDIRF SyntheticSurfaces"


def test_version_has_a_single_source(wheel: Path) -> None:
    spec = importlib.util.find_spec("anomalib_osdirf")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert wheel.name.split("-")[1] == module.__version__
