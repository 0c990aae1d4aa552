# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is said at the end of a test: what was trained, on what, how good it is, where the files are, what next."""

import csv
import shlex
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from rich.console import Console

from anomalib_osdirf.progress import box
from anomalib_osdirf.report.page import PREDICTIONS, Run
from anomalib_osdirf.report.results import Results
from anomalib_osdirf.runs import shown


def print_summary(
    folder: Path, page: Path | None, console: Console | None = None, title: str = "Test finished"
) -> None:
    """Print a summary of a results folder and of where its files are, ``page`` among them if there is one."""
    box(title, _lines(Run(Results(folder)), page), console)


def _lines(run: Run, page: Path | None) -> Iterator[tuple[str, str]]:
    entries, counts = run.entries, run.counts
    training, test = entries.get("training") or {}, entries.get("test") or {}
    yield "Model", f"{run.model}, {entries.get('parameters', 0) / 1e6:.1f} M parameters, {entries.get('device', '')}"
    if run.data:
        yield "Data", run.data
    if training.get("seconds") is not None:
        images = f" on {training['images']} images" if training.get("images") else ""
        yield "Trained", f"{training['steps']} steps{images} in {training['seconds']:.0f} s"
    if test.get("seconds"):
        speed = len(run.results.ids) / test["seconds"]
        tested = f"{counts['normal']} normal and {counts['anomalous']} anomalous images, {speed:.1f} images/s"
        yield "Tested", f"{tested}, reading and pictures included"
    yield from _metrics(run)
    threshold, origin = run.threshold
    if threshold is not None:
        labels, scores = run.results.labels[run.scored], run.scores[run.scored]
        misses = int(((labels == 1) & (scores <= threshold)).sum())
        false_alarms = int(((labels == 0) & (scores > threshold)).sum())
        missed = f"{misses} missed, " if counts["anomalous"] else ""
        found = f"{missed}{false_alarms} false alarms"
        yield "Threshold", f"{threshold:.3f} ({origin}): scores above it are anomalous; {found}"
    yield from _places(run, page)


def _places(run: Run, page: Path | None) -> Iterator[tuple[str, str]]:
    """Say where everything is, and what can be done with it."""
    folder = run.results.folder
    yield "Folder", shown(folder)
    if page is not None:
        yield "Report", shown(page)
    for name, file in (("Predictions", PREDICTIONS), ("Pictures", "images"), ("Settings", "config.yaml")):
        if (folder / file).exists():
            yield name, shown(folder / file)
    checkpoint = run.entries.get("checkpoint")
    exported = next((export.path for export in run.exports if export.format == "OpenVINO"), None)
    if checkpoint:
        yield "Checkpoint", shown(Path(checkpoint))
    if exported is not None:
        yield "OpenVINO", shown(exported)
        yield "Try it", _command("app", shown(exported))
    elif checkpoint:
        export = ["--model", run.model, "--export_type", "openvino", "--ckpt_path", shown(Path(checkpoint))]
        yield "Export", shlex.join(["anomalib", "export", *export])
    model = exported or checkpoint
    if model:
        yield "Predict", f"{_command('predict', shown(Path(model)))} <folder>"


def _command(*words: str) -> str:
    return shlex.join(["python", "-m", "anomalib_osdirf", *words])


def write_predictions(run: Run) -> None:
    """Write ``predictions.csv`` into a run folder: path, category, defect type, truth, score and label of each image.

    Truth and label are whether the image is anomalous; scores are normalised, but not clipped to 0 and 1.
    """
    results, threshold = run.results, run.threshold[0]
    rows = zip(results.paths, results.categories, results.defect_types, results.labels, run.scores, strict=True)
    with (results.folder / PREDICTIONS).open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        table = csv.writer(stream)
        table.writerow(("path", "category", "defect_type", "truth", "score", "label"))
        for path, category, defect_type, truth, score in rows:
            label = None if threshold is None or not isfinite(score) else bool(score > threshold)
            table.writerow((path, category, defect_type, None if truth < 0 else bool(truth), f"{score:.6g}", label))


def _metrics(run: Run) -> Iterator[tuple[str, str]]:
    if not run.counts["anomalous"]:
        yield "image AUROC", "no defective test images"
    for name in ("image AUROC", "image F1", "pixel AUROC"):
        estimate = run.metrics.get(name)
        if estimate is not None:
            yield name, f"{estimate.value:.3f} (95 % interval {estimate.low:.3f} to {estimate.high:.3f})"
