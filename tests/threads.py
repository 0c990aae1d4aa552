# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes played by threads, for tests of what they share."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from anomalib_osdirf.processes import DistributedContext

Result = TypeVar("Result")


class Board:
    """Where each thread leaves something for all to see."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=20)
        self.places: list[Any] = [None] * count

    def show(self, rank: int, thing: object) -> list[Any]:
        """Leave something and return what everybody left."""
        self.places[rank] = thing
        self.barrier.wait()
        everything = list(self.places)
        self.barrier.wait()
        return everything


@dataclass(frozen=True)
class Threads(DistributedContext):
    """One of them."""

    board: Board = field(default_factory=lambda: Board(1))

    def add(self, values: Tensor) -> Tensor:
        total = self.board.show(self.rank, values.clone())
        return values.copy_(torch.stack(total).sum(dim=0))

    def exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        rows = [parts[self.rank] for parts in self.board.show(self.rank, values.split(sent))]
        assert [len(row) for row in rows] == received
        return torch.cat(rows)


def played(count: int, task: Callable[[DistributedContext], Result]) -> list[Result]:
    """Return what each of several processes makes of a task."""
    board = Board(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: task(Threads(rank, count, board=board)), range(count)))
