# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussian negative log densities of a field, per position."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.processes import ALONE, Processes

logger = logging.getLogger(__name__)

SHRINKAGES = ("oas", "auto")

# Keeps the factorisation alive where a position never varies (identical training images), far below real variances.
_VARIANCE_FLOOR = 1e-6
# What shrinkage=auto chooses from.
_INTENSITIES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


def oas_shrinkage(covariance: Tensor, num_samples: int) -> Tensor:
    """Shrinkage intensity of the oracle approximating estimator (Chen, Wiesel, Eldar and Hero 2010, equation 23).

    Args:
        covariance: Maximum-likelihood covariances, shape ``(..., D, D)``.
        num_samples: Number of samples behind each.

    Returns:
        Intensity in [0, 1] towards ``trace(S) / D * I``, shape ``(...)``.
    """
    dim = covariance.shape[-1]
    mean_square = covariance.square().mean(dim=(-2, -1))
    mu_square = (covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)).square()
    denominator = (num_samples + 1) * (mean_square - mu_square / dim)
    intensity = (mean_square + mu_square) / denominator.clamp_min(torch.finfo(covariance.dtype).tiny)
    return intensity.clamp(max=1.0)


def shrunk(covariance: Tensor, intensity: Tensor | float, target_variance: Tensor | float = 1.0) -> Tensor:
    """Shrink covariances towards a multiple of the identity: (1 - s) S + s v I, and a floor on variances.

    Args:
        covariance: S, shape ``(..., D, D)``.
        intensity: s in [0, 1], a number or of shape ``(...)``.
        target_variance: v, likewise.

    Returns:
        Shape of ``covariance``.
    """
    intensity, variance = (
        torch.as_tensor(value, dtype=covariance.dtype, device=covariance.device)[..., None, None]
        for value in (intensity, target_variance)
    )
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - intensity) * covariance + (intensity * variance + _VARIANCE_FLOOR) * identity


