# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Densities of features at every position of a grid: N(0, I), Gaussians per position, or a mixture shared by all."""

from collections.abc import Sequence
from math import gcd, log, pi
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_osdirf.features.statistics import StreamingMoments

# Keeps the factorisation alive where nothing varies (identical training images), far below real variances.
_RELATIVE_VARIANCE_FLOOR = 1e-6
_BLOCK_SIDE = 2


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


def shrunk_covariance(moments: StreamingMoments, floor: float) -> Tensor:
    """Covariances ``(..., D, D)`` shrunk by the oracle approximating estimator, ``floor`` on the diagonal."""
    covariance = moments.covariance()
    intensity = oas_shrinkage(covariance, moments.count)[..., None, None]
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - intensity) * covariance + (intensity * variance + floor) * identity


def precision_factors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise the precision of Gaussians of covariances ``(..., D, D)``.

    Returns:
        The inverse W of the covariance's Cholesky factor, shape ``(..., D, D)``: the squared Mahalanobis distance of x
        is ``|W (x - mean)|^2``. And the negative log density at the mean in nats, shape ``(...)``.
    """
    dim = covariance.shape[-1]
    factor = torch.linalg.cholesky(covariance)
    identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    precision_factor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return precision_factor, factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) + 0.5 * dim * log(2 * pi)


def variance_floor(groups: Sequence[StreamingMoments]) -> float:
    """Return a variance that is negligible beside that of all samples together."""
    count = sum(group.count for group in groups)
    variance = sum(group.scatter.diagonal(dim1=-2, dim2=-1).mean() for group in groups) / max(1, count)
    size = sum(group.count * group.mean.square().mean() for group in groups) / max(1, count)
    return _RELATIVE_VARIANCE_FLOOR * (float(variance) or float(size) or 1.0)


class FittedBuffers(nn.Module):
    """A module whose buffers take their shapes from a fit or a checkpoint."""

    def set_buffers(self, **values: Tensor) -> None:
        """Give buffers other values and shapes, on their device and in their precision."""
        for name, value in values.items():
            setattr(self, name, value.to(getattr(self, name)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the shapes of the state."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                self.set_buffers(**{name: buffer.new_zeros(saved.shape)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class StandardGaussian(nn.Module):
    """The standard normal N(0, I) (OSD-IRF's own density): half the squared length, up to a constant."""

    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        """Negative log density ``(B, h, w)``, in nats, of fields ``(B, D, h, w)``."""
        del cluster
        return 0.5 * x.square().sum(dim=1) + 0.5 * x.shape[1] * log(2 * pi)


class PositionGaussians(FittedBuffers):
    """A Gaussian with full covariance for each position, and for each cluster of images.

    With ``blocks``, the 2 x 2 positions of a block share a covariance, the mean of theirs: neighbours covary alike, and
    reading covariances is what scoring one image on a fine grid costs.

    Args:
        blocks: Whether positions share covariances. Then there is one cluster only.
    """

    mean: Tensor
    precision_factor: Tensor
    constant: Tensor

    def __init__(self, blocks: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("mean", torch.zeros(0, 0, 0))  # (K, P, D)
        self.register_buffer("precision_factor", torch.zeros(0, 0, 0, 0))  # (K, G, D, D)
        self.register_buffer("constant", torch.zeros(0, 0))  # (K, G)

    def fit_moments(
        self, clusters: Sequence[StreamingMoments], size: Sequence[int] | None = None
    ) -> "PositionGaussians":
        """Fit, given moments of each cluster at each position, ``mean`` of shape ``(P, D)``.

        ``size`` is the height and width of the grid, which is square unless told.
        """
        floor = variance_floor(clusters)
        size = size or [round(len(clusters[0].mean) ** 0.5)] * 2
        shared = [self._shared(moments, size) for moments in clusters]
        factors = [precision_factors(shrunk_covariance(moments, floor)) for moments in shared]
        self.set_buffers(
            mean=torch.stack([moments.mean for moments in clusters]),
            precision_factor=torch.stack([precision_factor for precision_factor, _ in factors]),
            constant=torch.stack([constant for _, constant in factors]),
        )
        return self

    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        """Negative log density ``(B, h, w)``, in nats, of fields ``(B, D, h, w)`` of images of clusters ``(B,)``."""
        if len(self.mean) == 1:
            return self._of_cluster(x, 0)
        assert cluster is not None
        if torch.compiler.is_exporting():  # no loop over what is in a batch, so each image's covariances are gathered
            return self._gathered(x, cluster)
        nll = x.new_empty(len(x), *x.shape[-2:])
        for index in cluster.unique().tolist():
            own = cluster == index
            nll[own] = self._of_cluster(x[own], index)
        return nll

    def _of_cluster(self, x: Tensor, cluster: int) -> Tensor:
        """Score images of one cluster; reordering comes last, or OpenVINO drops the marked precision."""
        size = x.shape[-2:]
        vectors = x.flatten(2).permute(2, 0, 1) - self.mean[cluster].unsqueeze(1)  # (P, B, D)
        if not self.blocks:
            whitened = torch.bmm(vectors.contiguous(), self.precision_factor[cluster].transpose(1, 2))
            nll = 0.5 * whitened.square().sum(dim=2) + self.constant[cluster][:, None]
            return nll.T.unflatten(1, size)
        rows = to_blocks(vectors, size)  # (G, n, B, D)
        whitened = torch.bmm(rows.flatten(1, 2), self.precision_factor[cluster].transpose(1, 2))
        nll = 0.5 * whitened.square().sum(dim=2) + self.constant[cluster][:, None]
        return from_blocks(nll.unflatten(1, (rows.shape[1], -1)), size).T.unflatten(1, size)

    def _gathered(self, x: Tensor, cluster: Tensor) -> Tensor:
        vectors = x.flatten(2).transpose(1, 2)  # (B, P, D)
        positions = vectors.shape[1]
        # Gathered by position, which OpenVINO does in parallel; gathering by image takes it three times as long.
        rows = (positions * cluster.unsqueeze(1) + torch.arange(positions, device=cluster.device)).flatten()
        centred = vectors.flatten(0, 1) - self.mean.flatten(0, 1).index_select(0, rows)
        precision_factor = self.precision_factor.transpose(2, 3).flatten(0, 1).index_select(0, rows)
        whitened = torch.bmm(centred.unsqueeze(1), precision_factor)
        distance = whitened.square().sum(dim=2).unflatten(0, (-1, positions)).squeeze(2)
        nll = 0.5 * distance + self.constant[cluster]
        return nll.unflatten(1, x.shape[-2:])

    def _shared(self, moments: StreamingMoments, size: Sequence[int]) -> StreamingMoments:
        """Return moments with each position's mean, and the mean scatter of each block."""
        if not self.blocks:
            return moments
        shared = StreamingMoments()
        shared.count, shared.mean = moments.count, moments.mean
        shared.scatter = to_blocks(moments.scatter, size).mean(dim=1)
        return shared


def to_blocks(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bring what each of P = h w positions has, shape ``(P, ...)``, into G blocks of n: shape ``(G, n, ...)``."""
    height, width = size
    rows, columns = gcd(height, _BLOCK_SIDE), gcd(width, _BLOCK_SIDE)
    split = values.unflatten(0, (height // rows, rows, width // columns, columns)).transpose(1, 2)
    return split.flatten(2, 3).flatten(0, 1)


def from_blocks(values: Tensor, size: Sequence[int]) -> Tensor:
    """Undo :func:`to_blocks`."""
    height, width = size
    rows, columns = gcd(height, _BLOCK_SIDE), gcd(width, _BLOCK_SIDE)
    split = values.unflatten(1, (rows, columns)).unflatten(0, (height // rows, width // columns)).transpose(1, 2)
    return split.flatten(0, 3)


class PatchMixture(FittedBuffers):
    """A mixture of Gaussians with full covariances shared by all positions, so that position does not matter.

    A position's negative log density is that of its likeliest component, with the component's weight; the full sum of
    the components changes little and costs exponentials in the exported graph.
    """

    weight: Tensor
    bias: Tensor
    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0, 0))  # (K D, D), precision factors W_k on top of each other
        self.register_buffer("bias", torch.zeros(0, 1))  # (K D, 1), -W_k mean_k
        self.register_buffer("constant", torch.zeros(0, 1))  # (K, 1)

    def fit_moments(self, components: Sequence[StreamingMoments]) -> "PatchMixture":
        """Fit, given moments of each component, ``mean`` of shape ``(D,)``; one without samples has no weight."""
        floor = variance_floor(components)
        total = sum(moments.count for moments in components)
        weights, biases, constants = [], [], []
        for moments in components:
            if moments.count:
                precision_factor, constant = precision_factors(shrunk_covariance(moments, floor))
                weights.append(precision_factor)
                biases.append(-precision_factor @ moments.mean)
                constants.append(constant - log(moments.count / total))
            else:
                weights.append(torch.zeros_like(moments.scatter))
                biases.append(torch.zeros_like(moments.mean))
                constants.append(moments.mean.new_tensor(torch.inf))
        self.set_buffers(
            weight=torch.cat(weights), bias=torch.cat(biases)[:, None], constant=torch.stack(constants)[:, None]
        )
        return self

    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        """Negative log density ``(B, h, w)``, in nats, of fields ``(B, D, h, w)``."""
        del cluster
        return self.components(x).amin(dim=1).unflatten(1, x.shape[-2:])

    def components(self, x: Tensor) -> Tensor:
        """Negative log density under each component, its weight included, shape ``(B, K, h w)``, nats."""
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and len(x) > 1:
            # Image by image, as the whitened vectors of several fall out of a processor's caches.
            return torch.cat([self.components(image) for image in x.split(1)])
        whitened = self.weight @ x.flatten(2) + self.bias
        distance = whitened.unflatten(1, (len(self.constant), -1)).square().sum(dim=2)
        return 0.5 * distance + self.constant
