# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""From an image to one feature grid: frozen backbone, local averages, PCA projection."""

from anomalib_osdirf.features.backbone import Backbone, build_backbone, coarse
from anomalib_osdirf.features.projection import PCAProjection
from anomalib_osdirf.features.statistics import StreamingMoments

__all__ = ["Backbone", "PCAProjection", "StreamingMoments", "build_backbone", "coarse"]
