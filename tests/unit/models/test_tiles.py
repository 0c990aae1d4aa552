# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Counting, cutting and joining tiles, and the score and map of an image in tiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from torch import Tensor

from anomalib_osdirf.features import tiles
from anomalib_osdirf.models.field_model import FieldModel
from anomalib_osdirf.models.osdirf import OSDIRFModel

IMAGES = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(fit: Callable[[FieldModel, Tensor], FieldModel]) -> FieldModel:
    """A small model, fitted on tiles."""
    torch.manual_seed(0)
    model = OSDIRFModel(
        timestep=100,
        density="position",
        backbone="test_efficientnet",
        layers=None,
        feature_dim=5,
        grid_size=4,
        denoiser="conv_mlp",
        ema_decay=0.9,
    )
    return fit(model, torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_an_image_has_the_score_of_its_worst_tile_and_the_maps_of_all(model: FieldModel) -> None:
    model.tiler = None
    expected = [[model(IMAGES[:, :, top : top + 64, left : left + 64]) for left in (0, 64, 128)] for top in (0, 64)]
    model.tiler = Tiler(64, 64)
    found = model(IMAGES)
    scores = torch.stack([tile.pred_score for row in expected for tile in row])
    torch.testing.assert_close(found.pred_score, scores.amax(dim=0))
    maps = torch.cat([torch.cat([tile.anomaly_map for tile in row], dim=3) for row in expected], dim=2)
    torch.testing.assert_close(found.anomaly_map, maps, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_maps_of_overlapping_tiles_are_averaged(model: FieldModel) -> None:
    image = IMAGES[:1, :, :64, :96]
    model.tiler = None
    left, right = model(image[..., :64]).anomaly_map, model(image[..., 32:]).anomaly_map
    model.tiler = Tiler(64, (64, 32))
    found = model(image).anomaly_map
    middle = (left[..., 32:] + right[..., :32]) / 2
    expected = torch.cat([left[..., :32], middle, right[..., 32:]], dim=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_network_looks_at_few_tiles_at_once(model: FieldModel) -> None:
    seen: list[int] = []
    model.tiler = Tiler(64, 8)
    handle = model.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        model(IMAGES)
    finally:
        handle.remove()
    assert sum(seen) == 2 * 9 * 17
    assert max(seen) == 16


@torch.no_grad()
def test_a_frozen_model_cuts_alike(model: FieldModel) -> None:
    model.tiler = Tiler(64, 64)
    torch.testing.assert_close(model.freeze()(IMAGES).pred_score, model(IMAGES).pred_score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("stride", "number"), [(64, 6), (32, 15), ((64, 16), 18)])
def test_tiles_are_counted(stride: Any, number: int) -> None:
    tiler = Tiler(64, stride)
    assert tiles.number_of_tiles(tiler, 128, 192) == number
    assert len(tiles.cut(tiler, IMAGES)) == 2 * number


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        ({}, (100, 128), "100 x 128 .* 128 x 128"),
        ({}, (40, 64), "40 x 64 .* 64 x 64"),
        ({"remove_border_count": 2}, (128, 128), "remove_border_count=2"),
    ],
)
def test_what_tiles_do_not_fill_is_refused(arguments: dict[str, Any], size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiles.number_of_tiles(Tiler(64, 64, **arguments), *size)


def test_a_tiler_survives_as_plain_values() -> None:
    values = tiles.as_plain(Tiler((64, 32), (16, 8), mode=ImageUpscaleMode.INTERPOLATION))
    assert values == {"tile_size": [64, 32], "stride": [16, 8], "remove_border_count": 0, "mode": "interpolation"}
    assert tiles.as_plain(tiles.from_plain(values)) == values
    assert tiles.from_plain(tiles.as_plain(None)) is None
