# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The noise schedule: beta_t, alpha_t = 1 - beta_t and abar_t = prod alpha, held by diffusers' DDPMScheduler."""

from collections.abc import Sequence
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


def check_timestep(name: str, timestep: int) -> None:
    """Raise an error if an argument is not a timestep of the noise schedule."""
    if not isinstance(timestep, int):
        msg = f"{name}={timestep!r} is not a whole number; use 0 to {NUM_TRAIN_TIMESTEPS - 1}."
        raise ValueError(msg)  # noqa: TRY004 - a wrong value, for who writes a configuration
    if not 0 <= timestep < NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"{name}={timestep} is outside the noise schedule; use 0 to {NUM_TRAIN_TIMESTEPS - 1}.")


def inversion_timesteps(num_inference_steps: int, spacing: str | Sequence[int]) -> list[int]:
    """Timesteps at which DDIM inversion asks the network.

    Args:
        num_inference_steps: Number of steps S, 1 to 1000.
        spacing: ``paper`` divides the schedule into S equal parts and takes their ends ([333, 666, 999] for three),
            ``released`` is what InvAD's released code takes, from 0 to 999 in equal distances ([0, 500, 999]); or the
            timesteps themselves.

    Returns:
        The timesteps, increasing.

    Raises:
        ValueError: If the number is out of range, the spacing unknown, or the timesteps are not S increasing ones.
    """
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= NUM_TRAIN_TIMESTEPS:
        msg = f"num_inference_steps={num_inference_steps!r} is out of range; use 1 to {NUM_TRAIN_TIMESTEPS}."
        raise ValueError(msg)
    last = NUM_TRAIN_TIMESTEPS - 1
    if isinstance(spacing, str):
        steps = range(num_inference_steps)
        spacings = {
            "paper": [round(last * (step + 1) / num_inference_steps) for step in steps],
            "released": [round(last * step / max(1, num_inference_steps - 1)) for step in steps],
        }
        if spacing not in spacings:
            msg = f"timestep_spacing={spacing!r} is unknown; use {', '.join(spacings)}, or a list of timesteps."
            raise ValueError(msg)
        return spacings[spacing]
    if not isinstance(spacing, list | tuple) or not spacing:
        msg = f"timestep_spacing={spacing!r} names no timesteps; use paper, released, or a list such as [0, 500, 999]."
        raise ValueError(msg)
    timesteps: list[int] = list(spacing)
    for timestep in timesteps:
        check_timestep("timestep_spacing", timestep)
    if timesteps != sorted(set(timesteps)):
        msg = f"timestep_spacing={timesteps} does not increase; give each timestep once, the smallest first."
        raise ValueError(msg)
    if len(timesteps) != num_inference_steps:
        raise ValueError(
            f"timestep_spacing={timesteps} has {len(timesteps)} timesteps, num_inference_steps={num_inference_steps}; "
            f"use num_inference_steps={len(timesteps)} with this list."
        )
    return timesteps
