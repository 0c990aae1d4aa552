# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The region of interest: what lies outside is blanked before the backbone, and takes no part behind it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from anomalib_osdirf.features.backbone import FINE
from anomalib_osdirf.features.pre_processing import parts_of
from anomalib_osdirf.inference.reading import ImageError, read_image
from anomalib_osdirf.scoring.densities import FittedBuffers

logger = logging.getLogger(__name__)

Polygon = Sequence[Sequence[float]]

_MOST_PIXELS = 10**9
_FEWEST_VERTICES = 3
# Polygons are drawn larger than the pre-processed image: resized with antialiasing, as photos are, they then tell which
# of its pixels have something of the outside mixed in.
_DRAWN_LARGER = 2
_WHOLLY_INSIDE = 0.999
_SAME_RATIO = 0.02


class RegionOfInterest(FittedBuffers):
    """Which pixels and positions of the grid are inside; all that is known is in buffers.

    A position of the field's grid is inside if any of its pixels is, and so are the 2 x 2 fine positions in it. Those
    inside are packed: P of the field in one row, ``(B, D, 1, P)``, and the fine ones in two, ``(B, D, 2, 2 P)``, as on
    a grid of P positions beside each other. Densities and image scores know no others.
    """

    mask: Tensor
    lowest: Tensor
    inside_1: Tensor
    inside_2: Tensor
    nearest_1: Tensor
    nearest_2: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(0, 0, dtype=torch.bool))  # (H, W)
        self.register_buffer("lowest", torch.tensor(0.0))  # what maps are outside
        for block in (1, FINE):
            # Positions inside (block, block P); and in these, the nearest one to each position of the grid.
            self.register_buffer(f"inside_{block}", torch.zeros(0, 0, dtype=torch.int64))
            self.register_buffer(f"nearest_{block}", torch.zeros(0, 0, dtype=torch.int64))

    def fit(
        self, roi: str | Polygon, transform: nn.Module | None, grid_size: int, image_size: Sequence[int] | None = None
    ) -> None:
        """Bring a region to the geometry of pre-processed images.

        Args:
            roi: File of a mask, white inside, or vertices of a polygon.
            transform: The pre-processing, which gives all images one size.
            grid_size: Side of the field's grid.
            image_size: Height and width of the images that the mask was drawn for; ``None`` if unknown.

        Raises:
            ValueError: If the region can't be read or has nothing inside, or images keep their sizes.
        """
        geometry = [part for part in parts_of(transform) if isinstance(part, v2.Resize | v2.CenterCrop | v2.Pad)]
        size = next((part.size for part in reversed(geometry) if isinstance(part, v2.Resize)), None)
        if size is None or len(size) != 2:
            msg = f"roi={roi!r} needs images of one size; give the pre_processor a Resize to a height and a width."
            raise ValueError(msg)
        values = torch.from_numpy(_read(roi, image_size) if isinstance(roi, str) else _drawn(roi, size))[None]
        for part in geometry:
            values = part(values)
        mask = values[0] > _WHOLLY_INSIDE
        if not mask.any():
            msg = f"roi={roi!r} has nothing inside; use a larger polygon, or a mask that is white where to look."
            raise ValueError(msg)
        cells = functional.adaptive_max_pool2d(mask[None].float(), grid_size)[0] > 0
        found = {"mask": mask}
        for block in (1, FINE):
            found[f"inside_{block}"], found[f"nearest_{block}"] = _positions(cells, block)
        self.set_buffers(**found)

    def blank(self, images: Tensor) -> Tensor:
        """Set pre-processed images ``(B, C, H, W)`` to 0 outside.

        Raises:
            ValueError: If they are of another size than the region.
        """
        if images.shape[-2:] != self.mask.shape:
            sizes = (" x ".join(map(str, size)) for size in (self.mask.shape, images.shape[-2:]))
            msg = "roi is for images of {} pixels and these have {}; use the training's pre_processor and no tiles."
            raise ValueError(msg.format(*sizes))
        return torch.where(self.mask, images, 0.0)

    def pack(self, values: Tensor) -> Tensor:
        """Pack what is inside of a grid, ``(B, D, h, w)`` or ``(B, D, 2 h, 2 w)``."""
        inside = self.inside_1 if values.shape[-2:] == self.nearest_1.shape else self.inside_2
        return values.flatten(2).index_select(2, inside.flatten()).unflatten(2, inside.shape)

    def unpack(self, values: Tensor) -> Tensor:
        """Put packed ``(B, 1, P)`` or ``(B, 2, 2 P)`` back on a grid ``(B, 1, h, w)``, continued outside."""
        nearest = self.nearest_1 if values.shape[-2] == 1 else self.nearest_2
        return values.flatten(1).index_select(1, nearest.flatten()).unflatten(1, (1, *nearest.shape))


