# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a user sees: few lines of a training and an export, and one sentence of a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch

from textures import textured_image

MODEL = [
    "--model=OSDIRF",
    "--model.feature_dim=8",
    "--model.grid_size=4",
    "--model.max_steps=4",
    "--model.pre_processor=anomalib.pre_processing.PreProcessor",
    "--model.pre_processor.transform=torchvision.transforms.v2.Resize",
    "--model.pre_processor.transform.size=[64,64]",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
BANK = [*MODEL, "--model.backbone=filter_bank"]
PROGRAM = [sys.executable, "-m", "anomalib_osdirf"]
ANOMALIB = [str(Path(sys.executable).with_name("anomalib"))]
# Imports anomalib's command line once, and has a process for each command.
RUN_ALL = """
import json, os, sys
from multiprocessing import process
commands, sys.argv[0] = json.loads(sys.argv[1]), "anomalib"
from anomalib.cli.cli import main
statuses = {}
for name, arguments in commands.items():
    child = os.fork()
    if not child:
        process._children.clear()  # those of the parent, which it would wait for
        output = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv[1:] = arguments
        main()
        sys.exit(0)
    statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
json.dump(statuses, open("statuses.json", "w"))
"""
MISTAKES = {
    "backbone": "backbone='test_eficientnet'",
    "timestep": "timestep=5000",
    "unknown argument": "'backbon'",
    "model": "did you mean OSDIRF",
    "picture as weights": "picture.png'",
    "no hub": "--model.backbone_weights",
    "no folder": "nowhere/train/good",
    "empty folder": "empty/train/good",
    "one image": "1 normal image ",
    "other model's checkpoint": "ckpt_path",
    "no checkpoint": "gone.ckpt",
}


class Ended(NamedTuple):
    """A command that has come to its end."""

    status: int
    lines: list[str]


def data(root: Path | str, *more: str) -> list[str]:
    return ["--data=Folder", "--data.name=parts", f"--data.root={root}", "--data.normal_dir=train/good", *more]


def run(*command: str | Path, folder: Path, **environment: str) -> Ended:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout.splitlines())


