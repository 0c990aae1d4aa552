# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionAD: norm-guided one-step denoising and a segmentation network (arXiv 2303.08730)."""

from anomalib_osdirf.models.diffusionad.lightning_model import DiffusionAD
from anomalib_osdirf.models.diffusionad.torch_model import DiffusionADModel

__all__ = ["DiffusionAD", "DiffusionADModel"]
