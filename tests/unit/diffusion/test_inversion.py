# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The identities of DDIM inversion and its residual field, against independent float64 references."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_osdirf.diffusion import (
    NoiseSchedule,
    ddim_inversion,
    ddim_inversion_step,
    finite_difference_field,
    inverse_residual_field,
    inversion_timesteps,
)

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # float64, independent of diffusers

steps = st.tuples(st.integers(0, 999), st.integers(0, 999)).filter(lambda pair: pair[0] < pair[1])


def test_schedule_is_the_linear_one() -> None:
    schedule = NoiseSchedule()
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), ABAR, rtol=2e-5)
    assert schedule.abar(150) == pytest.approx(ABAR[150], rel=1e-5)


def test_forward_process_matches_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 999])
    expected = (
        np.sqrt(ABAR[timesteps])[:, None, None, None] * sample.numpy()
        + np.sqrt(1 - ABAR[timesteps])[:, None, None, None] * noise.numpy()
    )
    np.testing.assert_allclose(NoiseSchedule().add_noise(sample, noise, timesteps).numpy(), expected, atol=1e-5)


@settings(deadline=None)
@given(pair=steps, seed=st.integers(0, 2**31))
def test_inversion_step_is_predict_then_renoise(pair: tuple[int, int], seed: int) -> None:
    """The step equals: estimate the clean sample from z_s, then put it at t with the same predicted noise."""
    abar_s, abar_t = ABAR[list(pair)]
    rng = np.random.default_rng(seed)
    z_s, eps = rng.normal(size=(2, 5))
    clean = (z_s - np.sqrt(1 - abar_s) * eps) / np.sqrt(abar_s)
    expected = np.sqrt(abar_t) * clean + np.sqrt(1 - abar_t) * eps
    result = ddim_inversion_step(torch.tensor(z_s), torch.tensor(eps), abar_s, abar_t)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(pair=steps, seed=st.integers(0, 2**31))
def test_finite_difference_of_a_step_is_the_field(pair: tuple[int, int], seed: int) -> None:
    """The definition of the field: for any successor, the residual is the predicted noise."""
    source, target = pair
    z = torch.tensor(np.random.default_rng(seed).normal(size=(2, 3, 2, 2)))

    def denoiser(z_s: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z_s) + source / 1000

    field = inverse_residual_field(denoiser, z, ABAR[source])
    z_s = np.sqrt(ABAR[source]) * z
    z_t = ddim_inversion_step(z_s, field, ABAR[source], ABAR[target])
    residual = finite_difference_field(z_s, z_t, ABAR[source], ABAR[target])
    torch.testing.assert_close(residual, field, rtol=1e-7, atol=1e-7)


def test_field_is_the_prediction_at_the_mean_of_the_forward_process() -> None:
    z = torch.randn(2, 3)
    torch.testing.assert_close(inverse_residual_field(torch.exp, z, 0.25), (z / 2).exp())


def test_inversion_with_one_timestep_is_the_field() -> None:
    z = torch.randn(2, 3)
    latent = ddim_inversion([torch.exp], z / 2, [0.25])
    torch.testing.assert_close(latent, inverse_residual_field(torch.exp, z, 0.25))


def test_the_process_ends_in_the_predicted_noise() -> None:
    z, eps = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(ddim_inversion_step(z, eps, ABAR[700], 0.0), eps)


@settings(deadline=None)
@given(
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True).map(sorted),
    seed=st.integers(0, 2**31),
)
def test_inversion_matches_numpy(timesteps: list[int], seed: int) -> None:
    """Predict the clean sample and put it at the next timestep, at the end at abar = 0."""
    z = np.random.default_rng(seed).normal(size=(2, 3))
    abar = [*ABAR[timesteps], 0.0]
    expected = z
    for step, timestep in enumerate(timesteps):
        eps = np.tanh(expected) + timestep / 500
        clean = (expected - np.sqrt(1 - abar[step]) * eps) / np.sqrt(abar[step])
        expected = np.sqrt(abar[step + 1]) * clean + np.sqrt(1 - abar[step + 1]) * eps
    denoisers = [
        partial(lambda timestep, state: torch.tanh(state) + timestep / 500, timestep) for timestep in timesteps
    ]
    result = ddim_inversion(denoisers, torch.tensor(z), list(ABAR[timesteps]))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("count", "spacing", "expected"),
    [
        (3, "paper", [333, 666, 999]),
        (3, "released", [0, 500, 999]),
        (1, "paper", [999]),
        (1, "released", [0]),
        (5, "released", [0, 250, 500, 749, 999]),
        (2, [10, 400], [10, 400]),
    ],
)
def test_inversion_timesteps(count: int, spacing: str | list[int], expected: list[int]) -> None:
    assert inversion_timesteps(count, spacing) == expected


@pytest.mark.parametrize(
    ("count", "spacing", "match"),
    [
        (0, "paper", "num_inference_steps=0"),
        (2.5, "paper", "num_inference_steps=2.5"),
        (3, [], r"timestep_spacing=\[\]"),
        (1, 5, "timestep_spacing=5"),
        (2, [0.5, 10], "timestep_spacing=0.5"),
        (3, "linear", "timestep_spacing='linear'"),
        (2, [5, 1000], "timestep_spacing=1000"),
        (2, [400, 10], r"timestep_spacing=\[400, 10\]"),
        (3, [10, 400], r"has 2 timesteps, num_inference_steps=3; use num_inference_steps=2"),
    ],
)
def test_impossible_inversion_timesteps(count: int, spacing: str | list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        inversion_timesteps(count, spacing)
