# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Backbone features of the training images, computed once and served for every epoch."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from anomalib_osdirf.training.resumable import ResumableLoader, reason_not_to_reorder

_DETERMINISTIC_TRANSFORMS = (
    v2.Resize,
    v2.CenterCrop,
    v2.Pad,
    v2.Normalize,
    v2.Grayscale,
    v2.RGB,
    v2.ToImage,
    v2.ToDtype,
    v2.ToPureTensor,
    v2.Identity,
)


@dataclass
class FeatureBatch:
    """A training batch of cached features ``(B, C, h, w)``, instead of an ``ImageBatch``.

    anomalib's pre-processor looks for an image and a mask, which are always ``None``.
    """

    features: Tensor
    image: None = None
    gt_mask: None = None


class FeatureCache:
    """Features ``(C, h, w)`` by image, in memory or, above a limit in bytes, in a memory-mapped temporary file.

    The file has no name once it is open (on Windows, it is deleted when the process lets go of it), so nothing stays
    behind however the process ends.

    Raises:
        OSError: If the disk has no room for the file.
    """

    def __init__(self, num_images: int, shape: Sequence[int], memory_limit: float) -> None:
        self.num_bytes = 4 * num_images * prod(shape)
        self.on_disk = self.num_bytes > memory_limit
        if self.on_disk:
            with tempfile.TemporaryFile(prefix="osdirf-features-") as file:
                self._reserve(file.fileno())
                memory_map = np.memmap(file, dtype=np.float32, mode="r+", shape=(num_images, *shape))
            self.features = torch.from_numpy(memory_map)
        else:
            self.features = torch.empty(num_images, *shape)

    def _reserve(self, file: int) -> None:
        """Allocate the whole file: a page that can't be written later would kill the process without a message."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, self.num_bytes)
            else:
                os.truncate(file, self.num_bytes)
        except OSError as error:
            msg = (
                f"The feature cache needs {self.num_bytes / 2**30:.1f} GiB in {tempfile.gettempdir()}: "
                f"{error.strerror}; point TMPDIR at a larger disk, raise cache_memory_gb, or use feature_cache=false."
            )
            raise OSError(error.errno, msg) from error

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features)

    def describe(self) -> str:
        """Describe where the cache is and its size."""
        place = f"a memory-mapped temporary file in {tempfile.gettempdir()}" if self.on_disk else "memory"
        return f"{self.num_bytes / 2**20:.1f} MiB in {place}"


class CachedFeatureLoader(ResumableLoader):
    """Dataloader of shuffled batches of cached features; the cache may be filled later.

    Each process caches its own images, and processes exchange the features that a batch needs.
    """

    cache: FeatureCache | None = None

    @property
    def num_cached(self) -> int:
        """Number of this process's images."""
        return len(self.processes.numbers(self.num_images))

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Yield the rest of the current epoch."""
        for indices in self.remaining():
            yield FeatureBatch(self._features(indices))

    def _features(self, indices: Tensor) -> Tensor:
        """Return the features of this process's part of a batch."""
        assert self.cache is not None
        rank, count = self.processes.rank, self.processes.count
        if count == 1:
            return self.cache.features[indices]
        parts = [replace(self.processes, rank=other).part(indices) for other in range(count)]
        wanted = [part[part % count == rank] // count for part in parts]
        owners = parts[rank] % count
        received = self.processes.exchange(
            self.cache.features[torch.cat(wanted)],
            sent=[len(one) for one in wanted],
            received=owners.bincount(minlength=count).tolist(),
        )
        features = torch.empty_like(received)
        features[owners.argsort(stable=True)] = received
        return features

    def in_order(self, batch_size: int) -> Iterator[FeatureBatch]:
        """Yield this process's images once, in the order of the data set."""
        assert self.cache is not None
        for features in self.cache.features.split(batch_size):
            yield FeatureBatch(features)


def reason_not_to_cache(dataloader: object) -> str | None:
    """Return why the features of the images of a datamodule's dataloader can't be cached, if they can't."""
    reason = reason_not_to_reorder(dataloader)
    if reason:
        return reason
    augmentations = getattr(getattr(dataloader, "dataset", None), "augmentations", None)
    random = _random_transforms(augmentations)
    if random:
        return f"the datamodule augments ({', '.join(random)})"
    return None


def _random_transforms(transform: object) -> list[str]:
    if transform is None or isinstance(transform, _DETERMINISTIC_TRANSFORMS):
        return []
    if isinstance(transform, v2.Compose):
        return [name for part in transform.transforms for name in _random_transforms(part)]
    return [type(transform).__name__]
