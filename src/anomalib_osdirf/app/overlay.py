# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of maps over images."""

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.colours import COLOURS, THRESHOLD
from anomalib_osdirf.inference.scoring import Array

_OPACITY = 0.4
_BLACK = (0, 0, 0)


def overlay(image: Array, anomaly_map: Array | None, side: int = 640, threshold: float = 0.5) -> NDArray[np.uint8]:
    """Lay a normalised map over an image, near the threshold and above it, and outline what is above.

    Args:
        image: Image ``(H, W, 3)``, in 0 to 1.
        anomaly_map: Map ``(h, w)``, ``None`` for none.
        side: Longest side of the result.
        threshold: The map's threshold, in (0, 1).

    Returns:
        The picture.
    """
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA) * 255
    if anomaly_map is None:
        return np.clip(picture.round(), 0, 255).astype(np.uint8)
    values = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colours = COLOURS[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)]
    opacity = _OPACITY * np.clip(values / threshold * 10 - 9, 0, 1)[..., None]  # from nine tenths of the threshold
    blended = np.clip((picture * (1 - opacity) + colours * opacity).round(), 0, 255).astype(np.uint8)
    lines, _ = cv2.findContours((values > threshold).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    width = max(1, round(max(size) / 320))
    for colour, thickness in ((_BLACK, 3 * width), (THRESHOLD, width)):
        cv2.drawContours(blended, lines, -1, colour, thickness, cv2.LINE_AA)
    return blended
