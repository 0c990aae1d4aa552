# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the methods as pure functions of tensors: schedule, inversion, residual field, objective."""

from anomalib_osdirf.diffusion.inversion import (
    ddim_inversion,
    ddim_inversion_step,
    finite_difference_field,
    inverse_residual_field,
)
from anomalib_osdirf.diffusion.norm_guided import clean_estimate, norm_guided_estimate
from anomalib_osdirf.diffusion.objective import explained_share, linear_denoiser_loss
from anomalib_osdirf.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule, check_timestep, inversion_timesteps

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "NoiseSchedule",
    "check_timestep",
    "clean_estimate",
    "ddim_inversion",
    "ddim_inversion_step",
    "explained_share",
    "finite_difference_field",
    "inverse_residual_field",
    "inversion_timesteps",
    "linear_denoiser_loss",
    "norm_guided_estimate",
]