@pytest.fixture(scope="module")
def mistakes(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every mistake, by ``anomalib``."""
    folder = tmp_path_factory.mktemp("mistakes")
    for place in ("empty", "one"):
        (folder / place / "train" / "good").mkdir(parents=True)
    picture = textured_image(np.random.default_rng(0), 80, 72)
    for file in ("picture.png", "one/train/good/0.png"):
        cv2.imwrite(str(folder / file), picture)
    state = {"model.memory_bank": torch.zeros(3)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}}, folder / "of.ckpt")
    efficientnet = [*MODEL, "--model.backbone=test_efficientnet"]
    own = data(parts, "--data.num_workers=0")
    commands = {
        "backbone": ["train", "--model=OSDIRF", "--model.backbone=test_eficientnet", *own],
        "timestep": ["train", *BANK, "--model.timestep=5000", *own],
        "unknown argument": ["train", "--model=OSDIRF", "--model.backbon=x", *own],
        "model": ["train", "--model=OSDRF", "--model.seed=0", *own],
        "picture as weights": ["train", *efficientnet, "--model.backbone_weights=picture.png", *own],
        "no hub": ["train", *efficientnet, *own],
        "no folder": ["train", *BANK, *data("nowhere")],
        "empty folder": ["train", *BANK, *data("empty")],
        "one image": ["train", *BANK, *data("one")],
        "other model's checkpoint": ["test", *BANK, "--ckpt_path=of.ckpt", *own],
        "no checkpoint": ["test", *BANK, "--ckpt_path=gone.ckpt", *own],
        "anomalib's model": ["train", "--model=Padim", *data("nowhere")],
    }
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": ""}
    ended = run(sys.executable, "-c", RUN_ALL, json.dumps(commands), folder=folder, **offline)
    assert ended.status == 0, ended.lines[-10:]
    statuses = json.loads((folder / "statuses.json").read_text(encoding="utf-8"))
    return {
        name: Ended(status, (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines())
        for name, status in statuses.items()
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_with_a_sentence_that_names_it(name: str, mistakes: dict[str, Ended]) -> None:
    status, lines = mistakes[name]
    assert status != 0
    assert lines[-1].startswith("error: ")
    assert MISTAKES[name] in lines[-1]
    assert not [line for line in lines if "Traceback" in line or "Namespace(" in line]
    assert len(lines) < 10


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_mistake_with_a_model_of_anomalib_is_left_to_anomalib(mistakes: dict[str, Ended]) -> None:
    status, lines = mistakes["anomalib's model"]
    assert status != 0
    assert any("Traceback" in line for line in lines)


def test_mistake_of_our_command_line(tmp_path: Path) -> None:
    arguments = ["train", "--model=OSDIRF", "--model.timestep=5000"]
    short = run(*PROGRAM, *arguments, folder=tmp_path)
    assert short.status != 0
    assert len(short.lines) == 1
    assert "timestep=5000" in short.lines[0]
    long = run(*PROGRAM, *arguments, "--verbose", folder=tmp_path)
    assert long.status != 0
    assert any("Traceback" in line for line in long.lines)


def test_a_training_and_an_export_are_quiet(parts: Path, tmp_path: Path) -> None:
    callback = "--trainer.callbacks=anomalib_osdirf.report.ReportCallback"
    tested = ("--data.abnormal_dir=test/dent", "--data.normal_test_dir=test/good", "--data.mask_dir=masks")
    trained = run(*ANOMALIB, "train", *BANK, *data(parts, *tested), callback, folder=tmp_path)
    assert trained.status == 0, trained.lines[-10:]
    assert len(trained.lines) <= 40
    own = "\n".join(line for line in trained.lines if "FutureWarning" not in line)  # of anomalib's import
    assert "Scorer: fitted on 12 images." in own
    assert own.count("image AUROC") == 1
    assert not [word for word in ("max_epochs", "worker processes", " - INFO - ", "GPU available") if word in own]
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    exported = run(
        *PROGRAM, "export", "--model=OSDIRF", "--export_type=openvino", f"--ckpt_path={checkpoint}", folder=tmp_path
    )
    assert exported.status == 0, exported.lines[-10:]
    assert len(exported.lines) <= 10
    assert str(next(tmp_path.rglob("model.xml")).name) in exported.lines[-1]


def test_everything_is_shown_on_request(trained: Any, tmp_path: Path) -> None:
    arguments = ["predict", "--model=OSDIRF", f"--ckpt_path={trained.checkpoint}", f"--data={tmp_path}"]
    cv2.imwrite(str(tmp_path / "one.png"), textured_image(np.random.default_rng(0), 80, 72))
    ended = run(*ANOMALIB, *arguments, folder=tmp_path, ANOMALIB_OSDIRF_VERBOSE="1")
    assert ended.status == 0
    assert any("GPU available" in line for line in ended.lines)


def test_a_missing_extra_is_found_before_the_training(tmp_path: Path) -> None:
    code = "import sys; sys.modules['openvino'] = None; from anomalib_osdirf.__main__ import main; "
    code += "sys.exit(main(['quickstart']))"
    ended = run(sys.executable, "-c", code, folder=tmp_path)
    assert ended.status == 1
    assert "openvino" in ended.lines[-1]
    assert not list(tmp_path.iterdir())


def test_help_has_our_commands_first_and_unclipped(tmp_path: Path) -> None:
    status, lines = run(*PROGRAM, "--help", folder=tmp_path, COLUMNS="60")
    assert status == 0
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3].strip()]
    assert names[0] == "train"
    assert "doctor" in names
    assert "validate" in " ".join(lines[lines.index(next(line for line in lines if "anomalib's commands" in line)) :])
    assert not [line for line in lines if "…" in line]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    """Which takes seconds to import."""
    code = "import sys; from anomalib_osdirf.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    assert run(sys.executable, "-c", code, folder=tmp_path).status == 0


def test_misspelt_command_gets_a_suggestion(tmp_path: Path) -> None:
    ended = run(*PROGRAM, "quikstart", folder=tmp_path)
    assert ended.status == 2
    assert "quickstart" in ended.lines[-1]
