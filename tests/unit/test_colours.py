# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Colours of anomaly maps."""

import numpy as np
import pytest

from anomalib_osdirf.colours import Span, colour_map


@pytest.mark.parametrize("threshold", [None, 0.5, 0.9, 7.0])
def test_brighter_and_more_opaque_the_higher(threshold: float | None) -> None:
    colours = colour_map(np.linspace(-1, 2, 200)[None], Span(0, 1, threshold))[0].astype(float)
    luminance = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -2).all()
    assert (np.diff(colours[:, 3]) >= 0).all()
    assert colours[0, 3] == 0
    assert colours[-1, 3] > 200


def test_the_threshold_has_its_own_colour_whatever_the_span() -> None:
    assert [Span(0, high, 2).share(np.array([2.0]))[0] for high in (3, 10, 1000)] == pytest.approx([0.6] * 3)
