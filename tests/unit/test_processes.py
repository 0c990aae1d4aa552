# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What several processes share, against one process alone."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.training.feature_cache import CachedFeatureLoader, FeatureCache
from anomalib_osdirf.training.resumable import ResumableImageLoader, ahead, ordered, share_out
from threads import played

COUNTS = st.integers(1, 4)


def _cached_loader(
    processes: DistributedContext, num_images: int, batch_size: int, position: int = 0
) -> CachedFeatureLoader:
    loader = CachedFeatureLoader(num_images, batch_size, 3, lambda: position, processes)
    loader.cache = FeatureCache(loader.num_cached, (1, 1, 1), 10**9)
    loader.cache.features[:, 0, 0, 0] = torch.tensor(processes.numbers(num_images))
    return loader


def _image_loader(
    processes: DistributedContext, num_images: int, batch_size: int, position: int = 0
) -> ResumableImageLoader:
    dataloader = DataLoader(TensorDataset(torch.arange(num_images)), batch_size=batch_size, shuffle=True)
    return ResumableImageLoader(dataloader, 3, lambda: position, processes)


@settings(deadline=None, max_examples=40)
@given(count=COUNTS, more=st.integers(0, 20), batch_size=st.integers(1, 5))
def test_parts_of_a_batch_make_up_the_batch_of_one_process(count: int, more: int, batch_size: int) -> None:
    """Cached or read anew; a process without an image gets another's, of weight zero."""
    num_images = count + more
    alone = [batch.features.flatten().tolist() for batch in _cached_loader(ALONE, num_images, count * batch_size)]
    cached = played(
        count, lambda one: [batch.features.flatten() for batch in _cached_loader(one, num_images, batch_size)]
    )
    read = [
        [batch[0] for batch in _image_loader(DistributedContext(rank, count), num_images, batch_size)]
        for rank in range(count)
    ]
    loader = _image_loader(DistributedContext(0, count), num_images, batch_size)
    for number, batch in enumerate(alone):
        assert loader.images_at(number) == loader.images_at(number + len(loader)) == len(batch)
        for rank in range(count):
            expected = batch[rank::count] or batch[:1]
            assert cached[rank][number].tolist() == expected
            assert read[rank][number].tolist() == expected
            assert DistributedContext(rank, count).weight(len(batch)) == count * len(batch[rank::count]) / len(batch)
    assert {len(batches) for batches in (*cached, *read)} == {len(alone)} == {len(loader)}


@settings(deadline=None, max_examples=40)
@given(count=COUNTS, num_images=st.integers(1, 30))
def test_weighted_parts_have_the_batchs_mean(count: int, num_images: int) -> None:
    values = torch.randn(num_images, dtype=torch.float64)
    processes = [DistributedContext(rank, count) for rank in range(count)]
    parts = [one.weight(num_images) * one.part(values).mean() for one in processes]
    torch.testing.assert_close(torch.stack(parts).mean(), values.mean())


@settings(deadline=None, max_examples=20)
@given(count=COUNTS, more=st.integers(0, 20), offset=st.floats(-1e4, 1e4))
def test_pooled_moments_are_those_of_all_samples_the_same_bits_everywhere(count: int, more: int, offset: float) -> None:
    samples = torch.randn(3, count + more, 4, dtype=torch.float64) + offset
    reference = StreamingMoments()
    reference.update(samples)

    def moments(one: DistributedContext) -> StreamingMoments:
        own = StreamingMoments()
        for batch in samples[:, one.rank :: one.count].split(3, dim=1):
            own.update(batch)
        return own.pooled(one)

    results = played(count, moments)
    for result in results:
        assert result.count == count + more
        torch.testing.assert_close(result.mean, reference.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.scatter, reference.scatter, rtol=1e-9, atol=1e-7)
        assert torch.equal(result.mean, results[0].mean)
        assert torch.equal(result.scatter, results[0].scatter)


@settings(deadline=None, max_examples=20)
@given(count=COUNTS, more=st.integers(0, 20))
def test_gathered_rows_are_those_of_all_images_in_their_order(count: int, more: int) -> None:
    rows = torch.randn(count + more, 2)
    for result in played(count, lambda one: one.gathered(rows[one.rank :: one.count])):
        torch.testing.assert_close(result, rows, rtol=0, atol=0)


@settings(deadline=None, max_examples=20)
@given(count=COUNTS, owners=st.lists(st.integers(0, 3), max_size=20))
def test_collected_rows_are_in_the_order_of_their_numbers(count: int, owners: list[int]) -> None:
    """Whoever has how many of them, none included."""
    rows, owner = torch.randn(len(owners), 2), torch.tensor(owners, dtype=torch.int64) % count
    numbers = 7 * torch.arange(len(owners))

    def collected(one: DistributedContext) -> Tensor:
        own = owner == one.rank
        return one.collected(rows[own], numbers[own])

    for result in played(count, collected):
        torch.testing.assert_close(result, rows, rtol=0, atol=0)


@settings(deadline=None, max_examples=20)
@given(count=COUNTS, more=st.integers(0, 20), batch_size=st.integers(1, 5))
def test_every_image_is_passed_in_one_process(count: int, more: int, batch_size: int) -> None:
    dataloader = DataLoader(TensorDataset(torch.arange(count + more)), batch_size=batch_size)
    for share in (ordered, share_out):
        seen = [
            torch.cat([batch[0] for batch in share(dataloader, DistributedContext(rank, count))])
            for rank in range(count)
        ]
        assert [images.tolist() for images in seen] == [list(range(rank, count + more, count)) for rank in range(count)]


def test_what_lightning_has_to_share_out_itself() -> None:
    few, many = TensorDataset(torch.arange(2)), TensorDataset(torch.arange(9))
    for dataloader in (DataLoader(few), DataLoader(many, shuffle=True), DataLoader(many, batch_size=None), [1, 2]):
        assert share_out(dataloader, DistributedContext(0, 3)) is dataloader


def test_batches_of_a_kind_of_their_own_are_kept() -> None:
    class Pairs(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            for index in self.sampler:
                yield [index, index]

    dataset = TensorDataset(torch.arange(5))
    dataloader = DataLoader(dataset, batch_sampler=Pairs(SequentialSampler(dataset), 2, drop_last=False))
    share = share_out(dataloader, DistributedContext(1, 2))
    assert [batch[0].tolist() for batch in share] == [[1, 1], [3, 3]]
    assert share.dataset is dataset
    assert [batch[0].tolist() for batch in dataloader] == [[index, index] for index in range(5)]


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in ahead(items()):
        assert all(event.wait(20) for event in begun[: number + 2])
    assert list(ahead([])) == []


def test_a_failure_ahead_is_raised_where_the_item_was_wanted() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("broken image")

    iterator = ahead(items())
    assert next(iterator) == 1
    with pytest.raises(OSError, match="broken image"):
        next(iterator)
