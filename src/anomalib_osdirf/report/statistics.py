# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of scores with bootstrap confidence intervals, as pure functions of arrays.

A set of scores is given by counts: how many normal and anomalous samples have each of the scores, in ascending order.
One resampling of the set is another row of counts, so all resamplings are evaluated at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_AUPRO_LIMIT = 0.3
REPLICATES = 1000
LEVEL = 0.95
# With more scores than this, resamplings (not the values themselves) are computed on scores grouped to quantiles.
MOST_BINS = 2048


@dataclass
class Estimate:
    """A metric's value and its values on resampled images."""

    value: float
    replicates: Array

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return float(np.quantile(self.replicates, (1 - LEVEL) / 2))

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return float(np.quantile(self.replicates, (1 + LEVEL) / 2))


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


def threshold_metrics(false_alarms: Array, normals: Array, misses: Array, anomalies: Array) -> dict[str, Array]:
    """Compute metrics at a threshold from counts; one that would divide by zero is left out.

    Args:
        false_alarms: Normal samples above the threshold.
        normals: All normal samples.
        misses: Anomalous samples not above the threshold.
        anomalies: All anomalous samples.

    Returns:
        ``F1``, ``miss rate`` and ``false-alarm rate``.
    """
    metrics = {}
    if np.all(anomalies > 0):
        hits = anomalies - misses
        metrics["F1"] = 2 * hits / (hits + false_alarms + anomalies)
        metrics["miss rate"] = misses / anomalies
    if np.all(normals > 0):
        metrics["false-alarm rate"] = false_alarms / normals
    return metrics


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
        estimates |= {name: Estimate(float(value), resampled[name]) for name, value in exact.items()}
    if threshold is not None:
        sizes = [len(normal), len(anomalous)]
        wrong = [int(np.sum(normal > threshold)), int(np.sum(anomalous <= threshold))]
        totals = [np.array(float(size)) for size in sizes]
        exact = threshold_metrics(np.array(float(wrong[0])), totals[0], np.array(float(wrong[1])), totals[1])
        drawn = [_binomial(size, count, rng) for size, count in zip(sizes, wrong, strict=True)]
        resampled = threshold_metrics(drawn[0], totals[0], drawn[1], totals[1])
        estimates |= {name: Estimate(float(value), resampled[name]) for name, value in exact.items()}
    return estimates


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
    return {name: Estimate(float(value), resampled[name]) for name, value in exact.items()}


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Average a metric over independent sets of images."""
    return Estimate(
        float(np.mean([estimate.value for estimate in estimates])),
        np.mean([estimate.replicates for estimate in estimates], axis=0),
    )


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
    """Compute ROC and precision-recall curves of at most so many points.

    Args:
        scores: Scores, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        most: Largest number of points.

    Returns:
        ``roc``: false-alarm rate, detection rate; ``pr``: recall, precision. Empty without both classes.
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
