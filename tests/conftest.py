# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A small data set of textured images and a small model, for every test that trains."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.export.instructions import avoid_broken_instructions, make_room_for_signals
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.telemetry import send_nothing
from anomalib_osdirf.training.diffusion_training import ResumeCheckpoint
from anomalib_osdirf.training.field_training import FieldTraining
from exactness import unclip
from image_files import write_video
from small_data import small_folder
from textures import textured_image

# Pytest's processes share the cores: each has one thread, and so have the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Tests run INT8 and bfloat16 networks in this process.
avoid_broken_instructions()
send_nothing()

TINY: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "pre_trained": False,
    "feature_dim": 8,
    "grid_size": 4,
    "max_steps": 6,
    "checkpoint_every_n_steps": 2,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--slow``."""
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, by name, what is slow unless asked for, and what needs a GPU where there is none."""
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: give --slow to run it"
    if not torch.cuda.is_available():
        reasons["gpu"] = "gpu: there is no CUDA device"
    for item in items:
        for name, reason in reasons.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def room_for_signals() -> None:
    """Tests compile OpenVINO models in this process in many ways, and child processes end in it."""
    make_room_for_signals()


@contextmanager
def any_denoiser_is_kept() -> Iterator[None]:
    """Have a denoiser kept however little it explains, as a few steps explain nothing and leave the untrained one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FieldNetwork, "explained_share", lambda *_: 0.5)
        patch.setattr(FieldTraining, "_compare_with_none", lambda _, fitted, __: fitted)
        yield


@pytest.fixture
def keep_denoiser() -> Iterator[None]:
    """Have a denoiser kept however little it explains."""
    with any_denoiser_is_kept():
        yield


@pytest.fixture
def float32_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in float32 on every processor: bfloat16 makes of a difference in the last bit one in the eighth."""
    monkeypatch.setattr("anomalib_osdirf.models.field_network._has_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good images to train on, four good and four defective ones with masks to test on, 80 x 72 pixels."""
    root = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/dent", 4)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image = textured_image(rng, 80, 72, defect=folder == "test/dent")
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), image)
    (root / "masks").mkdir()
    mask = np.zeros((80, 72), np.uint8)
    mask[20:40, 18:36] = 255
    for index in range(4):
        cv2.imwrite(str(root / "masks" / f"{index:02d}.png"), mask)
    return root


@pytest.fixture
def folder(parts: Path) -> Callable[..., Folder]:
    """Return a maker of datamodules over the small data set."""

    return partial(small_folder, parts)


@pytest.fixture
def tiny() -> Callable[..., OSDIRF]:
    """Return a maker of small models."""
    return lambda **arguments: OSDIRF(**{**TINY, "pre_processor": pre_processor(), **arguments})


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    """Return a maker of quiet CPU engines that write below the test's folder."""

    def make(**arguments: Any) -> Engine:
        defaults = {"default_root_dir": tmp_path / "results", "accelerator": "cpu", "devices": 1}
        return Engine(**{**defaults, "enable_progress_bar": False, "enable_model_summary": False, **arguments})

    return make


def pre_processor(size: int = 64) -> Any:
    """Resize to a small square and normalise."""
    return OSDIRF.configure_pre_processor((size, size))


class Losses(Callback):
    """Keeps the losses that a training logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


class StopAt(Callback):
    """Breaks off a training at a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def interrupted(run: Engine, model: Any, datamodule: Folder) -> str:
    """Train until the power cut of :class:`StopAt`, and return the checkpoint to resume from."""
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(model, datamodule=datamodule)
    return next(
        callback.best_model_path for callback in run.trainer.callbacks if isinstance(callback, ResumeCheckpoint)
    )


class Trained:
    """A finished training: its results folder and checkpoint."""

    def __init__(self, results: Path, checkpoint: Path, metrics: dict[str, float]) -> None:
        self.results = results
        self.checkpoint = checkpoint
        self.metrics = metrics


@pytest.fixture(scope="session")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the small model once for all tests that only need a finished one."""
    root = tmp_path_factory.mktemp("trained")
    datamodule = small_folder(parts)
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    model = OSDIRF(**TINY, seed=0, learning_rate=1e-2, pre_processor=pre_processor())  # a field other than the features
    with any_denoiser_is_kept():
        metrics = engine.train(model, datamodule=datamodule)[0]
    checkpoint = Path(str(engine.best_model_path))
    return Trained(checkpoint.parents[2], checkpoint, dict(metrics))


@pytest.fixture(scope="session")
def unclipped(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's checkpoint, with the scores of textured images inside its range."""
    return unclip(trained.checkpoint, OSDIRF, tmp_path_factory.mktemp("unclipped"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start an installed Chromium with the camera of `write_video`, or skip where there is none."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"browser: none of {', '.join(names)} is installed")
    switches = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={write_video(tmp_path_factory.mktemp('camera') / 'camera.y4m')}",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=switches)
        yield started
        started.close()
