# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Which training images the denoiser is judged by, and that it is not trained on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from anomalib_osdirf.training.feature_cache import CachedFeatureLoader, FeatureCache
from anomalib_osdirf.training.held_out import held_out
from anomalib_osdirf.training.resumable import ResumableImageLoader


@pytest.mark.parametrize(
    ("total", "expected"),
    [(1, []), (2, [1]), (3, [2]), (4, [3]), (5, [4]), (9, [4]), (10, [4, 9]), (23, [4, 9, 14, 19])],
)
def test_every_fifth_image_is_held_out_or_one_of_fewer(total: int, expected: list[int]) -> None:
    """But not the only one."""
    assert held_out(torch.arange(total), total).nonzero().flatten().tolist() == expected


def test_the_shape_of_numbers_is_kept() -> None:
    assert held_out(torch.arange(20).view(4, 5), 20).tolist() == 4 * [[False, False, False, False, True]]


def _trained(images: int, tiles_per_image: int, batch_size: int, epoch: int) -> list[int]:
    """Return the numbers of the images or tiles that an epoch trains on."""
    loader = CachedFeatureLoader(
        images * tiles_per_image,
        batch_size,
        0,
        lambda: epoch * len(loader),
        tiles_per_image=tiles_per_image,
        hold_out=True,
    )
    loader.cache = FeatureCache(loader.num_cached, (1, 1, 1), 10**9)
    loader.cache.features[:, 0, 0, 0] = torch.arange(images * tiles_per_image)
    return [int(value) for batch in loader for value in batch.features.flatten()]


@settings(deadline=None, max_examples=30)
@given(
    images=st.integers(1, 25), tiles_per_image=st.integers(1, 6), batch_size=st.integers(1, 9), epoch=st.integers(0, 2)
)
def test_held_out_images_are_left_out_with_all_their_tiles(
    images: int, tiles_per_image: int, batch_size: int, epoch: int
) -> None:
    """Every other tile is trained on once in an epoch."""
    left_out = held_out(torch.arange(images), images).tolist()
    expected = [number for number in range(images * tiles_per_image) if not left_out[number // tiles_per_image]]
    assert sorted(_trained(images, tiles_per_image, batch_size, epoch)) == expected


def test_all_features_are_cached_and_served_in_order() -> None:
    """The scorer is fitted on held-out images, too."""
    loader = CachedFeatureLoader(11, 4, 0, lambda: 0, hold_out=True)
    assert loader.num_cached == 11


def test_images_that_are_not_cached_are_left_out_alike() -> None:
    dataloader = DataLoader(TensorDataset(torch.arange(11)), batch_size=4, shuffle=True)
    loader = ResumableImageLoader(dataloader, 0, lambda: 0, hold_out=True)
    assert sorted(index for batch in loader for index in batch[0].tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert len(loader) == 3
    assert [loader.images_at(position) for position in range(3)] == [4, 4, 1]
