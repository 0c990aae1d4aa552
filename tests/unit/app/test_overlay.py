# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Maps over images."""

import numpy as np

from anomalib_osdirf.app.overlay import overlay

IMAGE = np.full((400, 2000, 3), 0.4, np.float32)


def test_overlay_shows_the_part_and_outlines_where_the_map_is_high() -> None:
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[:5] = 1
    picture = overlay(IMAGE, anomaly_map, side=200)
    assert picture.shape == (40, 200, 3)
    assert (picture[35] == 102).all()
    assert np.ptp(picture[8, 100]) > 20  # coloured
    assert np.abs(picture[8, 100].astype(int) - 102).max() < 0.5 * 153  # but more of the part than of the map
    assert (picture[:22, 100] > 220).all(axis=1).any()  # a white line


def test_only_what_is_near_the_threshold_is_coloured() -> None:
    assert (overlay(IMAGE, np.full((10, 10), 0.6, np.float32), side=200, threshold=0.9) == 102).all()
