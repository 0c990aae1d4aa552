# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The results file: what a test found, image by image, and how the model was trained.

It is an SQLite database, ``report.sqlite`` in the results folder, written batch by batch: an interrupted test leaves
what it had, and large tests need no memory. Scores are the model's own, before anomalib normalises and clips them.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.runs import RESULTS

FILE_NAME = RESULTS
FORMAT = 3

_TABLES = """
CREATE TABLE IF NOT EXISTS entry (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS loss (step INTEGER PRIMARY KEY, value REAL);
CREATE TABLE IF NOT EXISTS image (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE, label INTEGER, category TEXT, defect_type TEXT, score REAL,
    width INTEGER, height INTEGER, picture BLOB, map BLOB, map_low REAL, map_high REAL, mask BLOB,
    normal_pixels BLOB, anomalous_pixels BLOB, regions BLOB
);
"""
_LIGHT = "id, path, label, category, defect_type, score, width, height"


@dataclass
class ImageResult:
    """What a test found in one image."""

    path: str | None
    label: int | None  # 0 normal, 1 anomalous, None unknown
    category: str
    defect_type: str
    score: float | None
    width: int
    height: int
    picture: bytes | None  # small picture of what the model was given
    map: bytes | None  # small grey picture of the anomaly map, from map_low (black) to map_high (white)
    map_low: float | None
    map_high: float | None
    mask: bytes | None  # small picture of the ground truth, white where anomalous
    normal_pixels: bytes | None  # counts of the map's values in pixels of either class, by `pack`
    anomalous_pixels: bytes | None
    regions: bytes | None  # shares of the anomalous regions' pixels by the map's value, summed, by `pack`


