# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Per-position residual perceptron with adaptive layer norm: no position sees another."""

from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.denoisers.embedding import TimestepEmbedding, grid_positions


class AdaptiveBlock(nn.Module):
    """Residual block x + gate * MLP(norm(x) * (1 + scale) + shift), with shift, scale and gate from the timestep.

    Args:
        width: Size of the hidden state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        # adaLN-Zero (Peebles and Xie 2023, section 3.2): every block starts as the identity.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape, given the time embedding ``(B, width)``."""
        shift, scale, gate = self.modulation(functional.silu(time))[:, None].chunk(3, dim=-1)
        return tokens + gate * self.mlp(self.norm(tokens) * (1 + scale) + shift)


class PositionMLP(nn.Module):
    """Noise predictor that looks at each position alone, and knows where it is by an embedding added to its input.

    Args:
        dim: Channels D of the feature grid.
        grid_size: Side of the grid.
        width: Size of the hidden state; ``None`` takes 384, or D rounded up if that is larger, because noise in D
            dimensions does not pass through a narrower state.
        depth: Number of residual blocks.
    """

    position: Tensor

    def __init__(self, dim: int, grid_size: int, width: int | None = None, depth: int = 3) -> None:
        super().__init__()
        width = width or max(384, -(-dim // 64) * 64)
        self.time_embedding = TimestepEmbedding(width)
        self.register_buffer("position", grid_positions(grid_size, width), persistent=False)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            z: Noised features z_t, shape ``(B, D, h, w)``.
            timesteps: Shape ``(B,)``.

        Returns:
            Predicted noise, shape ``(B, D, h, w)``.
        """
        time = self.time_embedding(timesteps)
        tokens = self.input(z.flatten(2).transpose(1, 2)) + self.position.to(z.dtype)
        for block in self.blocks:
            tokens = block(tokens, time)
        noise: Tensor = self.output(self.norm(tokens))
        return noise.transpose(1, 2).unflatten(2, z.shape[-2:])
