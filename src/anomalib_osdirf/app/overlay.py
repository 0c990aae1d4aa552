# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of maps over images."""

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.colours import Span, colour_map
from anomalib_osdirf.inference.scoring import Array


def overlay(image: Array, anomaly_map: Array | None, side: int = 640) -> NDArray[np.uint8]:
    """Lay a normalised map over an image.

    Args:
        image: Image ``(H, W, 3)``, in 0 to 1.
        anomaly_map: Map ``(h, w)``, ``None`` for none.
        side: Longest side of the result.

    Returns:
        The picture.
    """
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA) * 255
    if anomaly_map is not None:
        values = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        colours = colour_map(values, Span(0, 1, 0.5)).astype(np.float32)
        opacity = colours[..., 3:] / 255
        picture = picture * (1 - opacity) + colours[..., :3] * opacity
    return np.clip(picture.round(), 0, 255).astype(np.uint8)
