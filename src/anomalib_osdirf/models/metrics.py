# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The usual metrics, on top of anomalib's and torchmetrics' implementations."""

from types import SimpleNamespace
from typing import Any

import torch
from anomalib import metrics
from anomalib.metrics import AnomalibMetric, Evaluator
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAveragePrecision


class _OfBothClasses:
    """Is NaN without both normal and anomalous samples, where torchmetrics and anomalib say 0 or 1."""

    fields: tuple[str, str]
    of_class: Tensor  # numbers of normal and anomalous samples

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("of_class", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # type: ignore[attr-defined]

    def update(self, batch: Any) -> None:
        """Add a batch."""
        truth = getattr(batch, self.fields[1], None)
        if isinstance(truth, Tensor) and isinstance(getattr(batch, self.fields[0], None), Tensor):
            anomalous = truth.bool().sum()
            self.of_class += torch.stack([truth.numel() - anomalous, anomalous])
        super().update(batch)  # type: ignore[misc]

    def compute(self) -> Any:
        """Compute the metric."""
        if self.of_class.sum() and not self.of_class.all():
            return torch.tensor(float("nan"), device=self.of_class.device)
        return super().compute()  # type: ignore[misc]


class _AnyScale(_OfBothClasses):
    """Ranks scores of any scale.

    torchmetrics takes scores outside [0, 1] for logits, batch by batch, and its float32 sigmoid makes all large ones
    equal: the scores of a model without validation images, which anomalib does not normalise, would lose their order.
    """

    def update(self, batch: Any) -> None:
        """Add a batch, its scores brought into (0, 1) by one function that keeps their order."""
        scores, truth = (getattr(batch, name, None) for name in self.fields)
        if isinstance(scores, Tensor) and isinstance(truth, Tensor):
            scores, truth = scores.flatten().double(), truth.flatten()
            scores = 0.5 + 0.5 * scores / (1 + scores.abs())
        values = dict(zip(self.fields, (scores, truth), strict=True))
        super().update(SimpleNamespace(**values))


class AUROC(_AnyScale, metrics.AUROC):  # type: ignore[misc]
    """Area under the ROC curve."""


class AP(_AnyScale, AnomalibMetric, BinaryAveragePrecision):  # type: ignore[misc]
    """Average precision; anomalib's AUPR is the trapezoidal area, which is optimistic."""


class F1Max(_AnyScale, metrics.F1Max):  # type: ignore[misc]
    """F1 score at the best threshold."""

    def reset(self) -> None:
        """Reset what anomalib resets, and the counts."""
        super().reset()
        Metric.reset(self)


class AUPRO(_OfBothClasses, metrics.AUPRO):  # type: ignore[misc]
    """Area under the per-region overlap."""


def default_evaluator() -> Evaluator:
    """Image AUROC, AP, F1max and pixel AUROC, AP, F1max, AUPRO (FPR limit 0.3), the latter only where masks exist."""
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    ranking = [metric(**image) for metric in (AUROC, AP, F1Max)] + [metric(**pixel) for metric in (AUROC, AP, F1Max)]
    return Evaluator(test_metrics=[*ranking, AUPRO(**pixel, fpr_limit=0.3)])
