# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The run folder, in which anomalib puts what one training writes: ``<root>/<model>/<data>[/<category>]/v<number>``."""

from pathlib import Path

RESULTS = "report.sqlite"


def run_of(checkpoint: Path | str) -> Path | None:
    """Return the run folder of a checkpoint, or ``None`` if the checkpoint is not where a training wrote it."""
    file = Path(checkpoint).resolve()
    return file.parents[2] if file.parts[-3:-1] == ("weights", "lightning") else None


def is_run(folder: Path) -> bool:
    """Return whether a folder has the results of a training or test."""
    return (folder / "weights").is_dir() or (folder / RESULTS).is_file()


def shown(path: Path) -> str:
    """Format a path, relative to the working directory if it is inside it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
