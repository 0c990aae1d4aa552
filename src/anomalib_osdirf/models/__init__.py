# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The models, as anomalib sees them."""

from anomalib_osdirf.models.diffusionad import DiffusionAD, DiffusionADModel
from anomalib_osdirf.models.invad import InvAD, InvADModel
from anomalib_osdirf.models.osdirf import OSDIRF, OSDIRFModel

__all__ = ["OSDIRF", "DiffusionAD", "DiffusionADModel", "InvAD", "InvADModel", "OSDIRFModel"]
