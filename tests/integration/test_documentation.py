# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What README and documentation tell people to type works, what they quote exists, and the site builds.

A block of a page is run as it is written, with the arguments in ``SMALL`` behind those of its commands and the
replacements in ``SMALLER`` in its Python, in a folder with the files that the pages speak of. Or it names, in a comment
above it, the test that runs it: ``<!-- tested by tests/integration/test_app.py::test_a_folder_is_scored -->``.
"""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import yaml
from packaging.requirements import Requirement
from safetensors.torch import save_file

from anomalib_osdirf import quickstart
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.report import page as report_page
from textures import textured_image

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src").rglob("README.md")),
)
LANGUAGES = {"bash", "python", "yaml", "text"}

BACKBONE = "test_efficientnet"
_ON_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
_SMALL_MODEL = {"backbone": BACKBONE, "feature_dim": 8, "grid_size": 4, "max_steps": 2}
_SMALL_SURFACES = {"num_train": 4, "num_test_good": 2, "num_test_per_defect": 1, "image_size": 64, "num_workers": 0}
_SMALL_IMAGES: dict[str, Any] = {
    "class_path": "anomalib.pre_processing.PreProcessor",
    "init_args": {"transform": {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}},
}
_SMALL_TRAINING = [
    *(f"--model.{name}={value}" for name, value in _SMALL_MODEL.items()),
    f"--model.pre_processor={_SMALL_IMAGES['class_path']}",
    f"--model.pre_processor.transform={_SMALL_IMAGES['init_args']['transform']['class_path']}",
    "--model.pre_processor.transform.size=[64,64]",
    *_ON_CPU,
]
SMALL: dict[str, list[str]] = {"train": _SMALL_TRAINING, "test": _ON_CPU, "predict": _ON_CPU}
SMALLER = {
    'backbone="mobilenetv2_100"': f"backbone={BACKBONE!r}, feature_dim=8, grid_size=4, max_steps=2",
    'Folder("parts",': 'Folder("parts", num_workers=0,',
    "Engine(": "Engine(accelerator='cpu', enable_progress_bar=False, ",
    "pretrained=True": "pretrained=False",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    tested_by: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
        before = ""
        for number, line in lines:
            if line.startswith("```"):
                inside = takewhile(lambda numbered: not numbered[1].startswith("```"), lines)
                text = "\n".join(text for _, text in inside) + "\n"
                marker = re.fullmatch(r"<!-- tested by (.+) -->", before)
                # The command that tests the project is run by what tests the project.
                tested_by = ".ci/run" if before == "<!-- test command -->" else marker[1] if marker else None
                yield Block(page, number, line.removeprefix("```"), text, tested_by)
            before = line


BLOCKS = list(_blocks())


def _to_run(language: str) -> list[Any]:
    return [
        pytest.param(block, id=str(block)) for block in BLOCKS if block.language == language and not block.tested_by
    ]


@pytest.fixture(scope="module")
def folder(trained: Any, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in small, with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("configs", "examples", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for source, target in (("train/good", "good"), ("test/dent", "defect"), ("masks", "mask")):
        shutil.copytree(parts / source, folder / "parts" / target)
    (folder / "new_images").mkdir()
    rng = np.random.default_rng(5)
    for index in range(2):
        cv2.imwrite(str(folder / "new_images" / f"{index}.png"), textured_image(rng, 90, 70))
    weights = timm.create_model(BACKBONE, pretrained=False).state_dict()
    for name in ("efficientnet_b4", "mobilenetv2_100"):
        save_file(weights, folder / f"{name}.safetensors")
    shutil.copy(trained.checkpoint, folder / "model.ckpt")
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The folder, with ``model.xml`` and what belongs to it, by the pages' own command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _run(shlex.split("anomalib export --model OSDIRF --ckpt_path model.ckpt --export_type openvino"))
    for part in (folder / "results" / "weights" / "openvino").glob("model.*"):
        shutil.copy(part, folder)
    return folder


@pytest.fixture
def here(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder; make small quick starts, and reports without charts, which take seconds."""
    small = yaml.safe_load(quickstart.config_file().read_text(encoding="utf-8"))
    small["model"]["init_args"] |= {**_SMALL_MODEL, "pre_trained": False, "pre_processor": _SMALL_IMAGES}
    small["data"]["init_args"] |= _SMALL_SURFACES
    small["trainer"]["accelerator"] = "cpu"
    (exported / "quickstart.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    monkeypatch.setattr(quickstart, "config_file", lambda: exported / "quickstart.yaml")
    monkeypatch.setattr(report_page, "_charts", str)
    monkeypatch.chdir(exported)
    for latest in (exported / "results").rglob("latest"):
        if not latest.is_symlink():  # anomalib's, of a test before any training: none could follow
            shutil.rmtree(latest)
    return exported


_done: set[str] = set()


def _run(command: list[str]) -> None:
    """Run a command of a page, once."""
    if shlex.join(command) in _done:
        return
    match command:
        case ["python", "-m", "pip", "install" | "wheel", *arguments]:
            _check_requirements(arguments)
        case ["anomalib", subcommand, *arguments] | ["python", "-m", "anomalib_osdirf", subcommand, *arguments]:
            assert main([subcommand, *arguments, *_small(subcommand, shlex.join(arguments))]) == 0
        case ["python", script, *arguments]:
            _run_script(script, arguments)
        case _:
            pytest.fail(f"{shlex.join(command)!r} is of no kind that can be run here; name the test that runs it")
    _done.add(shlex.join(command))


def _small(subcommand: str, arguments: str) -> list[str]:
    small = list(SMALL.get(subcommand, ()))
    if subcommand == "train" and "backbone_weights" not in arguments:
        small.append("--model.pre_trained=false")
    if "quickstart.yaml" in arguments:
        small += [f"--data.{name}={value}" for name, value in _SMALL_SURFACES.items()]
    if "--data Folder" in arguments or "osdirf.yaml" in arguments:
        small.append("--data.num_workers=0")
    if subcommand == "doctor":
        small.append(f"--backbone={BACKBONE if '--weights' in arguments else 'filter_bank'}")
    return small


def _check_requirements(arguments: list[str]) -> None:
    """See that the extras that are asked for exist; installing is tested in test_install.py and test_offline.py."""
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[$", table.partition("\n[")[0], re.MULTILINE))
    for argument in arguments:
        if argument.startswith((".", "anomalib-osdirf")):
            assert Requirement(argument.replace(".", "anomalib-osdirf", 1)).extras <= extras


def _run_script(script: str, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("block", _to_run("bash"))
def test_commands_work(block: Block, here: Path) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words:
                _run(words)


@pytest.mark.parametrize("block", _to_run("python"))
def test_python_works(block: Block, here: Path, tmp_path: Path) -> None:
    text = block.text
    for written, smaller in SMALLER.items():
        text = text.replace(written, smaller)
    script = tmp_path / "block.py"
    script.write_text(text, encoding="utf-8")
    _run_script(str(script), ["model.xml", "new_images"])


def test_yaml_can_be_read() -> None:
    blocks = [block for block in BLOCKS if block.language == "yaml"]
    assert blocks
    for block in blocks:
        assert isinstance(yaml.safe_load(block.text), dict), block


def test_every_block_is_of_a_language_that_is_looked_at() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


def test_tests_that_blocks_name_exist() -> None:
    named = [block for block in BLOCKS if block.tested_by]
    assert named
    for block in named:
        file, *names = str(block.tested_by).split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"(def|class) {name}\b", text) for name in names), block


def _messages() -> set[str]:
    """All texts in the source, with … where something is filled in."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Messages of this package")[2].partition("\n## ")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| ") and "`" in row]
    assert len(rows) > 20
    messages = _messages()
    for row in rows:
        wanted = re.compile(".*".join(map(re.escape, re.findall(r"`([^`]+)`", row))), re.DOTALL)
        assert any(wanted.search(message) for message in messages), row


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page, expected in (("index.html", "Troubleshooting"), ("reference/models/index.html", "density")):
        assert expected in (tmp_path / "site" / page).read_text(encoding="utf-8")
