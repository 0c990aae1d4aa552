# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussians for several kinds of image: clusters of training images, and for each image those that its field suits."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from math import ceil, inf, log2
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from anomalib_osdirf.density.gaussian import Density, FittedDensity, PositionGaussian, shrunk
from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.processes import ALONE, Processes

logger = logging.getLogger(__name__)

AUTO = "auto"
# What num_clusters=auto starts from.
_MOST_CLUSTERS = 16
# Fewer images than this tell too little about their covariance: they go to the nearest larger cluster.
_FEWEST_IMAGES = 8
_SEED = 0
_RESTARTS = 100  # the best of few hangs on the seed
_MOST_IMAGES = 10_000  # that clusters are found on, evenly spaced among all of them

# Of the mean variance, where kinds are told apart.
_LEAST_VARIANCE = 1e-4

Halves = tuple[StreamingMoments, StreamingMoments]


class SeveralKinds(nn.Module):
    """A module whose buffers are as long as those that are set or loaded: by the kinds of image that a fit found."""

    def set_buffers(self, **values: Tensor) -> None:
        """Give buffers other values, of another number of kinds."""
        for name, value in values.items():
            setattr(self, name, value.to(getattr(self, name)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's own signature
        """Take as many kinds as the state has."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                self.set_buffers(**{name: buffer.new_zeros(len(saved), *buffer.shape[1:])})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class KindChoice(SeveralKinds):
    """Which of several kinds a whole field is likeliest under, its channels and positions taken as independent.

    Args:
        size: Values D h w of a field.
    """

    centre: Tensor
    quadratic: Tensor
    linear: Tensor
    constant: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        # A kind's negative log density is a polynomial in the difference from a centre; these are its coefficients.
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("quadratic", torch.zeros(0, size))
        self.register_buffer("linear", torch.zeros(0, size))
        self.register_buffer("constant", torch.zeros(0))

    def set_gaussians(self, mean: Tensor, variance: Tensor) -> None:
        """Set the Gaussians of the kinds, means and variances of shape ``(K, D h w)``."""
        # Coefficients that are all alike in size keep the choice exact in 32 bits.
        variance = variance.clamp_min(_LEAST_VARIANCE * variance.mean())
        centre = mean.mean(dim=0)
        offset = mean - centre
        self.set_buffers(
            centre=centre,
            quadratic=0.5 / variance,
            linear=-offset / variance,
            constant=0.5 * (offset.square() / variance + variance.log()).mean(dim=1),
        )

    def forward(self, field: Tensor) -> Tensor:
        """Return the kind of each field ``(B, D, h, w)``, the first of equals, shape ``(B,)``."""
        if len(self.constant) == 1:
            return torch.zeros_like(field[:, 0, 0, 0], dtype=torch.int64)
        values = field.flatten(1) - self.centre
        total = values.square() @ self.quadratic.T + values @ self.linear.T
        return (total / values.shape[1] + self.constant).argmin(dim=1)


class PositionMixture(SeveralKinds, FittedDensity):
    """Gaussians as of :class:`PositionGaussian` for each of several kinds of image, which nobody has to name.

    The kinds are clusters of training images (:meth:`cluster`). An image is scored by the Gaussians of the kind that
    its own field is likeliest under: neither its category nor another image has a part in that. For this choice,
    channels are taken as independent, which is a hundredth of the work of full covariances.

    Args:
        dim: Channels D of the field.
        grid_size: Side of the grid.
        num_clusters: Number of kinds, or ``auto``: 16, joined where that makes held-out training images likelier.
        shrinkage: ``oas`` or a number, see :class:`PositionGaussian`.

    Raises:
        ValueError: If ``num_clusters`` or ``shrinkage`` is none of these.
    """

    mean: Tensor
    whitener: Tensor
    log_normaliser: Tensor

    def __init__(
        self, dim: int, grid_size: int, num_clusters: int | str = AUTO, shrinkage: float | str = "oas"
    ) -> None:
        super().__init__()
        whole = isinstance(num_clusters, int) and not isinstance(num_clusters, bool)
        if num_clusters != AUTO and not (whole and int(num_clusters) > 0):
            msg = f"num_clusters={num_clusters!r} is neither {AUTO} nor a whole number of at least 1; use one."
            raise ValueError(msg)
        if shrinkage == "auto":
            msg = "shrinkage=auto is not for density=mixture_full; use oas, a number, or density=position_full."
            raise ValueError(msg)
        self.num_clusters = num_clusters
        self._build = partial(PositionGaussian, dim, grid_size, shrinkage)
        self._build()  # which checks the shrinkage
        positions = grid_size**2
        self.register_buffer("mean", torch.zeros(0, positions, dim))
        self.register_buffer("whitener", torch.zeros(0, positions, dim, dim))
        self.register_buffer("log_normaliser", torch.zeros(0, positions))
        self.choice = KindChoice(dim * positions)

    @property
    def num_kinds(self) -> int:
        """Number of kinds, 0 before they are found."""
        return len(self.mean)

    # ------------------------------------------------------------------ fit

    def cluster(
        self,
        features: Callable[[], Iterable[Tensor]],
        fields: Callable[[], Iterable[Tensor]],
        processes: Processes = ALONE,
    ) -> None:
        """Find the kinds, before :meth:`fit`.

        Features tell kinds, by their means over all positions, and how many of them there are; the field knows less.

        Args:
            features: Returns the training images' features in batches of shape ``(B, D, h, w)``, whenever called.
            fields: Returns their fields in the same order and of the same shapes.
            processes: Who has the other images.
        """
        described, spacing = _described(features(), processes)
        most = _MOST_CLUSTERS if self.num_clusters == AUTO else int(self.num_clusters)
        centres = processes.first(clusters(described, most))
        if spacing == 1:
            labels = processes.first(nearest(described, centres))
        else:
            labels = processes.gathered(torch.cat([nearest(_means(batch), centres) for batch in features()]))
        if self.num_clusters == AUTO and len(centres) > 1:
            centres = torch.stack([described[labels[::spacing] == index].mean(dim=0) for index in range(len(centres))])
            labels = self._joined(labels, centres, features, processes)
        own = slice(processes.rank, None, processes.count)
        self._set(moments_of(_labelled(fields(), labels[own]), int(labels.max()) + 1, processes))

    def _joined(
        self, labels: Tensor, centres: Tensor, features: Callable[[], Iterable[Tensor]], processes: Processes
    ) -> Tensor:
        """Return each image's kind, given its cluster and the clusters' centres: see :func:`joined_where_likelier`."""
        half = torch.zeros_like(labels)
        for index in range(len(centres)):
            half[labels == index] = torch.arange(int((labels == index).sum()), device=half.device) % 2
        own = slice(processes.rank, None, processes.count)
        moments = moments_of(_labelled(features(), (2 * labels + half)[own]), 2 * len(centres), processes)
        halves = list(zip(moments[::2], moments[1::2], strict=True))
        return processes.first(joined_where_likelier(halves, centres, self._build()).to(labels)[labels])

    def fit(self, fields: Iterable[Tensor], processes: Processes = ALONE) -> Callable[[], Density]:
        """See :meth:`FittedDensity.fit`: the Gaussians of each kind, on the images that choose it.

        Raises:
            RuntimeError: If :meth:`cluster` has found no kinds yet.
        """
        if not self.num_kinds:
            msg = "A mixture's kinds must be found by cluster() before it is fitted."
            raise RuntimeError(msg)
        fitted_by = copy.deepcopy(self.choice)
        moments = moments_of(((field, fitted_by(field)) for field in fields), self.num_kinds, processes)
        counts = [one.count for one in moments]
        self.num_images = sum(counts)
        logger.info("Kinds of training image: %d, of %s images.", len(counts), ", ".join(map(str, counts)))
        # A kind that hardly any image chooses any more is that of all.
        everything = reduce(StreamingMoments.merged, moments)
        moments = [one if one.count > 1 else everything for one in moments]
        gaussians = self._set(moments)
        return lambda: LeaveOneOutMixture(
            self, fitted_by, [gaussian.leave_one_out(one) for gaussian, one in zip(gaussians, moments, strict=True)]
        )

    def _set(self, moments: Sequence[StreamingMoments]) -> list[PositionGaussian]:
        """Set the Gaussians of each kind, and return them."""
        gaussians = [self._build().to(self.mean.device) for _ in moments]
        variances = []
        for gaussian, one in zip(gaussians, moments, strict=True):
            gaussian.fit_moments(one, StreamingMoments())
            variances.append(shrunk(one.covariance(), *gaussian.shrinking).diagonal(dim1=-2, dim2=-1).T.flatten())
        self.choice.set_gaussians(torch.stack([one.mean.T.flatten() for one in moments]), torch.stack(variances))
        self.set_buffers(
            mean=torch.stack([gaussian.mean for gaussian in gaussians]),
            whitener=torch.stack([gaussian.whitener for gaussian in gaussians]),
            log_normaliser=torch.stack([gaussian.log_normaliser for gaussian in gaussians]),
        )
        return gaussians

    # ------------------------------------------------------------------ use

    def choose(self, field: Tensor) -> Tensor:
        """See :meth:`Density.choose`."""
        kind: Tensor = self.choice(field)
        return kind

    def buffers_in_use(self) -> dict[str, Tensor]:
        """See :meth:`Density.buffers_in_use`; one kind is not chosen."""
        return dict(self.named_buffers(recurse=self.num_kinds > 1))

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return self._squared_distance(field, self.choose(field)).flatten(1)

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`."""
        kind = self.choose(field)
        nll = 0.5 * self._squared_distance(field, kind) + self.log_normaliser[kind].unsqueeze(2)
        return nll.flatten(1).unflatten(1, (1, *field.shape[-2:]))

    def _squared_distance(self, field: Tensor, kind: Tensor) -> Tensor:
        """Squared Mahalanobis distances by the Gaussians of each image's kind, shape ``(B, P, 1)``."""
        vectors = field.flatten(2).transpose(1, 2)
        if self.num_kinds == 1:
            return self._squared_distance_of(vectors, 0)
        if torch.compiler.is_exporting():  # no loop over what is in a batch, so each image's covariances are gathered
            positions = vectors.shape[1]
            # By position, which OpenVINO does in parallel: all of an image's in one piece take it three times as long.
            rows = (positions * kind.unsqueeze(1) + torch.arange(positions, device=kind.device)).flatten()
            centred = vectors.flatten(0, 1) - self.mean.flatten(0, 1).index_select(0, rows)
            whitener = self.whitener.transpose(2, 3).flatten(0, 1).index_select(0, rows)
            whitened = torch.bmm(centred.unsqueeze(1), whitener)
            return whitened.square().sum(dim=2).unflatten(0, (-1, positions))
        distances = vectors.new_empty(*vectors.shape[:2], 1)
        for index in kind.unique().tolist():
            own = kind == index
            distances[own] = self._squared_distance_of(vectors[own], index)
        return distances

    def _squared_distance_of(self, vectors: Tensor, kind: int) -> Tensor:
        """The same of vectors ``(B, P, D)`` of images that are all of one kind."""
        centred = (vectors - self.mean[kind]).transpose(0, 1).contiguous()
        whitened = torch.bmm(centred, self.whitener[kind].transpose(1, 2))
        return whitened.square().sum(dim=2, keepdim=True).transpose(0, 1)


class LeaveOneOutMixture(Density):
    """A mixture that each image it was fitted on is left out of, from the Gaussians of its kind, when it is scored.

    An image of a kind whose fit it had no part in, since it chose another one before, is scored as by the mixture.

    Args:
        mixture: The mixture, by which images choose.
        fitted_by: What they chose by when the mixture was fitted.
        kinds: What the images that each kind was fitted on are scored by.
    """

    def __init__(self, mixture: PositionMixture, fitted_by: KindChoice, kinds: Sequence[Density]) -> None:
        super().__init__()
        self.mixture = mixture
        self.fitted_by = fitted_by
        self.kinds = nn.ModuleList(kinds)
        self.num_images = mixture.num_images

    def choose(self, field: Tensor) -> Tensor:
        """See :meth:`Density.choose`."""
        return self.mixture.choose(field)

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`; the field must be that of images of the fit."""
        return self._by_kind(field, "squared_distance")

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`; the field must be that of images of the fit."""
        return self._by_kind(field, "map")

    def _by_kind(self, field: Tensor, method: str) -> Tensor:
        """Return what each image's kind has for it."""
        chosen, fitted = self.choose(field), self.fitted_by(field)
        values = getattr(self.mixture, method)(field)
        for index, kind in enumerate(self.kinds):
            own = (chosen == index) & (fitted == index)
            values[own] = getattr(kind, method)(field[own])
        return values


def _means(batch: Tensor) -> Tensor:
    """What tells kinds: means over all positions of features ``(B, D, h, w)``, shape ``(B, D)``."""
    return batch.mean(dim=(2, 3))


def _described(batches: Iterable[Tensor], processes: Processes) -> tuple[Tensor, int]:
    """Return what tells the kinds of at most ``_MOST_IMAGES`` images, and the spacing of these among all."""

    def thinned(total: int, numbers: Tensor, values: Tensor) -> tuple[int, Tensor, Tensor]:
        spacing = 2 ** max(0, ceil(log2(total / _MOST_IMAGES)))
        chosen = numbers % spacing == 0
        return spacing, numbers[chosen], values[chosen]

    images, seen = [], 0
    for batch in batches:
        numbers = processes.rank + processes.count * torch.arange(seen, seen + len(batch), device=batch.device)
        seen += len(batch)
        images.append((numbers, _means(batch)))
        images = [thinned(int(numbers[-1]) + 1, *map(torch.cat, zip(*images, strict=True)))[1:]]
    total = int(processes.add(torch.tensor(seen)))
    spacing, numbers, own = thinned(total, *images[0])
    described = own.new_zeros(ceil(total / spacing), own.shape[1])
    described[numbers // spacing] = own
    return processes.add(described), spacing


def clusters(descriptors: Tensor, most: int) -> Tensor:
    """Find clusters by k-means, always from the same seed.

    Args:
        descriptors: One for each image, shape ``(N, F)``.
        most: Number of clusters; those with too few images are given up.

    Returns:
        The clusters' centres, shape ``(K, F)``; see :func:`nearest`.
    """
    values = descriptors.double().cpu().numpy()
    found = KMeans(min(most, len(values)), n_init=_RESTARTS, random_state=_SEED).fit(values)
    centres = torch.from_numpy(found.cluster_centers_).to(descriptors)
    while True:
        sizes = nearest(descriptors, centres).bincount(minlength=len(centres))
        if len(centres) == 1 or int(sizes.min()) >= _FEWEST_IMAGES:
            return centres
        centres = centres[torch.arange(len(centres), device=centres.device) != sizes.argmin()]


def nearest(descriptors: Tensor, centres: Tensor) -> Tensor:
    """Return which of the centres ``(K, F)`` is nearest to each descriptor ``(N, F)``, shape ``(N,)``."""
    return torch.cdist(descriptors, centres).argmin(dim=1)


def _labelled(fields: Iterable[Tensor], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of fields with their part of all labels."""
    start = 0
    for field in fields:
        yield field, labels[start : start + len(field)]
        start += len(field)


def moments_of(
    images: Iterable[tuple[Tensor, Tensor]], count: int, processes: Processes = ALONE
) -> list[StreamingMoments]:
    """Return the moments of the images of each label.

    Args:
        images: Fields ``(B, D, h, w)`` in batches, and their labels ``(B,)``.
        count: Number of labels.
        processes: Who has the other images.
    """
    moments = [StreamingMoments() for _ in range(count)]
    for field, label in images:
        vectors = field.flatten(2).permute(2, 0, 1)
        for index, one in enumerate(moments):
            one.update(vectors[:, label == index])
    return [one.pooled(processes) for one in moments]


@dataclass(eq=False)
class _Branch:
    """A branch of the tree of clusters, and the likeliest way to cut it."""

    halves: Halves
    centre: Tensor
    nll: float
    kinds: list[list[int]]  # by the numbers of clusters

    @property
    def count(self) -> int:
        return sum(half.count for half in self.halves)

    def distance(self, other: "_Branch") -> float:
        """Return by how much joining grows the sum of squared distances from the centres (Ward 1963)."""
        share = self.count * other.count / (self.count + other.count)
        return share * float((self.centre - other.centre).square().sum())

    def joined(self, other: "_Branch", gaussian: PositionGaussian) -> "_Branch":
        """Return the branch that these two make."""
        even, odd = (one.merged(two) for one, two in zip(self.halves, other.halves, strict=True))
        together, apart = cross_validated_nll((even, odd), gaussian), self.nll + other.nll
        kinds = self.kinds + other.kinds
        if together <= apart:
            kinds = [[cluster for kind in kinds for cluster in kind]]
        centre = torch.lerp(self.centre, other.centre, other.count / (self.count + other.count))
        return _Branch((even, odd), centre, min(together, apart), kinds)


def joined_where_likelier(halves: Sequence[Halves], centres: Tensor, gaussian: PositionGaussian) -> Tensor:
    """Join clusters where that makes held-out images likelier.

    Joining the nearest two until one is left gives a tree. It is cut where each half of the images is likeliest under
    the Gaussians of the other.

    Args:
        halves: Moments of both halves of each cluster's images.
        centres: Centres of the clusters, shape ``(K, F)``.
        gaussian: What is fitted on them, one after another.

    Returns:
        Each cluster's kind, shape ``(K,)``.
    """
    branches = [
        _Branch(pair, centre, cross_validated_nll(pair, gaussian), [[index]])
        for index, (pair, centre) in enumerate(zip(halves, centres, strict=True))
    ]
    while len(branches) > 1:
        one, other = min(combinations(branches, 2), key=lambda pair: pair[0].distance(pair[1]))
        branches = [branch for branch in branches if branch not in {one, other}] + [one.joined(other, gaussian)]
    result = torch.zeros(len(halves), dtype=torch.int64)
    for kind, members in enumerate(branches[0].kinds):
        result[members] = kind
    return result


def cross_validated_nll(halves: Halves, gaussian: PositionGaussian) -> float:
    """Sum the negative log densities, in nats, of each half of the images under Gaussians fitted on the other.

    Args:
        halves: Moments of both; the sum is infinite where one is empty.
        gaussian: What is fitted on each.
    """
    if not all(half.count for half in halves):
        return inf
    total = 0.0
    for fitted, held_out in (halves, halves[::-1]):
        gaussian.fit_moments(fitted, StreamingMoments())
        whitener = gaussian.whitener.to(fitted.mean)
        offset = (whitener @ (held_out.mean - fitted.mean).unsqueeze(-1)).square().sum()
        spread = (whitener @ held_out.covariance() * whitener).sum()
        total += held_out.count * float(0.5 * (offset + spread) + gaussian.log_normaliser.double().sum())
    return total
