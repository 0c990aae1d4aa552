# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Densities against scipy and scikit-learn in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import chi2, kstest, multivariate_normal
from sklearn.covariance import OAS
from torch import Tensor, nn

from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.scoring import PatchMixture, PositionGaussians, StandardGaussian, oas_shrinkage
from anomalib_osdirf.scoring.densities import from_blocks, to_blocks


def _fields(count: int, dim: int, grid: int, seed: int = 0) -> Tensor:
    """Draw fields whose mean and covariance differ between positions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(grid, grid, dim, dim, generator=generator)
    noise = torch.randn(count, dim, grid, grid, generator=generator)
    return torch.einsum("hwde,nehw->ndhw", scale, noise) + 2 * torch.randn(dim, grid, grid, generator=generator)


def _moments(*groups: Tensor) -> list[StreamingMoments]:
    """Return the moments of each position of each group of fields, batch by batch."""
    result = [StreamingMoments() for _ in groups]
    for moments, fields in zip(result, groups, strict=True):
        for batch in fields.split(7):
            moments.update(batch.flatten(2).permute(2, 0, 1))
    return result


def _floor(*groups: Tensor) -> float:
    """Return a millionth of the mean variance about each group's and position's mean."""
    squares = sum(len(fields) * fields.double().var(dim=0, correction=0).mean() for fields in groups)
    return 1e-6 * float(squares) / sum(len(fields) for fields in groups)


def _oas_gaussian(samples: np.ndarray, floor: float) -> multivariate_normal:
    reference = OAS().fit(samples)
    return multivariate_normal(reference.location_, reference.covariance_ + floor * np.eye(samples.shape[1]))


def _oas_intensity(covariance: np.ndarray, num_samples: int) -> float:
    """Return scikit-learn's intensity for as many samples with exactly this covariance."""
    samples = np.random.default_rng(0).normal(size=(num_samples, len(covariance)))
    samples -= samples.mean(axis=0)
    precision_factor = np.linalg.inv(np.linalg.cholesky(np.cov(samples.T, bias=True)))
    return float(OAS().fit(samples @ precision_factor.T @ np.linalg.cholesky(covariance).T).shrinkage_)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 60), dim=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_oas_intensity_matches_sklearn(count: int, dim: int, seed: int) -> None:
    samples = np.random.default_rng(seed).normal(size=(count, dim)) @ np.diag(np.arange(1.0, dim + 1))
    covariance = torch.from_numpy(np.cov(samples.T, bias=True))
    assert float(oas_shrinkage(covariance, count)) == pytest.approx(OAS().fit(samples).shrinkage_, rel=1e-9)


def test_standard_gaussian_matches_scipy() -> None:
    field = torch.randn(4, 5, 2, 3)
    expected = -multivariate_normal(np.zeros(5)).logpdf(field.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(StandardGaussian()(field).numpy(), expected, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 60), dim=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_position_gaussians_match_sklearn_and_scipy(count: int, dim: int, seed: int) -> None:
    """Also with fewer images than dimensions."""
    fields, test = _fields(count, dim, 2, seed), _fields(3, dim, 2, seed + 1)
    result = PositionGaussians().fit_moments(_moments(fields))(test)
    for row, column in np.ndindex(2, 2):
        gaussian = _oas_gaussian(fields[:, :, row, column].double().numpy(), _floor(fields))
        expected = -gaussian.logpdf(test[:, :, row, column].double().numpy())
        np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=2e-3, atol=2e-3)


