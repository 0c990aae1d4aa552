# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Scores on disk: parts that are written atomically during a run, and merged into one file."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from anomalib_osdirf.bulk.rows import SCHEMA

_KEY = b"anomalib_osdirf"
_CSV = SCHEMA.set(SCHEMA.get_field_index("box"), pa.field("box", pa.string()))
_ROWS_OF_A_GROUP = 100_000


@dataclass
class Totals:
    """Totals of a file of scores."""

    images: int = 0
    anomalous: int = 0
    scored: int = 0
    errors: int = 0
    first_error: str | None = None

    def add(self, rows: pa.Table) -> None:
        """Count rows."""
        errors = rows["error"].drop_null()
        self.images += rows.num_rows
        self.anomalous += pc.sum(rows["label"]).as_py() or 0
        self.scored += rows.num_rows - rows["score"].null_count
        self.errors += len(errors)
        if self.first_error is None and len(errors):
            self.first_error = errors[0].as_py()


class Store:
    """Scores of a run in progress: parts, written every so many seconds, in a folder beside the final file.

    ``settings`` are what all scores have in common: digest of the model, folder of the maps.

    Raises:
        ValueError: If the existing scores have other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], seconds: float) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self._seconds = seconds
        self._schema = SCHEMA.with_metadata({_KEY: json.dumps(settings).encode()})
        self._waiting: list[pa.Table] = []
        self._written = time.monotonic()
        for file in self._files():
            self._check(file, settings)

    def finished(self, retry_errors: bool) -> set[str]:
        """Return the paths of all images that are done; with ``retry_errors``, those with an error are not."""
        scored, failed = self._paths()
        return scored if retry_errors else scored | failed

    def add(self, rows: pa.Table) -> None:
        """Add rows of `SCHEMA`, and write a part if it is due."""
        self._waiting.append(rows)
        if time.monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last part."""
        if self._waiting:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / f"{time.time_ns():020d}-{os.getpid()}.parquet", self._waiting)
            self._waiting = []
        self._written = time.monotonic()

    def merge(self) -> Totals:
        """Make one file of all parts, with one row for each image: its score if there is one, else an error."""
        self.flush()
        totals, files = Totals(), self._files()
        if files == [self.output]:
            for rows in _read(self.output):
                totals.add(rows)
            return totals
        self._write(self.output, self._once_each(files, totals))
        shutil.rmtree(self.folder)
        return totals

    def _once_each(self, files: list[Path], totals: Totals) -> Iterator[pa.Table]:
        scored, _ = self._paths()
        seen: set[str] = set()
        for file in files:
            for rows in _read(file):
                wanted = []
                for path, error in zip(rows["path"].to_pylist(), rows["error"].to_pylist(), strict=True):
                    wanted.append(path not in seen and (error is None or path not in scored))
                    if wanted[-1]:
                        seen.add(path)
                kept = rows.filter(pa.array(wanted, pa.bool_()))
                totals.add(kept)
                yield kept

    def _paths(self) -> tuple[set[str], set[str]]:
        """Return the paths of images with a row that has no error, and with one that has."""
        scored: set[str] = set()
        failed: set[str] = set()
        for file in self._files():
            for rows in _read(file, ["path", "error"]):
                good = pc.is_null(rows["error"])
                scored.update(rows["path"].filter(good).to_pylist())
                failed.update(rows["path"].filter(pc.invert(good)).to_pylist())
        return scored, failed

    def _files(self) -> list[Path]:
        """Return the files that there are, without parts that a power failure left broken."""
        parts = [part for part in sorted(self.folder.glob("*.parquet")) if _is_whole(part)]
        return [self.output, *parts] if self.output.exists() else parts

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        try:
            found = json.loads(pq.read_schema(file).metadata[_KEY])
        except (OSError, ValueError, TypeError, KeyError) as error:
            msg = f"--output {str(file)!r} exists and is not of this command; choose another, or move it away."
            raise ValueError(msg) from error
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"--output {str(self.output)!r} was begun with another {name} ({found.get(name)}, now {value}); "
                    "choose another --output, or go on as it was begun."
                )

    def _write(self, file: Path, tables: Iterable[pa.Table]) -> None:
        """Write a file, whole or not at all, a group of rows at a time."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        unfinished = self.folder / f"{file.name}.{os.getpid()}.partial"
        with unfinished.open("wb") as stream:
            with pq.ParquetWriter(stream, self._schema, compression="zstd") as writer:
                for group in _grouped(tables):
                    writer.write_table(group.cast(self._schema))
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)


def write_csv(scores: Path, output: Path) -> None:
    """Write a file of scores as CSV, atomically, boxes as four numbers separated by spaces."""
    unfinished = output.with_name(f".{output.name}.partial")
    try:
        with csv.CSVWriter(unfinished, _CSV) as writer:
            for rows in _read(scores):
                boxes = [None if box is None else " ".join(map(str, box)) for box in rows["box"].to_pylist()]
                index = rows.schema.get_field_index("box")
                writer.write_table(rows.set_column(index, "box", pa.array(boxes, pa.string())).cast(_CSV))
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join tables to larger ones, each of which becomes one group of rows in a file."""
    group: list[pa.Table] = []
    rows = 0
    for table in tables:
        group.append(table)
        rows += table.num_rows
        if rows >= _ROWS_OF_A_GROUP:
            yield pa.concat_tables(group)
            group, rows = [], 0
    if group:
        yield pa.concat_tables(group)


def _read(file: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(columns=columns):
            yield pa.Table.from_batches([batch])


def _is_whole(part: Path) -> bool:
    try:
        pq.read_metadata(part)
    except (OSError, pa.ArrowInvalid):
        return False
    return True
