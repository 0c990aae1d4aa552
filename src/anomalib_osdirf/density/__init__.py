# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Gaussian densities of the inverse residual field, and image scores from the map they give."""

from anomalib_osdirf.density.block import BlockGaussian
from anomalib_osdirf.density.gaussian import (
    Density,
    DiagonalGaussian,
    FittedDensity,
    Gaussian,
    PositionGaussian,
    StandardGaussian,
)
from anomalib_osdirf.density.mixture import PositionMixture
from anomalib_osdirf.density.registry import DENSITIES, MIXTURE, build_density
from anomalib_osdirf.density.score import IMAGE_SCORES, StandardisedSum, SumByKind, image_score

__all__ = [
    "DENSITIES",
    "IMAGE_SCORES",
    "MIXTURE",
    "BlockGaussian",
    "Density",
    "DiagonalGaussian",
    "FittedDensity",
    "Gaussian",
    "PositionGaussian",
    "PositionMixture",
    "StandardGaussian",
    "StandardisedSum",
    "SumByKind",
    "build_density",
    "image_score",
]