def held_out_nll(fitted: StreamingMoments, held_out: StreamingMoments, intensities: Tensor) -> Tensor:
    """Mean negative log density of samples under Gaussians fitted on others, from the moments of both.

    With S the shrunk covariance of the fitted samples, m their mean, and C, c those of the others, it is
    ``(log det S + trace(S^-1 (C + (c - m)(c - m)^T)) + D log 2 pi) / 2``. All shrunk covariances share their
    eigenvectors, so one decomposition serves every intensity.

    Args:
        fitted: Moments that the Gaussians are fitted on, one for each group.
        held_out: Moments of the samples that are evaluated.
        intensities: Shrinkage intensities towards the identity, shape ``(S,)``.

    Returns:
        Mean over groups and samples in nats, shape ``(S,)``.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(fitted.covariance())  # (P, D), (P, D, D)
    offset = (held_out.mean - fitted.mean).unsqueeze(-2) @ eigenvectors
    spread = (eigenvectors * (held_out.covariance() @ eigenvectors)).sum(dim=-2) + offset.squeeze(-2).square()
    intensity = intensities[:, None, None]
    variances = (1 - intensity) * eigenvalues.clamp_min(0) + intensity + _VARIANCE_FLOOR  # (S, P, D)
    return 0.5 * (variances.log() + spread / variances + log(2 * pi)).sum(dim=-1).mean(dim=-1)


def likeliest_shrinkage(halves: tuple[StreamingMoments, StreamingMoments]) -> float:
    """Choose the intensity towards the identity under which either half of the samples tells the other best.

    Args:
        halves: Moments of both halves.

    Returns:
        One of a fixed list, for all groups together; 1 where a half is empty.
    """
    if not all(half.count for half in halves):
        return 1.0
    intensities = torch.tensor(_INTENSITIES, dtype=torch.float64, device=halves[0].mean.device)
    nll = held_out_nll(halves[0], halves[1], intensities) + held_out_nll(halves[1], halves[0], intensities)
    return _INTENSITIES[int(nll.argmin())]


class Density(nn.Module, ABC):
    """What fields are scored by: a Gaussian over their channels at every position of the grid.

    ``num_images`` counts the training images that it was fitted on; 0 means never fitted. It is part of the state
    dict, so that a checkpoint knows whether it can score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_images = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state dict keeps besides tensors."""
        return {"num_images": self.num_images}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.num_images = state["num_images"]

    def choose(self, field: Tensor) -> Tensor | None:
        """Return the number of the Gaussians that each image is scored by, shape ``(B,)``, where there are several.

        Args:
            field: Shape ``(B, D, h, w)``.
        """
        del field
        return None

    def buffers_in_use(self) -> dict[str, Tensor]:
        """Return the buffers that scoring reads, by name."""
        return dict(self.named_buffers())

    @abstractmethod
    def squared_distance(self, field: Tensor) -> Tensor:
        """Squared Mahalanobis distance from the mean.

        Args:
            field: Shape ``(B, D, h, w)``.

        Returns:
            Shape ``(B, h w)``.
        """

    @abstractmethod
    def map(self, field: Tensor) -> Tensor:
        """Negative log density in nats as an image of one channel.

        Args:
            field: Shape ``(B, D, h, w)``.

        Returns:
            Shape ``(B, 1, h, w)``.
        """

    def forward(self, field: Tensor) -> Tensor:
        """Negative log density in nats.

        Args:
            field: Shape ``(B, D, h, w)``.

        Returns:
            Shape ``(B, h, w)``.
        """
        return self.map(field).squeeze(1)


class FittedDensity(Density):
    """A density that can be fitted on training images."""

    @abstractmethod
    def fit(self, fields: Iterable[Tensor], processes: Processes = ALONE) -> Callable[[], Density]:
        """Fit in one pass.

        Args:
            fields: The training images' fields in batches, shape ``(B, D, h, w)`` each.
            processes: Who has the fields of the other images.

        Returns:
            What makes a density for these images, each as if it had been left out of the fit.
        """


class Gaussian(FittedDensity):
    """A Gaussian at every position, the same for all images."""

    def fit(self, fields: Iterable[Tensor], processes: Processes = ALONE) -> Callable[[], Density]:
        """See :meth:`FittedDensity.fit`."""
        halves = StreamingMoments(), StreamingMoments()
        number = processes.rank
        for field in fields:
            vectors = field.flatten(2).permute(2, 0, 1)
            numbers = number + processes.count * torch.arange(field.shape[0], device=field.device)
            for parity, half in enumerate(halves):
                half.update(vectors[:, numbers % 2 == parity])
            number += processes.count * field.shape[0]
        even, odd = (half.pooled(processes) for half in halves)
        self.fit_moments(even, odd)
        moments = even.merged(odd)
        self.num_images = moments.count
        return partial(self.leave_one_out, moments)

    @abstractmethod
    def fit_moments(self, even: StreamingMoments, odd: StreamingMoments) -> None:
        """Fit the Gaussian.

        Args:
            even: Moments of every other training image's field from the first on, ``mean`` of shape ``(P, D)`` for
                P = h w positions.
            odd: Those of the rest.
        """

    def leave_one_out(self, moments: StreamingMoments) -> Density:
        """Return a density for the images that this one was just fitted on, each as if left out of the fit.

        What is fitted on all positions together is kept: one image is next to nothing of it.

        Args:
            moments: Moments of all these images' fields.
        """
        del moments
        return self

    @property
    @abstractmethod
    def normaliser(self) -> Tensor | float:
        """Negative log density at the mean, in nats: a number, or of shape ``(P,)`` or ``(1,)``."""

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`."""
        nll = 0.5 * self.squared_distance(field) + self.normaliser
        return nll.unflatten(1, (1, *field.shape[-2:]))


