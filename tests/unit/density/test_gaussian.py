# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Densities against scipy and scikit-learn in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest, multivariate_normal
from sklearn.covariance import OAS

from anomalib_osdirf.density import DENSITIES, MIXTURE, PositionGaussian, StandardGaussian, build_density, image_score
from anomalib_osdirf.density.gaussian import held_out_nll, likeliest_shrinkage, oas_shrinkage
from anomalib_osdirf.features import StreamingMoments


def _reference(mean: np.ndarray, covariance: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return -multivariate_normal(mean, covariance, allow_singular=False).logpdf(samples)


def _correlated(count: int, dim: int, grid: int, seed: int) -> torch.Tensor:
    """Draw fields whose mean and covariance differ between positions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(grid, grid, dim, dim, generator=generator)
    noise = torch.randn(count, dim, grid, grid, generator=generator)
    return torch.einsum("hwde,nehw->ndhw", scale, noise) + 2 * torch.randn(dim, grid, grid, generator=generator)


def test_standard_matches_scipy() -> None:
    field = torch.randn(4, 5, 2, 3)
    expected = -multivariate_normal(np.zeros(5)).logpdf(field.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(StandardGaussian(field.shape[1])(field).numpy(), expected, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(num_images=st.integers(2, 60), dim=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_position_full_matches_sklearn_and_scipy(num_images: int, dim: int, seed: int) -> None:
    """Also with fewer images than dimensions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(dim, dim, generator=generator)
    fields = torch.einsum("de,nehw->ndhw", scale, torch.randn(num_images, dim, 2, 2, generator=generator)) + 3
    density = PositionGaussian(dim, 2)
    density.fit(fields.split(7))
    test = torch.randn(3, dim, 2, 2, generator=generator)
    result = density(test)
    for row, column in np.ndindex(2, 2):
        reference = OAS().fit(fields[:, :, row, column].double().numpy())
        covariance = reference.covariance_ + 1e-6 * np.eye(dim)
        expected = -multivariate_normal(reference.location_, covariance).logpdf(
            test[:, :, row, column].double().numpy()
        )
        np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["channel", "position"])
def test_diagonal_densities_match_scipy(name: str) -> None:
    fields, test = _correlated(40, 5, 3, seed=0), torch.randn(4, 5, 3, 3)
    density = build_density(name, 5, 3)
    density.fit(fields.split(7))
    result = density(test)
    assert result.shape == (4, 3, 3)
    for row, column in np.ndindex(3, 3):
        seen = fields if name == "channel" else fields[:, :, row : row + 1, column : column + 1]
        samples = seen.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
        covariance = np.diag(samples.var(axis=0) + 1e-6)
        expected = _reference(samples.mean(axis=0), covariance, test[:, :, row, column].double().numpy())
        np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1])
def test_shrinkage_towards_standard_matches_scipy(shrinkage: float) -> None:
    """The mean is kept, the covariance goes to the identity."""
    fields, test = _correlated(30, 4, 2, seed=1), torch.randn(3, 4, 2, 2)
    density = build_density("position_full", 4, 2, shrinkage)
    density.fit(fields.split(7))
    for row, column in np.ndindex(2, 2):
        samples = fields[:, :, row, column].double().numpy()
        covariance = (1 - shrinkage) * np.cov(samples.T, bias=True) + (shrinkage + 1e-6) * np.eye(4)
        expected = _reference(samples.mean(axis=0), covariance, test[:, :, row, column].double().numpy())
        np.testing.assert_allclose(density(test)[:, row, column].numpy(), expected, rtol=1e-3)


def _halves(fields: torch.Tensor) -> tuple[StreamingMoments, StreamingMoments]:
    halves = StreamingMoments(), StreamingMoments()
    for half, part in zip(halves, (fields[::2], fields[1::2]), strict=True):
        half.update(part.flatten(2).permute(2, 0, 1))
    return halves


@settings(deadline=None, max_examples=5)
@given(num_images=st.integers(6, 40), seed=st.integers(0, 2**31))
def test_held_out_likelihood_matches_brute_force(num_images: int, seed: int) -> None:
    """Also with fewer images than dimensions, where no shrinkage at all is no choice."""
    fields = _correlated(num_images, 6, 2, seed)
    intensities = [0.001, 0.1, 1.0]
    result = held_out_nll(*_halves(fields), torch.tensor(intensities, dtype=torch.float64))
    for intensity, value in zip(intensities, result, strict=True):
        expected = []
        for row, column in np.ndindex(2, 2):
            samples = fields[:, :, row, column].double().numpy()
            covariance = (1 - intensity) * np.cov(samples[::2].T, bias=True) + (intensity + 1e-6) * np.eye(6)
            expected.append(_reference(samples[::2].mean(axis=0), covariance, samples[1::2]).mean())
        assert float(value) == pytest.approx(np.mean(expected), rel=1e-6)


