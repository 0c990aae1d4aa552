# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The page: images in, overlays, scores and labels out. It keeps nothing but what a browser's session shows."""

import csv
import uuid
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio
import numpy as np
import pandas as pd

from anomalib_osdirf.app.rows import HEADERS, Row, score_file, table_of
from anomalib_osdirf.app.stream import Stream
from anomalib_osdirf.inference.scoring import Scorer

_MOST_PICTURES = 60
_HOUR = 3600
_AT_ONCE = 4
_HEIGHT = 340
_BYTES_PER_PIXEL = 6  # of an uncompressed image of 16 bits
# The server is told a file's name only: files of a folder get that of their parent folder before it.
_NAMES_WITH_FOLDERS = """<script>
document.addEventListener("change", ({ target }) => {
  if (!target.webkitdirectory) return;
  const named = new DataTransfer();
  for (const file of target.files) {
    const name = file.webkitRelativePath.split("/").slice(-2).join(" - ");
    named.items.add(new File([file], name, { type: file.type }));
  }
  target.files = named.files;
}, true);
</script>"""


class App:
    """The page of a model.

    Args:
        scorer: The model.
        max_pixels: Largest number of pixels of an image.
        watched: Folder whose images are scored as they come, ``None`` for none.
    """

    def __init__(self, scorer: Scorer, max_pixels: int, watched: Path | None = None) -> None:
        self.scorer = scorer
        self.max_pixels = max_pixels
        self.stream = None if watched is None else Stream(watched, scorer, max_pixels)
        self._scratch = TemporaryDirectory(prefix="anomalib-osdirf-app-")
        self.page = self._build()

    def score(self, paths: Sequence[str] | str | None, progress: Any = None) -> list[Row]:
        """Score files; return a row for each, the highest scores first. As many as are shown have pictures."""
        files = [Path(path) for path in ([paths] if isinstance(paths, str) else paths or [])]
        rows = []
        for number, file in enumerate(files):
            if progress is not None:
                progress((number, len(files)), unit="images")
            rows.append(score_file(self.scorer, file, self.max_pixels, file.name))
            if len(rows) % _MOST_PICTURES == 0:
                _keep_pictures(rows)
        _keep_pictures(rows)
        return rows

    def show(
        self, rows: list[Row], threshold: float, originals: bool = False
    ) -> tuple[list[Any], dict[str, Any], str | None, str]:
        """Return pictures with captions, the table, the path of the table as CSV, and a sentence."""
        pictures = [
            (row.original if originals else row.picture, row.caption(threshold))
            for row in rows
            if row.picture is not None and row.score is not None
        ]
        table = table_of(rows, threshold)
        file = self._csv([table["headers"], *table["data"]]) if rows else None
        return pictures, table, file, _sentence(rows, len(pictures), threshold)

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
            stays = "Images stay on the computer that serves this page."
            gradio.Markdown(f"# {self.scorer.name}\nRuns on {self.scorer.runtime}. {stays}")
            if self.stream is None:
                self._build_trial()
            else:
                with gradio.Tab("Stream"):
                    self._build_stream(self.stream)
                with gradio.Tab("Try it"):
                    self._build_trial()
        page.queue(default_concurrency_limit=_AT_ONCE)
        return page

    def _build_trial(self) -> None:
        rows = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                with gradio.Tab("Images"):
                    files = gradio.File(label="Drop images", file_count="multiple", elem_id="files", height=180)
                with gradio.Tab("Folder"):
                    folder = gradio.File(label="Choose a folder", file_count="directory", elem_id="folder", height=180)
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
        table = _table("Scores (click a heading to sort)", "table")
        download = gradio.DownloadButton("Save as CSV", elem_id="csv")
        shown = [pictures, table, download, sentence]

        def scored(paths: Any, limit: float, plain: bool, progress: Any = gradio.Progress()) -> Any:  # noqa: B008
            found = self.score(paths, progress)
            return [found, *self.show(found, limit, plain)]

        for source, event in ((files, files.change), (folder, folder.change), (camera, camera.change)):
            event(scored, [source, threshold, originals], [rows, *shown], api_visibility="private")
        for changed in (threshold.release, originals.change):
            changed(self.show, [rows, threshold, originals], shown, api_visibility="private", show_progress="hidden")

    def _build_stream(self, stream: Stream) -> None:
        version = gradio.State(-1)  # what this browser shows
        sentence = gradio.Textbox(label=f"Images in {stream.folder}", interactive=False, elem_id="stream")
        drift = gradio.Markdown(elem_id="drift")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                history = gradio.ScatterPlot(
                    x="image",
                    y="score",
                    color="label",
                    color_map={"normal": "#0072b2", "anomalous": "#d55e00"},
                    title=f"Scores, threshold {stream.scorer.threshold:.3f}",
                    tooltip="all",
                    height=_HEIGHT,
                    elem_id="history",
                )
            with gradio.Column(scale=2, min_width=320):
                pictures = gradio.Gallery(
                    label="Last anomalous images",
                    columns=2,
                    height=_HEIGHT,
                    object_fit="contain",
                    interactive=False,
                    elem_id="anomalous",
                )
        table = _table("Files without a score, then the last images", "latest")

        def shown(last: int) -> Any:
            with stream.lock:
                if stream.version == last:
                    return [gradio.skip()] * 6
                limit = stream.scorer.threshold
                plot = _history(stream, limit) if stream.history else gradio.skip()
                overlays = [(row.picture, row.caption(limit)) for row in stream.pictures]
                mark = "## ⚠ " if stream.drift.latest is not None and stream.drift.latest.drifts else ""
                warning = mark + stream.drift.sentence()
                return [stream.version, stream.sentence(), warning, plot, overlays, table_of(stream.rows(), limit)]

        outputs = [version, sentence, drift, history, pictures, table]
        gradio.Timer(1).tick(shown, version, outputs, api_visibility="private", show_progress="hidden")

    def launch(self, host: str, port: int | None) -> str:
        """Serve the page in threads, at a free port where it is ``None``; return its address."""
        # System fonts: others would be fetched from the internet.
        theme = gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        _, address, _ = self.page.launch(
            server_name=host,
            server_port=port,
            max_file_size=_BYTES_PER_PIXEL * self.max_pixels,
            theme=theme,
            head=_NAMES_WITH_FOLDERS,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        if self.stream is not None:
            self.stream.start()
        return str(address)

    def close(self) -> None:
        """Stop serving."""
        if self.stream is not None:
            self.stream.stop()
        self.page.close()
        self._scratch.cleanup()


def _table(label: str, name: str) -> gradio.Dataframe:
    return gradio.Dataframe(
        label=label,
        headers=HEADERS,
        datatype=["str", "number", "str", "number", "str", "number"],
        type="array",
        interactive=False,
        wrap=True,
        column_widths=[220, 110, 110, 70, 560, 110],
        elem_id=name,
    )


def _history(stream: Stream, limit: float) -> gradio.ScatterPlot:
    points = pd.DataFrame(list(stream.history), columns=["image", "score", "label"])
    low, high = (bound([limit, *points["score"]]) for bound in (min, max))
    margin = 0.05 * (high - low)
    return gradio.ScatterPlot(points, y_lim=[low - margin, high + margin])


def _keep_pictures(rows: list[Row]) -> None:
    """Sort by score, and forget the pictures of those that are not shown."""
    rows.sort(key=lambda row: -np.inf if row.score is None else row.score, reverse=True)
    for row in rows[_MOST_PICTURES:]:
        row.picture = row.original = None


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