class StandardGaussian(Gaussian):
    """The standard normal N(0, I): half the squared length of the field, up to a constant.

    Args:
        dim: Channels D of the field.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def fit_moments(self, even: StreamingMoments, odd: StreamingMoments) -> None:
        """See :meth:`Gaussian.fit_moments`; N(0, I) has nothing to fit."""

    @property
    def normaliser(self) -> float:
        """See :attr:`Gaussian.normaliser`."""
        return 0.5 * self.dim * log(2 * pi)

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return field.square().sum(dim=1).flatten(1)


class DiagonalGaussian(Gaussian):
    """A Gaussian of independent channels: a mean and a variance for each, at each position or for all of them.

    Standardising is kept as scale * field + offset, the form that converters leave as it is.

    Args:
        dim: Channels D of the field.
        num_positions: Number of positions P, or 1 for one Gaussian over all positions.
    """

    scale: Tensor
    offset: Tensor
    log_normaliser: Tensor

    def __init__(self, dim: int, num_positions: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(dim, num_positions))
        self.register_buffer("offset", torch.zeros(dim, num_positions))
        self.register_buffer("log_normaliser", torch.zeros(num_positions))

    def fit_moments(self, even: StreamingMoments, odd: StreamingMoments) -> None:
        """See :meth:`Gaussian.fit_moments`."""
        moments = even.merged(odd)
        mean, variance = moments.mean, moments.covariance().diagonal(dim1=-2, dim2=-1)  # (P, D)
        if self.scale.shape[1] == 1:
            # Within positions and between them: every position has as many samples as the others.
            variance = (variance + mean.var(dim=0, correction=0)).mean(dim=0, keepdim=True)
            mean = mean.mean(dim=0, keepdim=True)
        self.set_gaussian(mean, variance + _VARIANCE_FLOOR)

    def set_gaussian(self, mean: Tensor, variance: Tensor) -> None:
        """Set mean and variances, both ``(P, D)``."""
        std = variance.sqrt()
        self.scale.copy_((1 / std).T)
        self.offset.copy_((-mean / std).T)
        self.log_normaliser.copy_(std.log().sum(dim=1) + 0.5 * mean.shape[1] * log(2 * pi))

    def leave_one_out(self, moments: StreamingMoments) -> Density:
        """See :meth:`Gaussian.leave_one_out`."""
        if self.scale.shape[1] == 1:
            return self
        grown = moments.count / (moments.count - 1)
        around = copy.deepcopy(self).double()
        around.set_gaussian(moments.mean, grown * moments.covariance().diagonal(dim1=-2, dim2=-1) + _VARIANCE_FLOOR)
        return LeaveOneOut(around, moments.count, 1.0)

    def parts(self, field: Tensor) -> Tensor:
        """Squared distance of each channel, shape ``(B, D, h w)``."""
        return (field.flatten(2) * self.scale + self.offset).square()

    @property
    def normaliser(self) -> Tensor:
        """See :attr:`Gaussian.normaliser`."""
        return self.log_normaliser

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return self.parts(field).sum(dim=1)


class PositionGaussian(Gaussian):
    """A Gaussian with full covariance for each position, shrunk so that few images suffice.

    The mean is kept in any case. ``oas`` shrinks each position's covariance S towards trace(S) / D I, the intensity
    that of the oracle approximating estimator. A number s shrinks all towards that of N(0, I), to (1 - s) S + s I.
    ``auto`` is the one of a few such numbers under which every other training image makes the rest likeliest.

    Args:
        dim: Channels D of the field.
        grid_size: Side of the grid; there are ``grid_size ** 2`` Gaussians.
        shrinkage: ``oas``, ``auto`` or a number in [0, 1].
        num_covariances: Covariances to make room for, one for each position by default.

    Raises:
        ValueError: If ``shrinkage`` is none of these.
    """

    mean: Tensor
    whitener: Tensor
    log_normaliser: Tensor

    def __init__(
        self, dim: int, grid_size: int, shrinkage: float | str = "oas", num_covariances: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(shrinkage, str):
            known = shrinkage in SHRINKAGES
        else:
            known = not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1
        if not known:
            msg = f"shrinkage={shrinkage!r} is neither {' nor '.join(SHRINKAGES)} nor a number from 0 to 1; use one."
            raise ValueError(msg)
        self.shrinkage = shrinkage
        positions = grid_size * grid_size
        self.register_buffer("mean", torch.zeros(positions, dim))
        covariances = num_covariances or positions
        self.register_buffer("whitener", torch.zeros(covariances, dim, dim))
        self.register_buffer("log_normaliser", torch.zeros(covariances))

    def fit_moments(self, even: StreamingMoments, odd: StreamingMoments) -> None:
        """See :meth:`Gaussian.fit_moments`. The inverse Cholesky factor is kept: scoring is one matrix product."""
        moments = even.merged(odd)
        self.shrinking = self._intensity(moments, (even, odd))
        self.set_gaussian(moments.mean, shrunk(moments.covariance(), *self.shrinking))

    def set_gaussian(self, mean: Tensor, covariance: Tensor) -> None:
        """Set means ``(P, D)`` and covariances ``(P, D, D)``."""
        dim = covariance.shape[-1]
        identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
        factor = torch.linalg.cholesky(covariance)
        whitener = torch.linalg.solve_triangular(factor, identity, upper=False)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        self.mean.copy_(mean)
        self.whitener.copy_(whitener)
        self.log_normaliser.copy_(0.5 * (log_determinant + dim * log(2 * pi)))

    def _intensity(
        self, moments: StreamingMoments, halves: tuple[StreamingMoments, StreamingMoments]
    ) -> tuple[Tensor | float, Tensor | float]:
        """Return how much covariances are shrunk, and towards which variance."""
        if self.shrinkage == "oas":
            covariance = moments.covariance()
            mean_variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
            return oas_shrinkage(covariance, moments.count), mean_variance
        if self.shrinkage == "auto":
            intensity = likeliest_shrinkage(halves)
            logger.info("shrinkage=auto: %g is the likeliest on held-out training images.", intensity)
            return intensity, 1.0
        return float(self.shrinkage), 1.0

    def leave_one_out(self, moments: StreamingMoments) -> Density:
        """See :meth:`Gaussian.leave_one_out`; the shrinkage stays that of all images."""
        intensity, variance = self.shrinking
        around = copy.deepcopy(self).double()
        grown = moments.count / (moments.count - 1)
        around.set_gaussian(moments.mean, shrunk(grown * moments.covariance(), intensity, variance))
        return LeaveOneOut(around, moments.count, 1 - intensity)

    def parts(self, field: Tensor) -> Tensor:
        """Squared distance of all channels together, shape ``(B, 1, h w)``."""
        return self.squared_distance(field).unsqueeze(1)

    @property
    def normaliser(self) -> Tensor:
        """See :attr:`Gaussian.normaliser`."""
        return self.log_normaliser

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return self._squared_distance(field).T

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`; all is computed before the transposition, or OpenVINO forgets its precision."""
        nll = 0.5 * self._squared_distance(field) + self.log_normaliser[:, None]
        return nll.T.unflatten(1, (1, *field.shape[-2:]))

    def _squared_distance(self, field: Tensor) -> Tensor:
        """Squared Mahalanobis distances, shape ``(h w, B)``."""
        vectors = (field.flatten(2).permute(2, 0, 1) - self.mean.unsqueeze(1)).contiguous()  # (P, B, D)
        whitened = torch.bmm(vectors, self.whitener.transpose(1, 2))
        return whitened.square().sum(dim=2)


