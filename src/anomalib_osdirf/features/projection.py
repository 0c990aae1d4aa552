# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Standardisation and PCA, optionally whitening, as one affine map."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.features.statistics import StreamingMoments

# A direction whose variance is below this share of the largest is numerical noise: it is not blown up to unit variance.
_RELATIVE_EIGENVALUE_FLOOR = 1e-6
# Below it a channel only rounds differently, as those of colour do on grey images; exports round differently, too.
_RELATIVE_STD_FLOOR = 1e-5


class PCAProjection(nn.Module):
    """Per-channel standardisation followed by PCA whitening, with training statistics in buffers.

    Args:
        in_channels: Channels C of the features.
        rank: Largest number of principal components r kept; no more than C exist. ``None`` standardises only (r = C).
        whiten: Scale the components to unit variance; otherwise each keeps its own.

    Raises:
        ValueError: If ``rank`` is not positive.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, in_channels: int, rank: int | None, whiten: bool = True) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            msg = f"feature_dim={rank} is not positive; use 1 to {in_channels} for these layers, or null for no PCA."
            raise ValueError(msg)
        self.rank = rank and min(rank, in_channels)
        self.whiten = whiten
        self.out_channels = self.rank or in_channels
        self.register_buffer("weight", torch.zeros(self.out_channels, in_channels))
        self.register_buffer("bias", torch.zeros(self.out_channels))

    def fit(self, moments: StreamingMoments) -> None:
        """Set the map from the moments of the training features.

        Args:
            moments: Moments of all training feature vectors, ``mean`` of shape ``(C,)``.
        """
        covariance = moments.covariance()
        std = covariance.diagonal().sqrt()
        # A channel that never changes carries no signal: it is centred and left at zero.
        scale = torch.where(std > _RELATIVE_STD_FLOOR * std.max(), 1 / std, 0.0)
        if self.rank is None:
            weight = torch.diag(scale)
        else:
            correlation = scale[:, None] * covariance * scale[None, :]
            eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
            eigenvalues, eigenvectors = eigenvalues.flip(0)[: self.rank], eigenvectors.flip(1)[:, : self.rank]
            # The sign of an eigenvector is arbitrary: fix it, so that machines agree.
            largest = eigenvectors.gather(0, eigenvectors.abs().argmax(dim=0, keepdim=True))
            eigenvectors = eigenvectors * torch.where(largest < 0, -1.0, 1.0)
            floor = _RELATIVE_EIGENVALUE_FLOOR * eigenvalues[0].clamp_min(1e-12)
            if self.whiten:
                eigenvectors = eigenvectors / eigenvalues.clamp_min(floor).sqrt()
            weight = eigenvectors.T * scale
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ moments.mean)

    def forward(self, features: Tensor) -> Tensor:
        """Project features.

        Args:
            features: Shape ``(B, C, h, w)``.

        Returns:
            Features z, whitened unless ``whiten`` is false, shape ``(B, r, h, w)``.
        """
        return functional.conv2d(features, self.weight[:, :, None, None], self.bias)
