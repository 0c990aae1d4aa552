# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The distributed context of a training: its processes, their shares of the images, and collective operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Values = TypeVar("Values", Tensor, Sequence[int])


@dataclass(frozen=True)
class DistributedContext:
    """Distributed context: the processes that share images and batches, and the rank of this one.

    Of N images, process r of n keeps those numbered r, r + n, r + 2n, ...; of a batch it has every n-th image, too.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Where tensors are put to be sent.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, trainer: Any) -> "DistributedContext":
        """Return a trainer's processes."""
        return cls(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)

    def numbers(self, total: int) -> range:
        """Return the numbers of this process's images among ``total``."""
        return range(self.rank, total, self.count)

    def part(self, batch: Values) -> Values:
        """Return this process's part of a batch, or the batch's first item if the part is empty.

        A process without an image would leave the others waiting for its gradients; see :meth:`weight`.
        """
        part = batch[self.rank :: self.count]
        return part if len(part) else batch[:1]

    def weight(self, total: int) -> float:
        """Return the weight of this process's mean loss with which the processes' mean is that of ``total`` images."""
        return self.count * len(self.numbers(total)) / total

    def add(self, values: Tensor) -> Tensor:
        """Return the sum over processes, bitwise equal in all; ``values`` may be overwritten."""
        if self.count == 1:
            return values
        total = values.to(self.device)
        distributed.all_reduce(total)
        return total.to(values.device)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes, without gradient."""
        return self.add(values.detach().clone()) / self.count

    def first(self, values: Tensor) -> Tensor:
        """Return the first process's values, so that rounding can't make processes differ."""
        return self.add(values if self.rank == 0 else torch.zeros_like(values))

    def gathered(self, values: Tensor) -> Tensor:
        """Return the rows of all images in their order, from each process's rows."""
        everything = values.new_zeros(int(self.add(torch.tensor(len(values)))), *values.shape[1:])
        everything[self.rank :: self.count] = values
        return self.add(everything)

    def collected(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Return the rows ``(N, ...)`` of all processes in the order of their numbers ``(N,)``, none twice."""
        if self.count == 1:
            return values
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(values)
        sizes = self.add(sizes)
        start = int(sizes[: self.rank].sum())
        everything = values.new_zeros(int(sizes.sum()), *values.shape[1:])
        order = torch.zeros(len(everything), dtype=torch.int64, device=numbers.device)
        everything[start : start + len(values)], order[start : start + len(values)] = values, numbers
        everything, order = self.add(everything), self.add(order)
        return everything[order.argsort()]

    def exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows to every process and receive theirs, both in the order of processes.

        Args:
            values: Rows to send.
            sent: How many go to each process.
            received: How many come from each process.
        """
        values = values.to(self.device)
        result = values.new_empty(sum(received), *values.shape[1:])
        distributed.all_to_all_single(result, values, received, sent)
        return result


ALONE = DistributedContext()
