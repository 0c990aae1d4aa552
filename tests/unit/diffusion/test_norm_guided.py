# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Norm-guided one-step denoising against an independent float64 reference and known answers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_osdirf.diffusion import clean_estimate, norm_guided_estimate

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # float64, independent of diffusers

small, big = st.integers(0, 299), st.integers(300, 999)
seeds = st.integers(0, 2**31)


def _abar(timestep: int) -> torch.Tensor:
    return torch.tensor(ABAR[timestep], dtype=torch.float64)


def _noised(clean: np.ndarray, noise: np.ndarray, timestep: int) -> torch.Tensor:
    return torch.tensor(np.sqrt(ABAR[timestep]) * clean + np.sqrt(1 - ABAR[timestep]) * noise)


@settings(deadline=None)
@given(t_n=small, t_b=big, strength=st.floats(0, 5), seed=seeds)
def test_equals_the_equations_in_numpy(t_n: int, t_b: int, strength: float, seed: int) -> None:
    z_n, z_b, eps_n, eps_b = np.random.default_rng(seed).normal(size=(4, 2, 3, 2, 2))
    abar_n, abar_b = ABAR[[t_n, t_b]]
    clean_b = np.clip(z_b / np.sqrt(abar_b) - np.sqrt(1 / abar_b - 1) * eps_b, -1, 1)
    difference = np.sqrt(abar_n) * clean_b + np.sqrt(1 - abar_n) * eps_n - z_n
    guided = eps_n - strength * np.sqrt(1 - abar_n) * difference
    expected = np.clip(z_n / np.sqrt(abar_n) - np.sqrt(1 / abar_n - 1) * guided, -1, 1)
    result = norm_guided_estimate(
        torch.tensor(z_n), torch.tensor(eps_n), _abar(t_n), torch.tensor(z_b), torch.tensor(eps_b), _abar(t_b), strength
    )
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-9)


@settings(deadline=None)
@given(t_n=small, t_b=big, strength=st.floats(0, 5), seed=seeds)
def test_oracle_recovers_the_clean_sample(t_n: int, t_b: int, strength: float, seed: int) -> None:
    """With the true noise at both scales the guide is z_n itself, so the guidance changes nothing, however strong."""
    rng = np.random.default_rng(seed)
    clean = rng.uniform(-1, 1, size=(2, 3, 2, 2))
    eps_n, eps_b = rng.normal(size=(2, *clean.shape))
    result = norm_guided_estimate(
        _noised(clean, eps_n, t_n),
        torch.tensor(eps_n),
        _abar(t_n),
        _noised(clean, eps_b, t_b),
        torch.tensor(eps_b),
        _abar(t_b),
        strength,
    )
    np.testing.assert_allclose(result.numpy(), clean, atol=1e-6)


@settings(deadline=None)
@given(t_n=small, t_b=big, seed=seeds)
def test_no_guidance_is_the_plain_clean_estimate(t_n: int, t_b: int, seed: int) -> None:
    z_n, z_b, eps_n, eps_b = torch.tensor(np.random.default_rng(seed).normal(size=(4, 5)))
    result = norm_guided_estimate(z_n, eps_n, _abar(t_n), z_b, eps_b, _abar(t_b), 0.0)
    torch.testing.assert_close(result, clean_estimate(z_n, eps_n, _abar(t_n)))


def test_guidance_pulls_towards_the_estimate_from_the_big_scale() -> None:
    """With unclamped values x0 moves by w (1 - abar_n) (x0_b - x0_plain): halfway where abar_n = 1/2 and w = 1."""
    zero, half = torch.zeros(1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    z_n = half.sqrt() * 0.8 + zero  # plain estimate 0.8
    z_b = half.sqrt() * 0.2 + zero  # estimate of the big scale 0.2
    result = norm_guided_estimate(z_n, zero, half, z_b, zero, half, 1.0)
    torch.testing.assert_close(result, torch.tensor([0.5], dtype=torch.float64))


@settings(deadline=None)
@given(t_n=small, t_b=big, seed=seeds)
def test_estimates_are_clamped(t_n: int, t_b: int, seed: int) -> None:
    z_n, z_b, eps_n, eps_b = torch.tensor(100 * np.random.default_rng(seed).normal(size=(4, 20)))
    result = norm_guided_estimate(z_n, eps_n, _abar(t_n), z_b, eps_b, _abar(t_b), 1.0)
    assert result.abs().max() <= 1


def test_timesteps_may_differ_within_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    z_n, z_b, eps_n, eps_b = torch.randn(4, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    abar_n, abar_b = (torch.tensor(ABAR[steps])[:, None, None, None] for steps in ([10, 250], [300, 900]))
    together = norm_guided_estimate(z_n, eps_n, abar_n, z_b, eps_b, abar_b, 1.0)
    for index in range(2):
        alone = norm_guided_estimate(
            z_n[index], eps_n[index], abar_n[index], z_b[index], eps_b[index], abar_b[index], 1.0
        )
        torch.testing.assert_close(together[index], alone)
