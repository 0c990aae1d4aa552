# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Statistics fitted on normal images after training: clusters, densities, score normalisation, image score."""

from anomalib_osdirf.scoring.clusters import ImageClusters, patch_centres
from anomalib_osdirf.scoring.cross_fitting import (
    FOLDS,
    CrossFitted,
    Sample,
    fit_mixture,
    fit_positions,
    standard,
)
from anomalib_osdirf.scoring.densities import PatchMixture, PositionGaussians, StandardGaussian, oas_shrinkage
from anomalib_osdirf.scoring.normalisation import HeldOutUnits, ImageScore, PositionStatistics

__all__ = [
    "FOLDS",
    "CrossFitted",
    "HeldOutUnits",
    "ImageClusters",
    "ImageScore",
    "PatchMixture",
    "PositionGaussians",
    "PositionStatistics",
    "Sample",
    "StandardGaussian",
    "fit_mixture",
    "fit_positions",
    "oas_shrinkage",
    "patch_centres",
    "standard",
]
