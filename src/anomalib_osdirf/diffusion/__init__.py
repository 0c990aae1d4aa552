# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the methods as pure functions of tensors: schedule, inversion, residual field, denoising."""

from anomalib_osdirf.diffusion.inversion import (
    STATES,
    ddim_inversion,
    ddim_inversion_step,
    diffusion_state,
    finite_difference_field,
    inverse_residual_field,
)
from anomalib_osdirf.diffusion.norm_guided import clean_estimate, norm_guided_estimate
from anomalib_osdirf.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule, check_timestep, inversion_timesteps

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "STATES",
    "NoiseSchedule",
    "check_timestep",
    "clean_estimate",
    "ddim_inversion",
    "ddim_inversion_step",
    "diffusion_state",
    "finite_difference_field",
    "inverse_residual_field",
    "inversion_timesteps",
    "norm_guided_estimate",
]
