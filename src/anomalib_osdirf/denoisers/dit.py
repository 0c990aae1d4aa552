# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Diffusion transformer on a feature grid, one token for each position (Peebles and Xie 2023)."""

from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined] # not in timm.layers before 1.0.20
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.denoisers.checkpointing import CheckpointedBlock
from anomalib_osdirf.denoisers.embedding import TimestepEmbedding, grid_positions


class DiTBlock(CheckpointedBlock):
    """Transformer block with adaLN-Zero: attention and perceptron, shifted, scaled and gated by the timestep."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def compute(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape, given the time embedding ``(B, width)``."""
        modulation = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        hidden = hidden + gate1 * self.attention(self.norm1(hidden) * (1 + scale1) + shift1)
        return hidden + gate2 * self.mlp(self.norm2(hidden) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Unconditional diffusion transformer that predicts the noise in a feature grid.

    Args:
        dim: Channels D of the feature grid.
        grid_size: Side of the grid.
        width: Size of the tokens.
        depth: Number of blocks.
        num_heads: Number of attention heads.
    """

    position: Tensor

    def __init__(self, dim: int, grid_size: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.time_embedding = TimestepEmbedding(width)
        self.register_buffer("position", grid_positions(grid_size, width), persistent=False)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, dim)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise in z_t ``(B, D, h, w)`` at timesteps ``(B,)``, same shape."""
        time = self.time_embedding(timesteps)
        tokens = self.input(z.flatten(2).transpose(1, 2)) + self.position.to(z.dtype)
        for block in self.blocks:
            tokens = block(tokens, time)
        shift, scale = self.modulation(functional.silu(time))[:, None].chunk(2, dim=-1)
        noise: Tensor = self.output(self.norm(tokens) * (1 + scale) + shift)
        return noise.transpose(1, 2).unflatten(2, z.shape[-2:])
