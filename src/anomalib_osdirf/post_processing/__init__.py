# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Thresholds by the best F1 or, from normal images alone, by a false-alarm rate; p-values.

``tail`` has the statistics, as pure functions of arrays that import neither torch nor anomalib; ``false_alarm`` is
anomalib's post-processor over them.
"""

from typing import Any

__all__ = ["FalseAlarmPostProcessor"]


def __getattr__(name: str) -> Any:  # the app computes p-values without torch
    if name == "FalseAlarmPostProcessor":
        from anomalib_osdirf.post_processing.false_alarm import FalseAlarmPostProcessor

        return FalseAlarmPostProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
