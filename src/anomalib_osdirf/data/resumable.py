# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training dataloaders whose order an interrupted training picks up where it left off."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler


class ResumableLoader(ABC):
    """Shuffled batches in an order that depends on the seed and the position in the training alone.

    Args:
        num_images: Number of images.
        batch_size: Images in a batch; the last one of an epoch may be smaller.
        seed: Seed of the order.
        position: Returns the number of batches that were trained on so far.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, position: Callable[[], int]) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.position = position

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return ceil(self.num_images / self.batch_size)

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the current epoch."""

    def remaining(self) -> tuple[Tensor, ...]:
        """Return the image indices of each batch that is left of the current epoch."""
        epoch, first = divmod(self.position(), len(self))
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + epoch))
        return order.split(self.batch_size)[first:]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is the trainer's. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to do for any loader
        """Take nothing back, see :meth:`state_dict`."""


class ResumableImageLoader(ResumableLoader):
    """The batches of a dataloader in resumable order.

    Args:
        dataloader: The user's dataloader.
        seed: Seed of the order.
        position: Returns the number of batches that were trained on so far.
    """

    def __init__(self, dataloader: DataLoader, seed: int, position: Callable[[], int]) -> None:
        assert dataloader.batch_size is not None
        super().__init__(len(dataloader.dataset), dataloader.batch_size, seed, position)  # type: ignore[arg-type]
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the current epoch."""
        batches = [indices.tolist() for indices in self.remaining()]
        return iter(
            DataLoader(
                self.dataloader.dataset,
                batch_sampler=batches,
                num_workers=self.dataloader.num_workers,
                collate_fn=self.dataloader.collate_fn,
                pin_memory=self.dataloader.pin_memory,
                worker_init_fn=self.dataloader.worker_init_fn,
                multiprocessing_context=self.dataloader.multiprocessing_context,
            )
        )


class ResumableDataModule:
    """The user's datamodule with another training dataloader; the datamodule itself stays untouched.

    Args:
        datamodule: The user's datamodule.
        loader: Takes the place of its training dataloader.
    """

    def __init__(self, datamodule: LightningDataModule, loader: ResumableLoader) -> None:
        self.datamodule = datamodule
        self.loader = loader

    def train_dataloader(self) -> ResumableLoader:
        """Return the other dataloader."""
        return self.loader

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the datamodule has
        """Fall back on the user's datamodule."""
        return getattr(self.datamodule, name)


def reason_not_to_reorder(dataloader: object) -> str | None:
    """Tell why the batches of a dataloader can't be put in an order of our own.

    Args:
        dataloader: The training dataloader of the user's datamodule.

    Returns:
        The reason, or ``None`` if they can.
    """
    if not isinstance(dataloader, DataLoader) or not hasattr(dataloader.dataset, "__len__"):
        return "the datamodule's dataloader is not over a data set of known length"
    if type(dataloader.sampler) not in {RandomSampler, SequentialSampler} or dataloader.batch_size is None:
        return "the datamodule has a sampler of its own"
    return None


def ordered(dataloader: DataLoader) -> DataLoader:
    """Return a dataloader over the same data in its own order, each image once."""
    return DataLoader(
        dataloader.dataset,
        batch_size=dataloader.batch_size,
        shuffle=False,
        num_workers=dataloader.num_workers,
        collate_fn=dataloader.collate_fn,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context,
    )
