# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles, by anomalib's ``Tiler``: each tile is scored as if it were an image."""

from collections.abc import Sequence
from typing import Any

from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler, compute_new_image_size
from torch import Tensor


def number_of_tiles(tiler: Tiler, height: int, width: int) -> int:
    """Count the tiles of an image.

    Args:
        tiler: How it is cut.
        height: Pixels of the pre-processed image.
        width: Pixels of the pre-processed image.

    Returns:
        Their number.

    Raises:
        ValueError: If tiles don't fill the image exactly, or leave parts of it without scores.
    """
    tile, stride = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    if tiler.remove_border_count:
        msg = (
            f"remove_border_count={tiler.remove_border_count} leaves the image's border without scores; use 0, and a "
            "stride smaller than the tile if tiles' borders disturb."
        )
        raise ValueError(msg)
    size = (max(height, tile[0]), max(width, tile[1]))
    filled = compute_new_image_size(size, tile, stride)
    if filled != (height, width):
        msg = (
            f"Images of {height} x {width} pixels can't be cut into {described(tiler)}, and padding would be taken for "
            f"a part of them; give the pre-processor a Resize to {filled[0]} x {filled[1]}."
        )
        raise ValueError(msg)
    return ((filled[0] - tile[0]) // stride[0] + 1) * ((filled[1] - tile[1]) // stride[1] + 1)


def check_patches(tiler: Tiler, patch: Sequence[int]) -> None:
    """Check that a backbone's patches fill tiles and the distances between them.

    Raises:
        ValueError: If they don't.
    """
    for name in ("tile_size", "stride"):
        own = [getattr(tiler, f"{name}_{side}") for side in "hw"]
        fitting = [max(1, round(size / step)) * step for size, step in zip(own, patch, strict=True)]
        if own != fitting:
            msg = (
                f"TilerConfigurationCallback's {name}={own} is no multiple of the backbone's patch of {patch[0]} x "
                f"{patch[1]} pixels; use {fitting}."
            )
            raise ValueError(msg)


def cut(tiler: Tiler, images: Tensor) -> Tensor:
    """Cut images ``(B, C, H, W)`` into tiles ``(B * T, C, h, w)``, an image's one after the other.

    Raises:
        ValueError: If tiles don't fill them exactly.
    """
    number_of_tiles(tiler, *images.shape[-2:])
    return tiler.tile(images)


def described(tiler: Tiler | None) -> str:
    """Describe the input of a network."""
    if tiler is None:
        return "whole images"
    size, stride = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    return f"tiles of {size[0]} x {size[1]} pixels with a stride of {stride[0]} x {stride[1]}"


def as_plain(tiler: Tiler | None) -> dict[str, Any] | None:
    """Describe a tiler by plain values, for a checkpoint."""
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": ImageUpscaleMode(tiler.mode).value,
    }


def from_plain(values: dict[str, Any] | None) -> Tiler | None:
    """Build the tiler described by :func:`as_plain`."""
    return None if values is None else Tiler(**{**values, "mode": ImageUpscaleMode(values["mode"])})
