# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Anomalies painted on normal images: where, how, and the same every time."""

import torch
from torch import Tensor

from anomalib_osdirf.scoring.painting import covered_positions, paint

NUMBERS = torch.tensor([3, 8, 11, 400])


def _images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_nothing_changes_outside_the_masks_and_something_inside() -> None:
    images = _images()
    painted, masks = paint(images, NUMBERS)
    assert painted.shape == images.shape
    assert masks.shape == (4, 1, 64, 64)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    changed = (painted != images).any(dim=1, keepdim=True)
    assert not (changed & (masks == 0)).any()
    assert changed.sum() > 0.9 * masks.sum()


def test_painted_colours_stay_within_the_range_of_the_image() -> None:
    images = _images() * torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None, None, None]
    painted, _ = paint(images, NUMBERS)
    assert (painted.flatten(1).amax(dim=1) <= images.flatten(1).amax(dim=1)).all()
    assert (painted.flatten(1).amin(dim=1) >= images.flatten(1).amin(dim=1)).all()


def test_an_image_is_painted_alike_whatever_the_batch_and_the_random_state() -> None:
    images = _images()
    painted, masks = paint(images, NUMBERS)
    torch.manual_seed(5)
    for index in range(4):
        alone = paint(images[index : index + 1], NUMBERS[index : index + 1])
        torch.testing.assert_close(alone, (painted[index : index + 1], masks[index : index + 1]), rtol=0, atol=0)
    assert not torch.equal(masks[0], masks[1])


def test_painting_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    paint(_images(), NUMBERS)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_position_is_covered_if_more_than_half_of_its_pixels_are() -> None:
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., :4, :4] = 1
    masks[..., 4:, :2] = 1  # exactly half
    expected = torch.tensor([[[True, False], [False, False]]])
    torch.testing.assert_close(covered_positions(masks, 2), expected)
