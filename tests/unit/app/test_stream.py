# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A watched folder: files half written, broken, changed and gone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_osdirf.app.stream import Stream
from anomalib_osdirf.inference.scoring import load_scorer
from brightness import brightness_model


@pytest.fixture
def watch(tmp_path: Path) -> Callable[..., Stream]:
    """Watch an empty folder by a model whose score is the brightest pixel."""

    def make(**metadata: Any) -> Stream:
        (tmp_path / "watched").mkdir()
        return Stream(tmp_path / "watched", load_scorer(brightness_model(tmp_path / "model", **metadata)), 40_000)

    return make


def _write(file: Path, brightness: int = 60) -> Path:
    Image.fromarray(np.full((60, 80), brightness, np.uint8)).save(file)
    return file


def _counts(stream: Stream) -> tuple[int, int, int]:
    return stream.scored, stream.anomalous, len(stream.errors)


def test_each_image_is_scored_once(watch: Callable[..., Stream]) -> None:
    stream = watch()
    (stream.folder / "a").mkdir()
    _write(stream.folder / "good.png")
    defect = _write(stream.folder / "a" / "defect.png", 200)
    (stream.folder / "readme.txt").write_text("no image")
    stream.look()
    assert _counts(stream) == (0, 0, 0)
    assert "2 waiting" in stream.sentence()
    stream.look()
    assert _counts(stream) == (2, 1, 0)
    assert [row.name for row in stream.pictures] == ["a/defect.png"]
    defect.touch()
    for _ in range(3):
        stream.look()
    assert _counts(stream) == (2, 1, 0)
    assert [number for number, _, _ in stream.history] == [1, 2]


def test_a_file_is_scored_when_it_is_written_whatever_the_pauses(watch: Callable[..., Stream]) -> None:
    stream = watch()
    whole = _write(stream.folder / "x.png").read_bytes()
    file = stream.folder / "x.png"
    file.write_bytes(whole[:30])
    stream.look()
    file.write_bytes(whole[:60])
    stream.look()
    assert _counts(stream) == (0, 0, 0)
    stream.look()
    stream.look()
    assert _counts(stream) == (0, 0, 1)
    assert "x.png" in stream.rows()[0].note
    file.write_bytes(whole)
    stream.look()
    stream.look()
    assert _counts(stream) == (1, 0, 0)


def test_a_folder_may_vanish_and_come_back(watch: Callable[..., Stream]) -> None:
    stream = watch()
    shutil.rmtree(stream.folder)
    stream.look()
    assert str(stream.folder) in stream.problem
    stream.folder.mkdir()
    _write(stream.folder / "x.png")
    stream.look()
    stream.look()
    assert _counts(stream) == (1, 0, 0)
    assert not stream.problem


def test_what_a_model_can_not_stand_is_an_error(watch: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = watch()

    def fail(image: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(stream.scorer, "score", fail)
    _write(stream.folder / "x.png")
    stream.look()
    stream.look()
    assert "no memory" in stream.rows()[0].note


def test_darker_images_than_those_of_training_drift(watch: Callable[..., Stream]) -> None:
    """Scores are normalised like the reference."""
    raw = np.random.default_rng(0).uniform(0.2, 0.4, 60)
    scales = {"image_min": 0.0, "image_max": 0.8, "image_threshold": 0.5, "post_processor": False}
    stream = watch(**scales, normal_scores={"quantiles": raw.tolist()})
    brightnesses = np.random.default_rng(1).uniform(0.2, 0.4, 50)
    for number, brightness in enumerate([*brightnesses, *(brightnesses - 0.15)]):
        _write(stream.folder / f"{number:03d}.png", round(255 * brightness))
        if number in {49, 99}:
            stream.look()
            stream.look()
            assert stream.drift.latest is not None
            assert stream.drift.latest.drifts == (number == 99)