def test_auto_shrinks_more_the_fewer_the_images() -> None:
    """White fields want N(0, I), many images of correlated ones their own covariance."""
    white = torch.randn(20, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    assert likeliest_shrinkage(_halves(white)) == 1
    chosen = [likeliest_shrinkage(_halves(_correlated(count, 8, 2, seed=3))) for count in (6, 30, 4000)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 10 * chosen[2]


def test_auto_is_the_likeliest_number_whatever_the_batches() -> None:
    fields = _correlated(30, 4, 2, seed=1)
    best = likeliest_shrinkage(_halves(fields))
    densities = [build_density("position_full", 4, 2, shrinkage) for shrinkage in ("auto", "auto", best)]
    for density, batch in zip(densities, (7, 1, 30), strict=True):
        density.fit(fields.split(batch))
    for density in densities[:2]:
        torch.testing.assert_close(density(fields), densities[2](fields))


@pytest.mark.parametrize(
    ("name", "shrinkage", "match"),
    [
        ("position_full", 1.5, r"shrinkage=1\.5 is neither oas nor auto nor a number from 0 to 1"),
        ("position_full", "ledoit", "shrinkage='ledoit' is neither oas nor auto"),
        ("position_full", True, "shrinkage=True is neither"),
        ("channel", 0.1, r"shrinkage=0\.1 needs density=position_full or mixture_full, not channel"),
    ],
)
def test_impossible_shrinkage(name: str, shrinkage: float | str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_density(name, 4, 4, shrinkage)


def test_oas_intensity_matches_sklearn() -> None:
    samples = np.random.default_rng(0).normal(size=(30, 12)) @ np.diag(np.arange(1.0, 13.0))
    covariance = np.cov(samples.T, bias=True)
    ours = oas_shrinkage(torch.tensor(covariance), len(samples))
    assert float(ours) == pytest.approx(OAS().fit(samples).shrinkage_, rel=1e-9)


def test_gaussian_data_follow_the_chi_square_law() -> None:
    generator = torch.Generator().manual_seed(1)
    dim = 6
    scale = torch.randn(dim, dim, generator=generator)

    def draw(count: int) -> torch.Tensor:
        return torch.einsum("de,nehw->ndhw", scale, torch.randn(count, dim, 1, 1, generator=generator))

    density = PositionGaussian(dim, 1)
    density.fit([draw(20_000)])
    distances = 2 * (density(draw(2_000)).flatten() - density.log_normaliser)
    assert kstest(distances.numpy(), chi2(dim).cdf).pvalue > 0.01


def test_identical_training_images_still_give_a_density() -> None:
    density = PositionGaussian(3, 2)
    density.fit([torch.ones(4, 3, 2, 2)])
    assert torch.isfinite(density(torch.zeros(1, 3, 2, 2))).all()


@pytest.mark.parametrize("name", [name for name in DENSITIES if name != MIXTURE])
def test_prediction_does_not_depend_on_the_batch(name: str) -> None:
    fields = torch.randn(9, 4, 3, 3)
    density = build_density(name, 4, 3)
    density.fit(fields.split(7))
    torch.testing.assert_close(density(fields)[5:6], density(fields[5:6]), rtol=1e-5, atol=1e-5)


def test_state_dict_says_whether_the_density_was_fitted() -> None:
    density = PositionGaussian(4, 3)
    assert density.num_images == 0
    density.fit([torch.randn(9, 4, 3, 3)])
    other = PositionGaussian(4, 3)
    other.load_state_dict(density.state_dict())
    assert other.num_images == 9


def test_image_scores() -> None:
    nll = torch.arange(50.0).reshape(1, 5, 10)
    assert image_score(nll, "max").item() == 49
    assert image_score(nll, "mean").item() == 24.5
    assert image_score(nll.flatten(1)[:, None, :30], "top_k").item() == 24.5  # a third of 30 positions: 20 to 29
    assert image_score(nll[:, :1, :2], "top_k").item() == 1  # at least one position


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"density='laplace' is unknown; use one of standard, channel"):
        build_density("laplace", 4, 4)
    with pytest.raises(ValueError, match=r"image_score='median' is unknown; use one of max, top_k, mean\."):
        image_score(torch.zeros(1, 2, 2), "median")


@pytest.mark.parametrize(
    ("name", "shrinkage", "count", "tolerance"),
    [
        ("position_full", 0.3, 4, 1e-4),
        ("position_full", 0.3, 30, 1e-4),
        ("position_full", "auto", 30, 1e-4),
        ("position_full", "oas", 30, 0.05),
        ("position", "oas", 4, 1e-4),
        ("position", "oas", 30, 1e-4),
    ],
)
def test_leaving_one_out_is_fitting_without_it(name: str, shrinkage: float | str, count: int, tolerance: float) -> None:
    """Fewer images than dimensions, too; an estimated shrinkage stays that of all images."""
    fields = _correlated(count, 6, 2, seed=1)
    density = build_density(name, 6, 2, shrinkage)
    left_out = density.fit(fields.split(7))()
    for index in range(count):
        without = build_density(name, 6, 2, density.shrinking[0] if shrinkage == "auto" else shrinkage)
        without.fit([torch.cat([fields[:index], fields[index + 1 :]])])
        one = fields[index : index + 1]
        torch.testing.assert_close(left_out.map(one), without.map(one), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            left_out.squared_distance(one), without.squared_distance(one), rtol=2 * tolerance, atol=tolerance
        )


@pytest.mark.parametrize("name", ["standard", "channel"])
def test_what_is_fitted_on_all_positions_leaves_nothing_out(name: str) -> None:
    density = build_density(name, 6, 2)
    assert density.fit([_correlated(9, 6, 2, seed=1)])() is density


def test_left_out_scores_are_those_of_new_images() -> None:
    """In-sample scores of a flexible density are far too low."""
    fields = _correlated(440, 20, 2, seed=2)
    density = PositionGaussian(20, 2)
    left_out = density.fit([fields[:40]])()
    inside, outside, new = density(fields[:40]).mean(), left_out(fields[:40]).mean(), density(fields[40:]).mean()
    assert new - inside > 2
    assert abs(new - outside) < 0.2 * (new - inside)
