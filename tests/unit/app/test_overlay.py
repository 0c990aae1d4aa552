# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Maps over images."""

import numpy as np

from anomalib_osdirf.app.overlay import overlay


def test_overlay_is_brighter_where_the_map_is_high() -> None:
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[:5] = 1
    picture = overlay(np.full((400, 2000, 3), 0.4, np.float32), anomaly_map, side=200)
    assert picture.shape == (40, 200, 3)
    assert (picture[35] == 102).all()
    assert picture[5].mean() > 120
