# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The region of interest: geometry, packing, and errors."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.region import RegionOfInterest, check_roi

TRANSFORM = v2.Compose([v2.Resize([32, 32], antialias=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
LEFT = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]


def _fitted(roi: Any, transform: v2.Transform = TRANSFORM) -> RegionOfInterest:
    region = RegionOfInterest()
    region.fit(roi, transform, grid_size=4)
    return region


def _file(folder: Path, height: int, width: int, value: int = 255) -> str:
    """Write a mask whose left half is inside."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = value
    cv2.imwrite(str(folder / "roi.png"), mask)
    return str(folder / "roi.png")


@pytest.mark.parametrize(("height", "width", "value"), [(300, 400, 255), (64, 64, 1), (8, 16, 255)])
def test_mask_of_any_size_and_brightness(height: int, width: int, value: int, tmp_path: Path) -> None:
    mask = _fitted(_file(tmp_path, height, width, value)).mask
    assert mask[:, :14].all()
    assert not mask[:, 16:].any()


def test_polygon_is_in_shares_of_width_and_height() -> None:
    mask = _fitted(LEFT, v2.Resize([32, 64])).mask
    assert mask.shape == (32, 64)
    assert mask[:, :31].all()
    assert not mask[:, 32:].any()


def test_crop_of_the_pre_processing_applies() -> None:
    mask = _fitted(LEFT, v2.Compose([v2.Resize([32, 32]), v2.CenterCrop([16, 16])])).mask
    assert mask.shape == (16, 16)
    assert mask[:, :7].all()
    assert not mask[:, 8:].any()


def test_pixels_outside_do_not_reach_those_inside_through_the_resize(tmp_path: Path) -> None:
    region = _fitted(_file(tmp_path, 300, 400))
    image = torch.rand(1, 3, 300, 400)
    other = image.clone()
    other[..., 200:] = 1
    one, two = (region.blank(TRANSFORM(some)) for some in (image, other))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert one.any()


def test_packed_field_and_fine_features_are_of_the_same_places() -> None:
    region = _fitted([[0.2, 0.1], [0.9, 0.6], [0.1, 0.9]])
    fine = torch.rand(2, 5, 8, 8)
    packed = region.pack(fine)
    assert packed.shape[2] == 2
    torch.testing.assert_close(coarse(packed), region.pack(coarse(fine)))


def test_unpacking_brings_positions_back_and_continues_them_outside() -> None:
    region = _fitted(LEFT)
    for side in (4, 8):
        values = torch.rand(1, side, side)
        unpacked = region.unpack(region.pack(values[:, None])[:, 0])[:, 0]
        torch.testing.assert_close(unpacked[..., : side // 2], values[..., : side // 2])
        nearest = values[..., side // 2 - 1 : side // 2].expand(-1, -1, side // 2)
        torch.testing.assert_close(unpacked[..., side // 2 :], nearest)


@pytest.mark.parametrize(
    "roi",
    [[[0, 0], [1, 1]], [[0, 0], [1, 1], [0, 1.5]], [[0, 0, 0], [1, 1, 1], [0, 1, 1]], [], [0.1, 0.2, 0.3], Path("a")],
)
def test_what_is_no_polygon_in_the_image(roi: Any) -> None:
    with pytest.raises(ValueError, match="roi="):
        check_roi(roi)


def test_constructor_refuses_a_wrong_polygon() -> None:
    with pytest.raises(ValueError, match="roi="):
        OSDIRF(backbone="filter_bank", roi=[[0, 0], [1, 1]])


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_unreadable_mask(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "roi.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"roi=.*roi.png"):
        _fitted(str(file))


def test_empty_mask(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"roi=.*nothing inside"):
        _fitted(_file(tmp_path, 40, 40, value=0))


def test_images_without_one_size() -> None:
    with pytest.raises(ValueError, match=r"roi=.*Resize"):
        _fitted(LEFT, v2.Resize(32))


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"roi .*32 x 32 .*16 x 32"):
        _fitted(LEFT).blank(torch.rand(1, 3, 16, 32))


@pytest.mark.parametrize(("size", "warned"), [((480, 640), False), ((480, 480), True)])
def test_mask_of_another_ratio_is_told(
    size: tuple[int, int], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "anomalib_osdirf"):
        RegionOfInterest().fit(_file(tmp_path, 300, 400), TRANSFORM, 4, size)
    assert ("roi=" in caplog.text) is warned
