# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Residual perceptron with depthwise convolutions and adaptive layer norm, as in ConvNeXt (Liu et al. 2022)."""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.denoisers.checkpointing import CheckpointedBlock
from anomalib_osdirf.denoisers.embedding import TimestepEmbedding

NORM_EPS = 1e-6


def channel_norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of each position, without weights: ``(B, C, h, w)`` to the same shape."""
    return functional.layer_norm(x.movedim(1, -1), (x.shape[1],), eps=NORM_EPS).movedim(-1, 1)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution that keeps the size of the grid and trains fast on a CPU.

    oneDNN computes the weight gradient of a kernel of up to three columns about 40 times faster than that of a wider
    one, so on a CPU this layer adds up convolutions with at most three columns of its kernel each.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the same shape."""
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        reach = self.kernel_size[0] // 2
        parts = []
        for first, columns in zip(range(0, self.kernel_size[1], 3), self.weight.split(3, dim=-1), strict=True):
            last = first + columns.shape[-1] - 1
            shifted = functional.pad(x, (reach - first, last - reach))
            bias = self.bias if first == 0 else None
            parts.append(functional.conv2d(shifted, columns, bias, padding=(reach, 0), groups=self.groups))
        return reduce(torch.add, parts)


class ConvMLPBlock(CheckpointedBlock):
    """Residual block x + gate * MLP(norm(depthwise(x)) * (1 + scale) + shift), modulated by the timestep.

    Args:
        width: Channels of the hidden state.
        kernel_size: Side of the depthwise kernel, odd.
        condition_width: Size of the condition.
    """

    def __init__(self, width: int, kernel_size: int, condition_width: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(width, kernel_size)
        self.mlp = nn.Sequential(nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1))
        self.modulation = nn.Linear(condition_width, 3 * width)
        # adaLN-Zero (Peebles and Xie 2023, section 3.2): every block starts as the identity.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def compute(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Map ``(B, width, h, w)`` to the same shape, given the condition ``(B, condition_width)``."""
        shift, scale, gate = self.modulation(condition)[:, :, None, None].chunk(3, dim=1)
        return hidden + gate * self.mlp(channel_norm(self.depthwise(hidden)) * (1 + scale) + shift)


class ConvMLP(nn.Module):
    """Noise predictor that treats all positions alike and sees each one's neighbourhood.

    It is equivariant under translation, except within depth * (kernel_size // 2) positions of the border, where it sees
    zero padding. So it learns texture and cannot memorise what lies where.

    Args:
        dim: Channels D of the feature grid.
        width: Channels of the hidden state. ``None`` takes 256, or D rounded up to a multiple of 64 if that is larger,
            because noise in D dimensions does not pass through a narrower state.
        depth: Number of residual blocks.
        kernel_size: Side of the depthwise kernels, odd.
        condition_width: Size of the timestep embedding.
    """

    def __init__(
        self, dim: int, width: int | None = None, depth: int = 3, kernel_size: int = 5, condition_width: int = 64
    ) -> None:
        super().__init__()
        width = width or max(256, -(-dim // 64) * 64)
        self.time_embedding = TimestepEmbedding(condition_width)
        self.input = nn.Conv2d(dim, width, 1)
        self.blocks = nn.ModuleList(ConvMLPBlock(width, kernel_size, condition_width) for _ in range(depth))
        self.output = nn.Conv2d(width, dim, 1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def condition(self, timesteps: Tensor) -> Tensor:
        """What modulates the blocks, shape ``(B, condition_width)``, for timesteps ``(B,)``."""
        return functional.silu(self.time_embedding(timesteps))

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise, or the velocity, in z_t ``(B, D, h, w)`` at timesteps ``(B,)``, same shape."""
        condition = self.condition(timesteps)
        # In this memory format the layer norm's transpositions are views: training takes two thirds of the time.
        hidden = self.input(z.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            hidden = block(hidden, condition)
        prediction: Tensor = self.output(channel_norm(hidden))
        return prediction
