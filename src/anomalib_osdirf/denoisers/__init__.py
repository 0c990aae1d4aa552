# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Networks eps_theta(z_t, t) that predict the noise in a feature grid."""

from anomalib_osdirf.denoisers.checkpointing import checkpoint_gradients
from anomalib_osdirf.denoisers.conv_mlp import ConvMLP
from anomalib_osdirf.denoisers.dit import DiT
from anomalib_osdirf.denoisers.fold import fold
from anomalib_osdirf.denoisers.registry import DENOISERS, build_denoiser
from anomalib_osdirf.denoisers.unet import UNet
from anomalib_osdirf.denoisers.velocity import VelocityDenoiser

__all__ = [
    "DENOISERS",
    "ConvMLP",
    "DiT",
    "UNet",
    "VelocityDenoiser",
    "build_denoiser",
    "checkpoint_gradients",
    "fold",
]
