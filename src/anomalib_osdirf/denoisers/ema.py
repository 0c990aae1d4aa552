# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The update rule of the denoiser's exponential moving average."""

from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


class EMAUpdate:
    """Exponential moving average with a warm-up, as ``multi_avg_fn`` of torch's ``AveragedModel``.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training is not averaged with its
    random start. A class rather than torch's ``get_ema_multi_avg_fn``, whose closure can't be pickled by the torch
    export.

    Args:
        decay: Decay approached after the warm-up, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        """Move the averages towards the current parameters, in place."""
        updates = int(num_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates))
        if averaged[0].dtype == current[0].dtype:
            torch._foreach_lerp_(averaged, current, 1 - decay)
            return
        for average, value in zip(averaged, current, strict=True):  # one copy in the average's precision at a time
            average.lerp_(value.to(average.dtype), 1 - decay)
