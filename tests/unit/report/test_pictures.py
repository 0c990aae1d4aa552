# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Outlines of maps and masks."""

import re

import numpy as np
import pytest
import torch

from anomalib_osdirf.report.pictures import encode_map, encode_mask, map_outline, mask_outline

SQUARE = torch.zeros(64, 64)
SQUARE[16:32, 32:48] = 1


def _extent(path: str) -> list[int]:
    places = np.array(re.findall(r"(\d+) (\d+)", path), dtype=int)
    return [*places.min(axis=0), *places.max(axis=0)]


def test_outlines_lie_around_what_is_inside() -> None:
    expected = [4 * 32, 4 * 16, 4 * 48, 4 * 32]
    assert _extent(map_outline(*encode_map(SQUARE * 7, 64), 3.5)) == pytest.approx(expected, abs=4)
    assert _extent(mask_outline(encode_mask(SQUARE, 64))) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("threshold", [None, 8.0])
def test_no_outline_without_a_value_above_the_threshold(threshold: float | None) -> None:
    assert map_outline(*encode_map(SQUARE * 7, 64), threshold) == ""
