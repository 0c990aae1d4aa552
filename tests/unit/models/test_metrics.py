# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics rank scores of any scale, against scikit-learn."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AnomalibMetric
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from anomalib_osdirf.models.metrics import AP, AUPRO, AUROC, F1Max


def _best_f1(truth: np.ndarray, scores: np.ndarray) -> float:
    return max(f1_score(truth, scores >= threshold) for threshold in scores)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(20,), (20, 1)])
@pytest.mark.parametrize(
    ("metric", "reference"), [(AUROC, roc_auc_score), (AP, average_precision_score), (F1Max, _best_f1)]
)
def test_order_is_all_that_counts(
    metric: type[AnomalibMetric], reference: Callable[..., float], shape: tuple[int, ...], scale: float
) -> None:
    """Batches that lie within [0, 1] and batches that do not are one ranking, and 300 nats are less than 301."""
    rng = np.random.default_rng(0)
    scores, truth = scale * rng.normal(0.5, 1, 60).astype(np.float32), rng.integers(0, 2, 60)
    scores[:20] = scale * rng.random(20)
    computed = metric(fields=["pred_score", "gt_label"])
    for part in range(0, 60, 20):
        batch = SimpleNamespace(
            pred_score=torch.from_numpy(scores[part : part + 20]).reshape(shape),
            gt_label=torch.from_numpy(truth[part : part + 20]).bool().reshape(shape),
        )
        computed.update(batch)
    assert float(computed.compute()) == pytest.approx(reference(truth, scores), abs=1e-5)


@pytest.mark.parametrize("metric", [AUROC, AP, F1Max, AUPRO])
@pytest.mark.parametrize("anomalous", [False, True])
def test_one_class_alone_has_no_metric(metric: type[AnomalibMetric], anomalous: bool) -> None:
    """And a metric that was reset knows nothing of what it had seen."""
    computed = metric(fields=["anomaly_map", "gt_mask"])
    both = torch.zeros(2, 4, 4, dtype=torch.bool)
    both[:, 1:3, 1:3] = True
    for mask, meaningful in ((both, True), (torch.full_like(both, anomalous), False)):
        computed.update(SimpleNamespace(anomaly_map=torch.rand(2, 4, 4), gt_mask=mask))
        assert torch.isfinite(computed.compute()) == meaningful
        computed.reset()


def test_metrics_without_ground_truth_are_left_out() -> None:
    metric = AUROC(fields=["anomaly_map", "gt_mask"], strict=False)
    metric.update(SimpleNamespace(anomaly_map=torch.rand(2, 1, 4, 4), gt_mask=None))
    assert metric.update_called is False
