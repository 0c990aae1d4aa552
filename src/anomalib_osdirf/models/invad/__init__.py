# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD: anomaly detection by DDIM inversion (arXiv 2504.05662)."""

from anomalib_osdirf.models.invad.lightning_model import InvAD
from anomalib_osdirf.models.invad.torch_model import InvADModel

__all__ = ["InvAD", "InvADModel"]
