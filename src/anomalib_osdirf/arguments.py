# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the command lines of our subcommands have in common."""

import argparse
import re
import sys
from collections.abc import Sequence

_ANOMALIBS = re.compile(r"(-c|--config|--print_config|--data|--(model|data|trainer)\.[\w.]+)(=|$)")


def is_anomalibs(arguments: Sequence[str]) -> bool:
    """Tell whether arguments are those of anomalib's `train` or `predict`, and not of ours of the same names."""
    return any(_ANOMALIBS.match(argument) for argument in arguments)


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
