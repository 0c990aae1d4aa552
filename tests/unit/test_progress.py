# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Phases: bars on a terminal, plain lines in a file, nothing where nobody wants to see them."""

import io
import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from anomalib_osdirf import OSDIRF, progress
from anomalib_osdirf.training.training_progress import TrainingProgress


def _lengths(items: list[str], visible: bool) -> list[str]:
    return list(progress.phase("Pass", items, sum(map(len, items)), visible, len))


def test_a_log_file_gets_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _lengths(["aaa", "bb"], visible=True) == ["aaa", "bb"]
    assert re.fullmatch(r"Pass: 5 images in [\d.]+ s, [\d.]+ images/s\.\n", capsys.readouterr().out)


def test_a_log_file_is_told_how_far_a_long_phase_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    assert _lengths(["aaaa"] * 5, visible=True) == ["aaaa"] * 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "Pass: 4 images in 40.0 s, 0.1 images/s, 0:02:40 left.",
        "Pass: 12 images in 0:02:00, 0.1 images/s, 80.0 s left.",
        "Pass: 20 images in 0:03:20, 0.1 images/s, 0.0 s left.",
    ]


def test_nothing_is_shown_to_those_who_do_not_want_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert _lengths(["aaa"], visible=False) == ["aaa"]
    with progress.step("Export", visible=False):
        pass
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(10_000))
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, get_time=lambda: next(clock))
    monkeypatch.setattr(progress, "Console", lambda: console)
    seen = []
    for item in progress.phase("Pass", ["aa"] * 6, 12, True, len):
        seen.append(item)
        if len(seen) == 5:
            time.sleep(0.3)  # the bar is drawn every tenth of a second
    assert len(seen) == 6
    assert "8/12" in output.getvalue()
    assert "images/s" in output.getvalue()
    assert "0:00:" in output.getvalue()


def test_durations_are_written_as_people_do() -> None:
    assert progress.duration(1.25) == "1.2 s"
    assert progress.duration(3723) == "1:02:03"
    assert progress.summary(12, 1.5) == "12 images in 1.5 s, 8.0 images/s"


def test_a_long_training_tells_how_far_it_is_a_few_times() -> None:
    shown = TrainingProgress()
    shown.start = 0.0
    assert shown._seconds_between_lines(now=360.0, left=3240.0) == 1200.0
    assert shown._seconds_between_lines(now=6.0, left=30.0) == 15.0
    assert shown._seconds_between_lines(now=6.0, left=math.inf) == 15.0


def test_a_training_in_a_log_file_tells_its_phases_without_bars(
    tiny: Callable[..., OSDIRF],
    folder: Callable[..., Any],
    engine: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anomalib_osdirf.training.training_progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("anomalib_osdirf.training.training_progress._MOST_LINES", 1e9)
    engine(enable_progress_bar=True).fit(tiny(), datamodule=folder())
    output = capsys.readouterr().out
    starts = [line.split(" in ")[0] for line in output.splitlines() if " in " in line]
    # Ten images of twelve are trained on; the features that the scorer is fitted on are in the cache.
    assert starts == ["Feature pass: 12 images", "Training: 30 images"]
    assert "Training: 6 steps." in output
    assert "Training: step 3, " in output
    assert "Epoch" not in output
    assert "\r" not in output
