# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf quickstart``: train, test and export OSDIRF on the embedded data, nothing to download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from anomalib_osdirf.progress import say
from anomalib_osdirf.terminal import quiet
from anomalib_osdirf.train import run


def config_file() -> Path:
    """Return ``quickstart.yaml``: inside the installed package, or in ``configs/`` of an editable checkout."""
    package = Path(__file__).parent
    places = (package / "configs" / "quickstart.yaml", package.parents[1] / "configs" / "quickstart.yaml")
    return next(place for place in places if place.is_file())


def run_category(category: str, root: Path) -> tuple[Path, Path | None]:
    """Train, test, export and report one surface; return the run folder and its page, if that could be made."""
    return run([f"--config={config_file()}", f"--data.init_args.category={category}", f"--default_root_dir={root}"])


def main(arguments: Sequence[str], program: str) -> int:
    """Run the quick start and print where its results are."""
    from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
    from anomalib_osdirf.report.summary import print_summary

    parser = argparse.ArgumentParser(
        prog=program, description="Train, test and export OSDIRF on the embedded data set."
    )
    parser.add_argument("--category", choices=CATEGORIES, default="weave", help="surface to train on (weave)")
    parser.add_argument("--root", type=Path, default=Path("results"), help="results folder")
    options = parser.parse_args(arguments)
    with quiet():
        folder, page = run_category(options.category, options.root)
    print_summary(folder, page, title="Quick start finished")
    say("Your own parts: python -m anomalib_osdirf train <folder>, good ones in its subfolder good")
    return 0
