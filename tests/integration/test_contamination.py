# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Defective images among the training images: named, and left out where they are expected."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.report import ReportCallback
from anomalib_osdirf.report.results import Results
from conftest import TINY, pre_processor
from textures import textured_image

GOOD, DEFECTIVE = 28, 2


def _fit(tmp_path: Path, **arguments: Any) -> OSDIRF:
    rng = np.random.default_rng(1)
    for folder, count in (("good", GOOD + DEFECTIVE), ("other", 4)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            image = textured_image(np.random.default_rng(0), 80, 72)
            if index >= GOOD:
                place = 30 * (index - GOOD)
                image[place + 8 : place + 32, place + 8 : place + 32] = 255 * (index % 2)
            noisy = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / folder / f"{'dent' if index >= GOOD else 'part'}{index:02d}.png"), noisy)
    model = OSDIRF(**{**TINY, "denoiser": "none"}, seed=0, pre_processor=pre_processor(), **arguments)
    report = ReportCallback(folder=tmp_path / "report", page=False, quiet=True)
    engine = Engine(default_root_dir=tmp_path / "run", callbacks=[report], accelerator="cpu", enable_progress_bar=False)
    datamodule = Folder(
        "parts", root=tmp_path, normal_dir="good", normal_test_dir="other", val_split_mode="same_as_test", num_workers=0
    )
    engine.fit(model, datamodule=datamodule)
    return model


def test_defective_training_images_are_named_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="anomalib_osdirf"):
        model = _fit(tmp_path)
    names = [Path(path).name for path, _ in model.suspicious_images]
    assert len(names) == 10
    assert set(names[:DEFECTIVE]) == {"dent28.png", "dent29.png"}
    assert names[0] in caplog.text
    recorded = Results(tmp_path / "report").entries["suspicious"]
    assert [path for path, _ in recorded] == [path for path, _ in model.suspicious_images]
    assert model.model.scorer.num_images == GOOD + DEFECTIVE


def test_expected_defects_are_left_out_of_the_scorer_and_the_threshold(tmp_path: Path) -> None:
    model = _fit(tmp_path, expected_contamination=DEFECTIVE / (GOOD + DEFECTIVE))
    assert model.model.scorer.num_images == GOOD
    assert model.post_processor.calibration["image"]["images"] == GOOD
    lowest_of_defects = min(score for path, score in model.suspicious_images if "dent" in path)
    assert float(model.post_processor.image_threshold) < lowest_of_defects


@pytest.mark.parametrize("share", [0.5, -0.1])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected_contamination"):
        OSDIRF(**TINY, expected_contamination=share)
