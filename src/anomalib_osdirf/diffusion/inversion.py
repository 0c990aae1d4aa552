# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DDIM inversion and the inverse residual field.

With y = z / sqrt(abar) and p = sqrt(1 / abar - 1) the DDIM inversion step from timestep s to a later timestep t reads

    (y_t - y_s) / (p_t - p_s) = eps_theta(z_s, s),

so the residual between a state and its successor, in units of the noise that separates them, is the predicted noise
itself, whichever successor is taken. One network evaluation gives the whole field (OSD-IRF, arXiv 2604.18393).
"""

from collections.abc import Callable, Sequence
from math import sqrt

from torch import Tensor

STATES = ("clean", "scaled", "noised")


def diffusion_state(sample: Tensor, abar: float, state: str, noise: Tensor | None = None) -> Tensor:
    """Turn a clean sample into the state z_s that the denoiser is asked about.

    Args:
        sample: Clean sample z, any shape.
        abar: abar_s of the timestep s, in (0, 1].
        state: ``clean`` feeds z itself, ``scaled`` feeds sqrt(abar_s) z, the mean of the forward process,
            ``noised`` feeds sqrt(abar_s) z + sqrt(1 - abar_s) eps, a sample of it.
        noise: The noise eps of ``noised``, broadcastable to ``sample``.

    Returns:
        The state z_s, shape of ``sample``.

    Raises:
        ValueError: If ``state`` is unknown, or its noise is missing.
    """
    if state == "clean":
        return sample
    if state == "scaled":
        return sqrt(abar) * sample
    if state == "noised":
        if noise is None:
            msg = "state='noised' needs noise; pass a field of the sample's shape."
            raise ValueError(msg)
        return sqrt(abar) * sample + sqrt(1 - abar) * noise
    msg = f"state={state!r} is unknown; use one of {', '.join(STATES)}."
    raise ValueError(msg)


def inverse_residual_field(
    denoiser: Callable[[Tensor], Tensor], sample: Tensor, abar: float, state: str, noise: Tensor | None = None
) -> Tensor:
    """Inverse residual field IRF_s(z) = eps_theta(z_s, s), in units of noise standard deviations.

    Args:
        denoiser: Noise predictor eps_theta at the timestep s, called as ``denoiser(z_s)``.
        sample: Clean sample z, any shape.
        abar: abar_s of that timestep.
        state: How z becomes z_s, see :func:`diffusion_state`.
        noise: Noise of the state ``noised``.

    Returns:
        The field, shape of ``sample``.
    """
    return denoiser(diffusion_state(sample, abar, state, noise))


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

    The clean sample is taken as the state at the first timestep, the network is asked at the timestep that a step comes
    from, and the last step, to abar = 0, ends at the noise predicted there.

    Args:
        denoisers: Noise predictor at each timestep, called as ``denoiser(z_s)``.
        sample: Clean sample z, any shape.
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

    This is the field's definition; :func:`inverse_residual_field` is its value. p_t - p_s cancels for neighbours, so
    use float64.

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
