# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Score normalisation in units of held-out normal variation, and the image score."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring.densities import FittedBuffers

# Share of the positions whose mean stands beside the maximum in an image's score (docs/lab-notes.md).
_TOP_SHARE = 0.1
# Of a Gaussian, this share lies below one standard deviation above the mean.
_ONE_STANDARD_DEVIATION = 0.8413
# Below this share of its size, a quantity that should vary between images is rounding noise.
_NO_SPREAD = 1e-6


class PositionStatistics:
    """Mean and variance of held-out values per position and cluster, accumulated image by image."""

    def __init__(self, clusters: int, size: Sequence[int], device: torch.device) -> None:
        # Of even and odd images: number, sum, sum of squares.
        self.sums = torch.zeros(2, clusters, 3, *size, dtype=torch.float64, device=device)

    def update(self, values: Tensor, cluster: Tensor, numbers: Tensor) -> None:
        """Add images ``(B, h, w)`` of clusters ``(B,)`` and numbers ``(B,)``."""
        values = values.double()
        powers = torch.stack([torch.ones_like(values), values, values.square()], dim=1)
        self.sums.index_put_((numbers % 2, cluster), powers, accumulate=True)

    def shrunk(self, processes: DistributedContext = ALONE) -> tuple[Tensor, Tensor]:
        """Means and standard deviations, each shrunk towards its mean over all positions by how reliable it is.

        The correlation r of two halves of the images tells the reliability 2 r / (1 + r) of the whole (Spearman 1910,
        Brown 1910): with few images, or where position does not matter, all positions share one unit. A cluster of
        fewer than two images has the units of all.

        Returns:
            Both of shape ``(C, h, w)``.
        """
        sums = processes.add(self.sums)
        few = sums[:, :, 0].sum(dim=0) < 2  # (C, h, w)
        sums = torch.where(few[:, None], sums.sum(dim=1, keepdim=True), sums)
        halves = [_mean_and_log_variance(half) for half in sums]
        whole = _mean_and_log_variance(sums.sum(dim=0))
        mean, log_variance = (_shrunk(value, even, odd) for value, even, odd in zip(whole, *halves, strict=True))
        return mean, (log_variance / 2).exp()


def _mean_and_log_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, of sums ``(C, 3, h, w)``, shape ``(C, h, w)``."""
    count, first, second = sums.unbind(dim=1)
    mean = first / count.clamp_min(1)
    variance = second / count.clamp_min(1) - mean.square()
    floor = (_NO_SPREAD * (variance + mean.square()).mean(dim=(1, 2), keepdim=True).sqrt()).square()
    return mean, torch.maximum(variance, floor.clamp_min(_NO_SPREAD**2)).log()


def _shrunk(value: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    centred = [half - half.mean(dim=(1, 2), keepdim=True) for half in (even, odd)]
    spread = (centred[0].square().mean(dim=(1, 2)) * centred[1].square().mean(dim=(1, 2))).sqrt()
    products = (centred[0] * centred[1]).mean(dim=(1, 2))
    correlation = torch.where(spread > 0, products / spread, 0.0).clamp(0, 1)
    reliability = (2 * correlation / (1 + correlation))[:, None, None]
    mean = value.mean(dim=(1, 2), keepdim=True)
    return mean + reliability * (value - mean)


class HeldOutUnits(FittedBuffers):
    """Standardises negative log densities per position and cluster, by held-out normal images.

    Positions where normal images vary more therefore do not score higher.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(0, 0, 0))  # (C, h, w)
        self.register_buffer("offset", torch.zeros(0, 0, 0))

    def fit(self, mean: Tensor, deviation: Tensor) -> None:
        """Set means and standard deviations of held-out values, both ``(C, h, w)``."""
        self.set_buffers(scale=1 / deviation, offset=-mean / deviation)

    def forward(self, nll: Tensor, cluster: Tensor) -> Tensor:
        """Map values ``(B, h, w)`` of images of clusters ``(B,)`` to the same shape."""
        if len(self.scale) == 1:
            return nll * self.scale + self.offset
        return nll * self.scale[cluster] + self.offset[cluster]


class ImageScore(FittedBuffers):
    """The score of an image from its map: maximum plus mean of the largest tenth, for defects small and large.

    Each of the two is in units of held-out normal images of the image's cluster: its distance from their median, over
    the distance from there to their upper quantile of one standard deviation. Median and upper quantile are robust to
    outliers and to a skewed lower tail.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(0, 2))  # (C, 2)
        self.register_buffer("offset", torch.zeros(0, 2))

    @staticmethod
    def terms(values: Tensor) -> Tensor:
        """Return maximum and mean of the largest tenth of maps ``(B, h, w)``, shape ``(B, 2)``."""
        flat = values.flatten(1)
        count = max(1, round(_TOP_SHARE * flat.shape[1]))
        return torch.stack([flat.amax(dim=1), flat.topk(count, dim=1).values.mean(dim=1)], dim=1)

    def fit(self, terms: Tensor, cluster: Tensor, clusters: int) -> None:
        """Set the normalisation.

        Args:
            terms: Terms of all held-out images, shape ``(N, 2)``.
            cluster: Cluster of each, shape ``(N,)``; one of fewer than two images takes the normalisation of all.
            clusters: Number of clusters.
        """
        groups = [terms[cluster == index].double() for index in range(clusters)]
        groups = [group if len(group) > 1 else terms.double() for group in groups]
        median = torch.stack([group.quantile(0.5, dim=0) for group in groups])
        spread = torch.stack([group.quantile(_ONE_STANDARD_DEVIATION, dim=0) for group in groups]) - median
        scale = torch.where(spread > _NO_SPREAD * median.abs(), 1 / spread, 1.0)
        self.set_buffers(scale=scale, offset=-scale * median)

    def forward(self, values: Tensor, cluster: Tensor) -> Tensor:
        """Score maps ``(B, h, w)`` of images of clusters ``(B,)``: shape ``(B,)``."""
        return self.of_terms(self.terms(values), cluster)

    def of_terms(self, terms: Tensor, cluster: Tensor) -> Tensor:
        """Return scores ``(B,)`` of terms ``(B, 2)`` of images of clusters ``(B,)``."""
        scale, offset = (
            (self.scale, self.offset) if len(self.scale) == 1 else (self.scale[cluster], self.offset[cluster])
        )
        return (terms * scale + offset).sum(dim=1)