class LeaveOneOut(Density):
    """Gaussians that each image they were fitted on is left out of when it is scored.

    Without an image at d from the mean of n, mean and covariance are m - d / (n - 1) and
    ``n / (n - 1) S - n / (n - 1)^2 d d^T``, shrunk as before: a matrix B that all images share, minus a term of rank
    one. With q = d^T B^-1 d and c = (1 - s) n / (n - 1)^2 the squared distance is ``(n / (n - 1))^2 q / (1 - c q)``
    and the determinant that of B times 1 - c q (Sherman and Morrison 1950), at no more cost than a fitted density's.

    Args:
        around: The Gaussians of B around the means of all images, in float64.
        count: Number n of images, at least 2.
        share: Share 1 - s of S in the shrunk covariance, a number or of shape ``(P,)``.
    """

    def __init__(self, around: "DiagonalGaussian | PositionGaussian", count: int, share: Tensor | float) -> None:
        super().__init__()
        self.around = around
        self.count = count
        self.share = share
        self.num_images = count

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`; the field must be that of images of the fit."""
        return self._distance_and_remainder(field)[0].to(field.dtype)

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`; the field must be that of images of the fit."""
        distance, remainder = self._distance_and_remainder(field)
        nll = 0.5 * (distance + remainder.log().sum(dim=1)) + self.around.normaliser
        return nll.unflatten(1, (1, *field.shape[-2:])).to(field.dtype)

    def _distance_and_remainder(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared distances ``(B, P)``, and 1 - c q, which is positive but for rounding."""
        parts = self.around.parts(field.double())
        remainder = 1 - self.share * (self.count / (self.count - 1) ** 2) * parts
        remainder = remainder.clamp_min(torch.finfo(torch.float64).eps)
        grown = (self.count / (self.count - 1)) ** 2
        return (grown * parts / remainder).sum(dim=1), remainder
