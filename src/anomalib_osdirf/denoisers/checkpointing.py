# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: activations are recomputed in the backward pass, not kept (Chen et al. 2016)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anomalib_osdirf.denoisers.unet import UNet


class CheckpointedBlock(nn.Module, ABC):
    """A denoiser's block that can recompute its activations in the backward pass and keep only its inputs."""

    gradient_checkpointing = False

    @abstractmethod
    def compute(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Map the hidden state, tokens ``(B, P, width)`` or a grid ``(B, width, h, w)``, to the same shape."""

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """See :meth:`compute`."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.compute(hidden, condition)
        result: Tensor = checkpoint(self.compute, hidden, condition, use_reentrant=False, preserve_rng_state=False)
        return result


def checkpoint_gradients(denoiser: nn.Module) -> None:
    """Make the blocks of any of the denoisers recompute their activations in the backward pass."""
    for module in denoiser.modules():
        if isinstance(module, CheckpointedBlock):
            module.gradient_checkpointing = True
        elif isinstance(module, UNet):
            module.network.enable_gradient_checkpointing()
