# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The anomalib models; importing them also registers the datamodules, which anomalib looks up by name."""

from importlib import import_module

from anomalib.models import ALLOWED_MODULES

from anomalib_osdirf.models.diffusionad import DiffusionAD, DiffusionADModel
from anomalib_osdirf.models.invad import InvAD, InvADModel
from anomalib_osdirf.models.osdirf import OSDIRF, OSDIRFModel
from anomalib_osdirf.terminal import shorten_parser_errors

__all__ = ["OSDIRF", "DiffusionAD", "DiffusionADModel", "InvAD", "InvADModel", "OSDIRFModel"]

for _name in ("multi_category", "synthetic_surfaces"):
    import_module(f"anomalib_osdirf.data.{_name}")
# Where `anomalib benchmark` may take `build_entry` from; it is imported when it is asked for.
ALLOWED_MODULES.add("anomalib_osdirf.benchmark")
shorten_parser_errors()
