# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Finds broken files in data sets beforehand, skips and lists them."""

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from anomalib_osdirf.data.reading import trouble_with
from anomalib_osdirf.progress import phase

logger = logging.getLogger(__name__)

_NAMED = 3  # files in a sentence
_THREADS = 4


def skip_broken(datasets: Iterable[Any], visible: bool) -> dict[str, str]:
    """Remove samples with a broken image or mask from anomalib's data sets, in place; return reasons by file."""
    datasets = list(datasets)
    files = [list(_files_of(dataset)) for dataset in datasets]
    paths = sorted({path for samples in files for sample in samples for path in sample})
    # Threads, because Pillow decodes without Python's lock.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        looked_at = phase("Looking for broken files", pool.map(_known_trouble, paths), len(paths), visible)
        troubles = dict(zip(paths, looked_at, strict=True))
    found: dict[str, str] = {}
    for dataset, samples in zip(datasets, files, strict=True):
        broken = {}
        for index, sample in enumerate(samples):
            trouble = next((troubles[path] for path in sample if troubles[path]), None)
            if trouble is not None:
                broken[index] = found[sample[0]] = trouble
        if broken:
            _keep(dataset, [index for index in range(len(samples)) if index not in broken])
    return found


def report(found: Mapping[str, str], file: Path) -> None:
    """List broken files and reasons in a CSV file, and warn of the first; without any, remove an earlier list."""
    if not found:
        file.unlink(missing_ok=True)
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            csv.writer(stream).writerows([("image_path", "error"), *found.items()])
        listed = f"listed in {file}"
    except OSError as error:
        listed = f"not listed, as {file} can't be written ({error.strerror})"
    count = "1 image is" if len(found) == 1 else f"{len(found)} images are"
    named = "; ".join(list(found.values())[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    logger.warning("%s skipped and %s: %s%s.", count, listed, named, more)


def datasets_in(dataloaders: Any) -> Iterator[Any]:  # whatever a trainer takes
    """Yield the data sets of dataloaders, alone or in lists."""
    if isinstance(dataloaders, DataLoader):
        yield dataloaders.dataset
    elif isinstance(dataloaders, list | tuple):
        for dataloader in dataloaders:
            yield from datasets_in(dataloader)


def _known_trouble(path: str) -> str | None:
    """Look at each file once: a test follows a training on the same images."""
    try:
        changed = Path(path).stat().st_mtime_ns
    except OSError:
        changed = 0
    return _trouble(path, changed)


@cache
def _trouble(path: str, changed: int) -> str | None:
    del changed
    return trouble_with(path)


def _files_of(dataset: Any) -> Iterator[tuple[str, ...]]:
    """Yield the files of each sample of a data set, its image first."""
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        yield from ((str(path),) for path in dataset.image_filenames)
    elif hasattr(dataset, "samples") and hasattr(dataset, "subsample"):
        samples = dataset.samples
        masks = samples.mask_path.fillna("") if "mask_path" in samples else [""] * len(samples)
        for image, mask in zip(samples.image_path, masks, strict=True):
            yield (str(image), str(mask)) if mask else (str(image),)


def _keep(dataset: Any, indices: list[int]) -> None:
    if hasattr(dataset, "image_filenames"):
        dataset.image_filenames = [dataset.image_filenames[index] for index in indices]
    else:
        dataset.subsample(indices, inplace=True)
