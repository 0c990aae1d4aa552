# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Errors as one line of a table or log."""


def one_line(error: BaseException, length: int = 500) -> str:
    """Return an error's class and message in one line of at most ``length`` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, such as after a worker's traceback; its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
