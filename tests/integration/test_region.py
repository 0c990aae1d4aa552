# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A region of interest, from the training to the exported file."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.report import ReportCallback
from anomalib_osdirf.report.results import Results
from conftest import TINY, any_denoiser_is_kept, pre_processor
from exactness import TOLERANCES, compare, export, predict, runtime
from small_data import small_folder
from textures import textured_image

INSIDE = (slice(20, 72), slice(0, 40))  # of images of 80 x 72 pixels
DEFECT = (slice(40, 56), slice(10, 26))


class Training(NamedTuple):
    """A finished training."""

    model_class: Any
    checkpoint: Path
    images: Path


def _without_the_outside(image: np.ndarray) -> np.ndarray:
    """Make all white that is outside, up to the border."""
    changed = np.full_like(image, 255)
    changed[INSIDE] = image[INSIDE]
    return changed


def _train(model_class: Any, images: Path, root: Path) -> Path:
    """Train with a mask that is gone afterwards."""
    mask = np.zeros((80, 72), np.uint8)
    mask[INSIDE] = 255
    file = root / "roi.png"
    cv2.imwrite(str(file), mask)
    engine = Engine(
        default_root_dir=root,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        callbacks=[ReportCallback(page=False)],
    )
    model = model_class(**TINY, seed=0, learning_rate=1e-2, pre_processor=pre_processor(), roi=str(file))
    with any_denoiser_is_kept():
        engine.train(model, datamodule=small_folder(images))
    file.unlink()
    return Path(str(engine.best_model_path))


@pytest.fixture(scope="module", params=[OSDIRF, InvAD])
def training(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training of each model."""
    checkpoint = _train(request.param, parts, tmp_path_factory.mktemp("trained"))
    return Training(request.param, checkpoint, parts)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image, the same with another outside, and one with a defect inside."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = textured_image(np.random.default_rng(3), 80, 72)
    defective = image.copy()
    defective[DEFECT] = 255 - defective[DEFECT]
    for name, one in (("0", image), ("1", _without_the_outside(image)), ("2", defective)):
        cv2.imwrite(str(folder / f"{name}.png"), one)
    return folder


def test_a_defect_outside_changes_nothing(training: Training, images: Path, tmp_path: Path) -> None:
    model = training.model_class.load_from_checkpoint(training.checkpoint, post_processor=False)
    good, outside, _ = predict(model, images, tmp_path)
    torch.testing.assert_close(outside.pred_score, good.pred_score, rtol=0, atol=0)
    torch.testing.assert_close(outside.anomaly_map, good.anomaly_map, rtol=0, atol=0)


def test_a_defect_inside_is_found_in_its_place(training: Training, images: Path, tmp_path: Path) -> None:
    model = training.model_class.load_from_checkpoint(training.checkpoint, post_processor=False)
    good, _, inside = predict(model, images, tmp_path)
    assert inside.pred_score > good.pred_score
    row, column = np.unravel_index(int((inside.anomaly_map - good.anomaly_map).argmax()), (64, 64))
    assert DEFECT[0].start * 64 / 80 - 16 <= row < DEFECT[0].stop * 64 / 80 + 16
    assert DEFECT[1].start * 64 / 72 - 16 <= column < DEFECT[1].stop * 64 / 72 + 16


def test_maps_are_lowest_outside(training: Training, images: Path, tmp_path: Path) -> None:
    model = training.model_class.load_from_checkpoint(training.checkpoint, post_processor=False)
    roi = model.model.network.roi
    for batch in predict(model, images, tmp_path):
        outside = batch.anomaly_map[..., ~roi.mask]
        assert (outside == roi.lowest).all()
    assert roi.lowest < batch.anomaly_map[..., roi.mask].median()


def test_training_does_not_see_the_outside(training: Training, tmp_path: Path) -> None:
    shutil.copytree(training.images, tmp_path / "parts")
    for file in (tmp_path / "parts/train/good").iterdir():
        cv2.imwrite(str(file), _without_the_outside(cv2.imread(str(file))))
    again = _train(training.model_class, tmp_path / "parts", tmp_path)
    one, two = (torch.load(file, weights_only=False)["state_dict"] for file in (training.checkpoint, again))
    for name, value in one.items():
        if name.startswith("model.") and isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("compression", [None, "INT8_PTQ"])
def test_exports_have_the_region(training: Training, compression: str | None, images: Path, tmp_path: Path) -> None:
    data = {"datamodule": small_folder(training.images)} if compression else {}
    file = export("openvino", tmp_path, training.checkpoint, compression, training.model_class(), **data)
    good, outside, inside = (runtime(file)(str(images / f"{number}.png")) for number in range(3))
    for one, other in zip(good, outside, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)
    assert inside[0] > good[0]
    if compression is None:
        model = training.model_class.load_from_checkpoint(training.checkpoint)
        compare(predict(model, images, tmp_path), file, *TOLERANCES["openvino"])


def test_pictures_of_the_report_are_darker_outside(training: Training) -> None:
    results = Results(training.checkpoint.parents[2])
    picture = next(results.pictures(results.ids[:1]))["picture"]
    pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert pixels[40:50, 40:].mean() < 0.7 * pixels[40:50, :30].mean()


def test_tiles_are_refused(tmp_path: Path, parts: Path) -> None:
    callback = TilerConfigurationCallback(enable=True, tile_size=32, stride=32)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, callbacks=[callback])
    model = OSDIRF(**TINY, pre_processor=pre_processor(), roi=[[0, 0], [1, 0], [1, 1]])
    with pytest.raises(ValueError, match=r"TilerConfigurationCallback.* roi"):
        engine.fit(model, datamodule=small_folder(parts))
