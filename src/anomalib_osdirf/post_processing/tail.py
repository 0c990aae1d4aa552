# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The distribution of normal images' scores, and thresholds at a false-alarm rate.

A score's p-value is the share of normal images with a score at least as high. Down to 1 / (n + 1) it is counted among n
scores; below that, it follows a generalised Pareto tail (Coles 2001, chapter 4). Uncertainty comes from the exact law
of order statistics where p-values are counted, and from the tail's posterior where they are not.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from anomalib_osdirf.post_processing.p_values import EXPONENTS, THRESHOLD, Array

LEVEL = 0.95
FEWEST_SCORES = 3
# Of n scores, the largest n / 10 are the tail's, at least 20 where that is no more than a third, and at most 250: those
# pin the two parameters down, and further out the tail is closer to its limit.
_TAIL_SHARE, _FEWEST_EXCESSES, _MOST_EXCESSES = 0.1, 20, 250
# The prior of the shape: tails of scores are close to exponential, and few excesses tell little about it.
_SHAPE_DEVIATION = 0.15
_SHAPES = np.linspace(-0.6, 0.6, 25)
_SCALES = np.geomspace(0.25, 5.0, 40)  # in mean excesses
_DISTANCES = np.geomspace(1e-3, 1e6, 200)  # likewise
_SHARE_NODES = (np.arange(20) + 0.5) / 20


@dataclass(frozen=True)
class Calibration:
    """Calibration on scores of normal images."""

    knots: tuple[float, ...]  # scores whose p-value is rate^e, for each e of EXPONENTS, ascending
    interval: tuple[float, float]  # of the threshold's false-alarm rate, at the level LEVEL
    images: int

    @property
    def threshold(self) -> float:
        """The score whose p-value is the rate."""
        return self.knots[THRESHOLD]


def supports(images: int, rate: float) -> bool:
    """Return whether a number of scores supports a false-alarm rate: one in n + 1 lies above the largest."""
    return images >= FEWEST_SCORES and rate * (images + 1) >= 1 - 1e-9


def images_needed(rate: float) -> int:
    """Return the number of scores that a false-alarm rate needs."""
    return max(FEWEST_SCORES, math.ceil(1 / rate - 1 - 1e-9))


def calibrate(scores: Array, rate: float, extrapolate: bool = False, images: str = "normal images") -> Calibration:
    """Find the threshold of a false-alarm rate, its uncertainty, and the p-values of all scores ``(n,)``.

    With ``extrapolate``, the threshold comes from the fitted tail where the rate is below 1 / (n + 1).

    Raises:
        ValueError: If the scores can't support the rate (``images`` says what they are), are not finite, or all equal.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    count = len(ordered)
    counted = supports(count, rate)
    if not counted and (not extrapolate or count < FEWEST_SCORES):
        raise ValueError(unsupported(count, rate, images))
    if not np.isfinite(ordered).all():
        msg = "The scores of normal images are not all finite, so they have no threshold; train the model again."
        raise ValueError(msg)
    if ordered[0] == ordered[-1]:
        msg = f"All {count} normal images have the score {ordered[0]:g}, so they have no threshold; train the model."
        raise ValueError(msg)
    tail = Tail.fit(ordered)
    # Where the threshold is counted, the tail begins behind the largest score, else at its own start.
    rank = 1 if counted else tail.excesses + 1
    probabilities = rate ** np.array(EXPONENTS)
    knots = _ascending(_quantiles(ordered, tail, rank, probabilities), ordered)
    if counted:
        low, high = counted_interval(rate, count)
    else:
        low, high = tail.interval(knots[THRESHOLD], count)
    return Calibration(tuple(knots.tolist()), (float(low), float(high)), count)


def calibrate_without_spread(scores: Array, rate: float) -> Calibration:
    """Calibrate on one or two scores, or equal ones: the largest is the threshold, of p-value ``rate``."""
    highest = float(scores.max())
    knots = highest + (np.array(EXPONENTS) - 1) * max(abs(highest), 1.0)
    return Calibration(tuple(knots.tolist()), counted_interval(rate, len(scores)), len(scores))


def counted_interval(rate: float, count: int) -> tuple[float, float]:
    """Return where the rate lies, by the law of the (fractional) order statistic at the threshold (Hutson 1999)."""
    alarms = rate * (count + 1)
    low, high = stats.beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], alarms, count + 1 - alarms)
    return float(low), float(high)


def unsupported(count: int, rate: float, images: str) -> str:
    """Return the message that a rate is too small for the number of images, and what would work."""
    message = f"false_alarm_rate={rate:g} is too small for {count} {images}: give {images_needed(rate)} or more"
    if count < FEWEST_SCORES:
        return f"{message}."
    return (
        f"{message}, ask for {_rounded_up(1 / (count + 1)):g} or more, or give a FalseAlarmPostProcessor with "
        "extrapolate=True, which continues the tail of their scores."
    )


def _rounded_up(value: float) -> float:
    """Round to two digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.6g}")


