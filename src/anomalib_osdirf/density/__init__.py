# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussian densities of the inverse residual field, and image scores from the map they give."""

from anomalib_osdirf.density.block import BlockGaussian
from anomalib_osdirf.density.gaussian import (
    DENSITIES,
    Density,
    DiagonalGaussian,
    PositionGaussian,
    StandardGaussian,
    build_density,
)
from anomalib_osdirf.density.score import IMAGE_SCORES, StandardisedSum, image_score

__all__ = [
    "DENSITIES",
    "IMAGE_SCORES",
    "BlockGaussian",
    "Density",
    "DiagonalGaussian",
    "PositionGaussian",
    "StandardGaussian",
    "StandardisedSum",
    "build_density",
    "image_score",
]
