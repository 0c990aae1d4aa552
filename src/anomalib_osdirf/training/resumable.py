# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Dataloaders whose order survives an interruption, sharded over processes."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.training.held_out import held_out

Item = TypeVar("Item")


class ResumableLoader(ABC):
    """Shuffled batches in an order that depends only on the seed and the position in the training.

    All processes follow the same order: a global batch has as many images as the batches of all processes together,
    and each process takes its part of it.

    Args:
        num_images: Number of images, or of tiles.
        batch_size: Images per process in a batch; the last batch of an epoch may be smaller.
        seed: Seed of the order.
        position: Returns the number of batches seen so far.
        processes: Distributed context.
        tiles_per_image: Consecutive numbers that belong to one image.
        hold_out: Exclude the images of :func:`~anomalib_osdirf.training.held_out.held_out`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        processes: DistributedContext = ALONE,
        tiles_per_image: int = 1,
        hold_out: bool = False,
    ) -> None:
        every = torch.arange(num_images)
        self.numbers = every[~held_out(every // tiles_per_image, num_images // tiles_per_image)] if hold_out else every
        self.num_images = num_images
        self.whole_batch = batch_size * processes.count
        self.seed = seed
        self.position = position
        self.processes = processes

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return ceil(len(self.numbers) / self.whole_batch)

    def images_at(self, position: int) -> int:
        """Return the number of images in the global batch at ``position``."""
        return min(self.whole_batch, len(self.numbers) - position % len(self) * self.whole_batch)

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the current epoch."""

    def remaining(self) -> tuple[Tensor, ...]:
        """Return the image indices of each remaining global batch of the current epoch."""
        epoch, first = divmod(self.position(), len(self))
        order = torch.randperm(len(self.numbers), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.numbers[order].split(self.whole_batch)[first:]

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, which tells Lightning that the loader can resume; the trainer holds the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to do for any loader
        """Take nothing back, see :meth:`state_dict`."""


class ResumableImageLoader(ResumableLoader):
    """A dataloader's batches in resumable order."""

    def __init__(
        self,
        dataloader: DataLoader,
        seed: int,
        position: Callable[[], int],
        processes: DistributedContext = ALONE,
        hold_out: bool = False,
    ) -> None:
        assert dataloader.batch_size is not None
        super().__init__(_length(dataloader), dataloader.batch_size, seed, position, processes, hold_out=hold_out)
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the current epoch."""
        yield from _with_batches(self.dataloader, [self.processes.part(batch).tolist() for batch in self.remaining()])


class SharedLoader(DataLoader):
    """One process's shard of the images of a dataloader that goes through its data set in order, without repeats.

    Lightning's own sampler repeats images to make shards equally long, and metrics would count them twice.
    """

    def __init__(self, dataloader: DataLoader, processes: DistributedContext) -> None:
        dataset: Any = dataloader.dataset
        sampler = UnrepeatedDistributedSampler(dataset, processes.count, processes.rank, shuffle=False)
        batches: Any = copy.copy(dataloader.batch_sampler)
        batches.sampler = sampler
        super().__init__(dataset, batch_sampler=batches, **_options(dataloader))
        # Lightning replaces any sampler that is not distributed by its own.
        self.__dict__.update(sampler=sampler, batch_size=dataloader.batch_size)


def share_out(dataloader: Any, processes: DistributedContext) -> Any:
    """Return one process's shard of validation or test images, or all where Lightning has to share them out."""
    plain = isinstance(dataloader, DataLoader) and type(dataloader.sampler) is SequentialSampler
    if processes.count == 1 or not plain or dataloader.batch_sampler is None or _length(dataloader) < processes.count:
        return dataloader
    return SharedLoader(dataloader, processes)


class SharedDataModule:
    """The user's datamodule, sharded over processes, with an optional replacement of the training dataloader.

    The datamodule itself stays untouched.
    """

    def __init__(
        self, datamodule: LightningDataModule, processes: DistributedContext, loader: ResumableLoader | None = None
    ) -> None:
        self.datamodule = datamodule
        self.processes = processes
        self.loader = loader

    def train_dataloader(self) -> Any:
        """Return the replacement, or the datamodule's own dataloader."""
        return self.loader or self.datamodule.train_dataloader()

    def val_dataloader(self) -> Any:
        """Return this process's share of the validation images."""
        return share_out(self.datamodule.val_dataloader(), self.processes)

    def test_dataloader(self) -> Any:
        """Return this process's share of the test images."""
        return share_out(self.datamodule.test_dataloader(), self.processes)

    def __getattr__(self, name: str) -> Any:  # whatever the datamodule has
        """Fall back on the user's datamodule."""
        return getattr(self.datamodule, name)


def reason_not_to_reorder(dataloader: object) -> str | None:
    """Return why the batches of a datamodule's training dataloader can't be reordered, if they can't."""
    if not isinstance(dataloader, DataLoader) or not hasattr(dataloader.dataset, "__len__"):
        return "the datamodule's dataloader is not over a data set of known length"
    if type(dataloader.sampler) not in {RandomSampler, SequentialSampler} or dataloader.batch_size is None:
        return "the datamodule has a sampler of its own"
    return None


def ordered(dataloader: DataLoader, processes: DistributedContext = ALONE, batch_size: int | None = None) -> DataLoader:
    """Return a dataloader over one process's shard of the same data, in order, each image once."""
    batch_size = batch_size or dataloader.batch_size
    assert batch_size is not None
    numbers = processes.numbers(_length(dataloader))
    return _with_batches(dataloader, BatchSampler(numbers, batch_size, drop_last=False))


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items and prepare the next one meanwhile: without workers, a dataloader then reads images in a thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        item = thread.submit(next, iterator, end)
        while (made := item.result()) is not end:
            item = thread.submit(next, iterator, end)
            yield made  # type: ignore[misc] # not the end


def _length(dataloader: DataLoader) -> int:
    return len(dataloader.dataset)  # type: ignore[arg-type] # data sets of unknown length don't come here


def _with_batches(dataloader: DataLoader, batches: Iterable[list[int]]) -> DataLoader:
    """Return a dataloader over the same data with other batches of indices."""
    return DataLoader(dataloader.dataset, batch_sampler=batches, **_options(dataloader))


def _options(dataloader: DataLoader) -> dict[str, Any]:
    """Return a dataloader's reading options."""
    names = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context")
    return {name: getattr(dataloader, name) for name in names}
