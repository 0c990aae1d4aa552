# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exact mean and covariance in one streaming pass, with memory independent of the number of samples."""

import torch
from torch import Tensor


class StreamingMoments:
    """Mean and scatter matrix of vectors, merged batch by batch in float64 (Chan, Golub and LeVeque 1983).

    Leading dimensions are separate groups (the positions of a grid, say), each with its own moments.

    Attributes:
        count: Number of samples seen per group.
        mean: Mean, shape ``(..., D)``, float64.
        scatter: Sum of centred outer products, shape ``(..., D, D)``, float64.

    Example:
        >>> moments = StreamingMoments()
        >>> moments.update(torch.tensor([[0.0], [2.0]]))
        >>> moments.mean.item(), moments.covariance().item()
        (1.0, 1.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.scatter = torch.zeros(())

    def update(self, samples: Tensor) -> None:
        """Merge a batch of samples.

        Args:
            samples: Shape ``(..., N, D)``: N vectors for each group.

        Raises:
            ValueError: If a sample is not finite.
        """
        samples = samples.double()
        if not bool(torch.isfinite(samples).all()):
            msg = "Features are not finite: an image or the backbone's weights hold NaN or infinite values."
            raise ValueError(msg)
        count = samples.shape[-2]
        mean = samples.mean(dim=-2)
        centred = samples - mean.unsqueeze(-2)
        scatter = centred.transpose(-1, -2) @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self.mean
        outer = delta.unsqueeze(-1) * delta.unsqueeze(-2)
        self.scatter += scatter + outer * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Maximum-likelihood covariance, scatter / count, shape ``(..., D, D)``, float64."""
        return self.scatter / self.count

    def affine(self, weight: Tensor, bias: Tensor) -> "StreamingMoments":
        """Return the moments of ``weight @ x + bias``.

        Args:
            weight: Shape ``(r, D)``.
            bias: Shape ``(r,)``.
        """
        weight, bias = weight.to(self.mean), bias.to(self.mean)
        moved = StreamingMoments()
        moved.count = self.count
        moved.mean = self.mean @ weight.T + bias
        moved.scatter = weight @ self.scatter @ weight.T
        return moved
