# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf report``: one page about one or more runs of any anomalib model."""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from anomalib_osdirf.report.results import FILE_NAME, ResultsError, ResultsWriter


def main(arguments: Sequence[str], program: str) -> int:
    """Make a page.

    Args:
        arguments: The command line after the subcommand.
        program: Name for the help text.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Make one page about one or more runs of any anomalib model. The callback "
        f"anomalib_osdirf.report.ReportCallback writes what it needs, {FILE_NAME}, while a test runs.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="run folders, or folders of many runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--test",
        action="store_true",
        help=f"test the checkpoint of folders without {FILE_NAME} first, with the data in their config.yaml",
    )
    parser.add_argument(
        "--latency", action="store_true", help="time the exported OpenVINO and ONNX models on this processor"
    )
    options = parser.parse_args(arguments)
    try:
        for folder in options.results:
            if options.test and folder.is_dir() and not any(folder.rglob(FILE_NAME)):
                _test(folder)
        folders = [run for folder in options.results for run in _runs(folder)]
        for folder in folders if options.latency else []:
            if (folder / FILE_NAME).is_file():
                measure_latencies(folder)
        from anomalib_osdirf.report.page import write_page

        page = write_page(folders, options.output, options.title)
    except (ResultsError, ModuleNotFoundError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(page)  # noqa: T201
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


def _by_age(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda path: path.stat().st_mtime)


def _test(folder: Path) -> None:
    """Test a results folder's checkpoint with the data of its configuration."""
    # Lightning writes it into the folder of its logger, if there is one.
    configs = _by_age(folder.glob("config.yaml")) or _by_age(folder.rglob("config.yaml"))
    checkpoints = _by_age((folder / "weights" / "lightning").glob("*.ckpt"))
    if not configs or not checkpoints:
        missing = "weights/lightning/*.ckpt" if configs else "config.yaml"
        msg = (
            f"results folder {str(folder)!r} can't be tested, because {missing} is not in it (anomalib's command line "
            "writes it); add anomalib_osdirf.report.ReportCallback to trainer.callbacks and test again."
        )
        raise ResultsError(msg)
    from anomalib_osdirf.__main__ import main as run

    # What else a test leaves behind, pictures above all, goes where it harms no other run.
    with tempfile.TemporaryDirectory() as scratch:
        run(
            [
                "test",
                f"--config={configs[-1]}",
                f"--ckpt_path={checkpoints[-1]}",
                f"--default_root_dir={scratch}",
                "--trainer.callbacks+=anomalib_osdirf.report.ReportCallback",
                f"--trainer.callbacks.folder={folder.resolve()}",
                "--trainer.callbacks.page=false",
                "--trainer.callbacks.quiet=true",
            ]
        )
