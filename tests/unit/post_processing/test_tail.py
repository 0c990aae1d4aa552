# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Thresholds, intervals and p-values against the laws that the scores were drawn from, and against scipy's own fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anomalib_osdirf.post_processing.p_values import EXPONENTS, normalise, p_value
from anomalib_osdirf.post_processing.tail import Tail, calibrate, images_needed, supports

LAWS = {"normal": stats.norm(), "exponential": stats.expon(), "gamma": stats.gamma(3), "heavy": stats.t(5)}


def _drawn(law: str, count: int, seed: int) -> np.ndarray:
    return LAWS[law].rvs(count, random_state=np.random.default_rng(seed))


def test_a_counted_threshold_is_the_order_statistic() -> None:
    scores = _drawn("gamma", 199, 0)
    assert calibrate(scores, 5 / 200).threshold == pytest.approx(np.sort(scores)[-5])


def test_the_counted_interval_is_that_of_clopper_and_pearson() -> None:
    """Four of 199 lie above the threshold, which is the fifth largest itself."""
    reference = stats.binomtest(4, 199).proportion_ci(0.95, method="exact")
    low, high = calibrate(_drawn("normal", 199, 0), 5 / 200).interval
    assert high == pytest.approx(reference.high)
    assert low == pytest.approx(stats.binomtest(5, 199).proportion_ci(0.95, method="exact").low)


def test_counted_rates_lie_in_their_interval_as_often_as_it_says() -> None:
    found = [(calibrate(_drawn("gamma", 150, seed), 0.02), seed) for seed in range(200)]
    rates = np.array([LAWS["gamma"].sf(calibration.threshold) for calibration, _ in found])
    low, high = found[0][0].interval
    inside = np.mean((low <= rates) & (rates <= high))
    # 0.95, give or take three standard deviations of 200 trials.
    assert 0.90 <= inside <= 0.995
    assert rates.mean() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("law", LAWS)
def test_extrapolated_rates_lie_in_their_interval_as_often_as_it_says(law: str) -> None:
    """Five times further out than the scores reach."""
    found = [calibrate(_drawn(law, 200, seed), 0.001, extrapolate=True) for seed in range(60)]
    rates = [LAWS[law].sf(calibration.threshold) for calibration in found]
    inside = [one.interval[0] <= rate <= one.interval[1] for one, rate in zip(found, rates, strict=True)]
    assert np.mean(inside) >= 0.87
    assert 1e-4 < np.mean(rates) < 2e-3


def test_the_tail_agrees_with_scipys_fit() -> None:
    excesses = stats.genpareto(0.1, scale=2.0).rvs(2500, random_state=np.random.default_rng(0))
    tail = Tail.fit(np.sort(excesses))
    shape, _, scale = stats.genpareto.fit(np.sort(excesses)[-tail.excesses :] - tail.start, floc=0)
    distances = np.linspace(0, 8, 9)
    reference = stats.genpareto.sf(distances, shape, scale=scale)
    np.testing.assert_allclose(tail.survival(tail.start + distances), reference, rtol=0.25, atol=0.005)


def test_p_values_are_those_of_the_law() -> None:
    calibration = calibrate(_drawn("gamma", 5000, 1), 0.01)
    scores = np.linspace(0.5, 9, 30)
    found = p_value(normalise(scores, np.array(calibration.knots)), 0.01)
    np.testing.assert_allclose(found, LAWS["gamma"].sf(scores), rtol=0.2)


def test_far_out_p_values_are_small_but_never_vanish() -> None:
    knots = np.array(calibrate(_drawn("normal", 300, 0), 0.01).knots)
    far = p_value(normalise(np.array([6.0, 20.0, 60.0]), knots), 0.01)
    assert (np.diff(far) < 0).all()
    assert far[0] < 0.002
    assert far[-1] > 0


@pytest.mark.parametrize("scores", [[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1], [1, 1, 2, 2, 3, 3, 3]])
def test_equal_scores_keep_knots_apart(scores: list[float]) -> None:
    knots = np.array(calibrate(np.array(scores, float), 0.25).knots, np.float32)
    assert (np.diff(knots) > 0).all()


@given(
    scores=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=60).filter(lambda values: np.ptp(values) > 1e-3),
    rate=st.floats(0.25, 0.9),
    queries=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_normalised_scores_keep_their_order_within_0_and_1(
    scores: list[float], rate: float, queries: list[float]
) -> None:
    knots = np.array(calibrate(np.array(scores), rate).knots)
    values = normalise(np.sort(queries), knots)
    assert (np.diff(values) >= 0).all()
    assert (values > 0).all()
    assert (values < 1).all()
    np.testing.assert_allclose(p_value(normalise(knots, knots), rate), rate ** np.array(EXPONENTS), rtol=1e-9)


@settings(deadline=None)
@given(rate=st.floats(1e-6, 0.999))
def test_the_number_of_images_needed_is_the_smallest_that_supports_a_rate(rate: float) -> None:
    needed = images_needed(rate)
    assert supports(needed, rate)
    assert needed == 3 or not supports(needed - 1, rate)


@pytest.mark.parametrize(
    ("count", "extrapolate", "sentence"),
    [
        (96, False, r"false_alarm_rate=.* 96 normal images: give 999 or more, ask for 0.011 or more"),
        (2, True, r"false_alarm_rate=.* 2 normal images: give 999 or more\.$"),
        (0, True, r"false_alarm_rate=.* 0 normal images: give 999 or more\.$"),
    ],
)
def test_unsupported_rates_are_refused_in_a_sentence(count: int, extrapolate: bool, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        calibrate(np.arange(count), 0.001, extrapolate)


@pytest.mark.parametrize(("value", "sentence"), [(np.nan, "not all finite"), (0.0, "All 9 normal images have the")])
def test_scores_without_a_threshold_are_refused_in_a_sentence(value: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        calibrate(np.full(9, value), 0.2)
