# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exact mean and covariance in one streaming pass, with memory independent of the number of samples."""

from math import sqrt

import torch
from torch import Tensor

from anomalib_osdirf.processes import DistributedContext


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
        """Merge a batch of samples, in place: no more memory is needed than the moments and the batch take.

        Args:
            samples: Shape ``(..., N, D)``: N vectors for each group, or none.

        Raises:
            ValueError: If a sample is not finite.
        """
        samples = samples.double()
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("Features are not finite: an image or the backbone's weights hold NaN or infinite values.")
        groups, (count, dim) = samples.shape[:-2], samples.shape[-2:]
        if not self.mean.ndim:
            self.mean = samples.new_zeros(*groups, dim)
            self.scatter = samples.new_zeros(*groups, dim, dim)
        if not count:
            return
        total = self.count + count
        mean = samples.mean(dim=-2, keepdim=True)
        delta = mean - self.mean.unsqueeze(-2)
        # The step between the means is one more row, scaled to the weight that it has in the merged scatter.
        step = delta * sqrt(self.count * count / total)
        rows = torch.cat((samples - mean, step), dim=-2).reshape(-1, count + 1, dim)
        self.scatter.view(-1, dim, dim).baddbmm_(rows.mT, rows)
        self.mean += delta.squeeze(-2) * (count / total)
        self.count = total

    def merged(self, other: "StreamingMoments") -> "StreamingMoments":
        """Return the moments of these samples and those of another, neither of which is changed."""
        if not (self.count and other.count):
            return self if self.count else other
        total = StreamingMoments()
        total.count = self.count + other.count
        delta = other.mean - self.mean
        outer = delta.unsqueeze(-1) * delta.unsqueeze(-2)
        total.mean = self.mean + delta * (other.count / total.count)
        total.scatter = self.scatter + other.scatter + outer * (self.count * other.count / total.count)
        return total

    def pooled(self, processes: DistributedContext) -> "StreamingMoments":
        """Return the moments of the samples of all processes, bitwise equal in each.

        Every process calls this, after an :meth:`update` at least.
        """
        if processes.count == 1:
            return self
        total = StreamingMoments()
        total.count = int(processes.add(self.mean.new_tensor(self.count)))
        total.mean = processes.add(self.mean * self.count) / max(1, total.count)
        dim = self.mean.shape[-1]
        delta = (self.mean - total.mean).reshape(-1, dim, 1)
        scatter = self.scatter.view(-1, dim, dim).baddbmm(delta, delta.mT, alpha=self.count)
        total.scatter = processes.add(scatter).view_as(self.scatter)
        return total

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
