# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A page to judge a detector by: ``callback`` -> ``results`` (one file per results folder) -> ``page``."""

from anomalib_osdirf.report.callback import ReportCallback

__all__ = ["ReportCallback"]
