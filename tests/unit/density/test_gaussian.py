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

from anomalib_osdirf.density import DENSITIES, PositionGaussian, StandardGaussian, build_density, image_score
from anomalib_osdirf.density.gaussian import oas_shrinkage
from anomalib_osdirf.features import StreamingMoments


def _moments(fields: torch.Tensor) -> StreamingMoments:
    moments = StreamingMoments()
    for part in fields.split(7):
        moments.update(part.flatten(2).permute(2, 0, 1))
    return moments


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
    density.fit(_moments(fields))
    test = torch.randn(3, dim, 2, 2, generator=generator)
    result = density(test)
    for row, column in np.ndindex(2, 2):
        reference = OAS().fit(fields[:, :, row, column].double().numpy())
        covariance = reference.covariance_ + 1e-6 * np.eye(dim)
        expected = -multivariate_normal(reference.location_, covariance).logpdf(
            test[:, :, row, column].double().numpy()
        )
        np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=2e-3, atol=2e-3)


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
    density.fit(_moments(draw(20_000)))
    distances = 2 * (density(draw(2_000)).flatten() - density.log_normaliser)
    assert kstest(distances.numpy(), chi2(dim).cdf).pvalue > 0.01


def test_identical_training_images_still_give_a_density() -> None:
    density = PositionGaussian(3, 2)
    density.fit(_moments(torch.ones(4, 3, 2, 2)))
    assert torch.isfinite(density(torch.zeros(1, 3, 2, 2))).all()


@pytest.mark.parametrize("name", DENSITIES)
def test_prediction_does_not_depend_on_the_batch(name: str) -> None:
    fields = torch.randn(9, 4, 3, 3)
    density = build_density(name, 4, 3)
    density.fit(_moments(fields))
    torch.testing.assert_close(density(fields)[5:6], density(fields[5:6]), rtol=1e-5, atol=1e-5)


def test_state_dict_says_whether_the_density_was_fitted() -> None:
    density = PositionGaussian(4, 3)
    assert density.num_images == 0
    density.fit(_moments(torch.randn(9, 4, 3, 3)))
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
    with pytest.raises(ValueError, match=r"density='laplace' is unknown; use one of standard, position_full\."):
        build_density("laplace", 4, 4)
    with pytest.raises(ValueError, match=r"image_score='median' is unknown; use one of max, top_k, mean\."):
        image_score(torch.zeros(1, 2, 2), "median")
