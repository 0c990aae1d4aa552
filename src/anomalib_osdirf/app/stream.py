# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A watched folder, whose images are scored as they come."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Lock, Thread

from anomalib_osdirf.app.rows import Row, score_file
from anomalib_osdirf.errors import one_line
from anomalib_osdirf.inference.reading import IMAGE_SUFFIXES
from anomalib_osdirf.inference.scoring import Scorer
from anomalib_osdirf.post_processing.drift import DriftWatch
from anomalib_osdirf.progress import counted

_SECONDS = 1.0
_HISTORY = 500
_LATEST, _PICTURES = 50, 12

Signature = tuple[int, int]  # size and time of the last change


class Stream:
    """Scores the images in a folder and in the folders below it, each file once.

    A file is scored when it has stayed as it is from one look at the folder to the next. One that can't be read then is
    counted as an error, and tried again when it changes.

    Attributes:
        lock: Held while any of the following changes.
        scored: Number of images scored.
        anomalous: Number of those above the threshold.
        waiting: Number of images that are known and not scored yet.
        errors: Rows of files that can't be scored, by their paths.
        history: Number, score and label of the last images.
        latest: Rows of the last images, the newest first.
        pictures: Rows of the last anomalous images, the newest first.
        problem: Sentence about the folder, empty if it can be read.
        version: Changes whenever any of these does.

    Args:
        folder: The folder.
        scorer: The model.
        max_pixels: Largest number of pixels of an image.
    """

    def __init__(self, folder: Path, scorer: Scorer, max_pixels: int) -> None:
        self.lock = Lock()
        self.folder = folder
        self.scorer = scorer
        self.max_pixels = max_pixels
        self.scored = self.anomalous = self.waiting = self.version = 0
        self.errors: dict[Path, Row] = {}
        self.history: deque[tuple[int, float, str]] = deque(maxlen=_HISTORY)
        self.latest: deque[Row] = deque(maxlen=_LATEST)
        self.pictures: deque[Row] = deque(maxlen=_PICTURES)
        self.problem = ""
        self.drift = DriftWatch(scorer.normal_scores)
        self._seen: dict[Path, Signature] = {}
        self._done: dict[Path, Signature | None] = {}  # None: scored, else as it was when it could not be
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Look at the folder each second, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End that."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            self.look()

    def look(self) -> None:
        """Score the files that have not changed since the last look."""
        problem, there = "", {}
        try:
            there = dict(self._files())
        except OSError as error:
            problem = f"Folder {str(self.folder)!r} can't be read ({error.strerror}); scoring goes on once it can."
        new = {file: signature for file, signature in there.items() if self._is_new(file, signature)}
        ready = sorted((signature[1], file) for file, signature in new.items() if self._seen.get(file) == signature)
        self._seen = new
        self._say(problem, len(new))
        for number, (_, file) in enumerate(ready, start=1):
            if self._ended.is_set():
                return
            self._score(file, new[file])
            self._say(problem, len(new) - number)

    def _say(self, problem: str, waiting: int) -> None:
        with self.lock:
            self.version += (problem, waiting) != (self.problem, self.waiting)
            self.problem, self.waiting = problem, waiting

    def _is_new(self, file: Path, signature: Signature) -> bool:
        return file not in self._done or self._done[file] not in {None, signature}

    def _files(self) -> Iterator[tuple[Path, Signature]]:
        os.scandir(self.folder).close()  # raises what os.walk keeps to itself
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(parent, name)
                if file.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    try:
                        status = file.stat()
                    except FileNotFoundError:  # moved away meanwhile
                        continue
                    yield file, (status.st_size, status.st_mtime_ns)

    def _score(self, file: Path, signature: Signature) -> None:
        name = str(file.relative_to(self.folder))
        try:
            row = score_file(self.scorer, file, self.max_pixels, name)
        except Exception as error:  # noqa: BLE001 - whatever an image does to a model, the others are scored
            row = Row(name, note=f"{name} could not be scored ({one_line(error)}).")
        self._done[file] = signature if row.score is None else None
        with self.lock:
            self._add(file, row)

    def _add(self, file: Path, row: Row) -> None:
        self.errors.pop(file, None)
        if row.score is None:
            self.errors[file] = row
            return
        label = row.label(self.scorer.threshold)
        self.scored += 1
        self.anomalous += label == "anomalous"
        self.history.append((self.scored, row.score, label))
        self.drift.add([row.score])
        if label == "anomalous":
            self.pictures.appendleft(row)
        self.latest.appendleft(Row(row.name, row.score, row.p_value, row.milliseconds))

    def rows(self) -> list[Row]:
        """Return the table's rows: the last errors, then the last images."""
        return list(self.errors.values())[: -_LATEST - 1 : -1] + list(self.latest)

    def sentence(self) -> str:
        """Say how many images there were."""
        parts = [f"{self.scored} scored", f"{self.anomalous} anomalous", counted(len(self.errors), "error")]
        parts += [f"{self.waiting} waiting"] if self.waiting else []
        return f"{', '.join(parts)}. {self.problem}".strip()
