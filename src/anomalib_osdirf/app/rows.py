# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Results of images as rows of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.app.overlay import overlay
from anomalib_osdirf.inference.reading import ImageError, readable
from anomalib_osdirf.inference.scoring import ModelError, Scorer

HEADERS = ["image", "score", "label", "ms", "note"]
P_VALUE = "p-value"  # a further column, for models that have it


@dataclass
class Row:
    """One image's results."""

    name: str
    score: float | None = None
    p_value: float | None = None
    milliseconds: float | None = None
    original: NDArray[np.uint8] | None = None
    picture: NDArray[np.uint8] | None = None
    note: str = ""

    def label(self, threshold: float) -> str:
        """Return what the score means at a threshold."""
        if self.score is None:
            return ""
        return "anomalous" if self.score > threshold else "normal"

    def caption(self, threshold: float) -> str:
        """Return what stands below the picture."""
        return f"{self.label(threshold)} {self.score:.3f}, {self.name}"


def score_file(scorer: Scorer, file: Path, max_pixels: int, name: str) -> Row:
    """Score an image file; one that can't be read or scored has a note that says so."""
    name = readable(name)
    try:
        image, result = scorer.score_file(file, max_pixels)
    except (ImageError, ModelError) as error:
        return Row(name, note=str(error))
    picture = overlay(image, result.map, threshold=scorer.pixel_threshold)
    return Row(name, result.score, result.p_value, result.milliseconds, overlay(image, None), picture)


def table_of(rows: Sequence[Row], threshold: float) -> dict[str, Any]:
    """Return headers and cells."""
    headers = [*HEADERS, P_VALUE] if any(row.p_value is not None for row in rows) else HEADERS
    return {"headers": headers, "data": [_cells(row, threshold)[: len(headers)] for row in rows]}


def _cells(row: Row, threshold: float) -> list[Any]:
    score, p_value = (None if value is None else float(f"{value:.6g}") for value in (row.score, row.p_value))
    milliseconds = None if row.milliseconds is None else round(row.milliseconds)
    return [row.name, score, row.label(threshold), milliseconds, row.note, p_value]
