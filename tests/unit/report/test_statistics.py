# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn, intervals against theory."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from anomalib_osdirf.report import statistics
from anomalib_osdirf.report.pictures import count_pixels


def _sample(seed: int, size: int = 60, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, of both classes."""
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, *rng.integers(0, 2, size - 2)])
    return (rng.normal(size=size) + labels).round(decimals), labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_values_are_scikit_learns(seed: int) -> None:
    scores, labels = _sample(seed)
    metrics = statistics.image_metrics(scores, labels, threshold=0.5)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1_max = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert metrics["AUROC"].value == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["AP"].value == pytest.approx(average_precision_score(labels, scores))
    assert metrics["F1Max"].value == pytest.approx(f1_max)
    assert metrics["F1"].value == pytest.approx(f1_score(labels, scores > 0.5))
    assert metrics["miss rate"].value == pytest.approx(np.mean(scores[labels == 1] <= 0.5))
    assert metrics["false-alarm rate"].value == pytest.approx(np.mean(scores[labels == 0] > 0.5))


def test_resampled_metrics_are_those_of_resampled_images() -> None:
    scores, labels = _sample(0)
    rng = np.random.default_rng(1)
    chosen = rng.integers(0, len(scores), len(scores))
    values = np.unique(scores)
    counts = [
        np.array([np.sum(scores[chosen][labels[chosen] == label] == value) for value in values], dtype=float)
        for label in (0, 1)
    ]
    metrics = statistics.ranking_metrics(*counts)
    assert metrics["AUROC"] == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]))
    assert metrics["AP"] == pytest.approx(average_precision_score(labels[chosen], scores[chosen]))


def test_interval_covers_the_true_value_as_often_as_it_says() -> None:
    """Of scores N(0, 1) and N(1, 1), the AUROC is Phi(1 / sqrt 2)."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scores, labels = np.concatenate([rng.normal(size=60), 1 + rng.normal(size=60)]), np.repeat([0, 1], 60)
        estimate = statistics.image_metrics(scores, labels, None, seed=seed)["AUROC"]
        covered += estimate.low <= 0.7602499 <= estimate.high
    assert 50 <= covered


def test_grouping_many_scores_changes_intervals_little(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = _sample(0, size=3000, decimals=9)
    grouped = statistics.image_metrics(scores, labels, None)["AUROC"]
    monkeypatch.setattr(statistics, "MOST_BINS", 10_000)
    single = statistics.image_metrics(scores, labels, None)["AUROC"]
    assert grouped.value == single.value
    assert np.std(grouped.replicates) == pytest.approx(np.std(single.replicates), rel=0.15)
    assert grouped.replicates.mean() == pytest.approx(single.replicates.mean(), abs=2e-3)


def test_intervals_of_rates_are_wilsons() -> None:
    """The reference is statsmodels' formula, by hand; of several categories, that of the mean is narrower."""
    labels = np.repeat([0, 1], [20, 5])
    metrics = statistics.image_metrics(np.repeat([0.0, 1.0], [20, 5]), labels, threshold=0.5)
    z = 1.959964
    for name, count in (("false-alarm rate", 20), ("miss rate", 5)):
        assert (metrics[name].value, metrics[name].low) == (0, 0)
        assert metrics[name].high == pytest.approx(z**2 / (count + z**2), abs=1e-6)
    together = statistics.mean([metrics["miss rate"]] * 4)
    assert (together.value, together.low) == (0, 0)
    assert together.high == pytest.approx(metrics["miss rate"].high / 2)


def test_one_class_alone_gives_its_rate_only() -> None:
    scores = np.array([0.1, 0.2, 0.9])
    assert set(statistics.image_metrics(scores, np.zeros(3, int), 0.5)) == {"false-alarm rate"}
    assert set(statistics.image_metrics(scores, np.ones(3, int), 0.5)) == {"F1", "miss rate"}
    assert statistics.best_threshold(scores, np.zeros(3, int)) is None
    assert statistics.curves(scores, np.zeros(3, int)) == {"roc": [], "pr": []}


def test_pixels_are_resampled_by_whole_images() -> None:
    rng = np.random.default_rng(0)
    normal = rng.integers(0, 50, (12, 30)).astype(np.float32)
    anomalous = rng.integers(0, 5, (12, 30)).astype(np.float32)
    anomalous[6:] = 0
    regions = anomalous / np.maximum(anomalous.sum(axis=1, keepdims=True), 1)  # one in each image
    metrics = statistics.pixel_metrics(normal, anomalous, regions)
    values = np.tile(np.arange(30), 2)
    weights = np.concatenate([normal.sum(axis=0), anomalous.sum(axis=0)])
    expected = roc_auc_score(np.repeat([0, 1], 30), values, sample_weight=weights)
    assert metrics["AUROC"].value == pytest.approx(expected)
    same = statistics.pixel_metrics(*(np.tile(part[:1], (12, 1)) for part in (normal, anomalous, regions)))
    for metric in ("AUROC", "AUPRO"):
        assert same[metric].high - same[metric].low == pytest.approx(0, abs=1e-9)
    assert statistics.pixel_metrics(normal, np.zeros_like(normal), np.zeros_like(normal)) == {}


def test_aupro_is_anomalibs() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 32, 32)
    masks[0, 3:9, 4:20], masks[1, 20:24, 2:5], masks[1, 2:30, 25:28], masks[2, 0, 0] = 1, 1, 1, 1
    maps = torch.rand(6, 32, 32, generator=generator) + 0.4 * masks
    reference = AUPRO(fields=["anomaly_map", "gt_mask"])
    reference.update(ImageBatch(image=torch.zeros(6, 3, 32, 32), anomaly_map=maps, gt_mask=masks.bool()))
    counts = [count_pixels(one, mask, 0, 1.4) for one, mask in zip(maps, masks, strict=True)]
    normal, anomalous, regions = (np.array([count[kind] for count in counts], np.float32) for kind in range(3))
    assert regions.sum() == pytest.approx(4)
    metrics = statistics.pixel_metrics(normal, anomalous, regions)
    assert metrics["AUPRO"].value == pytest.approx(float(reference.compute()), abs=2e-3)
    assert metrics["AUPRO"].low < metrics["AUPRO"].value < metrics["AUPRO"].high


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_best_threshold_reaches_the_largest_f1(seed: int) -> None:
    scores, labels = _sample(seed)
    threshold = statistics.best_threshold(scores, labels)
    assert f1_score(labels, scores > threshold) == pytest.approx(
        statistics.image_metrics(scores, labels, None)["F1Max"].value
    )


def test_curves_enclose_the_metrics_areas() -> None:
    scores, labels = _sample(3, size=300, decimals=6)
    curves = statistics.curves(scores, labels)
    x, y = np.array(curves["roc"]).T
    assert auc(x, y) == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert curves["roc"][0] == [0, 0]
    assert curves["roc"][-1] == [1, 1]


def test_mean_of_independent_sets_is_more_certain_than_each() -> None:
    estimates = [statistics.image_metrics(*_sample(seed), None, seed=seed)["AUROC"] for seed in range(4)]
    mean = statistics.mean(estimates)
    assert mean.value == pytest.approx(np.mean([estimate.value for estimate in estimates]))
    assert mean.high - mean.low < min(estimate.high - estimate.low for estimate in estimates)