class ResultsWriter:
    """Writes a results file.

    Args:
        folder: Results folder.
        fresh: Whether to start anew where there is a file already.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE_NAME
        if fresh:
            # The journal of a killed process first: SQLite would undo its changes in the new file.
            for file in (folder / f"{FILE_NAME}-journal", self.file):
                file.unlink(missing_ok=True)
        with closing(self._connect()) as database, database:
            database.executescript(_TABLES)
            self._put(database, {"format": FORMAT})

    def put(self, entries: Mapping[str, Any]) -> None:
        """Store values that JSON can hold, in the place of earlier ones of the same names."""
        with closing(self._connect()) as database, database:
            self._put(database, entries)

    def forget_training(self) -> None:
        """Remove what is there of an earlier training."""
        with closing(self._connect()) as database, database:
            database.execute("DELETE FROM loss")
            names = ("training", "training_command", "training_config", "suspicious")
            database.execute(f"DELETE FROM entry WHERE name IN {names}")

    def forget_test(self) -> None:
        """Remove what is there of an earlier test."""
        with closing(self._connect()) as database, database:
            database.execute("DELETE FROM image")
            database.execute("DELETE FROM entry WHERE name IN ('metrics', 'latencies')")

    def add_losses(self, losses: Iterable[tuple[int, float]]) -> None:
        """Add losses: step, value."""
        with closing(self._connect()) as database, database:
            database.executemany("INSERT OR REPLACE INTO loss VALUES (?, ?)", losses)

    def add_images(self, images: Iterable[ImageResult]) -> None:
        """Add images; one whose path is there already is left out, as samplers repeat images to fill up batches."""
        names = [field.name for field in fields(ImageResult)]
        statement = f"INSERT OR IGNORE INTO image ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        with closing(self._connect()) as database, database:
            database.executemany(statement, [astuple(image) for image in images])

    def _connect(self) -> sqlite3.Connection:
        # Several processes of one test may write at the same time.
        return sqlite3.connect(self.file, timeout=60)

    @staticmethod
    def _put(database: sqlite3.Connection, entries: Mapping[str, Any]) -> None:
        rows = [(name, json.dumps(value)) for name, value in entries.items()]
        database.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?)", rows)


class Results:
    """A results file that was read.

    Attributes:
        entries: What was stored by name.
        losses: Array of steps and values, ``(N, 2)``.
        ids: Numbers of the images in the file; all further attributes have one item for each.
        paths: Paths, ``None`` where the data have none.
        labels: 0 normal, 1 anomalous, -1 unknown.
        categories: Names of categories.
        defect_types: Names of defect types.
        scores: Scores, NaN where there is none.
        sizes: Widths and heights, ``(N, 2)``.

    Args:
        folder: Results folder.

    Raises:
        ValueError: If the folder has no results file, or not a readable one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / FILE_NAME
        if not self.file.is_file():
            raise ValueError(_no_results(folder))
        try:
            self._recover()
            with closing(self._connect()) as database:
                self.entries = {
                    name: json.loads(value) for name, value in database.execute("SELECT name, value FROM entry")
                }
                if self.entries.get("format") != FORMAT:
                    raise ValueError(
                        f"{str(self.file)!r} has format {self.entries.get('format')}, and this version reads {FORMAT}; "
                        "run the test again, or use the version of anomalib-osdirf that wrote it."
                    )
                self.losses = np.array(
                    database.execute("SELECT step, value FROM loss ORDER BY step").fetchall(), dtype=np.float64
                ).reshape(-1, 2)
                rows = database.execute(f"SELECT {_LIGHT} FROM image ORDER BY id").fetchall()
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            sentence = f"{str(self.file)!r} can't be read ({error}); delete it and run the test again."
            raise ValueError(sentence) from error
        self.ids: list[int] = [row[0] for row in rows]
        self.paths: list[str | None] = [row[1] for row in rows]
        self.labels = np.array([-1 if row[2] is None else row[2] for row in rows], dtype=np.int64)
        self.categories: list[str] = [row[3] for row in rows]
        self.defect_types: list[str] = [row[4] for row in rows]
        self.scores = np.array([np.nan if row[5] is None else row[5] for row in rows], dtype=np.float64)
        self.sizes = np.array([row[6:8] for row in rows], dtype=np.int64).reshape(-1, 2)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.file.resolve().as_uri()}?mode=ro", uri=True)

    def _recover(self) -> None:
        """Have SQLite undo what a killed process left half done, which it does not on a connection for reading."""
        if self.file.with_name(f"{FILE_NAME}-journal").is_file():
            with closing(sqlite3.connect(self.file, timeout=60)) as database:
                database.execute("SELECT name FROM entry").fetchone()

    def picture_bytes(self) -> NDArray[np.int64]:
        """Return how many bytes each image's pictures take."""
        size = " + ".join(f"coalesce(length({name}), 0)" for name in ("picture", "map", "mask"))
        with closing(self._connect()) as database:
            rows = database.execute(f"SELECT {size} FROM image ORDER BY id").fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def pictures(self, ids: Iterable[int]) -> Iterator[sqlite3.Row]:
        """Yield ``picture``, ``map``, ``map_low``, ``map_high`` and ``mask`` of images by their numbers."""
        statement = "SELECT picture, map, map_low, map_high, mask FROM image WHERE id = ?"
        with closing(self._connect()) as database:
            database.row_factory = sqlite3.Row
            for number in ids:
                yield database.execute(statement, (number,)).fetchone()

    def map_range(self) -> tuple[float, float] | None:
        """Return the smallest and largest value of all maps."""
        with closing(self._connect()) as database:
            low, high = database.execute("SELECT min(map_low), max(map_high) FROM image").fetchone()
        return None if low is None else (low, high)

    def pixel_counts(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Return the counts of the n images with masks, ``(n, bins)`` each, and a mask of these images, ``(N,)``."""
        with closing(self._connect()) as database:
            rows = database.execute("SELECT normal_pixels, anomalous_pixels, regions FROM image ORDER BY id").fetchall()
        known = np.array([row[0] is not None for row in rows], dtype=np.bool_)
        counted = [row for row in rows if row[0] is not None]
        normal, anomalous, regions = (np.array([unpack(row[part]) for row in counted]) for part in range(3))
        return normal, anomalous, regions, known


def pack(values: NDArray[Any]) -> bytes:
    """Compress an array, in float32: counts of an image's pixels are exact in it."""
    return zlib.compress(values.astype("<f4").tobytes(), 6)


def unpack(packed: bytes) -> NDArray[np.float32]:
    """Reverse :func:`pack`."""
    return np.frombuffer(zlib.decompress(packed), dtype="<f4")


def name_groups(path: str | None, label: int | None, category: str | None) -> tuple[str, str]:
    """Tell an image's category (empty for none) and defect type from its path and label.

    Paths are ``.../<category>/test/<type>/000.png`` or ``.../<type>/000.png``. ``category`` is the data's own name.
    """
    parts = Path(path or "").parts
    if not category:
        category = parts[-4] if len(parts) >= 4 and parts[-3] == "test" else ""
    if label == 0:
        return category, "good"
    return category, parts[-2] if len(parts) >= 2 else ("anomalous" if label else "unlabelled")


def _no_results(folder: Path) -> str:
    if not folder.is_dir():
        return f"results folder {str(folder)!r} does not exist; give the folder that a training or test wrote to."
    return (
        f"results folder {str(folder)!r} has no {FILE_NAME}; add anomalib_osdirf.report.ReportCallback to "
        "trainer.callbacks and test the model."
    )
