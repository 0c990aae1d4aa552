# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Per-position residual perceptron with adaptive layer norm: no position sees another."""

from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.denoisers.checkpointing import CheckpointedBlock
from anomalib_osdirf.denoisers.embedding import TimestepEmbedding, grid_positions


class AdaptiveBlock(CheckpointedBlock):
    """Residual block x + gate * MLP(norm(x) * (1 + scale) + shift), modulated by timestep and position.

    Args:
        width: Size of the hidden state.
        condition_width: Size of the condition.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(condition_width, 3 * width)
        # adaLN-Zero (Peebles and Xie 2023, section 3.2): every block starts as the identity.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def compute(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape, given the condition ``(B, P, condition_width)``."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return tokens + gate * self.mlp(self.norm(tokens) * (1 + scale) + shift)


class PositionMLP(nn.Module):
    """Noise predictor that looks at each position alone; timestep and position together modulate its blocks.

    Args:
        dim: Channels D of the feature grid.
        grid_size: Side of the grid.
        width: Size of the hidden state; ``None`` takes 256, or D rounded up if that is larger, because noise in D
            dimensions does not pass through a narrower state.
        depth: Number of residual blocks.
        condition_width: Size of the embedding of timestep and position. Every position has a modulation of its own,
            so this, more than the width, decides what training costs.
    """

    position: Tensor

    def __init__(
        self,
        dim: int,
        grid_size: int,
        width: int | None = None,
        depth: int = 3,
        condition_width: int = 64,
    ) -> None:
        super().__init__()
        width = width or max(256, -(-dim // 64) * 64)
        self.time_embedding = TimestepEmbedding(condition_width)
        self.register_buffer("position", grid_positions(grid_size, condition_width), persistent=False)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width, condition_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def condition(self, timesteps: Tensor) -> Tensor:
        """What modulates the blocks, shape ``(B, P, condition_width)``, for timesteps ``(B,)``."""
        time = self.time_embedding(timesteps)
        return functional.silu(time[:, None] + self.position.to(time.dtype))

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            z: Noised features z_t, shape ``(B, D, h, w)``.
            timesteps: Shape ``(B,)``.

        Returns:
            Predicted noise, shape ``(B, D, h, w)``.
        """
        condition = self.condition(timesteps)
        tokens = self.input(z.flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, condition)
        noise: Tensor = self.output(self.norm(tokens))
        return noise.transpose(1, 2).unflatten(2, z.shape[-2:])
