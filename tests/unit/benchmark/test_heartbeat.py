# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Tests of what a run tells of itself."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from anomalib_osdirf.benchmark import heartbeat
from anomalib_osdirf.benchmark.heartbeat import Heartbeat


@pytest.fixture
def half_seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    clock = count(10.0, 0.5)
    monkeypatch.setattr(heartbeat.time, "perf_counter", lambda: next(clock))
    return None


def _batch(size: int) -> Any:
    return SimpleNamespace(image=torch.zeros(size, 3, 2, 2))


def test_images_per_second_of_a_phase_start_with_its_second_batch(half_seconds: None, tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path / "heartbeat.txt")
    for _ in range(2):
        beat.on_train_batch_end(Mock(), Mock(), None, _batch(8), 0)
    assert beat.file.read_text(encoding="utf-8") == "training, 16.0 images/s"


def test_each_phase_has_a_rate_of_its_own(half_seconds: None, tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path / "heartbeat.txt")
    for _ in range(3):
        beat.on_train_batch_end(Mock(), Mock(), None, _batch(8), 0)
    for _ in range(3):
        beat.on_test_batch_end(Mock(), Mock(), None, _batch(2), 0)
    assert beat.file.read_text(encoding="utf-8") == "test, 4.0 images/s"
