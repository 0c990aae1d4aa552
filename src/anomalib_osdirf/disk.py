# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Recognises errors of full disks and folders without write permission."""

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
    """Return in a few words why a file could not be written, ``None`` if the error is about something else."""
    reason = None
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return error.strerror
        if isinstance(error, RuntimeError) and _WRITERS.search(str(error)):
            reason = "the disk is full, or files may not grow so large"
        error = error.__context__
    return reason
