# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the command lines of our subcommands have in common."""

import argparse
import sys


def positive(text: str) -> int:
    """Read a positive whole number; ``argparse`` tells the user where it is none."""
    if not text.isdecimal() or int(text) < 1:
        msg = f"{text!r} is no positive whole number"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def fail(program: str, sentence: str, status: int = 1) -> int:
    """Say on the error stream what is wrong, and return the exit status."""
    print(f"{program}: {sentence}", file=sys.stderr)  # noqa: T201
    return status