def test_blocks_match_sklearn_and_scipy() -> None:
    """The covariance of a block is that of its positions' vectors, each about its position's mean."""
    fields, test = _fields(30, 5, 4), _fields(3, 5, 4, seed=1)
    result = PositionGaussians(blocks=True).fit_moments(_moments(fields))(test)
    centred = (fields - fields.mean(dim=0)).double()
    for row, column in np.ndindex(4, 4):
        top, left = row // 2 * 2, column // 2 * 2
        block = centred[:, :, top : top + 2, left : left + 2].permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        sample = np.cov(block.T, bias=True)
        # scikit-learn has no way to say that the covariance is one of 30 samples, not of 120.
        intensity = _oas_intensity(sample, 30)
        covariance = (1 - intensity) * sample + (intensity * np.trace(sample) / 5 + _floor(fields)) * np.eye(5)
        gaussian = multivariate_normal(fields[:, :, row, column].double().mean(dim=0).numpy(), covariance)
        expected = -gaussian.logpdf(test[:, :, row, column].double().numpy())
        np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(("height", "width", "blocks"), [(4, 6, 6), (3, 3, 9), (4, 3, 6), (1, 1, 1)])
def test_blocks_are_neighbours_and_come_apart_again(height: int, width: int, blocks: int) -> None:
    """A side of odd length is not divided."""
    positions = torch.arange(height * width)
    parts = to_blocks(positions, (height, width))
    assert parts.shape == (blocks, height * width // blocks)
    rows, columns = parts // width, parts % width
    for part in (rows, columns):
        assert int((part.amax(dim=1) - part.amin(dim=1)).max()) <= 1
    torch.testing.assert_close(from_blocks(parts, (height, width)), positions)


def test_an_odd_grid_has_a_covariance_for_each_position() -> None:
    fields, test = _fields(20, 4, 3), _fields(2, 4, 3, seed=1)
    blocks, single = (PositionGaussians(shared).fit_moments(_moments(fields)) for shared in (True, False))
    torch.testing.assert_close(blocks(test), single(test))


def test_an_image_is_scored_by_its_own_cluster() -> None:
    groups = [_fields(count, 4, 3, seed) for seed, count in enumerate((40, 25, 60))]
    density = PositionGaussians().fit_moments(_moments(*groups))
    cluster = torch.tensor([2, 0, 1, 0, 2])
    test = torch.cat([groups[index][:1] + 0.3 for index in cluster.tolist()])
    result = density(test, cluster)
    for image, index in enumerate(cluster.tolist()):
        for row, column in np.ndindex(3, 3):
            gaussian = _oas_gaussian(groups[index][:, :, row, column].double().numpy(), _floor(*groups))
            expected = -gaussian.logpdf(test[image, :, row, column].double().numpy())
            assert float(result[image, row, column]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_exported_clusters_are_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported graph gathers each image's covariances."""
    groups = [_fields(20, 4, 3, seed) for seed in range(3)]
    density = PositionGaussians().fit_moments(_moments(*groups))
    test, cluster = _fields(5, 4, 3, seed=9), torch.tensor([2, 0, 1, 0, 2])
    expected = density(test, cluster)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(density(test, cluster), expected, rtol=1e-5, atol=1e-5)


def test_clusters_can_be_exported() -> None:
    density = PositionGaussians().fit_moments(_moments(*(_fields(20, 4, 3, seed) for seed in range(3))))
    batch = torch.export.Dim("batch", min=2, max=64)
    example = _fields(2, 4, 3, seed=9), torch.tensor([2, 0])
    graph = torch.export.export(density, example, dynamic_shapes=({0: batch}, {0: batch})).module()
    test, cluster = _fields(5, 4, 3, seed=8), torch.tensor([2, 0, 1, 0, 2])
    torch.testing.assert_close(graph(test, cluster), density(test, cluster), rtol=1e-5, atol=1e-5)


def _components() -> list[Tensor]:
    """Draw samples ``(N, 4)`` of three components of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + offset
        for count, offset in ((50, 0.0), (20, 6.0), (130, -6.0))
    ]


def _mixture(components: list[Tensor]) -> PatchMixture:
    moments = [StreamingMoments() for _ in components]
    for one, samples in zip(moments, components, strict=True):
        one.update(samples)
    return PatchMixture().fit_moments(moments)


def _joint_log_densities(components: list[Tensor], points: np.ndarray) -> np.ndarray:
    """Return log weight plus log density of each component, shape ``(K, N)``."""
    total = sum(len(samples) for samples in components)
    variance = sum(len(samples) * float(samples.double().var(dim=0, correction=0).mean()) for samples in components)
    gaussians = [_oas_gaussian(samples.double().numpy(), 1e-6 * variance / total) for samples in components]
    return np.stack(
        [
            gaussian.logpdf(points) + math.log(len(samples) / total)
            for gaussian, samples in zip(gaussians, components, strict=True)
        ]
    )


def test_mixture_takes_the_likeliest_component_with_its_weight() -> None:
    components, test = _components(), 6 * torch.randn(3, 4, 2, 5)
    result = _mixture(components)(test)
    points = test.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    expected = -_joint_log_densities(components, points).max(axis=0)
    assert result.shape == (3, 2, 5)
    np.testing.assert_allclose(result.flatten().numpy(), expected, rtol=1e-3)


def test_likeliest_component_is_close_to_the_whole_sum() -> None:
    components = _components()
    test = torch.cat(components)[:, :, None, None]
    reference = -logsumexp(_joint_log_densities(components, torch.cat(components).double().numpy()), axis=0)
    difference = _mixture(components)(test).flatten().double().numpy() - reference
    assert (difference > -1e-3).all()
    assert difference.mean() < 0.1


def test_component_without_samples_has_no_weight() -> None:
    components, test = _components(), 6 * torch.randn(3, 4, 2, 5)
    empty = _mixture([*components, torch.empty(0, 4)])
    torch.testing.assert_close(empty(test), _mixture(components)(test))


def test_mixture_scores_do_not_depend_on_the_position() -> None:
    density, test = _mixture(_components()), torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(density(test.roll((1, 2), (2, 3))), density(test).roll((1, 2), (1, 2)))


def test_gaussian_data_follow_the_chi_square_law() -> None:
    generator = torch.Generator().manual_seed(1)
    dim = 6
    scale = torch.randn(dim, dim, generator=generator)

    def draw(count: int) -> Tensor:
        return torch.einsum("de,nehw->ndhw", scale, torch.randn(count, dim, 1, 1, generator=generator))

    density = PositionGaussians().fit_moments(_moments(draw(20_000)))
    distances = 2 * (density(draw(2_000)).flatten() - density.constant.flatten())
    assert kstest(distances.numpy(), chi2(dim).cdf).pvalue > 0.01


def _densities() -> list[nn.Module]:
    one, two = _fields(20, 4, 4), _fields(20, 4, 4, seed=1)
    return [
        StandardGaussian(),
        PositionGaussians().fit_moments(_moments(one)),
        PositionGaussians().fit_moments(_moments(one, two)),
        PositionGaussians(blocks=True).fit_moments(_moments(one)),
        _mixture(_components()),
    ]


@pytest.mark.parametrize("index", range(5))
def test_scores_do_not_depend_on_the_batch(index: int) -> None:
    density, test, cluster = _densities()[index], _fields(4, 4, 4, seed=3), torch.tensor([1, 0, 0, 1])
    alone = [density(test[number : number + 1], cluster[number : number + 1]) for number in range(4)]
    torch.testing.assert_close(density(test, cluster), torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(5))
def test_state_dict_restores_a_density_whatever_its_shape(index: int) -> None:
    density, test, cluster = _densities()[index], _fields(4, 4, 4, seed=3), torch.tensor([1, 0, 0, 1])
    arguments = {"blocks": density.blocks} if isinstance(density, PositionGaussians) else {}
    other = type(density)(**arguments)
    other.load_state_dict(density.state_dict())
    torch.testing.assert_close(other(test, cluster), density(test, cluster), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_identical_images_still_give_a_density(value: float) -> None:
    fields = torch.full((4, 3, 2, 2), value)
    patches = fields.permute(0, 2, 3, 1).reshape(-1, 3)
    for density in (PositionGaussians().fit_moments(_moments(fields)), _mixture([patches, patches])):
        assert torch.isfinite(density(torch.zeros(1, 3, 2, 2))).all()
