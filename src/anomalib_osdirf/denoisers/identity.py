# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""No denoiser, as one: what any other is compared with."""

from torch import Tensor, nn


class NoDenoiser(nn.Module):
    """Answers with what it is asked about, at any timestep, so that the field of clean features is they themselves."""

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Return z ``(B, D, h, w)``, whatever the timesteps ``(B,)``."""
        del timesteps
        return z
