# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Lists the images to score."""

import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from anomalib_osdirf.inference.reading import IMAGE_SUFFIXES


def list_images(wanted: str) -> list[str]:
    """List the images in a folder, a text file with a path in each line, or what a pattern matches.

    Paths are absolute, each once, a folder's sorted; lines are relative to the working directory.

    Raises:
        ValueError: If there are none.
    """
    matches = [wanted] if Path(wanted).exists() else sorted(glob(wanted, recursive=True))  # noqa: PTH207 - of any folder
    if not matches:
        msg = f"--input {wanted!r} does not exist; give a folder, a text file with a path in each line, or a pattern."
        raise ValueError(msg)
    images = list(dict.fromkeys(os.path.abspath(path) for match in matches for path in _images_of(Path(match))))  # noqa: PTH100 - links stay as they are
    if not images:
        raise ValueError(f"--input {wanted!r} has no images; known are files that end in {', '.join(IMAGE_SUFFIXES)}.")
    return images


def _images_of(place: Path) -> Iterator[str]:
    if place.is_dir():
        yield from _images_below(place)
    elif place.suffix.lower() in IMAGE_SUFFIXES:
        yield str(place)
    else:
        yield from _images_named_in(place)


def _images_below(folder: Path) -> Iterator[str]:
    try:
        for parent, folders, files in os.walk(folder, onerror=_fail):
            folders.sort()
            yield from (os.path.join(parent, name) for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES))  # noqa: PTH118 - as os.walk has them
    except OSError as error:
        raise ValueError(f"--input: folder {error.filename!r} can't be listed ({error.strerror}).") from error


def _fail(error: OSError) -> None:
    raise error


def _images_named_in(file: Path) -> Iterator[str]:
    try:
        # Names of files are bytes, and need not be of any encoding.
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"--input {str(file)!r} can't be read ({error.strerror}).") from error
    if "\0" in text:
        msg = f"--input {str(file)!r} is neither a folder nor an image nor a text file with a path in each line."
        raise ValueError(msg)
    yield from (line for line in text.split("\n") if line.strip())
