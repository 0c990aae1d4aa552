# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The files of an export: none before all are complete, and none left behind."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished_export(destination: Path, name: str) -> Iterator[Path]:
    """Provide an empty folder to export into, on the disk of the destination, which is made.

    It has the same ``name`` each time, so that what a killed export left is gone with the next one. Temporary files of
    the converters go there as well.
    """
    destination.mkdir(parents=True, exist_ok=True)
    folder, usual = destination / f".unfinished-{name}", tempfile.tempdir
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "temporary").mkdir(parents=True)
    tempfile.tempdir = str(folder / "temporary")
    try:
        yield folder
    finally:
        tempfile.tempdir = usual
        shutil.rmtree(folder, ignore_errors=True)


def move_export(folder: Path, destination: Path, model: Path) -> None:
    """Move an export's files, ``model`` last: there is none, rather than a new one with an old one's weights."""
    (destination / model).unlink(missing_ok=True)
    files = sorted(file for file in (folder / model).parent.iterdir() if file.is_file())
    for file in sorted(files, key=lambda file: file == folder / model):
        target = destination / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