def check_roi(roi: str | Polygon | None) -> None:
    """Check a polygon; a mask's file is read by a training only.

    Raises:
        ValueError: If it is none.
    """
    if roi is None or isinstance(roi, str):
        return
    try:
        vertices = np.asarray(roi, dtype=np.float64)
    except (TypeError, ValueError):
        vertices = np.empty(0)
    if vertices.ndim != 2 or vertices.shape[1:] != (2,) or len(vertices) < _FEWEST_VERTICES:
        raise ValueError(f"roi={roi!r} is no polygon; use three or more [x, y] in 0 to 1, or the path of a mask image.")
    if not ((vertices >= 0) & (vertices <= 1)).all():
        msg = f"roi={roi!r} leaves the image; give x as a share of its width and y of its height, both in 0 to 1."
        raise ValueError(msg)


def blank(roi: RegionOfInterest | None, images: Tensor) -> Tensor:
    """Blank images outside of a region, if there is one."""
    return images if roi is None else roi.blank(images)


def pack(roi: RegionOfInterest | None, values: Tensor) -> Tensor:
    """Pack what is inside of a region, if there is one."""
    return values if roi is None else roi.pack(values)


def _read(roi: str, image_size: Sequence[int] | None) -> NDArray[np.float32]:
    """Read a mask: 1 inside, where it is at least half as bright as anywhere."""
    try:
        mask = read_image(Path(roi), _MOST_PIXELS).max(axis=2)
    except ImageError as error:
        raise ValueError(f"roi={roi!r} is no mask: {str(error).rstrip('.')}; give the path of an image.") from error
    height, width = mask.shape
    if image_size is not None and abs(width / height * image_size[0] / image_size[1] - 1) > _SAME_RATIO:
        text = "roi=%r has %d x %d pixels and an image %d x %d, of another ratio; it is stretched over images."
        logger.warning(text, roi, width, height, image_size[1], image_size[0])
    return (mask > mask.max() / 2).astype(np.float32)


def _drawn(polygon: Polygon, size: Sequence[int]) -> NDArray[np.float32]:
    height, width = (_DRAWN_LARGER * side for side in size)
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([(x * width - 0.5, y * height - 0.5) for x, y in polygon], fill=1)
    return np.asarray(canvas, dtype=np.float32)


def _positions(cells: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return positions inside, and nearest ones, of the grid with ``block`` squared positions in each cell."""
    height, width = (block * side for side in cells.shape)
    every = torch.arange(height * width).view(len(cells), block, -1, block).transpose(0, 1).flatten(1, 2)
    inside = every[:, cells.flatten()].flatten(1)
    places = torch.zeros(height * width, dtype=torch.int64)
    places[inside.flatten()] = torch.arange(inside.numel())
    outside = ~cells.repeat_interleave(block, 0).repeat_interleave(block, 1).numpy()
    rows, columns = distance_transform_edt(outside, return_distances=False, return_indices=True)
    return inside, places[torch.from_numpy(rows.astype(np.int64) * width + columns)]
