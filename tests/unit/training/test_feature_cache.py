# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The feature cache: memory and file, order, and when it must not be used."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torchvision.transforms import v2

from anomalib_osdirf.training.feature_cache import CachedFeatureLoader, FeatureCache, reason_not_to_cache
from anomalib_osdirf.training.resumable import ordered


@pytest.mark.parametrize("limit", [0, 10**9])
def test_cache_keeps_what_is_written(limit: int) -> None:
    cache = FeatureCache(5, (2, 3, 3), limit)
    features = torch.randn(5, 2, 3, 3)
    cache.features[:3] = features[:3]
    cache.features[3:] = features[3:]
    torch.testing.assert_close(cache.features[torch.tensor([4, 0])], features[torch.tensor([4, 0])])
    assert cache.on_disk is (limit == 0)
    assert len(cache) == 5


def test_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = FeatureCache(5, (2, 3, 3), 0)
    assert str(tmp_path) in cache.describe()
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"TMPDIR .*feature_cache=false"):
        FeatureCache(5, (2, 3, 3), 0)


def _loader(num_images: int, batch_size: int, position: int, seed: int = 0) -> CachedFeatureLoader:
    loader = CachedFeatureLoader(num_images, batch_size, seed, lambda: position)
    loader.cache = FeatureCache(num_images, (1, 1, 1), 10**9)
    loader.cache.features[:, 0, 0, 0] = torch.arange(num_images)
    return loader


@settings(deadline=None)
@given(num_images=st.integers(1, 40), batch_size=st.integers(1, 12), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_resumed_order_is_the_rest_of_the_epoch(num_images: int, batch_size: int, epoch: int, seed: int) -> None:
    length = len(_loader(num_images, batch_size, 0))
    whole = [batch.features.flatten().tolist() for batch in _loader(num_images, batch_size, epoch * length, seed)]
    assert len(whole) == length
    assert sorted(value for batch in whole for value in batch) == list(range(num_images))
    for first in range(length):
        rest = _loader(num_images, batch_size, epoch * length + first, seed)
        assert [batch.features.flatten().tolist() for batch in rest] == whole[first:]


def test_epochs_and_seeds_differ_in_order() -> None:
    def order(position: int, seed: int) -> list[float]:
        return torch.cat([batch.features.flatten() for batch in _loader(30, 10, position, seed)]).tolist()

    assert order(0, 0) != order(3, 0)
    assert order(0, 0) != order(0, 1)


def test_in_order_yields_each_image_once() -> None:
    values = torch.cat([batch.features.flatten() for batch in _loader(11, 4, 0).in_order(4)])
    assert values.tolist() == list(range(11))


class _Images(TensorDataset):
    augmentations: object = None


def _images(augmentations: object = None, **arguments: object) -> DataLoader:
    dataset = _Images(torch.zeros(6, 3))
    dataset.augmentations = augmentations
    return DataLoader(dataset, batch_size=2, **arguments)


def test_what_can_be_cached() -> None:
    resize = v2.Compose([v2.Resize((8, 8)), v2.Compose([v2.CenterCrop(4), v2.Normalize([0.5], [0.5])])])
    assert reason_not_to_cache(_images(shuffle=True)) is None
    assert reason_not_to_cache(_images(resize)) is None
    assert "augments (ColorJitter)" in str(reason_not_to_cache(_images(v2.Compose([resize, v2.ColorJitter()]))))
    assert "sampler" in str(reason_not_to_cache(_images(sampler=WeightedRandomSampler([1.0] * 6, 6))))
    assert "known length" in str(reason_not_to_cache(["no dataloader"]))


def test_ordered_keeps_everything_but_the_shuffle() -> None:
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_size=2, shuffle=True)
    assert torch.cat([batch[0] for batch in ordered(loader)]).tolist() == list(range(9))
    assert ordered(loader).dataset is loader.dataset
