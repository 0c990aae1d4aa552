# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""From an image to one standardised feature grid: frozen backbone, average pooling, PCA whitening."""

from anomalib_osdirf.features.backbone import Backbone, build_backbone
from anomalib_osdirf.features.statistics import StreamingMoments
from anomalib_osdirf.features.whitening import PCAWhitening

__all__ = ["Backbone", "PCAWhitening", "StreamingMoments", "build_backbone"]
