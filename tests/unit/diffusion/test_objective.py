# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The loss of the best linear denoiser against float64 least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_osdirf.diffusion import explained_share, linear_denoiser_loss

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # float64, independent of diffusers


@pytest.mark.parametrize("timestep", [20, 200, 700])
def test_linear_loss_is_that_of_least_squares(timestep: int) -> None:
    """Regress the noise on all channels of z_t: samples with exact moments, so the residual is exact, too."""
    abar, variance = ABAR[timestep], np.array([4.0, 1.0, 0.3, 0.01])
    # Orthonormal columns of mean zero: samples that are exactly uncorrelated.
    samples = np.random.default_rng(timestep).normal(size=(500, 8))
    white = np.sqrt(500) * np.linalg.qr(samples - samples.mean(0))[0]
    z, noise = white[:, :4] * np.sqrt(variance), white[:, 4:]
    z_t = np.sqrt(abar) * z + np.sqrt(1 - abar) * noise
    weight = np.linalg.lstsq(z_t, noise, rcond=None)[0]
    expected = np.square(noise - z_t @ weight).mean()
    loss = linear_denoiser_loss(torch.tensor(abar, dtype=torch.float64), torch.tensor(variance))
    assert float(loss) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=5), dim=st.integers(1, 9))
def test_linear_loss_of_white_features_is_abar(timesteps: list[int], dim: int) -> None:
    abar = torch.tensor(ABAR[timesteps])
    torch.testing.assert_close(linear_denoiser_loss(abar, torch.ones(dim, dtype=torch.float64)), abar)


def test_linear_loss_keeps_the_shape_of_abar() -> None:
    assert linear_denoiser_loss(torch.rand(2, 3), torch.rand(5)).shape == (2, 3)
    assert linear_denoiser_loss(torch.tensor(0.5), torch.zeros(5)) == 0


def test_explained_share_weighs_timesteps_by_their_baseline() -> None:
    baseline = torch.tensor([0.1, 0.9])
    assert float(explained_share(baseline, baseline)) == 0
    assert float(explained_share(torch.zeros(2), baseline)) == 1
    assert float(explained_share(torch.tensor([0.1, 0.45]), baseline)) == pytest.approx(0.45)
    assert float(explained_share(2 * baseline, baseline)) == pytest.approx(-1)
