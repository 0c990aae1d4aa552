# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The watch on drift: its false warnings, and what it notices."""

import numpy as np
import pytest

from anomalib_osdirf.post_processing.drift import FIRST, RATE, WINDOW, DriftWatch, compare, quantiles


def _scores(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(3, size=count) + shift


@pytest.mark.parametrize("normal", [38, 5000])
def test_false_warnings_are_as_rare_as_stated(normal: int) -> None:
    """At a rate that 1,000 windows can tell; the p-value is one for all rates."""
    values = [
        compare(_scores(WINDOW, seed), np.array(quantiles(_scores(normal, seed + 10_000)))).p_value
        for seed in range(1000)
    ]
    assert np.mean(np.array(values) < 0.02) < 0.02 + 3 * np.sqrt(0.02 / 1000)
    assert np.mean(np.array(values) < RATE) < 0.005


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_shift_of_the_scores_is_noticed_within_two_windows(shift: float) -> None:
    watch = DriftWatch(quantiles(_scores(200, 0)))
    watch.add(_scores(4 * WINDOW + 20, 1))
    assert (watch.windows, watch.warnings) == (4, 0)
    watch.add(_scores(2 * WINDOW - 20, 2, shift))
    assert watch.latest is not None
    assert watch.latest.drifts
    assert "drift from those of training" in watch.sentence()


def test_few_defects_do_not_warn() -> None:
    watch = DriftWatch(quantiles(_scores(200, 0)))
    watch.add(np.where(np.arange(20 * WINDOW) % 20 == 0, 50, _scores(20 * WINDOW, 1)))  # one image in 20
    assert watch.warnings == 0


def test_without_normal_scores_the_first_of_the_stream_are_the_reference() -> None:
    watch = DriftWatch(_scores(5, 0))
    watch.add(_scores(FIRST + WINDOW - 1, 1, 7.0))
    assert watch.latest is None
    assert "after 1 more" in watch.sentence()
    watch.add([7.0])
    assert watch.latest is not None
    assert not watch.latest.drifts
    assert f"the first {FIRST} of this stream" in watch.sentence()


def test_quantiles_of_many_scores_keep_their_distribution() -> None:
    scores = _scores(5000, 0)
    assert len(quantiles(scores)) == 200
    assert quantiles(scores[:30]) == sorted(scores[:30])
    assert np.median(quantiles(scores)) == pytest.approx(np.median(scores), rel=1e-2)
