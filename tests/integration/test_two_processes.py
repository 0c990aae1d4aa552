# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Trainings in two processes (CPU, gloo) against the same in one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.processes import DistributedContext
from anomalib_osdirf.report.results import Results
from anomalib_osdirf.training import distributed
from anomalib_osdirf.training.diffusion_training import DiffusionTraining
from states import assert_same_state
from two_processes import models, state_in_float64, tiny, train

TESTS = Path(__file__).parents[1]
MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]
Result = dict[str, Any]


@pytest.fixture(scope="module")
def data(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images to train on and seven to test on, and a second category."""
    root = tmp_path_factory.mktemp("uneven") / "parts"
    shutil.copytree(parts, root)
    for index in (9, 10, 11):
        (root / f"train/good/{index:02d}.png").unlink()
    (root / "test/good/03.png").unlink()
    shutil.copytree(root, root.parent / "nuts")
    shutil.move(root.parent / "nuts", root / "nuts")
    return root


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes."""
    output = tmp_path_factory.mktemp("two")
    launcher_variables = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher_variables}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "two_processes.py"), str(data), str(output)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return output


def _results(output: Path, name: str) -> list[Result]:
    return [torch.load(output / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Train in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_osdirf.models.field_network._has_bfloat16", lambda: False)
        return {
            name: train(model, data, tmp_path_factory.mktemp("one"), devices=1, more=name == "OSDIRF")
            for name, model in models().items()
            if name != "DiffusionAD"
        }


@pytest.mark.parametrize("name", ["OSDIRF", "InvAD", "mixture", "calibrated"])
def test_two_processes_end_where_one_does(name: str, output: Path, alone: dict[str, Result]) -> None:
    """PCA, weights, their average, what is kept of it, clusters, densities, units, thresholds."""
    expected = alone[name]
    for result in _results(output, name):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        # Adam amplifies rounding where gradients are nearly 0, by up to 1e-2 a step; the next test has none.
        assert_same_state(result["state"], expected["state"], rtol=1e-3, atol=5e-4)


def test_without_rounding_two_processes_end_where_one_does(output: Path, data: Path, tmp_path: Path) -> None:
    expected = state_in_float64(data, tmp_path, devices=1)
    for result in _results(output, "float64"):
        assert_same_state(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["OSDIRF", "InvAD", "mixture", "calibrated", "DiffusionAD"])
def test_both_processes_have_the_same_bits(name: str, output: Path) -> None:
    one, other = (result["state"] for result in _results(output, name))
    assert_same_state(one, other, rtol=0, atol=0)


def test_checkpoint_of_two_processes_is_a_plain_one(output: Path) -> None:
    result = _results(output, "OSDIRF")[0]
    model = OSDIRF.load_from_checkpoint(result["checkpoint"])
    assert_same_state(model.state_dict(), result["state"], rtol=0, atol=0)


def test_metrics_are_those_of_each_image_once(output: Path, alone: dict[str, Result]) -> None:
    """Seven images, which Lightning by itself would make eight."""
    for result in _results(output, "OSDIRF"):
        for kind in ("metrics", "by_category"):
            assert result[kind]
            assert result[kind] == pytest.approx(alone["OSDIRF"][kind], abs=1e-5)


@pytest.mark.parametrize("name", ["OSDIRF", "DiffusionAD"])
def test_each_image_is_predicted_once(name: str, output: Path, alone: dict[str, Result]) -> None:
    one, other = (result["scores"] for result in _results(output, name))
    assert (len(one), len(other)) == (4, 3)
    assert not set(one) & set(other)
    if name != "DiffusionAD":
        assert {**one, **other} == pytest.approx(alone["OSDIRF"]["scores"], abs=1e-3)


def test_files_are_those_of_one_process(output: Path, alone: dict[str, Result]) -> None:
    root = output / "OSDIRF" / "OSDIRF" / "parts"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "v0"]
    assert (root / "latest").resolve() == (root / "v0").resolve()
    assert [path.name for path in (root / "v0/weights/lightning").iterdir()] == ["model.ckpt"]
    results = Results(root / "v0")
    assert len(results.paths) == len(set(results.paths)) == 14  # of the test of two categories, which came last
    assert results.losses[:, 1] == pytest.approx(alone["OSDIRF"]["losses"], rel=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model think that it is in the first of two processes."""
    monkeypatch.setattr(DiffusionTraining, "processes", DistributedContext(0, 2))


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "2 processes can't share the training images, because the training data came as a dataloader.*devices 1"),
        ({"denoiser": "none"}, "denoiser=none"),
    ],
)
def test_training_that_can_not_be_shared(
    arguments: dict[str, Any], match: str, folder: MakeFolder, engine: MakeEngine
) -> None:
    datamodule = folder()
    datamodule.setup()
    with pytest.raises(ValueError, match=match):
        engine().fit(tiny(OSDIRF, **arguments), train_dataloaders=datamodule.train_dataloader())


def test_more_processes_than_images(folder: MakeFolder, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionTraining, "processes", DistributedContext(0, 13))
    with pytest.raises(ValueError, match=r"13 processes.* --trainer.devices 12"):
        engine().fit(tiny(OSDIRF), datamodule=folder())


@pytest.mark.usefixtures("two")
def test_splits_that_differ_between_processes(
    folder: MakeFolder, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda _, thing: {} if isinstance(thing, dict) else thing)
    with pytest.raises(ValueError, match=r"--data\.seed 0"):
        engine().fit(tiny(OSDIRF), datamodule=folder())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_share_weights_out_are_refused(
    strategy: type, folder: MakeFolder, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, strategy.__name__, SingleDeviceStrategy)
    with pytest.raises(ValueError, match=r"strategy=SingleDeviceStrategy.*ddp"):
        engine().fit(tiny(OSDIRF), datamodule=folder())
