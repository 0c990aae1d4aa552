# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The noise schedule: beta_t, alpha_t = 1 - beta_t and abar_t = prod alpha, held by diffusers' DDPMScheduler."""

from typing import Any

from torch import Tensor, nn

NUM_TRAIN_TIMESTEPS = 1000


class NoiseSchedule(nn.Module):
    """Linear DDPM schedule from 1e-4 to 0.02 over 1000 timesteps (Ho et al. 2020, section 4).

    Attributes:
        alphas_cumprod: abar_t for t = 0 .. 999, shape ``(1000,)``.
    """

    alphas_cumprod: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Imported here because diffusers takes seconds to import and `anomalib --help` must not pay for it.
        from diffusers import DDPMScheduler

        scheduler: Any = DDPMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
        )
        self.scheduler = scheduler
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Forward process z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.

        Args:
            sample: Clean sample z, shape ``(B, ...)``.
            noise: Standard normal noise eps, shape of ``sample``.
            timesteps: Timestep of each sample, shape ``(B,)``, integers in 0 .. 999.

        Returns:
            The noised sample z_t, shape of ``sample``.
        """
        return self.scheduler.add_noise(sample, noise, timesteps)

    def abar(self, timestep: int) -> float:
        """Return abar_t of one timestep."""
        return float(self.alphas_cumprod[timestep])
