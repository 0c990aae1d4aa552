# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Scores an image file to a row. Imports neither Ray nor, for exported models, torch."""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anomalib_osdirf.errors import one_line
from anomalib_osdirf.inference.reading import ImageError, readable
from anomalib_osdirf.inference.scoring import ModelError, load_scorer

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("score", pa.float64()),
        ("label", pa.bool_()),  # whether it is anomalous
        ("box", pa.list_(pa.int32())),  # of `Score.box`
        ("seconds", pa.float64()),  # for reading and scoring
        ("map", pa.string()),  # file of the anomaly map
        ("error", pa.string()),
    ]
)
_MOST_DEATHS = 2


@dataclass(frozen=True)
class Job:
    """A worker's settings."""

    model: str
    threads: int
    max_pixels: int
    maps: str | None  # folder for anomaly maps


class Worker:
    """A loaded model that makes rows of image files.

    ``witness`` is a file that outlives this process if model or image kills it, on the same machine.

    Raises:
        ModelError: If the model can't be used here.
    """

    def __init__(self, job: Job, witness: Path) -> None:
        self._job = job
        self._witness = Witness(witness)
        if self._witness.deaths[job.model] >= _MOST_DEATHS:
            self._witness.close()
            raise ModelError(f"model {job.model!r} ended the process that loaded it, {_MOST_DEATHS} times")
        self._witness.watch(job.model)
        self._scorer = load_scorer(Path(job.model), threads=job.threads)
        self._witness.close()
        cv2.setNumThreads(job.threads)

    def rows(self, paths: list[bytes]) -> pa.Table:
        """Score files, given their absolute paths: a row of `SCHEMA` for each, with the error if it has no score."""
        table = pa.Table.from_pylist([self._row(os.fsdecode(path)) for path in paths], SCHEMA)
        self._witness.close()
        return table

    def _row(self, path: str) -> dict[str, Any]:
        row: dict[str, Any] = {"path": readable(path)}
        if self._witness.deaths[row["path"]] >= _MOST_DEATHS:
            return row | {"error": f"{Path(row['path']).name} ended the process that scored it, {_MOST_DEATHS} times."}
        start = time.perf_counter()
        self._witness.watch(row["path"])
        try:
            self._score(Path(path), row)
        except (ImageError, ModelError) as error:
            row["error"] = str(error)
        except Exception as error:  # noqa: BLE001 - whatever an image does to a model, the others are scored
            row["error"] = readable(f"{Path(path).name} could not be scored ({one_line(error)}).")
        return row | {"seconds": time.perf_counter() - start}

    def _score(self, path: Path, row: dict[str, Any]) -> None:
        image, result = self._scorer.score_file(path, self._job.max_pixels)
        row |= {"score": result.score, "label": result.label, "box": result.box(*image.shape[:2])}
        if self._job.maps is not None and result.map is not None:
            row["map"] = readable(str(_write_map(Path(self._job.maps), path, result.map)))


class Witness:
    """Records, during the work, which image a process was scoring when it died, and how often."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.deaths: Counter[str] = Counter()
        try:
            left = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.deaths.update(left["deaths"])
        self.deaths[left["current"]] += 1

    def watch(self, path: str) -> None:
        """Note that an image is being scored, or the model loaded."""
        self._file.write_text(json.dumps({"deaths": self.deaths, "current": path}), encoding="utf-8")

    def close(self) -> None:
        """Delete the record."""
        self._file.unlink(missing_ok=True)


def _write_map(folder: Path, image: Path, anomaly_map: NDArray[np.float32]) -> Path:
    """Write a map, whole or not at all, into folders like the image's."""
    file = folder.joinpath(image.drive.strip(":\\/"), *image.parts[1:-1], f"{image.name}.npy")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with unfinished.open("wb") as stream:
        np.save(stream, anomaly_map.astype(np.float32))
    return unfinished.replace(file)
