# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The colours of anomaly maps, alike in the report page and in the app. Neither torch nor anomalib is imported."""

import cv2
import numpy as np
from numpy.typing import NDArray

_GREY = np.arange(256, dtype=np.uint8)[:, None]
# Viridis: perceptually uniform, also for colour-blind people. Red, green, blue ``(256, 3)`` from low to high.
COLOURS: NDArray[np.uint8] = cv2.applyColorMap(_GREY, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]  # type: ignore[assignment]
TRUTH = (255, 45, 149)  # the outline of the ground truth; viridis has no red
THRESHOLD = (255, 255, 255)  # the outline of what is above the threshold
