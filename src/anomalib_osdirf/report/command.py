# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf report``: one page about one or more runs of any anomalib model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from anomalib_osdirf.report.results import FILE_NAME, ResultsWriter


def main(arguments: Sequence[str], program: str) -> int:
    """Make a page."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Make one page about one or more runs of any anomalib model. The callback "
        f"anomalib_osdirf.report.ReportCallback writes what it needs, {FILE_NAME}, while a test runs.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="run folders, or folders of many runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument(
        "--latency", action="store_true", help="time the exported OpenVINO and ONNX models on this processor"
    )
    options = parser.parse_args(arguments)
    folders = [run for folder in options.results for run in _runs(folder)]
    for folder in folders if options.latency else []:
        if (folder / FILE_NAME).is_file():
            measure_latencies(folder)
    from anomalib_osdirf.report.page import write_page

    print(write_page(folders, options.output))  # noqa: T201
    return 0


def _runs(folder: Path) -> list[Path]:
    """Return a run folder, or all that are somewhere in a folder."""
    if (folder / FILE_NAME).is_file():
        return [folder]
    return sorted(file.parent for file in folder.rglob(FILE_NAME)) or [folder]


def measure_latencies(folder: Path) -> None:
    """Time the exported models below a results folder and keep the figures in its results file."""
    from anomalib_osdirf.report.exports import measure

    ResultsWriter(folder).put({"latencies": measure(folder)})
