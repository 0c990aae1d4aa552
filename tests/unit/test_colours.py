# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Colours of anomaly maps."""

import numpy as np

from anomalib_osdirf.colours import COLOURS


def test_brighter_the_higher() -> None:
    luminance = COLOURS.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -1).all()
    assert luminance[0] < 30
    assert luminance[-1] > 200
