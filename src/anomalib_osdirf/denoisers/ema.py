# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of a network's weights."""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


class EMA(AveragedModel):
    """Exponential moving average with a warm-up: torch's ``AveragedModel`` with another update rule.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training is not averaged with its random
    start. Averages keep the precision that the weights had at the start, when those are made bfloat16 later.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # Methods, as the closures of torch's `get_ema_multi_avg_fn` can't be pickled by the torch export.
        super().__init__(model, multi_avg_fn=self._move)
        self.decay = decay
        self.requires_grad_(requires_grad=False)

    def update_parameters(self, model: nn.Module) -> None:
        """Move the averages towards the network's present weights."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        # torch 2.10 does not take pairs of two precisions all at once.
        one_by_one = any(average.dtype != current.dtype for average, current in pairs)
        self.avg_fn, self.multi_avg_fn = (self._move_one, None) if one_by_one else (None, self._move)
        super().update_parameters(model)

    def _move(self, averages: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        updates = int(num_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _move_one(self, average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        self._move([average], [current.to(average.dtype)], num_averaged)
        return average
