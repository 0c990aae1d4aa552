# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The colours of anomaly maps, alike in the report page and in the app. Neither torch nor anomalib is imported."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """Values of maps that the colours go from and to, and the threshold, which has a colour of its own.

    Without a threshold inside the span, colours are in proportion to the values.
    """

    low: float
    high: float
    threshold: float | None = None

    def share(self, values: NDArray[Any]) -> NDArray[Any]:
        """Map values to 0 to 1, and the threshold to 0.6."""
        if self.threshold is None or not self.low < self.threshold < self.high:
            return np.clip((values - self.low) / max(self.high - self.low, 1e-12), 0, 1)
        below = np.clip((values - self.low) / (self.threshold - self.low), 0, 1)
        # Few values are far above the threshold: the root keeps the others apart.
        above = np.sqrt(np.clip((values - self.threshold) / (self.high - self.threshold), 0, 1))
        return 0.6 * below + 0.4 * above


def colour_map(values: NDArray[Any], span: Span) -> NDArray[np.uint8]:
    """Colour a map ``(H, W)``, for people who are colour-blind, too.

    Args:
        values: The map.
        span: Values that the colours go from and to.

    Returns:
        Red, green, blue and opacity ``(H, W, 4)``: transparent where low, bright and nearly opaque where high.
    """
    share = span.share(values)
    colours = cv2.applyColorMap((share * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    alpha = (np.clip(share * 4 - 0.8, 0, 1) * 220).round().astype(np.uint8)
    return np.dstack([colours[..., ::-1], alpha])
