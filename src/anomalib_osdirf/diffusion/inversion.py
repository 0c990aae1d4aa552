# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DDIM inversion and the inverse residual field.

With y = z / sqrt(abar) and p = sqrt(1 / abar - 1) the DDIM inversion step from timestep s to a later timestep t reads

    (y_t - y_s) / (p_t - p_s) = eps_theta(z_s, s),

so the residual between a state and its successor, in units of the noise that separates them, is the predicted noise,
for any successor. One network evaluation gives the whole field (OSD-IRF, arXiv 2604.18393).
"""

from collections.abc import Callable, Sequence
from math import sqrt

from torch import Tensor


def inverse_residual_field(denoiser: Callable[[Tensor], Tensor], z: Tensor, abar: float) -> Tensor:
    """Inverse residual field IRF_s(z) = eps_theta(sqrt(abar_s) z, s), in units of noise standard deviations.

    The denoiser sees sqrt(abar_s) z, the mean of the forward process at timestep s.

    Args:
        denoiser: Noise predictor eps_theta at the timestep s, called as ``denoiser(z_s)``.
        z: Clean sample, any shape.
        abar: abar_s of that timestep, in (0, 1].

    Returns:
        The field, shape of ``z``.
    """
    return denoiser(sqrt(abar) * z)


def ddim_inversion_step(z_s: Tensor, predicted_noise: Tensor, abar_s: float, abar_t: float) -> Tensor:
    """One deterministic DDIM inversion step from timestep s to a later timestep t.

    z_t = sqrt(abar_t / abar_s) z_s + (sqrt(1 - abar_t) - sqrt(abar_t (1 - abar_s) / abar_s)) eps

    Args:
        z_s: State at timestep s, any shape.
        predicted_noise: eps_theta(z_s, s), shape of ``z_s``.
        abar_s: abar at s, in (0, 1].
        abar_t: abar at t, in [0, abar_s); 0 ends the process, where z_t equals the predicted noise.

    Returns:
        State z_t, shape of ``z_s``.
    """
    scale = sqrt(abar_t / abar_s)
    return scale * z_s + (sqrt(1 - abar_t) - scale * sqrt(1 - abar_s)) * predicted_noise


def ddim_inversion(denoisers: Sequence[Callable[[Tensor], Tensor]], sample: Tensor, abars: Sequence[float]) -> Tensor:
    """Latent z_T of DDIM inversion with the terminal abar_T = 0 (InvAD, arXiv 2504.05662, released code).

    The inversion takes the sample itself as the state at the first timestep. Each step evaluates the network at the
    timestep it starts from. The last step, to abar = 0, ends at the noise predicted there, so with one timestep the
    latent of sqrt(abar) z is the inverse residual field of z.

    Args:
        denoisers: Noise predictor at each timestep, called as ``denoiser(z_s)``.
        sample: State at the first timestep, any shape. InvAD passes the clean sample z.
        abars: abar of each timestep, decreasing, in (0, 1].

    Returns:
        The latent, shape of ``sample``.
    """
    state = sample
    for step in range(len(abars) - 1):
        state = ddim_inversion_step(state, denoisers[step](state), abars[step], abars[step + 1])
    return denoisers[-1](state)


def finite_difference_field(z_s: Tensor, z_t: Tensor, abar_s: float, abar_t: float) -> Tensor:
    """Residual (y_t - y_s) / (p_t - p_s) of two neighbouring states of the inverse process.

    This is the definition of the field, and :func:`inverse_residual_field` is its value where z_s = sqrt(abar_s) z. Use
    float64: p_t - p_s cancels for neighbours.

    Args:
        z_s: State at timestep s, any shape.
        z_t: State at a later timestep t, shape of ``z_s``.
        abar_s: abar at s, in (0, 1].
        abar_t: abar at t, in (0, abar_s).

    Returns:
        The residual field, shape of ``z_s``.
    """
    y_s, y_t = z_s / sqrt(abar_s), z_t / sqrt(abar_t)
    p_s, p_t = sqrt(1 / abar_s - 1), sqrt(1 / abar_t - 1)
    return (y_t - y_s) / (p_t - p_s)
