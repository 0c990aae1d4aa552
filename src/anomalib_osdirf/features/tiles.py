# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles, as anomalib's ``Tiler`` has them: each tile is scored as if it were an image.

Its own cut and join write into a tensor tile by tile, which makes graphs that few runtimes take.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler, compute_new_image_size
from torch import Tensor
from torch.nn.functional import pad


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
        raise ValueError(
            f"remove_border_count={tiler.remove_border_count} leaves the image's border without scores; use 0, and a "
            "stride smaller than the tile if tiles' borders disturb."
        )
    size = (max(height, tile[0]), max(width, tile[1]))
    filled = compute_new_image_size(size, tile, stride)
    if filled != (height, width):
        raise ValueError(
            f"Images of {height} x {width} pixels can't be cut into {described(tiler)}, and padding would be taken for "
            f"a part of them; give the pre-processor a Resize to {filled[0]} x {filled[1]}."
        )
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
            raise ValueError(
                f"TilerConfigurationCallback's {name}={own} is no multiple of the backbone's patch of {patch[0]} x "
                f"{patch[1]} pixels; use {fitting}."
            )


def cut(tiler: Tiler, images: Tensor) -> Tensor:
    """Cut images ``(B, C, H, W)`` into tiles ``(B * T, C, h, w)``, an image's one after the other.

    Raises:
        ValueError: If tiles don't fill them exactly.
    """
    number_of_tiles(tiler, *images.shape[-2:])
    tops, lefts = _corners(tiler, images.shape)
    rows = (images[..., top : top + tiler.tile_size_h, :] for top in tops)
    return torch.stack([row[..., left : left + tiler.tile_size_w] for row in rows for left in lefts], 1).flatten(0, 1)


def join(tiler: Tiler, maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Join maps ``(B * T, C, h, w)`` of the tiles of images ``(B, ..., H, W)``, with their mean where they overlap."""
    tops, lefts = _corners(tiler, shape)
    below, beside = shape[-2] - tiler.tile_size_h, shape[-1] - tiler.tile_size_w
    columns = maps.unflatten(0, (-1, len(tops), len(lefts))).unbind(2)
    rows = _sum(pad(part, (left, beside - left)) for left, part in zip(lefts, columns, strict=True)).unbind(1)
    joined = _sum(pad(row, (0, 0, top, below - top)) for top, row in zip(tops, rows, strict=True))
    down = _tiles_over(shape[-2], tops, tiler.tile_size_h, maps)
    across = _tiles_over(shape[-1], lefts, tiler.tile_size_w, maps)
    return joined / down.unsqueeze(1) / across


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _tiles_over(length: int, starts: Sequence[int], size: int, like: Tensor) -> Tensor:
    """Count the tiles over each pixel of an axis."""
    counts = [sum(start <= pixel < start + size for start in starts) for pixel in range(length)]
    return torch.tensor(counts, dtype=like.dtype, device=like.device)


def _corners(tiler: Tiler, shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return the first rows and the first columns of an image's tiles."""
    return (
        range(0, shape[-2] - tiler.tile_size_h + 1, tiler.stride_h),
        range(0, shape[-1] - tiler.tile_size_w + 1, tiler.stride_w),
    )


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
