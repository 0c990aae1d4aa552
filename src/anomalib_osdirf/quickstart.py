# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf quickstart``: train, test and export OSDIRF on the embedded data, nothing to download."""

import argparse
import io
import logging
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anomalib_osdirf.progress import say
from anomalib_osdirf.terminal import quiet
from anomalib_osdirf.train import run


def config_file() -> Path:
    """Return ``quickstart.yaml``: inside the installed package, or in ``configs/`` of an editable checkout."""
    package = Path(__file__).parent
    places = (package / "configs" / "quickstart.yaml", package.parents[1] / "configs" / "quickstart.yaml")
    return next(place for place in places if place.is_file())


def run_category(category: str, root: Path, quiet: bool = False) -> tuple[Path, Path | None]:
    """Train, test, export and report one surface; return the run folder and its page, if that could be made."""
    values = {
        "config": config_file(),
        "data.init_args.category": category,
        "default_root_dir": root,
        "trainer.enable_progress_bar": not quiet,
    }
    return run([f"--{name}={value}" for name, value in values.items()])


def main(arguments: Sequence[str], program: str) -> int:
    """Run the quick start and print where its results are."""
    from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
    from anomalib_osdirf.report.summary import print_summary

    parser = argparse.ArgumentParser(
        prog=program, description="Train, test and export OSDIRF on the embedded data set."
    )
    parser.add_argument(
        "--category",
        choices=[*CATEGORIES, "all"],
        default="weave",
        help="surface to train on, or all of them, with one model each",
    )
    parser.add_argument("--root", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    options = parser.parse_args(arguments)
    categories = CATEGORIES if options.category == "all" else [options.category]
    # Phases are printed whatever the level of logging.
    with (
        quiet(logging.WARNING if options.quiet else logging.INFO),
        redirect_stdout(io.StringIO()) if options.quiet else nullcontext(),
    ):
        runs = {category: run_category(category, options.root, options.quiet) for category in categories}
    if options.quiet:
        return 0
    folder, page = runs[categories[0]]
    if len(runs) > 1:
        page = _compare([folder for folder, _ in runs.values()], options.root)
    print_summary(folder, page, title="Quick start finished")
    say("Your own parts: python -m anomalib_osdirf train <folder>, good ones in its subfolder good")
    return 0


def _compare(folders: Sequence[Path], root: Path) -> Path | None:
    """Print the metrics of all runs, and make a page about them."""
    from anomalib_osdirf.report.page import PAGE_NAME, Run, write_page_or_warn
    from anomalib_osdirf.report.results import Results

    runs = [Run(Results(folder)) for folder in folders]
    table = Table("", *(run.data for run in runs), "mean", title="OSDIRF on the embedded data set")
    for name in runs[0].metrics:
        values = [run.metrics[name].value for run in runs]
        table.add_row(name, *(f"{value:.3f}" for value in [*values, sum(values) / len(values)]))
    Console().print(table)
    return write_page_or_warn(folders, root / PAGE_NAME)
