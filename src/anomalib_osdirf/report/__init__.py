# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A page to judge a detector by: a callback collects the results of a test, a command makes the page from them.

Data flows one way: ``callback`` -> ``results`` (one file per results folder) -> ``page``, whose figures come from
``statistics`` and ``exports``.
"""

from anomalib_osdirf.report.callback import ReportCallback

__all__ = ["ReportCallback"]
