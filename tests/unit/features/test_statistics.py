# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Streaming moments and PCA, whitening or not, against numpy and scikit-learn."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from anomalib_osdirf.features import PCAProjection, StreamingMoments
from anomalib_osdirf.processes import DistributedContext
from threads import played


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), offset=st.floats(-1e4, 1e4), seed=st.integers(0, 2**31)
)
def test_moments_do_not_depend_on_the_split(sizes: list[int], offset: float, seed: int) -> None:
    samples = np.random.default_rng(seed).normal(size=(2, sum(sizes), 3)) + offset
    moments = StreamingMoments()
    for part in np.split(samples, np.cumsum(sizes)[:-1], axis=1):
        moments.update(torch.tensor(part))
    assert moments.count == sum(sizes)
    for group in range(2):
        np.testing.assert_allclose(moments.mean[group].numpy(), samples[group].mean(0), rtol=1e-9, atol=1e-9)
        expected = np.cov(samples[group].T, bias=True)
        np.testing.assert_allclose(moments.covariance()[group].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_moments_refuse_features_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="Features are not finite"):
        StreamingMoments().update(torch.tensor([[1.0], [float("nan")]]))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell a process's memory")
def test_memory_does_not_grow_with_the_samples() -> None:
    """100 MB of samples go through."""

    def pass_through(batches: int) -> int:
        for _ in range(batches):
            moments.update(torch.randn(16, 64, 32))
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    moments = StreamingMoments()
    before = pass_through(20)
    assert pass_through(800) - before < 10e6
    assert moments.count == 820 * 64
    assert moments.scatter.nbytes == 8 * 16 * 32**2


def _fit(samples: np.ndarray, rank: int | None, whiten: bool = True) -> PCAProjection:
    moments = StreamingMoments()
    moments.update(torch.tensor(samples))
    projection = PCAProjection(samples.shape[1], rank, whiten)
    projection.fit(moments)
    return projection


def _apply(projection: PCAProjection, samples: np.ndarray) -> np.ndarray:
    return projection(torch.tensor(samples, dtype=torch.float32)[:, :, None, None])[:, :, 0, 0].numpy()


def test_whitening_matches_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8)) * rng.uniform(0.1, 50, 8) + 7
    ours = _apply(_fit(samples, 5), samples)
    standardised = StandardScaler().fit_transform(samples)
    theirs = PCA(5, whiten=True).fit(standardised).transform(standardised) * np.sqrt(500 / 499)  # it divides by n - 1
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs * signs, atol=2e-4)


def test_without_whitening_components_keep_their_variance() -> None:
    rng = np.random.default_rng(4)
    samples = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8)) + 7
    reduced = _apply(_fit(samples, 5, whiten=False), samples)
    theirs = PCA(5).fit_transform(StandardScaler().fit_transform(samples))
    np.testing.assert_allclose(reduced, theirs * np.sign((reduced * theirs).sum(0)), atol=2e-4)


def test_whitened_features_have_unit_covariance() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    np.testing.assert_allclose(np.cov(_apply(_fit(samples, 6), samples).T, bias=True), np.eye(6), atol=1e-4)


def test_without_rank_channels_are_standardised() -> None:
    samples = np.random.default_rng(2).normal(3, 9, size=(300, 4))
    np.testing.assert_allclose(_apply(_fit(samples, None), samples), StandardScaler().fit_transform(samples), atol=1e-5)


def test_rounding_of_a_channel_that_never_changes_is_not_blown_up() -> None:
    """As of colour on grey images, where another runtime rounds otherwise."""
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1] = -4.6 + 4e-7 * values[:, 1]
    moments = StreamingMoments()
    moments.update(values)
    projection = PCAProjection(3, None)
    projection.fit(moments)
    assert projection.weight[:, 1].abs().max() == 0


def test_constant_and_duplicate_channels_stay_finite() -> None:
    base = np.random.default_rng(3).normal(size=(100, 2))
    samples = np.concatenate([base, base, np.full((100, 1), 5.0)], axis=1)
    whitened = _apply(_fit(samples, 5), samples)
    assert np.isfinite(whitened).all()
    assert np.abs(whitened).max() < 100


def test_rank_is_an_upper_bound() -> None:
    assert PCAProjection(8, 96).out_channels == 8
    with pytest.raises(ValueError, match="feature_dim=0"):
        PCAProjection(8, 0)


def test_the_sign_of_a_component_does_not_depend_on_the_data_order() -> None:
    samples = np.random.default_rng(5).normal(size=(200, 6)) @ np.random.default_rng(6).normal(size=(6, 6))
    torch.testing.assert_close(_fit(samples, 4).weight, _fit(samples[::-1].copy(), 4).weight, rtol=1e-3, atol=1e-4)


def test_merged_moments_are_those_of_all_samples() -> None:
    """Merging changes neither, and an empty one adds nothing."""
    samples = torch.randn(2, 30, 3, dtype=torch.float64)
    one, other, both = StreamingMoments(), StreamingMoments(), StreamingMoments()
    one.update(samples[:, :11])
    other.update(samples[:, 11:])
    both.update(samples)
    for merged in (one.merged(other), one.merged(other).merged(StreamingMoments())):
        assert merged.count == 30
        torch.testing.assert_close(merged.mean, both.mean)
        torch.testing.assert_close(merged.scatter, both.scatter)
    assert (one.count, other.count) == (11, 19)
    torch.testing.assert_close(one.mean, samples[:, :11].mean(dim=1))


def test_moments_of_an_affine_map() -> None:
    samples = torch.randn(3, 50, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 4), torch.randn(2)
    moments, moved = StreamingMoments(), StreamingMoments()
    moments.update(samples)
    moved.update(samples @ weight.double().T + bias.double())
    affine = moments.affine(weight, bias)
    assert affine.count == 50
    torch.testing.assert_close(affine.mean, moved.mean)
    torch.testing.assert_close(affine.covariance(), moved.covariance())


def test_moments_of_no_sample_are_pooled_as_such() -> None:
    def empty(processes: DistributedContext) -> StreamingMoments:
        moments = StreamingMoments()
        moments.update(torch.zeros(0, 3))
        return moments.pooled(processes)

    for pooled in played(2, empty):
        assert pooled.count == 0
        assert not pooled.mean.any()
