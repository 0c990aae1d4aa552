# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Densities whose neighbours share a covariance, against scikit-learn and scipy, and against fitting anew."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS

from anomalib_osdirf.density import BlockGaussian, PositionGaussian
from anomalib_osdirf.density.gaussian import shrunk
from anomalib_osdirf.features import StreamingMoments


def _fields(count: int, dim: int, grid: int, seed: int = 0) -> torch.Tensor:
    """Draw fields whose mean and covariance differ between positions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(grid, grid, dim, dim, generator=generator)
    noise = torch.randn(count, dim, grid, grid, generator=generator)
    return torch.einsum("hwde,nehw->ndhw", scale, noise) + 2 * torch.randn(dim, grid, grid, generator=generator)


def test_matches_sklearn_and_scipy() -> None:
    """The covariance of a block is that of its positions' vectors, each about its position's mean."""
    fields, test = _fields(30, 5, 4), _fields(3, 5, 4, seed=1)
    density = BlockGaussian(5, 4)
    density.fit(fields.split(7))
    result, distance = density(test), density.squared_distance(test).unflatten(1, (4, 4))
    centred = (fields - fields.mean(dim=0)).double()
    for row, column in np.ndindex(4, 4):
        top, left = row // 2 * 2, column // 2 * 2
        block = centred[:, :, top : top + 2, left : left + 2].permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        sample = np.cov(block.T, bias=True)
        # scikit-learn has no way to say that the covariance is one of 30 samples, not of 120.
        intensity = _oas(sample, 30)
        covariance = (1 - intensity) * sample + (intensity * np.trace(sample) / 5 + 1e-6) * np.eye(5)
        mean = fields[:, :, row, column].double().mean(dim=0).numpy()
        gaussian = multivariate_normal(mean, covariance)
        points = test[:, :, row, column].double().numpy()
        np.testing.assert_allclose(result[:, row, column].numpy(), -gaussian.logpdf(points), rtol=1e-4)
        expected = [(point - mean) @ np.linalg.solve(covariance, point - mean) for point in points]
        np.testing.assert_allclose(distance[:, row, column].numpy(), expected, rtol=1e-4)


def _oas(covariance: np.ndarray, num_samples: int) -> float:
    """Return scikit-learn's intensity for as many samples with exactly this covariance."""
    samples = np.random.default_rng(0).normal(size=(num_samples, len(covariance)))
    samples -= samples.mean(axis=0)
    whitener = np.linalg.inv(np.linalg.cholesky(np.cov(samples.T, bias=True)))
    return float(OAS().fit(samples @ whitener.T @ np.linalg.cholesky(covariance).T).shrinkage_)


def test_an_odd_grid_has_a_covariance_for_each_position() -> None:
    fields, test = _fields(20, 4, 3), _fields(2, 4, 3, seed=1)
    densities = BlockGaussian(4, 3), PositionGaussian(4, 3)
    for density in densities:
        density.fit([fields])
    torch.testing.assert_close(densities[0](test), densities[1](test))


@pytest.mark.parametrize("count", [4, 30])
def test_leaving_one_out_is_fitting_without_it(count: int) -> None:
    """Fewer images than dimensions, too; the shrinkage stays that of all images."""
    fields = _fields(count, 6, 4)
    density = BlockGaussian(6, 4)
    left_out = density.fit(fields.split(7))()
    for index in range(count):
        moments = StreamingMoments()
        moments.update(torch.cat([fields[:index], fields[index + 1 :]]).flatten(2).permute(2, 0, 1))
        without = BlockGaussian(6, 4)
        covariance = without.to_blocks(moments.covariance()).mean(dim=1)
        without.set_gaussian(moments.mean, shrunk(covariance, *density.shrinking))
        one = fields[index : index + 1]
        torch.testing.assert_close(left_out.map(one), without.map(one), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left_out.squared_distance(one), without.squared_distance(one), rtol=1e-4, atol=1e-4)
