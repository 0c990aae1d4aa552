# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Clusters: of images, where a product comes in several versions, and of patches, for a mixture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, inf, log2

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor
from torch.nn import functional

from anomalib_osdirf.features.backbone import FINE
from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring.densities import FittedBuffers, PositionGaussians

_MOST_CLUSTERS = 16
# Smaller clusters don't determine a covariance; their images go to the nearest larger cluster.
_FEWEST_IMAGES = 8
_SEED = 0
_RESTARTS = 100  # the best of few depends on the seed
_MOST_IMAGES = 10_000  # that clusters are found on, evenly spaced among all of them
_POSITIONS_PER_SIDE = 8  # more found the same clusters, and took longer
_MOST_PATCHES = 40_000  # that a mixture's components are found on

Halves = tuple[StreamingMoments, StreamingMoments]


class ImageClusters(FittedBuffers):
    """Clusters of images by the mean of their features over all positions, each channel in standard deviations.

    k-means finds up to 16 clusters. They are merged, nearest first (Ward 1963), while that increases the likelihood of
    held-out images under Gaussians per position. Often a single cluster remains.
    """

    scale: Tensor
    centres: Tensor
    cluster_of_centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(0))  # (D,)
        self.register_buffer("centres", torch.zeros(0, 0))  # (K', D)
        self.register_buffer("cluster_of_centre", torch.zeros(0, dtype=torch.int64))  # (K',)

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.cluster_of_centre.max()) + 1

    def fit(self, features: Callable[[], Iterable[Tensor]], processes: DistributedContext = ALONE) -> None:
        """Find the clusters by fine features ``(B, D, 2 h, 2 w)`` of all training images, in batches at every call."""
        described, scale = _described(features(), processes)
        centres = processes.first(_k_means(described, min(_MOST_CLUSTERS, len(described))))
        every = torch.arange(len(centres), device=centres.device)
        self.set_buffers(scale=scale, centres=centres, cluster_of_centre=every)
        if len(centres) == 1:
            return
        moments = [StreamingMoments() for _ in range(2 * len(centres))]
        seen = torch.zeros(len(centres), dtype=torch.int64, device=centres.device)
        for batch in features():
            labels = self(batch)
            rows = min(_POSITIONS_PER_SIDE, batch.shape[-2] // FINE)
            columns = min(_POSITIONS_PER_SIDE**2 // rows, batch.shape[-1] // FINE)  # more where they are in one row
            vectors = functional.adaptive_avg_pool2d(batch, (rows, columns)).flatten(2).permute(2, 0, 1)
            for index in range(len(centres)):
                own = vectors[:, labels == index]
                half = (seen[index] + torch.arange(own.shape[1], device=own.device)) % 2
                moments[2 * index].update(own[:, half == 0])
                moments[2 * index + 1].update(own[:, half == 1])
                seen[index] += own.shape[1]
        moments = [one.pooled(processes) for one in moments]
        halves = list(zip(moments[::2], moments[1::2], strict=True))
        self.set_buffers(cluster_of_centre=processes.first(joined_where_likelier(halves, centres)))

    def forward(self, fine: Tensor) -> Tensor:
        """Return the cluster of each image, given fine features ``(B, D, 2 h, 2 w)``: shape ``(B,)``."""
        if len(self.centres) == 1:
            return torch.zeros_like(fine[:, 0, 0, 0], dtype=torch.int64)
        offset = (fine.mean(dim=(2, 3)) * self.scale).unsqueeze(1) - self.centres
        return self.cluster_of_centre[offset.square().sum(dim=2).argmin(dim=1)]


def _described(features: Iterable[Tensor], processes: DistributedContext) -> tuple[Tensor, Tensor]:
    """Return the scaled descriptors of at most ``_MOST_IMAGES`` images, shape ``(N, D)``, and the scale ``(D,)``."""
    numbers, means, seen = [], [], 0
    squares: Tensor | float = 0.0
    total: Tensor | float = 0.0
    for batch in features:
        numbers.append(processes.rank + processes.count * torch.arange(seen, seen + len(batch), device=batch.device))
        means.append(batch.mean(dim=(2, 3)))
        squares = squares + batch.double().square().mean(dim=(2, 3)).sum(dim=0)
        total = total + means[-1].double().sum(dim=0)
        seen += len(batch)
    assert isinstance(squares, Tensor)
    assert isinstance(total, Tensor)
    images = int(processes.add(torch.tensor(seen)))
    squares, total = processes.add(squares) / images, processes.add(total) / images
    deviation = (squares - total.square()).clamp_min(0).sqrt()
    scale = torch.where(deviation > 0, 1 / deviation, 0.0).to(means[0])
    spacing = 2 ** max(0, ceil(log2(images / _MOST_IMAGES)))
    own_numbers, own = torch.cat(numbers), torch.cat(means) * scale
    kept = own_numbers % spacing == 0
    described = own.new_zeros(ceil(images / spacing), own.shape[1])
    described[own_numbers[kept] // spacing] = own[kept]
    return processes.add(described), scale


def _k_means(descriptors: Tensor, most: int) -> Tensor:
    """Return the centres of at most ``most`` clusters, each of enough images, shape ``(K, D)``."""
    found = KMeans(most, n_init=_RESTARTS, random_state=_SEED).fit(descriptors.double().cpu().numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(descriptors)
    while True:
        sizes = torch.cdist(descriptors, centres).argmin(dim=1).bincount(minlength=len(centres))
        if len(centres) == 1 or int(sizes.min()) >= _FEWEST_IMAGES:
            return centres
        centres = centres[torch.arange(len(centres), device=centres.device) != sizes.argmin()]


@dataclass(eq=False)
class _Branch:
    """A branch of the cluster tree, and the most likely way to cut it."""

    halves: Halves
    centre: Tensor
    nll: float
    clusters: list[list[int]]

    @property
    def count(self) -> int:
        return sum(half.count for half in self.halves)

    def distance(self, other: "_Branch") -> float:
        """Return the increase of the within-cluster sum of squares on merging (Ward 1963)."""
        share = self.count * other.count / (self.count + other.count)
        return share * float((self.centre - other.centre).square().sum())

    def joined(self, other: "_Branch") -> "_Branch":
        """Return the merged branch."""
        even, odd = (one.merged(two) for one, two in zip(self.halves, other.halves, strict=True))
        together, apart = cross_validated_nll((even, odd)), self.nll + other.nll
        clusters = self.clusters + other.clusters
        if together <= apart:
            clusters = [[index for cluster in clusters for index in cluster]]
        centre = torch.lerp(self.centre, other.centre, other.count / (self.count + other.count))
        return _Branch((even, odd), centre, min(together, apart), clusters)


def joined_where_likelier(halves: Sequence[Halves], centres: Tensor) -> Tensor:
    """Merge clusters where that increases the likelihood of held-out images.

    Merging the nearest two repeatedly gives a tree. It is cut where each half of the images is most likely under the
    Gaussians fitted on the other half.

    Args:
        halves: Moments of both halves of each cluster's images, ``mean`` of shape ``(P, D)``.
        centres: Centres of the clusters, shape ``(K, D)``.

    Returns:
        The joined cluster of each, shape ``(K,)``.
    """
    branches = [
        _Branch(pair, centre, cross_validated_nll(pair), [[index]])
        for index, (pair, centre) in enumerate(zip(halves, centres, strict=True))
    ]
    while len(branches) > 1:
        one, other = min(combinations(branches, 2), key=lambda pair: pair[0].distance(pair[1]))
        branches = [branch for branch in branches if branch not in {one, other}] + [one.joined(other)]
    result = torch.zeros(len(halves), dtype=torch.int64, device=centres.device)
    for cluster, members in enumerate(branches[0].clusters):
        result[members] = cluster
    return result


def cross_validated_nll(halves: Halves) -> float:
    """Sum the negative log densities, in nats, of each half under the other's Gaussians; infinite if one is empty."""
    if not all(half.count for half in halves):
        return inf
    total = 0.0
    for fitted, held_out in (halves, halves[::-1]):
        gaussian = PositionGaussians().double().to(fitted.mean.device).fit_moments([fitted])
        precision_factor = gaussian.precision_factor[0]
        offset = (precision_factor @ (held_out.mean - fitted.mean).unsqueeze(-1)).square().sum()
        spread = (precision_factor @ held_out.covariance() * precision_factor).sum()
        total += held_out.count * float(0.5 * (offset + spread) + gaussian.constant.sum())
    return total


def patch_centres(fields: Iterable[Tensor], images: int, most: int, processes: DistributedContext = ALONE) -> Tensor:
    """Find at most ``most`` centres ``(K, D)`` of patches by k-means, for the components of a mixture.

    ``fields`` are this process's, in batches ``(B, D, h, w)``; ``images`` is their number in all processes.
    """
    rows: Tensor | None = None
    seen, spacing = 0, 1
    for field in fields:
        patches = field.flatten(2).transpose(1, 2)  # (B, P, D)
        if rows is None:
            spacing = max(1, ceil(images * patches.shape[1] / _MOST_PATCHES))
            rows = patches.new_zeros(ceil(images / spacing), *patches.shape[1:])
        numbers = processes.rank + processes.count * torch.arange(seen, seen + len(field), device=field.device)
        kept = numbers % spacing == 0
        rows[numbers[kept] // spacing] = patches[kept]
        seen += len(field)
    assert rows is not None
    values = processes.add(rows).flatten(0, 1)
    found = MiniBatchKMeans(min(most, images), n_init=3, random_state=_SEED, batch_size=4096)
    return processes.first(torch.from_numpy(found.fit(values.cpu().numpy()).cluster_centers_).to(values))
