# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""The import hook, against a stand-in for anomalib that imports in no time; test_install has the real one."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import anomalib_osdirf

PACKAGE = Path(anomalib_osdirf.__file__).parent

# As in anomalib: `data` needs no models, `engine` does, and `models.image` lies in the package of the models.
STAND_IN = {
    "anomalib/__init__.py": "",
    "anomalib/data.py": "",
    "anomalib/engine.py": "import anomalib.models",
    "anomalib/models/__init__.py": "from anomalib.models import image\nNAMES = []\ndef get_model(): return NAMES",
    "anomalib/models/image.py": "import anomalib.data",
    "anomalib_osdirf/models/__init__.py": "from anomalib_osdirf.models.osdirf import OSDIRF\n__all__ = ['OSDIRF']",
    "anomalib_osdirf/models/osdirf.py": (
        "import anomalib.models.image\nclass OSDIRF: pass\nfrom anomalib.models import NAMES\nNAMES.append('OSDIRF')"
    ),
}

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A directory with our hook, and stand-ins for anomalib and our models."""
    for name, text in STAND_IN.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    for name in ("__init__.py", "_autoload.py"):
        shutil.copy(PACKAGE / name, tmp_path / "anomalib_osdirf" / name)
    return tmp_path


@pytest.fixture
def run_python(sandbox: Path) -> RunPython:
    """Run code in an interpreter that has the sandbox and the standard library only."""

    def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *flags, "-c", code],
            env={**os.environ, "PYTHONPATH": str(sandbox)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def lines_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The printed lines of a run that went well and warned of nothing."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


INSTALL = "from anomalib_osdirf._autoload import install, installed_finder; install()\n"


def test_hook_imports_nothing_but_itself(run_python: RunPython) -> None:
    listing = "import sys; before = set(sys.modules)\n" + INSTALL + "print(*sorted(set(sys.modules) - before))"
    assert lines_of(run_python(listing)) == ["anomalib_osdirf anomalib_osdirf._autoload"]


@pytest.mark.parametrize(
    "first",
    [
        "import anomalib.models",
        "import anomalib.models.image",
        "from anomalib.models import get_model",
        "import anomalib.data",
        "import anomalib.engine",
        "from anomalib_osdirf import OSDIRF",
        "import anomalib_osdirf; anomalib_osdirf.OSDIRF",
        "import anomalib_osdirf.models.osdirf",
    ],
)
def test_models_are_there_whatever_is_imported_first(run_python: RunPython, first: str) -> None:
    result = run_python(f"{INSTALL}{first}\nimport anomalib.models\nprint(anomalib.models.NAMES)")
    assert lines_of(result) == ["['OSDIRF']"]


def test_models_are_imported_at_once_where_anomalib_is_imported_already(run_python: RunPython) -> None:
    result = run_python("import anomalib.models\n" + INSTALL + "print(anomalib.models.NAMES)")
    assert lines_of(result) == ["['OSDIRF']"]


def test_hook_is_installed_once_and_fires_once(run_python: RunPython) -> None:
    code = INSTALL + (
        "install(); import sys; print(sum(type(f).__name__ == 'ModelsFinder' for f in sys.meta_path))\n"
        "import anomalib.models; first = anomalib.models\n"
        "del sys.modules['anomalib.models'], sys.modules['anomalib_osdirf.models']\n"
        "import anomalib.models; print(installed_finder().spent, anomalib.models is first, anomalib.models.NAMES)\n"
        "print('anomalib_osdirf.models' in sys.modules)"
    )
    assert lines_of(run_python(code)) == ["1", "True False []", "False"]


def test_find_spec_leaves_the_hook_and_shows_the_true_loader(run_python: RunPython) -> None:
    code = INSTALL + (
        "import copy, importlib.util; spec = importlib.util.find_spec('anomalib.models')\n"
        "print(installed_finder().spent, 'NAMES' in spec.loader.get_source('anomalib.models'))\n"
        "print(type(copy.copy(spec.loader)) is type(spec.loader))\n"
        "import anomalib.models; print(anomalib.models.NAMES)"
    )
    assert lines_of(run_python(code)) == ["False True", "True", "['OSDIRF']"]


def test_module_looks_as_if_there_had_been_no_hook(run_python: RunPython) -> None:
    code = INSTALL + (
        "import inspect, pickle, anomalib.models as m\n"
        "print(type(m.__loader__).__name__, m.__spec__.loader is m.__loader__, 'NAMES' in inspect.getsource(m))\n"
        "print(pickle.loads(pickle.dumps(m.get_model)) is m.get_model)"
    )
    assert lines_of(run_python(code)) == ["SourceFileLoader True True", "True"]


def test_failure_is_one_warning_and_anomalib_works(run_python: RunPython, sandbox: Path) -> None:
    (sandbox / "anomalib_osdirf/models/__init__.py").write_text("import no_such_module\n")
    result = run_python(INSTALL + "import anomalib.models, anomalib.models.image; print(anomalib.models.NAMES)")
    assert (result.returncode, result.stdout) == (0, "[]\n")
    assert result.stderr.count("RuntimeWarning") == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in result.stderr
    assert "python -m anomalib_osdirf doctor" in result.stderr
    assert "Traceback" not in result.stderr


def test_failure_does_not_break_anomalib_where_warnings_are_errors(run_python: RunPython, sandbox: Path) -> None:
    (sandbox / "anomalib_osdirf/models/__init__.py").write_text("raise ValueError('of\\ntwo lines')\n")
    result = run_python(INSTALL + "import anomalib.models; print(anomalib.models.NAMES)", "-W", "error")
    assert (result.returncode, result.stdout) == (0, "[]\n")
    assert "ValueError: of two lines - run `python -m anomalib_osdirf doctor`" in result.stderr


def test_hook_waits_when_anomalib_itself_fails(run_python: RunPython, sandbox: Path) -> None:
    models = sandbox / "anomalib/models/__init__.py"
    models.write_text("import sys\nif not hasattr(sys, 'mended'): raise ImportError('not yet')\nNAMES = []\n")
    code = INSTALL + (
        "import sys\ntry: import anomalib.models\nexcept ImportError as error: print(error)\n"
        "sys.mended = True\nimport anomalib.models\nprint(anomalib.models.NAMES)"
    )
    assert lines_of(run_python(code)) == ["not yet", "['OSDIRF']"]


def test_missing_anomalib_is_reported_as_ever(run_python: RunPython, sandbox: Path) -> None:
    shutil.rmtree(sandbox / "anomalib")
    result = run_python(INSTALL + "import anomalib.models")
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'anomalib'"


@pytest.mark.parametrize("position", [0, 1, 99])
def test_hook_gets_on_with_other_import_hooks(run_python: RunPython, position: int) -> None:
    """One that asks all finders again, as lazy-import and tracing tools do, in front of ours and behind it."""
    code = INSTALL + (
        "import sys, importlib.util\n"
        "class Asking:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy or name != 'anomalib.models': return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        f"sys.meta_path.insert({position}, Asking())\n"
        "import anomalib.models; print(anomalib.models.NAMES, type(anomalib.models.__loader__).__name__)"
    )
    assert lines_of(run_python(code)) == ["['OSDIRF'] SourceFileLoader"]


def test_hook_steps_aside_where_it_has_been_wrapped(run_python: RunPython) -> None:
    code = INSTALL + (
        "import sys; wrapped = list(sys.meta_path)\n"
        "class All:\n"
        "    def find_spec(self, *args):\n"
        "        return next((spec for finder in wrapped if (spec := finder.find_spec(*args))), None)\n"
        "sys.meta_path[:] = [All()]\n"
        "import anomalib.models; print(anomalib.models.NAMES)"
    )
    assert lines_of(run_python(code)) == ["[]"]


def test_threads_that_import_from_both_ends_both_get_the_models(run_python: RunPython, sandbox: Path) -> None:
    for name in ("anomalib/models/__init__.py", "anomalib_osdirf/models/osdirf.py"):
        text = (sandbox / name).read_text()
        (sandbox / name).write_text(f"import time; time.sleep(0.1)\n{text}import time; time.sleep(0.1)\n")
    code = INSTALL + (
        "import threading; start = threading.Barrier(2); failures = []\n"
        "def importer(statement):\n"
        "    start.wait()\n"
        "    try: exec(statement, {})\n"
        "    except BaseException as error: failures.append(repr(error))\n"
        "statements = ['import anomalib.models.image', 'from anomalib_osdirf import OSDIRF']\n"
        "threads = [threading.Thread(target=importer, args=(s,)) for s in statements]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "import anomalib.models; print(failures, anomalib.models.NAMES)"
    )
    assert lines_of(run_python(code)) == ["[] ['OSDIRF']"]


def test_public_names_are_listed_and_unknown_ones_refused() -> None:
    assert {"OSDIRF", "__version__"} <= set(dir(anomalib_osdirf))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        anomalib_osdirf.nonsense  # noqa: B018


def runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Names of the modules that importing this one imports."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_models_import_what_sets_off_the_hook(file: Path) -> None:
    """Any other module that did could not be the first import: our models would want it while it is half imported.

    The benchmark stands above the models: no module wants it. The training's package imports the models itself, first.
    """
    if file.relative_to(PACKAGE).parts[0] == "benchmark":
        return
    imports = list(runtime_imports(ast.parse(file.read_text(encoding="utf-8"))))
    assert not [module for module in imports if module.startswith("anomalib_osdirf.benchmark")]
    if file.relative_to(PACKAGE).parts[0] in {"models", "training"} or file.name == "exact_export.py":
        return
    setting_off = ("models", "engine", "callbacks", "cli", "pipelines")
    for module in imports:
        parts = module.split(".")
        assert parts[0] != "anomalib" or len(parts) == 1 or parts[1] not in setting_off, f"{file} imports {module}"


@pytest.mark.parametrize("module", ["export.exact_export", "training.field_training"])
def test_what_the_models_are_made_of_can_be_the_first_import(module: str) -> None:
    code = f"import anomalib_osdirf.{module}; from anomalib_osdirf import OSDIRF; from anomalib.models import get_model"
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stderr == ""
