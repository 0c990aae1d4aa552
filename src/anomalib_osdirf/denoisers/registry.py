# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The denoisers by name."""

from torch import nn

from anomalib_osdirf.denoisers.dit import DiT
from anomalib_osdirf.denoisers.mlp import PositionMLP

DENOISERS = ("mlp", "dit_s")


def build_denoiser(name: str, dim: int, grid_size: int) -> nn.Module:
    """Build a denoiser.

    Args:
        name: One of :data:`DENOISERS`.
        dim: Channels D of the feature grid.
        grid_size: Side of the grid.

    Returns:
        A module called as ``denoiser(z, timesteps)`` with z ``(B, D, h, w)`` and timesteps ``(B,)``.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "mlp":
        return PositionMLP(dim, grid_size)
    if name == "dit_s":
        return DiT(dim, grid_size, width=384, depth=12, num_heads=6)
    msg = f"denoiser={name!r} is unknown; use one of {', '.join(DENOISERS)}."
    raise ValueError(msg)
