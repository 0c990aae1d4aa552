# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The metrics that the field reports, over anomalib's and torchmetrics' implementations."""

from typing import Any

from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Max
from torch import Tensor
from torchmetrics.classification import BinaryAveragePrecision


class _AveragePrecision(BinaryAveragePrecision):
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take scores of shape ``(B, 1)`` too, as some of anomalib's models give them."""
        super().update(preds.flatten(), target.flatten())


class AP(AnomalibMetric, _AveragePrecision):  # type: ignore[misc]
    """Average precision; anomalib's AUPR is the trapezoidal area, which is optimistic."""


def default_evaluator() -> Evaluator:
    """Image AUROC, AP, F1max and pixel AUROC, AP, F1max, AUPRO (FPR limit 0.3), the latter only where masks exist."""
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    metrics = [metric(**image) for metric in (AUROC, AP, F1Max)]
    metrics += [metric(**pixel) for metric in (AUROC, AP, F1Max)]
    return Evaluator(test_metrics=[*metrics, AUPRO(**pixel, fpr_limit=0.3)])
