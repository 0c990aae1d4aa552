# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Held-out scores against densities fitted from scratch without the images."""

import pytest
import torch
from torch import Tensor

from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring import (
    FOLDS,
    CrossFitted,
    PatchMixture,
    PositionGaussians,
    Sample,
    fit_mixture,
    fit_positions,
    standard,
)
from threads import played

COUNT, DIM, GRID = 22, 4, 4
CENTRES = torch.tensor([[-1.0, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0]])


def _sample(count: int = COUNT, clusters: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randperm(count, generator=generator)
    mean = torch.randn(DIM, GRID, GRID, generator=generator)
    values = mean + torch.randn(count, DIM, GRID, GRID, generator=generator)
    return Sample(values, numbers // 4 % clusters, numbers)


def _batches(sample: Sample, processes: DistributedContext = ALONE) -> list[Sample]:
    """Return a process's images, five at a time."""
    own = sample.where(sample.numbers % processes.count == processes.rank)
    every = torch.arange(len(own.values))
    return [own.where((start <= every) & (every < start + 5)) for start in range(0, len(every), 5)]


def _label(values: Tensor) -> Tensor:
    return torch.cdist(values.flatten(2).transpose(1, 2), CENTRES.expand(len(values), -1, -1)).argmin(dim=2)


def _positions_from_scratch(sample: Sample, blocks: bool) -> PositionGaussians:
    moments = [StreamingMoments() for _ in range(int(sample.cluster.max()) + 1)]
    for index, one in enumerate(moments):
        one.update(sample.values[sample.cluster == index].flatten(2).permute(2, 0, 1))
    return PositionGaussians(blocks).fit_moments(moments)


def _mixture_from_scratch(sample: Sample) -> PatchMixture:
    patches, label = sample.values.flatten(2).transpose(1, 2).flatten(0, 1), _label(sample.values).flatten()
    moments = [StreamingMoments() for _ in CENTRES]
    for index, one in enumerate(moments):
        one.update(patches[label == index])
    return PatchMixture().fit_moments(moments)


@pytest.mark.parametrize(("clusters", "blocks"), [(1, False), (1, True), (2, False)])
def test_held_out_positions_are_those_of_the_other_folds(clusters: int, blocks: bool) -> None:
    sample = _sample(clusters=clusters)
    fitted = fit_positions(_batches(sample), clusters, FOLDS, blocks)
    held_out = fitted.held_out(sample)
    for fold in range(FOLDS):
        own = sample.numbers % FOLDS == fold
        reference = _positions_from_scratch(sample.where(~own), blocks)
        expected = reference(sample.values[own], sample.cluster[own])
        torch.testing.assert_close(held_out[own], expected, rtol=1e-4, atol=1e-4)
    everything = _positions_from_scratch(sample, blocks)
    torch.testing.assert_close(
        fitted.density(sample.values, sample.cluster), everything(sample.values, sample.cluster), rtol=1e-4, atol=1e-4
    )


def test_held_out_mixture_is_that_of_the_other_folds() -> None:
    """With the components of all images."""
    sample = _sample()
    fitted = fit_mixture(_batches(sample), _label, len(CENTRES), FOLDS)
    held_out = fitted.held_out(sample)
    for fold in range(FOLDS):
        own = sample.numbers % FOLDS == fold
        expected = _mixture_from_scratch(sample.where(~own))(sample.values[own])
        torch.testing.assert_close(held_out[own], expected, rtol=1e-4, atol=1e-4)
    expected = _mixture_from_scratch(sample)(sample.values)
    torch.testing.assert_close(fitted.density(sample.values), expected, rtol=1e-4, atol=1e-4)


def test_standard_gaussian_has_seen_nothing() -> None:
    sample, fitted = _sample(), standard(FOLDS)
    torch.testing.assert_close(fitted.held_out(sample), fitted.density(sample.values))


def test_images_are_less_likely_where_they_are_held_out() -> None:
    sample = _sample()
    for fitted in (fit_positions(_batches(sample), 1, FOLDS), fit_mixture(_batches(sample), _label, 3, FOLDS)):
        assert fitted.held_out(sample).mean() > fitted.density(sample.values, sample.cluster).mean()


def test_cluster_without_images_in_the_other_folds_is_that_of_all() -> None:
    sample = _sample()
    sample.cluster = (sample.numbers == 6).long()
    fitted = fit_positions(_batches(sample), 2, FOLDS)
    own = sample.numbers == 6
    everything = _positions_from_scratch(Sample(sample.values, 0 * sample.cluster, sample.numbers), blocks=False)
    torch.testing.assert_close(
        fitted.folds[6 % FOLDS](sample.values[own], sample.cluster[own]),
        everything(sample.values[own]),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("numbers", [[0, 1], [0, 2]])
def test_two_images_have_finite_held_out_scores(numbers: list[int]) -> None:
    """Even if they are in one fold, as numbers made of file names may be."""
    sample = _sample(2)
    sample.numbers = torch.tensor(numbers)
    for fitted in (fit_positions([sample], 1, 2), fit_mixture([sample], _label, 3, 2)):
        assert torch.isfinite(fitted.held_out(sample)).all()


def test_several_processes_fit_what_one_does() -> None:
    sample = _sample(clusters=2)

    def fitted(processes: DistributedContext) -> list[Tensor]:
        batches = _batches(sample, processes)
        both: list[CrossFitted] = [
            fit_positions(batches, 2, FOLDS, processes=processes),
            fit_positions(batches, 1, FOLDS, blocks=True, processes=processes),
            fit_mixture(batches, _label, 3, FOLDS, processes),
        ]
        return [one.held_out(sample) for one in both]

    expected = fitted(ALONE)
    for count in (2, 3):
        for result in played(count, fitted):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
