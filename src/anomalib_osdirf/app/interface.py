# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The page: images in, overlays, scores and labels out. It keeps nothing but what a browser's session shows."""

import csv
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio
import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.app.overlay import overlay
from anomalib_osdirf.inference.reading import ImageError, read_image
from anomalib_osdirf.inference.scoring import ModelError, Scorer

HEADERS = ["image", "score", "label", "ms", "note"]
P_VALUE = "p-value"  # a further column, for models that have it
_MOST_PICTURES = 60
_HOUR = 3600
_AT_ONCE = 4


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


class App:
    """The page of a model.

    Args:
        scorer: The model.
        max_pixels: Largest number of pixels of an image.
    """

    def __init__(self, scorer: Scorer, max_pixels: int) -> None:
        self.scorer = scorer
        self.max_pixels = max_pixels
        self._scratch = TemporaryDirectory(prefix="anomalib-osdirf-app-")
        self.page = self._build()

    def score(self, paths: Sequence[str] | str | None, progress: Any = None) -> list[Row]:  # noqa: ANN401
        """Score files; one that can't be read has a row that says so.

        Args:
            paths: Files, as the browser named them.
            progress: Called with the number of files done and of all.

        Returns:
            A row for each, the highest scores first; as many as are shown have pictures.
        """
        files = [Path(path) for path in ([paths] if isinstance(paths, str) else paths or [])]
        rows = []
        for number, file in enumerate(files):
            if progress is not None:
                progress((number, len(files)), unit="images")
            rows.append(self._score(file))
            if len(rows) % _MOST_PICTURES == 0:
                _keep_pictures(rows)
        _keep_pictures(rows)
        return rows

    def _score(self, file: Path) -> Row:
        try:
            image = read_image(file, self.max_pixels)
        except ImageError as error:
            return Row(file.name, note=str(error))
        try:
            result = self.scorer.score(image)
        except ModelError as error:
            return Row(file.name, note=f"{file.name} has no score: {error}")
        original = overlay(image, None)
        picture = overlay(image, result.map, threshold=self.scorer.pixel_threshold)
        return Row(file.name, result.score, result.p_value, result.milliseconds, original, picture)

    def show(
        self, rows: list[Row], threshold: float, originals: bool = False
    ) -> tuple[list[Any], dict[str, Any], str | None, str]:
        """Return pictures with captions, the table, the path of the table as CSV, and a sentence."""
        pictures = [
            (row.original if originals else row.picture, f"{row.label(threshold)} {row.score:.3f}, {row.name}")
            for row in rows
            if row.picture is not None and row.score is not None
        ]
        p_values = any(row.p_value is not None for row in rows)
        headers = [*HEADERS, P_VALUE] if p_values else HEADERS
        table = [_cells(row, threshold)[: len(headers)] for row in rows]
        file = self._csv([headers, *table]) if table else None
        return pictures, {"headers": headers, "data": table}, file, _sentence(rows, len(pictures), threshold)

    def _csv(self, table: list[list[Any]]) -> str:
        folder = Path(self._scratch.name) / uuid.uuid4().hex
        folder.mkdir()
        file = folder / "scores.csv"
        # With a mark by which spreadsheets know the encoding.
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows(table)
        return str(file)

    def _build(self) -> gradio.Blocks:
        with gradio.Blocks(
            title=f"{self.scorer.name}: try it", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)
        ) as page:
            rows = gradio.State([])
            stays = "Images stay on the computer that serves this page."
            gradio.Markdown(f"# {self.scorer.name}\nRuns on {self.scorer.kind}. {stays}")
            with gradio.Row():
                with gradio.Column(scale=1, min_width=280):
                    with gradio.Tab("Images"):
                        files = gradio.File(label="Drop images", file_count="multiple", elem_id="files", height=180)
                    with gradio.Tab("Folder"):
                        folder = gradio.File(
                            label="Choose a folder", file_count="directory", elem_id="folder", height=180
                        )
                    with gradio.Tab("Camera"):
                        # As the part lies there: neither mirrored nor compressed, by a phone's camera at the back.
                        camera = gradio.Image(
                            label="Camera",
                            sources=["webcam"],
                            type="filepath",
                            format="png",
                            webcam_options=gradio.WebcamOptions(
                                mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}}
                            ),
                            elem_id="camera",
                        )
                    threshold = gradio.Slider(
                        0, 1, self.scorer.threshold, step=0.001, label="Threshold", elem_id="threshold"
                    )
                    sentence = gradio.Textbox(label="Result", interactive=False, elem_id="result", lines=2)
                with gradio.Column(scale=2, min_width=320):
                    originals = gradio.Checkbox(label="Originals, without overlays", elem_id="originals")
                    pictures = gradio.Gallery(
                        label="Overlays, highest scores first",
                        columns=2,
                        object_fit="contain",
                        interactive=False,
                        elem_id="overlays",
                    )
            table = gradio.Dataframe(
                label="Scores (click a heading to sort)",
                headers=HEADERS,
                datatype=["str", "number", "str", "number", "str", "number"],
                type="array",
                interactive=False,
                wrap=True,
                elem_id="table",
            )
            download = gradio.DownloadButton("Save as CSV", elem_id="csv")
            shown = [pictures, table, download, sentence]

            def scored(paths: Any, limit: float, plain: bool, progress: Any = gradio.Progress()) -> Any:  # noqa: ANN401, B008
                found = self.score(paths, progress)
                return [found, *self.show(found, limit, plain)]

            for source, event in ((files, files.change), (folder, folder.change), (camera, camera.change)):
                event(scored, [source, threshold, originals], [rows, *shown], api_visibility="private")
            for changed in (threshold.release, originals.change):
                changed(
                    self.show, [rows, threshold, originals], shown, api_visibility="private", show_progress="hidden"
                )
        page.queue(default_concurrency_limit=_AT_ONCE)
        return page

    def launch(self, host: str, port: int | None, max_megabytes: int) -> str:
        """Serve the page, in threads of its own.

        Args:
            host: Address to listen on.
            port: Port to listen on; a free one where it is ``None``.
            max_megabytes: Largest size of a file.

        Returns:
            The page's address.
        """
        # System fonts: others would be fetched from the internet.
        theme = gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        _, address, _ = self.page.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_megabytes}mb",
            theme=theme,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        return str(address)

    def close(self) -> None:
        """Stop serving."""
        self.page.close()
        self._scratch.cleanup()


