# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""An error as one line of a table or log."""


def one_line(error: BaseException, length: int = 500) -> str:
    """Return an error's class and message in one line of at most ``length`` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]
