# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Telling a full disk and a folder that may not be written to from other errors."""

import errno
import re

_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}
# All that torch's and OpenVINO's writers have to say.
_WRITERS = re.compile("unexpected pos|file write failed|iostream error")


def why_unwritable(error: BaseException | None) -> str | None:
    """Tell why a file could not be written.

    Args:
        error: What was raised.

    Returns:
        The reason in a few words, ``None`` if the error is about something else.
    """
    reason = None
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return error.strerror
        if isinstance(error, RuntimeError) and _WRITERS.search(str(error)):
            reason = "the disk is full, or files may not grow so large"
        error = error.__context__
    return reason