def _keep_pictures(rows: list[Row]) -> None:
    """Sort by score, and forget the pictures of those that are not shown."""
    rows.sort(key=lambda row: -np.inf if row.score is None else row.score, reverse=True)
    for row in rows[_MOST_PICTURES:]:
        row.picture = row.original = None


def _cells(row: Row, threshold: float) -> list[Any]:
    score, p_value = (None if value is None else float(f"{value:.6g}") for value in (row.score, row.p_value))
    milliseconds = None if row.milliseconds is None else round(row.milliseconds)
    return [row.name, score, row.label(threshold), milliseconds, row.note, p_value]


def _sentence(rows: list[Row], pictures: int, threshold: float) -> str:
    if not rows:
        return ""
    labels = [row.label(threshold) for row in rows]
    parts = [f"{labels.count('anomalous')} anomalous, {labels.count('normal')} normal"]
    times = [row.milliseconds for row in rows if row.milliseconds is not None]
    if times:
        parts.append(f"{np.median(times):.0f} ms per image (median)")
    if pictures < len(times):
        parts.append(f"the {pictures} highest scores have pictures")
    notes = [row.note for row in rows if row.note]
    if notes:
        more = f" {len(notes) - 1} more have a note in the table." if len(notes) > 1 else ""
        return f"{'; '.join(parts)}. {notes[0]}{more}"
    return f"{'; '.join(parts)}."
