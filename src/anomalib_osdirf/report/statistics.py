# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of scores with confidence intervals, as pure functions of arrays.

Intervals of rates are Wilson's; those of other metrics are from the bootstrap.

A set of scores is given by counts: how many normal and anomalous samples have each of the scores, in ascending order.
One resampling of the set is another row of counts, so all resamplings are evaluated at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

_AUPRO_LIMIT = 0.3
REPLICATES = 1000
LEVEL = 0.95
# With more scores than this, resamplings (not the values themselves) are computed on scores grouped to quantiles.
MOST_BINS = 2048


@dataclass
class Estimate:
    """A metric's value and interval."""

    value: float
    low: float
    high: float
    replicates: Array | None = None  # values on resampled images, None of a rate

    @classmethod
    def resampled(cls, value: float, replicates: Array) -> "Estimate":
        """Take the interval from values on resampled images."""
        low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(value, float(low), float(high), replicates)

    @classmethod
    def rate(cls, count: int, total: int) -> "Estimate":
        """Return a share of images, with Wilson's interval."""
        interval = stats.binomtest(count, total).proportion_ci(LEVEL, method="wilson")
        return cls(count / total, interval.low, interval.high)


def ranking_metrics(normal: Array, anomalous: Array) -> dict[str, Array]:
    """Compute metrics that need no threshold.

    Args:
        normal: Counts of normal samples by ascending score, ``(..., U)``; at least one in each row.
        anomalous: Counts of anomalous samples, ``(..., U)``; at least one in each row.

    Returns:
        ``AUROC``, ``AP`` (average precision) and ``F1Max``, each ``(...)``.
    """
    below = np.cumsum(normal, axis=-1)
    normals, anomalies = below[..., -1], anomalous.sum(axis=-1)
    auroc = (anomalous * (below - normal / 2)).sum(axis=-1) / (normals * anomalies)
    hits = np.cumsum(anomalous[..., ::-1], axis=-1)
    alarms = np.cumsum(normal[..., ::-1], axis=-1)
    fired = np.maximum(hits + alarms, 1e-300)
    precision = hits / fired
    average_precision = (anomalous[..., ::-1] * precision).sum(axis=-1) / anomalies
    f1 = 2 * hits / (fired + anomalies[..., None])
    return {"AUROC": auroc, "AP": average_precision, "F1Max": f1.max(axis=-1)}


def aupro(normal: Array, regions: Array) -> Array:
    """Area under the per-region overlap, by the false-positive rate of pixels up to 0.3 (Bergmann et al. 2021).

    Args:
        normal: Counts of normal pixels by ascending score, ``(..., U)``; at least one in each row.
        regions: Sum over anomalous regions of the share of each region's pixels, ``(..., U)``; not all 0 in a row.

    Returns:
        In 0 to 1, ``(...)``.
    """
    rates, overlaps = (np.cumsum(part[..., ::-1], axis=-1) for part in (normal, regions))
    rates, overlaps = rates / rates[..., -1:], overlaps / overlaps[..., -1:]
    before, left = (
        np.concatenate([np.zeros_like(part[..., :1]), part[..., :-1]], axis=-1) for part in (overlaps, rates)
    )
    # Of the step across the limit, the part before it.
    share = np.clip((_AUPRO_LIMIT - left) / np.maximum(rates - left, 1e-300), 0, 1)
    heights = before + share * (overlaps - before) / 2
    return (share * (rates - left) * heights).sum(axis=-1) / _AUPRO_LIMIT


def image_metrics(
    scores: Array, labels: NDArray[np.int64], threshold: float | None, seed: int = 0
) -> dict[str, Estimate]:
    """Compute all metrics of images with intervals; normal and anomalous images are resampled apart.

    Args:
        scores: Scores, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        threshold: Scores above it count as anomalous; ``None`` for none.
        seed: Seed of the resampling.

    Returns:
        Estimates by name, those that the images allow: none of a ranking without both normal and anomalous images.
    """
    rng = np.random.default_rng(seed)
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    estimates: dict[str, Estimate] = {}
    if len(normal) and len(anomalous):
        exact = ranking_metrics(*_counts(np.unique(scores), normal, anomalous))
        bins = _bins(scores)
        resampled = ranking_metrics(*(_resample(counts, rng) for counts in _counts(bins, normal, anomalous)))
        estimates |= {name: Estimate.resampled(float(value), resampled[name]) for name, value in exact.items()}
    if threshold is not None:
        alarms, misses = int(np.sum(normal > threshold)), int(np.sum(anomalous <= threshold))
        if len(anomalous):
            drawn = (_binomial(len(normal), alarms, rng), _binomial(len(anomalous), misses, rng))
            exact_f1, resampled_f1 = (_f1(wrong, len(anomalous)) for wrong in ((alarms, misses), drawn))
            estimates["F1"] = Estimate.resampled(exact_f1, resampled_f1)
            estimates["miss rate"] = Estimate.rate(misses, len(anomalous))
        if len(normal):
            estimates["false-alarm rate"] = Estimate.rate(alarms, len(normal))
    return estimates


