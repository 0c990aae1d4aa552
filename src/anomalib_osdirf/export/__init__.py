# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of exported graphs."""

from anomalib_osdirf.export.exact_resize import ExactResize, exact_export_transform

__all__ = ["ExactResize", "exact_export_transform"]
