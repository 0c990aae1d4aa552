# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Fixed sine-cosine embeddings of timesteps and grid positions (Vaswani et al. 2017, section 3.5)."""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional


def sine_cosine(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed scalars ``(N,)`` by cosines and sines of geometrically spaced frequencies, shape ``(N, dim)``."""
    half = dim // 2
    frequencies = torch.exp(-log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(grid_size: int, dim: int) -> Tensor:
    """Embed the positions of a square grid ``(grid_size ** 2, dim)``: half for the row, half for the column."""
    rows, columns = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    return torch.cat([sine_cosine(rows.flatten(), dim // 2), sine_cosine(columns.flatten(), dim // 2)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sine-cosine embedding of the timestep."""

    def __init__(self, width: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.input = nn.Linear(frequency_dim, width)
        self.output = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps ``(B,)`` as ``(B, width)``."""
        embedding = sine_cosine(timesteps, self.frequency_dim).to(self.input.weight.dtype)
        return self.output(functional.silu(self.input(embedding)))
