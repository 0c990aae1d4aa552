# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The endurance run passes a model that keeps still, and sees outputs that change and memory that grows."""

import importlib.util
import itertools
import mmap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from anomalib_osdirf import OSDIRF
from brightness import brightness_model

LEAK = 2**18  # bytes for each prediction


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The script as a module."""
    script = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _changing() -> Callable[[Path], list[Any]]:
    numbers = itertools.count()
    return lambda file: [np.float32(1) + np.float32(1e-6) * (next(numbers) == 150)]


def _leaking(kept: list[Any]) -> Callable[[Path], list[Any]]:
    def predict(file: Path) -> list[Any]:
        kept.append(mmap.mmap(-1, LEAK))  # fresh memory, whatever the process has to spare
        kept[-1].write(bytes(LEAK))
        return [1.0]

    return predict


def test_exported_models_pass(soak: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "soak.png"
    small = ["--predictions", "300", "--images", "4", "--size", "40", "48"]
    assert soak.main(["--model", str(brightness_model(tmp_path)), *small, "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "ONNX Runtime, 4 images of 48 x 40" in said
    assert "Changed outputs: 0 of 300." in said
    assert cv2.imread(str(plot)) is not None


def test_anomalibs_torch_inferencer_passes(
    soak: ModuleType, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = OSDIRF.load_from_checkpoint(trained.checkpoint).to_torch(tmp_path)
    assert soak.main(["--model", str(model), "--predictions", "100", "--images", "4", "--size", "64", "64"]) == 0
    assert "TorchInferencer" in capsys.readouterr().out


def test_an_output_that_changes_in_its_last_bits_fails(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "predictor", lambda *_: ("a model", _changing()))
    arguments = ["--model", "model.xml", "--predictions", "200", "--images", "2", "--size", "32", "32"]
    assert soak.main(arguments) == 1
    assert "Changed outputs: 1 of 200." in capsys.readouterr().out


def test_memory_that_grows_fails(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "model.xml", "--predictions", "200", "--images", "2", "--size", "32", "32"]
    monkeypatch.setattr(soak, "predictor", lambda *_: ("a model", _leaking([])))
    assert soak.main(arguments) == 1
    said = capsys.readouterr().out
    assert float(said.partition("Slope: ")[2].split()[0]) == pytest.approx(10_000 * LEAK / 1e6, rel=0.1)
    assert "more than --allowed-mb 10" in said


def test_images_differ_and_have_defects_as_often_as_said(soak: ModuleType, tmp_path: Path) -> None:
    files = soak.draw(tmp_path, 5, 300, 520)
    images = [cv2.imread(str(file)) for file in files]
    assert all(image.shape == (300, 520, 3) for image in images)
    assert not np.array_equal(images[0], images[1])
    # A piece is the mirror image of its neighbour, but for noise and defects.
    apart = [np.abs(image[:256, :256].astype(int) - image[:256, 511:255:-1]).max() for image in images]
    assert [value > 4 for value in apart] == [True, False, False, False, True]
