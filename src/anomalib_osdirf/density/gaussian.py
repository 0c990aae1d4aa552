# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussian negative log densities of a field, per position."""

from abc import ABC, abstractmethod
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_osdirf.features.statistics import StreamingMoments

DENSITIES = ("standard", "position_full")

# Keeps the factorisation alive where a position never varies (identical training images), far below real variances.
_VARIANCE_FLOOR = 1e-6


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


class Density(nn.Module, ABC):
    """A Gaussian over the field's channels at every position of the grid.

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

    @abstractmethod
    def fit(self, moments: StreamingMoments) -> None:
        """Fit the Gaussian.

        Args:
            moments: Moments of the training images' fields, ``mean`` of shape ``(P, D)`` for P = h w positions.
        """

    @property
    @abstractmethod
    def normaliser(self) -> Tensor | float:
        """Negative log density at the mean, in nats: a number, or one for each position, shape ``(P,)``."""

    @abstractmethod
    def squared_distance(self, field: Tensor) -> Tensor:
        """Squared Mahalanobis distance from the mean.

        Args:
            field: Shape ``(B, D, h, w)``.

        Returns:
            Shape ``(B, h w)``.
        """

    def forward(self, field: Tensor) -> Tensor:
        """Negative log density in nats.

        Args:
            field: Shape ``(B, D, h, w)``.

        Returns:
            Shape ``(B, h, w)``.
        """
        nll = 0.5 * self.squared_distance(field) + self.normaliser
        return nll.unflatten(1, field.shape[-2:])


class StandardGaussian(Density):
    """The standard normal N(0, I): half the squared length of the field, up to a constant.

    Args:
        dim: Channels D of the field.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def fit(self, moments: StreamingMoments) -> None:
        """Note that the field was seen; N(0, I) has nothing to fit."""
        self.num_images = moments.count

    @property
    def normaliser(self) -> float:
        """See :attr:`Density.normaliser`."""
        return 0.5 * self.dim * log(2 * pi)

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return field.square().sum(dim=1).flatten(1)


class PositionGaussian(Density):
    """A Gaussian with full covariance for each position, shrunk by OAS so that few images suffice.

    Args:
        dim: Channels D of the field.
        grid_size: Side of the grid; there are ``grid_size ** 2`` Gaussians.
    """

    mean: Tensor
    whitener: Tensor
    log_normaliser: Tensor

    def __init__(self, dim: int, grid_size: int) -> None:
        super().__init__()
        positions = grid_size * grid_size
        self.register_buffer("mean", torch.zeros(positions, dim))
        self.register_buffer("whitener", torch.zeros(positions, dim, dim))
        self.register_buffer("log_normaliser", torch.zeros(positions))

    def fit(self, moments: StreamingMoments) -> None:
        """See :meth:`Density.fit`. The inverse Cholesky factor is kept, so that scoring is one matrix product."""
        covariance = moments.covariance()
        dim = covariance.shape[-1]
        identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
        shrinkage = oas_shrinkage(covariance, moments.count)[:, None, None]
        mu = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
        covariance = (1 - shrinkage) * covariance + (shrinkage * mu + _VARIANCE_FLOOR) * identity
        factor = torch.linalg.cholesky(covariance)
        whitener = torch.linalg.solve_triangular(factor, identity, upper=False)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        self.mean.copy_(moments.mean)
        self.whitener.copy_(whitener)
        self.log_normaliser.copy_(0.5 * (log_determinant + dim * log(2 * pi)))
        self.num_images = moments.count

    @property
    def normaliser(self) -> Tensor:
        """See :attr:`Density.normaliser`."""
        return self.log_normaliser

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        vectors = field.flatten(2).permute(2, 0, 1) - self.mean.unsqueeze(1)  # (P, B, D)
        whitened = torch.bmm(vectors, self.whitener.transpose(1, 2))
        return whitened.square().sum(dim=2).transpose(0, 1)


def build_density(name: str, dim: int, grid_size: int) -> Density:
    """Build an unfitted density.

    Args:
        name: One of :data:`DENSITIES`.
        dim: Channels of the field.
        grid_size: Side of the grid.

    Returns:
        The density.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "standard":
        return StandardGaussian(dim)
    if name == "position_full":
        return PositionGaussian(dim, grid_size)
    msg = f"density={name!r} is unknown; use one of {', '.join(DENSITIES)}."
    raise ValueError(msg)
