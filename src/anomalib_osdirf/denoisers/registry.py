# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The denoisers by name."""

from torch import nn

from anomalib_osdirf.denoisers.conv_mlp import ConvMLP
from anomalib_osdirf.denoisers.dit import DiT
from anomalib_osdirf.denoisers.identity import NoDenoiser
from anomalib_osdirf.denoisers.unet import UNet
from anomalib_osdirf.denoisers.velocity import PREDICTION_TYPES, VelocityDenoiser

# Width, depth and heads: S, B and L of Peebles and Xie (2023, table 1), and the transformer that InvAD released.
_TRANSFORMERS = {
    "dit_s": (384, 12, 6),
    "dit_b": (768, 12, 12),
    "dit_l": (1024, 24, 16),
    "dit_gigant": (2048, 16, 8),
}
DENOISERS = ("conv_mlp", "unet", *_TRANSFORMERS, "none")


def build_denoiser(name: str, dim: int, grid_size: int, prediction_type: str = "epsilon") -> nn.Module:
    """Build a denoiser.

    Args:
        name: One of :data:`DENOISERS`.
        dim: Channels D of the feature grid.
        grid_size: Side of the grid; ``conv_mlp`` runs on any grid.
        prediction_type: What the network predicts: the noise (``epsilon``) or the velocity (``v_prediction``), from
            which the noise follows. ``none`` has no network and ignores it.

    Returns:
        A module called as ``denoiser(z, timesteps)`` with z ``(B, D, h, w)`` and timesteps ``(B,)``.

    Raises:
        ValueError: If the name or the prediction type is unknown, or the grid does not fit the denoiser.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}.")
    if name == "none":
        return NoDenoiser()
    network = _build_network(name, dim, grid_size)
    return VelocityDenoiser(network) if prediction_type == "v_prediction" else network


def _build_network(name: str, dim: int, grid_size: int) -> nn.Module:
    if name == "conv_mlp":
        return ConvMLP(dim)
    if name == "unet":
        return UNet(dim, grid_size)
    if name in _TRANSFORMERS:
        width, depth, num_heads = _TRANSFORMERS[name]
        return DiT(dim, grid_size, width=width, depth=depth, num_heads=num_heads)
    msg = f"denoiser={name!r} is unknown; use one of {', '.join(DENOISERS)}."
    if name == "mlp":
        msg += " conv_mlp has replaced mlp."
    raise ValueError(msg)
