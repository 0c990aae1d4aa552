# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Cross-fitting: densities of all images and, for unbiased scores of these, of all folds but one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring.densities import PatchMixture, PositionGaussians, StandardGaussian

FOLDS = 4


@dataclass
class Sample:
    """A batch of training images for the densities.

    Attributes:
        values: Fields or fine features, shape ``(B, D, h, w)``.
        cluster: Cluster of each image, shape ``(B,)``.
        numbers: Number of each image among all, shape ``(B,)``.
    """

    values: Tensor
    cluster: Tensor
    numbers: Tensor

    def where(self, own: Tensor) -> "Sample":
        """Return the images selected by a mask ``(B,)``."""
        return Sample(self.values[own], self.cluster[own], self.numbers[own])


class CrossFitted:
    """A density of all images, and for each fold the density of the images of the other folds.

    Args:
        density: The density of all images.
        folds: One for each fold; image n is in fold ``n % len(folds)``.
    """

    def __init__(self, density: nn.Module, folds: Sequence[nn.Module]) -> None:
        self.density = density
        self.folds = folds

    def held_out(self, sample: Sample) -> Tensor:
        """Return held-out negative log densities, by the density of the other folds, shape ``(B, h, w)``, nats."""
        nll = sample.values.new_empty(len(sample.values), *sample.values.shape[-2:])
        for fold, density in enumerate(self.folds):
            own = sample.numbers % len(self.folds) == fold
            if own.any():
                part = sample.where(own)
                nll[own] = density(part.values, part.cluster)
        return nll


def standard(folds: int) -> CrossFitted:
    """Return N(0, I), which has nothing to fit."""
    density = StandardGaussian()
    return CrossFitted(density, [density] * folds)


def fit_positions(
    samples: Iterable[Sample], clusters: int, folds: int, blocks: bool = False, processes: DistributedContext = ALONE
) -> CrossFitted:
    """Fit Gaussians per position and cluster on this process's images.

    Args:
        samples: The images in batches.
        clusters: Number of clusters C; 1 fits one for all images, whatever their cluster.
        folds: Number of folds F.
        blocks: Whether neighbouring positions share covariances.
        processes: Distributed context.
    """
    moments = [StreamingMoments() for _ in range(clusters * folds)]
    for sample in samples:
        size = sample.values.shape[-2:]
        vectors = sample.values.flatten(2).permute(2, 0, 1)
        cluster = sample.cluster if clusters > 1 else torch.zeros_like(sample.cluster)
        group = cluster * folds + sample.numbers % folds
        for index, one in enumerate(moments):
            one.update(vectors[:, group == index])
    pooled = [one.pooled(processes) for one in moments]
    everything = reduce(StreamingMoments.merged, pooled)

    def fitted(kept: Callable[[int], bool]) -> PositionGaussians:
        merged = []
        for cluster in range(clusters):
            rest = [pooled[cluster * folds + fold] for fold in range(folds) if kept(fold)]
            moments = reduce(StreamingMoments.merged, rest)
            merged.append(moments if moments.count > 1 else everything)  # a cluster without images is that of all
        return PositionGaussians(blocks).to(everything.mean.device).fit_moments(merged, size)

    return CrossFitted(
        fitted(lambda _: True),
        [fitted(lambda fold, left=left: fold != left) for left in range(folds)],  # type: ignore[misc]
    )


def fit_mixture(
    samples: Iterable[Sample],
    label: Callable[[Tensor], Tensor],
    components: int,
    folds: int,
    processes: DistributedContext = ALONE,
) -> CrossFitted:
    """Fit a mixture that all positions share, each component on the patches of its label.

    Args:
        samples: This process's images in batches.
        label: Returns the component of each patch ``(B, P)`` of values ``(B, D, h, w)``.
        components: Number of components K.
        folds: Number of folds F.
        processes: Distributed context.
    """
    moments = [StreamingMoments() for _ in range(components * folds)]
    for sample in samples:
        vectors = sample.values.flatten(2).transpose(1, 2)
        group = label(sample.values) * folds + (sample.numbers % folds)[:, None]
        order = group.flatten().argsort(stable=True)
        sizes = group.flatten().bincount(minlength=len(moments)).tolist()
        for one, own in zip(moments, vectors.flatten(0, 1)[order].split(sizes), strict=True):
            one.update(own)
    pooled = [one.pooled(processes) for one in moments]

    def fitted(kept: Callable[[int], bool]) -> PatchMixture:
        merged = [
            reduce(StreamingMoments.merged, [pooled[index * folds + fold] for fold in range(folds) if kept(fold)])
            for index in range(components)
        ]
        if not any(moments.count for moments in merged):  # all images are in the held-out fold
            return fitted(lambda _: True)
        return PatchMixture().to(pooled[0].mean.device).fit_moments(merged)

    return CrossFitted(
        fitted(lambda _: True),
        [fitted(lambda fold, left=left: fold != left) for left in range(folds)],  # type: ignore[misc]
    )
