# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf benchmark``: models over data sets and seeds, accuracy, time, memory and size.

The configuration file is one for ``anomalib benchmark`` too; see ``configs/benchmark.yaml``.
"""

from collections.abc import Sequence

from anomalib_osdirf.benchmark.entry import build_entry

__all__ = ["build_entry", "main"]


def main(arguments: Sequence[str], program: str) -> int:
    """Run a benchmark and report it."""
    # Imported here, since every run is a process of its own that needs nothing of it.
    from anomalib_osdirf.benchmark import command

    return command.main(arguments, program)
