# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Helpers shared by our subcommands' command lines."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches

_ANOMALIBS = re.compile(r"(-c|--config|--print_config|--data|--(model|data|trainer)\.[\w.]+)(=|$)")


def is_anomalibs(arguments: Sequence[str]) -> bool:
    """Return whether arguments are those of anomalib's `train` or `predict` rather than of our commands."""
    return any(_ANOMALIBS.match(argument) for argument in arguments)


def positive(text: str) -> int:
    """Parse a positive whole number, for ``argparse``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def hint(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Return the end of a sentence about an unknown name: the closest one that is known, or all."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"use one of {', '.join(sorted(known))}."


def fail(program: str, sentence: str, status: int = 1) -> int:
    """Print an error to the error stream, and return the exit status."""
    print(f"{program}: {sentence}", file=sys.stderr)  # noqa: T201
    return status
