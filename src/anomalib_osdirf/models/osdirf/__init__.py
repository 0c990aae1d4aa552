# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF: one-step diffusion with the inverse residual field (arXiv 2604.18393)."""

from anomalib_osdirf.models.osdirf.lightning_model import OSDIRF
from anomalib_osdirf.models.osdirf.torch_model import OSDIRFModel

__all__ = ["OSDIRF", "OSDIRFModel"]