@dataclass(frozen=True)
class Tail:
    """Generalised Pareto law of the excesses of scores over a high one, as a posterior on a grid.

    Predictions are means over the posterior: they account for the uncertainty of few excesses, and no score is
    impossible.

    Attributes:
        start: Scores above it are the tail's.
        excesses: How many of the scores were.
        scale: Unit of excesses: their mean.
        weights: Posterior of shape and scale, ``(shapes, scales)``.
    """

    start: float
    excesses: int
    scale: float
    weights: Array

    @classmethod
    def fit(cls, ordered: Array) -> "Tail":
        """Fit the tail of ascending scores, at least two of which differ."""
        count = len(ordered)
        excesses = max(math.ceil(_TAIL_SHARE * count), min(_FEWEST_EXCESSES, count // 3), 1)
        excesses = min(excesses, _MOST_EXCESSES)
        start = ordered[-excesses - 1]
        values = ordered[-excesses:] - start
        scale = max(values.mean(), 1e-3 * (ordered[-1] - ordered[0]))
        likelihood = stats.genpareto.logpdf(values[:, None, None] / scale, _SHAPES[:, None], scale=_SCALES).sum(axis=0)
        posterior = np.exp(likelihood - likelihood.max() - 0.5 * (_SHAPES[:, None] / _SHAPE_DEVIATION) ** 2)
        return cls(float(start), excesses, float(scale), posterior / posterior.sum())

    def survival(self, scores: Array) -> Array:
        """Predicted share of the excesses that go beyond scores ``(...)``."""
        return (self._survivals(scores) * self.weights).sum(axis=(-2, -1))

    def _survivals(self, scores: Array) -> Array:
        """The share under each shape and scale, ``(..., shapes, scales)``."""
        distances = (np.asarray(scores, np.float64)[..., None, None] - self.start) / self.scale
        return np.asarray(stats.genpareto.sf(distances, _SHAPES[:, None], scale=_SCALES))

    def quantiles(self, shares: Array) -> Array:
        """Scores that have these shares of the excesses beyond them, ``(K,)``."""
        scores = self.start + self.scale * np.concatenate([[0.0], _DISTANCES])
        falling = np.log(np.maximum(self.survival(scores), 1e-300))
        return np.interp(-np.log(shares), -falling, scores)

    def interval(self, score: float, count: int) -> Array:
        """Where the share of all normal images beyond a score lies, of which ``count`` were seen."""
        beyond = stats.beta.ppf(_SHARE_NODES, self.excesses + 1, count - self.excesses)
        shares = (self._survivals(np.array(score))[..., None] * beyond).ravel()
        weights = np.broadcast_to(self.weights[..., None], (*self.weights.shape, len(beyond))).ravel()
        order = np.argsort(shares)
        below = np.cumsum(weights[order]) / weights.sum()
        return np.interp([(1 - LEVEL) / 2, (1 + LEVEL) / 2], below, shares[order])


def _quantiles(ordered: Array, tail: Tail, rank: int, probabilities: Array) -> Array:
    """Scores of these p-values: counted down to the ``rank``-th largest score, and the tail's beyond it."""
    count = len(ordered)
    ranks = np.arange(count, rank - 1, -1)
    counted = np.interp(-np.log(probabilities), -np.log(ranks / (count + 1)), ordered[: len(ranks)])
    at_rank = tail.survival(ordered[-rank])
    beyond = tail.quantiles(np.minimum(1.0, probabilities * (count + 1) / rank) * at_rank)
    return np.where(probabilities * (count + 1) >= rank, counted, beyond)


def _ascending(knots: Array, ordered: Array) -> Array:
    """Separate equal knots by steps that float32 resolves, so that normalised scores keep their order."""
    step = max(1e-5 * (ordered[-1] - ordered[0]), 1e-6 * np.abs(knots).max())
    spread = step * np.arange(len(knots))
    return np.maximum.accumulate(knots - spread) + spread
