# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Image scores from the map of negative log densities."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from anomalib_osdirf.density.mixture import SeveralKinds
from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.processes import ALONE, Processes

IMAGE_SCORES = ("max", "top_k", "mean")

# Between the largest positions, best for small defects, and all of them, best for large ones (model card, ablation).
_TOP_SHARE = 1 / 3
# Of a Gaussian, this share lies below one standard deviation above the mean.
_ONE_STANDARD_DEVIATION = 0.8413
# Below this share of its size, a quantity that should vary between images is rounding noise.
_NO_SPREAD = 1e-6


def image_score(nll: Tensor, method: str) -> Tensor:
    """Reduce the map of one image to its score, looking at no other image.

    Args:
        nll: Negative log densities, shape ``(B, h, w)``, nats.
        method: ``max``; ``top_k``, the mean of the largest third of the positions (at least one); or ``mean``, the
            density of the whole field by position.

    Returns:
        Scores, shape ``(B,)``, nats.

    Raises:
        ValueError: If ``method`` is unknown.
    """
    values = nll.flatten(1)
    if method == "max":
        return values.amax(dim=1)
    if method == "mean":
        return values.mean(dim=1)
    if method == "top_k":
        k = max(1, round(_TOP_SHARE * values.shape[1]))
        return values.topk(k, dim=1).values.mean(dim=1)
    msg = f"image_score={method!r} is unknown; use one of {', '.join(IMAGE_SCORES)}."
    raise ValueError(msg)


class StandardisedSum(nn.Module):
    """Sum of several quantities, each in standard deviations of the training images from their mean.

    InvAD's released evaluation brings NLL and Diff to one scale by their minima and maxima over the test set, anomalies
    included; the constants here come from normal training images.

    Args:
        num_terms: Number of quantities.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_terms))
        self.register_buffer("offset", torch.zeros(num_terms))

    def fit(self, terms: Iterable[Tensor], processes: Processes = ALONE) -> None:
        """Set the constants.

        Args:
            terms: The quantities of all training images in batches, shape ``(B, num_terms)`` each, two images at least.
            processes: Who has those of the other images.
        """
        moments = StreamingMoments()
        for batch in terms:
            moments.update(batch)
        moments = moments.pooled(processes)
        variance = moments.covariance().diagonal()
        std, size = variance.sqrt(), (variance + moments.mean.square()).sqrt()
        scale = torch.where(std > _NO_SPREAD * size, 1 / std, 1.0)
        self.scale.copy_(scale)
        self.offset.copy_(-scale * moments.mean)

    def forward(self, terms: Tensor) -> Tensor:
        """Map quantities ``(B, num_terms)`` to their sums ``(B,)``."""
        return (terms * self.scale + self.offset).sum(dim=1)


class SumByKind(SeveralKinds):
    """The same for images of several kinds, each by constants of its own, so that one threshold suits all.

    The constants are medians and the distances from there up to one standard deviation of a Gaussian: what few odd
    training images score must not matter, nor how seldom a kind scores low.

    Args:
        num_terms: Number of quantities.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(0, num_terms))
        self.register_buffer("offset", torch.zeros(0, num_terms))

    def fit(self, images: Iterable[tuple[Tensor, Tensor]], count: int, processes: Processes = ALONE) -> None:
        """Set the constants.

        Args:
            images: The quantities of all training images in batches, shape ``(B, num_terms)`` each, and their kinds,
                shape ``(B,)``; a kind of fewer than two images takes the constants of all.
            count: Number of kinds.
            processes: Who has those of the other images.
        """
        terms, kinds = (processes.gathered(torch.cat(parts)) for parts in zip(*images, strict=True))
        groups = [terms[kinds == kind].double() for kind in range(count)]
        groups = [group if len(group) > 1 else terms.double() for group in groups]
        median = torch.stack([group.quantile(0.5, dim=0) for group in groups])
        spread = torch.stack([group.quantile(_ONE_STANDARD_DEVIATION, dim=0) for group in groups]) - median
        scale = torch.where(spread > _NO_SPREAD * median.abs(), 1 / spread, 1.0)
        self.set_buffers(scale=scale, offset=-scale * median)

    def forward(self, terms: Tensor, kind: Tensor) -> Tensor:
        """Map quantities ``(B, num_terms)`` of images of some kinds ``(B,)`` to their sums ``(B,)``."""
        return (terms * self.scale[kind] + self.offset[kind]).sum(dim=1)
