# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: activations computed again in the backward pass and not kept (Chen et al. 2016)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anomalib_osdirf.denoisers.unet import UNet


class CheckpointedBlock(nn.Module, ABC):
    """A denoiser's block, which keeps its inputs alone for the backward pass once it is told to.

    What is computed again lies inside the block, so that FSDP, which gathers a block's weights around its call, has
    them there.
    """

    gradient_checkpointing = False

    @abstractmethod
    def compute(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape, given the condition."""

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """See :meth:`compute`."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.compute(tokens, condition)
        result: Tensor = checkpoint(self.compute, tokens, condition, use_reentrant=False, preserve_rng_state=False)
        return result


def checkpoint_gradients(denoiser: nn.Module) -> None:
    """Have the blocks of a denoiser compute their activations again in the backward pass.

    Args:
        denoiser: Any of :data:`~anomalib_osdirf.denoisers.DENOISERS`.
    """
    for module in denoiser.modules():
        if isinstance(module, CheckpointedBlock):
            module.gradient_checkpointing = True
        elif isinstance(module, UNet):
            module.network.enable_gradient_checkpointing()
