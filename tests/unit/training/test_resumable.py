# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A dataloader in resumable order; that order's properties are tested with the feature cache."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from anomalib_osdirf.training.resumable import ResumableImageLoader


def _batches(position: int, seed: int = 0) -> list[list[int]]:
    dataloader = DataLoader(TensorDataset(torch.arange(11)), batch_size=4, shuffle=True)
    return [batch[0].tolist() for batch in ResumableImageLoader(dataloader, seed, lambda: position)]


def test_rest_of_an_epoch_is_what_an_undisturbed_one_ends_with() -> None:
    assert sorted(index for batch in _batches(0) for index in batch) == list(range(11))
    assert _batches(1) == _batches(0)[1:]
    assert _batches(5) == _batches(3)[2:]


def test_epochs_and_seeds_differ() -> None:
    assert _batches(0) != _batches(3)
    assert _batches(0) != _batches(0, seed=1)