def _f1(wrong: tuple[Any, Any], anomalies: int) -> Any:  # numbers or arrays
    alarms, misses = wrong
    hits = anomalies - misses
    return 2 * hits / (hits + alarms + anomalies)


def pixel_metrics(
    normal: NDArray[np.float32], anomalous: NDArray[np.float32], regions: NDArray[np.float32], seed: int = 0
) -> dict[str, Estimate]:
    """Compute ranking metrics of pixels with intervals, for which whole images are resampled.

    Args:
        normal: Counts of normal pixels by ascending score in each image, ``(N, bins)``.
        anomalous: Counts of anomalous pixels, ``(N, bins)``.
        regions: Sum over anomalous regions of the share of each region's pixels, ``(N, bins)``.
        seed: Seed of the resampling.

    Returns:
        Estimates by name; none if there are no anomalous or no normal pixels.
    """
    total_normal, total_anomalous = normal.sum(axis=0, dtype=np.float64), anomalous.sum(axis=0, dtype=np.float64)
    if not total_normal.any() or not total_anomalous.any():
        return {}
    rng = np.random.default_rng(seed)
    defective = anomalous.any(axis=1)
    shape = (REPLICATES, normal.shape[1])
    normals, anomalies, overlaps = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for group in (defective, ~defective):  # apart, so that every resampling has anomalous pixels
        if group.any():
            often = _resample(np.ones(group.sum()), rng).astype(np.float32)
            normals += often @ normal[group]
            anomalies += often @ anomalous[group]
            overlaps += often @ regions[group]
    exact, resampled = ranking_metrics(total_normal, total_anomalous), ranking_metrics(normals, anomalies)
    exact["AUPRO"] = aupro(total_normal, regions.sum(axis=0, dtype=np.float64))
    resampled["AUPRO"] = aupro(normals, overlaps)
    return {name: Estimate.resampled(float(value), resampled[name]) for name, value in exact.items()}


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Average a metric over independent sets of images; of rates, distances to the limits add in squares (Newcombe)."""
    values, low, high = (np.array([getattr(one, name) for one in estimates]) for name in ("value", "low", "high"))
    value = float(values.mean())
    replicates = [one.replicates for one in estimates if one.replicates is not None]
    if replicates:
        return Estimate.resampled(value, np.mean(replicates, axis=0))
    below, above = (float(np.linalg.norm(values - end)) / len(values) for end in (low, high))
    return Estimate(value, value - below, value + above)


def best_threshold(scores: Array, labels: NDArray[np.int64]) -> float | None:
    """Return the threshold of the largest F1, halfway to the next lower score; ``None`` without both classes."""
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    if not len(normal) or not len(anomalous):
        return None
    values = np.unique(scores)
    normals, anomalies = _counts(values, normal, anomalous)
    hits, alarms = np.cumsum(anomalies[::-1])[::-1], np.cumsum(normals[::-1])[::-1]
    best = int(np.argmax(2 * hits / (hits + alarms + len(anomalous))))
    lower = values[best - 1] if best else values[best] - 1e-6 * max(1.0, abs(values[best]))
    return float((values[best] + lower) / 2)


def curves(scores: Array, labels: NDArray[np.int64], most: int = 400) -> dict[str, list[list[float]]]:
    """Compute points of two curves: ``roc`` (false-alarm rate, recall) and ``pr`` (recall, precision).

    They are empty without both classes, and have at most ``most`` points.
    """
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    if not len(normal) or not len(anomalous):
        return {"roc": [], "pr": []}
    normals, anomalies = _counts(np.unique(scores), normal, anomalous)
    hits, alarms = np.cumsum(anomalies[::-1]), np.cumsum(normals[::-1])
    keep = np.unique(np.linspace(0, len(hits) - 1, min(most, len(hits))).round().astype(int))
    recall, false_alarm_rate, precision = hits / len(anomalous), alarms / len(normal), hits / (hits + alarms)
    roc = [[0.0, 0.0], *np.stack([false_alarm_rate, recall], axis=1)[keep].round(5).tolist()]
    return {"roc": roc, "pr": np.stack([recall, precision], axis=1)[keep].round(5).tolist()}


def _bins(scores: Array) -> Array:
    values = np.unique(scores)
    if len(values) <= MOST_BINS:
        return values
    return np.unique(np.quantile(scores, np.linspace(0, 1, MOST_BINS), method="lower"))


def _counts(bins: Array, normal: Array, anomalous: Array) -> tuple[Array, Array]:
    """Count samples by the largest bin value that is not above their score."""
    places = [np.searchsorted(bins, part, side="right") - 1 for part in (normal, anomalous)]
    counts = [np.bincount(place, minlength=len(bins)).astype(np.float64) for place in places]
    return counts[0], counts[1]


def _resample(counts: Array, rng: np.random.Generator) -> Array:
    """Draw as many samples as there are, with replacement, again and again: ``(U,)`` -> ``(REPLICATES, U)``."""
    total = int(counts.sum())
    return rng.multinomial(total, counts / total, size=REPLICATES).astype(np.float64)


def _binomial(total: int, hits: int, rng: np.random.Generator) -> Array:
    return rng.binomial(total, hits / total if total else 0.0, size=REPLICATES).astype(np.float64)
