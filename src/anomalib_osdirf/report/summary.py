# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is said at the end of a test: what was trained, on what, how good it is, where the files are, what next."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from anomalib_osdirf.progress import box
from anomalib_osdirf.report.page import Run
from anomalib_osdirf.report.results import FILE_NAME, Results


def print_summary(folder: Path, page: Path | None, console: Console | None = None) -> None:
    """Print a summary of a results folder: in a box on a terminal, as plain lines elsewhere.

    Args:
        folder: Results folder.
        page: Its page, ``None`` if there is none.
        console: Where to print; the process's own output where it is ``None``.
    """
    box("Test finished", _lines(Run(Results(folder)), page), console)


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
        yield (
            "Tested",
            (
                f"{counts['normal']} normal and {counts['anomalous']} anomalous images, {speed:.1f} images/s, "
                "reading and pictures included"
            ),
        )
    yield from _metrics(run)
    threshold, origin = run.threshold
    if threshold is not None:
        labels, scores = run.results.labels[run.scored], run.scores[run.scored]
        misses = int(((labels == 1) & (scores <= threshold)).sum())
        false_alarms = int(((labels == 0) & (scores > threshold)).sum())
        yield "Threshold", f"{threshold:.3f} ({origin}): {misses} missed, {false_alarms} false alarms"
    yield "Results", str(run.results.folder / FILE_NAME)
    checkpoint = entries.get("checkpoint")
    if checkpoint:
        yield "Checkpoint", checkpoint
    if page is not None:
        yield "Look", str(page)
    if checkpoint:
        export = ["anomalib", "export", "--model", run.model, "--export_type", "openvino", "--ckpt_path", checkpoint]
        yield "Next", shlex.join(export)


def _metrics(run: Run) -> Iterator[tuple[str, str]]:
    if not run.counts["anomalous"]:
        yield "image AUROC", "no defective test images"
    for name in ("image AUROC", "image F1", "pixel AUROC"):
        estimate = run.metrics.get(name)
        if estimate is not None:
            yield name, f"{estimate.value:.3f} (95 % interval {estimate.low:.3f} to {estimate.high:.3f})"
