# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussians on a fine grid, whose neighbouring positions share a covariance."""

import copy
from math import gcd
from typing import cast

import torch
from torch import Tensor

from anomalib_osdirf.density.gaussian import Density, LeaveOneOut, PositionGaussian, shrunk
from anomalib_osdirf.features.statistics import StreamingMoments

_BLOCK_SIZE = 2


class BlockGaussian(PositionGaussian):
    """A mean for each position, and a full covariance for each block of 2 x 2 neighbours: the mean of theirs.

    Reading the covariances is what scoring one image on a fine grid costs, and neighbours covary alike. They are shrunk
    as of :class:`PositionGaussian` with ``oas``, a block being one sample of each image.

    Args:
        dim: Channels D of the field.
        grid_size: Side of the grid; with an odd one, each position has its own covariance.
    """

    def __init__(self, dim: int, grid_size: int) -> None:
        side = gcd(grid_size, _BLOCK_SIZE)
        super().__init__(dim, grid_size, num_covariances=(grid_size // side) ** 2)
        self.side = side
        self.blocks = grid_size // side

    def fit_moments(self, even: StreamingMoments, odd: StreamingMoments) -> None:
        """See :meth:`Gaussian.fit_moments`."""
        blocks = self._block_moments(even.merged(odd))
        super().fit_moments(blocks, StreamingMoments())

    def leave_one_out(self, moments: StreamingMoments) -> Density:
        """See :meth:`Gaussian.leave_one_out`; the shrinkage stays that of all images."""
        intensity, variance = self.shrinking
        around = copy.deepcopy(self).double()
        grown = moments.count / (moments.count - 1)
        covariance = self._block_moments(moments).covariance()
        around.set_gaussian(moments.mean, shrunk(grown * covariance, intensity, variance))
        return BlockLeaveOneOut(around, moments.count, 1 - intensity)

    @property
    def normaliser(self) -> Tensor:
        """See :attr:`Gaussian.normaliser`."""
        return self.from_blocks(self.log_normaliser.unsqueeze(1).expand(-1, self.side**2))

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`; all is computed before it is reordered, or OpenVINO forgets its precision."""
        nll = 0.5 * self._block_distances(field) + self.log_normaliser[:, None]
        return self._in_rows(nll).unflatten(1, (1, *field.shape[-2:]))

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`."""
        return self._in_rows(self._block_distances(field))

    def whitened(self, field: Tensor) -> Tensor:
        """Return fields ``(B, D, h, w)`` without mean and covariance, in G blocks of n: shape ``(G, n B, D)``."""
        vectors = self.to_blocks(field.flatten(2).permute(2, 0, 1) - self.mean.unsqueeze(1))
        return torch.bmm(vectors.flatten(1, 2), self.whitener.transpose(1, 2))

    def to_blocks(self, values: Tensor) -> Tensor:
        """Bring what each of P = G n positions has, shape ``(P, ...)``, into G blocks of n: shape ``(G, n, ...)``."""
        rows = values.unflatten(0, (self.blocks, self.side, self.blocks, self.side)).transpose(1, 2)
        return rows.flatten(2, 3).flatten(0, 1)

    def from_blocks(self, values: Tensor) -> Tensor:
        """Undo :meth:`to_blocks`."""
        rows = values.unflatten(1, (self.side, self.side)).unflatten(0, (self.blocks, self.blocks)).transpose(1, 2)
        return rows.flatten(0, 3)

    def _block_distances(self, field: Tensor) -> Tensor:
        """Squared Mahalanobis distances, shape ``(G, n B)``."""
        return self.whitened(field).square().sum(dim=2)

    def _in_rows(self, values: Tensor) -> Tensor:
        """Bring values ``(G, n B)`` into the order of the field's positions, shape ``(B, P)``."""
        return self.from_blocks(values.unflatten(1, (self.side**2, -1))).T

    def _block_moments(self, moments: StreamingMoments) -> StreamingMoments:
        """Return moments with each position's mean, and each block's mean scatter."""
        shared = StreamingMoments()
        shared.count, shared.mean = moments.count, moments.mean
        shared.scatter = self.to_blocks(moments.scatter).mean(dim=1)
        return shared


class BlockLeaveOneOut(LeaveOneOut):
    """The same where an image has n vectors in each block: its term has rank n (Woodbury 1950).

    With K the n x n inner products of its whitened vectors and c = (1 - s) n_images / (n (n_images - 1)^2), squared
    distances are the diagonal of ``(n_images / (n_images - 1))^2 K (1 - c K)^-1``, and the determinant is that of B
    times that of 1 - c K.
    """

    def map(self, field: Tensor) -> Tensor:
        """See :meth:`Density.map`; the field must be that of images of the fit."""
        distance, log_determinant = self._distance_and_log_determinant(field)
        nll = 0.5 * (distance + log_determinant) + self.around.normaliser
        return nll.unflatten(1, (1, *field.shape[-2:])).to(field.dtype)

    def squared_distance(self, field: Tensor) -> Tensor:
        """See :meth:`Density.squared_distance`; the field must be that of images of the fit."""
        return self._distance_and_log_determinant(field)[0].to(field.dtype)

    def _distance_and_log_determinant(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared distances, and log det (1 - c K), both ``(B, P)``."""
        around = cast("BlockGaussian", self.around)
        vectors = around.whitened(field.double()).unflatten(1, (around.side**2, -1)).transpose(1, 2)  # (G, B, n, D)
        products = vectors @ vectors.mT
        size = products.shape[-1]
        share = torch.as_tensor(self.share, device=field.device).reshape(-1, 1, 1, 1)
        weight = share * self.count / (size * (self.count - 1) ** 2)
        remainder = torch.eye(size, dtype=products.dtype, device=field.device) - weight * products
        factor = torch.linalg.cholesky(remainder)
        distance = torch.cholesky_solve(products, factor).diagonal(dim1=-2, dim2=-1)  # (G, B, n)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1, keepdim=True)
        grown = (self.count / (self.count - 1)) ** 2
        distance, log_determinant = grown * distance, log_determinant.expand_as(distance)
        return around.from_blocks(distance.mT).T, around.from_blocks(log_determinant.mT).T
