# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The C++ example builds against OpenVINO's wheel and scores as Python does."""

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from openvino.utils import get_cmake_path

from anomalib_osdirf.inference.scoring import load_scorer
from exactness import export
from textures import textured_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program as its README says."""
    missing = [name for name in ("cmake", "g++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"C++: {' and '.join(missing)} not installed")
    folder = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", EXAMPLE, "-B", folder, "-D", f"OpenVINO_DIR={get_cmake_path()}"]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "score"


@pytest.fixture(scope="module")
def models(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    return {kind: export(kind, root, unclipped) for kind in ("openvino", "onnx")}


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["openvino"]


def run(score: Path, model: Path, images: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([score, model, images], check=False, capture_output=True, text=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, tinted so that a swap of channels shows, the second beyond the threshold, and no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for index, (height, width) in enumerate(((900, 700), (64, 64), (50, 41))):
        tint = np.array([1.0, 0.9, 0.8] if index == 1 else [0.98, 1.0, 1.02])  # blue, green, red
        image = np.clip(textured_image(rng, height, width) * tint, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{index}.ppm"), image)
    (folder / "Thumbs.db").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_scores_and_labels_are_those_of_python(score: Path, models: dict[str, Path], images: Path, kind: str) -> None:
    done = run(score, models[kind], images)
    assert done.returncode == 0, done.stderr
    scorer = load_scorer(models[kind])
    files = sorted(images.glob("*.ppm"))
    labels = set()
    for line, file in zip(done.stdout.splitlines(), files, strict=True):
        path, value, label = line.rsplit(" ", 2)
        expected = scorer.score(cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB).astype(np.float32) / 255)
        assert path == str(file)
        assert float(value) == pytest.approx(expected.score, abs=1e-5)
        assert 0 < expected.score < 1
        assert label == ("defect" if expected.label else "good")
        labels.add(label)
    assert labels == {"defect", "good"}


def test_comment_in_the_header_is_passed_over(score: Path, model: Path, images: Path) -> None:
    plain = run(score, model, images).stdout
    for file in images.glob("*.ppm"):
        file.write_bytes(file.read_bytes().replace(b"P6", b"P6\n# by a camera", 1))
    assert run(score, model, images).stdout == plain


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P3\n1 1\n255\n0 0 0\n",
        b"P6\n0 4\n255\n",
        b"P6\n4 4\n65535\n" + bytes(96),
        b"P6\n4 4\n255\n" + bytes(47),
        b"P6\n99999999999 99999999999\n255\n" + bytes(48),
    ],
    ids=["empty", "text", "no pixels", "16 bits", "cut off", "too large"],
)
def test_broken_image_is_named(score: Path, model: Path, tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.ppm"
    broken.write_bytes(content)
    _fails_with(str(broken), run(score, model, tmp_path))


def test_folder_without_images_is_named(score: Path, model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        _fails_with(str(folder), run(score, model, folder))


def test_model_that_can_not_be_loaded_is_named(score: Path, model: Path, images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.xml"
    broken.write_bytes(model.read_bytes()[:3000])
    for file in (broken, tmp_path / "missing.xml"):
        _fails_with(str(file), run(score, file, images))


def _fails_with(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert f"'{name}'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
