# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf quickstart``: train, test and export OSDIRF on the embedded data, nothing to download."""

import argparse
import io
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomalib_osdirf.terminal import quiet


def config_file() -> Path:
    """Return ``quickstart.yaml``: inside the installed package, or in ``configs/`` of an editable checkout."""
    package = Path(__file__).parent
    places = (package / "configs" / "quickstart.yaml", package.parents[1] / "configs" / "quickstart.yaml")
    return next(place for place in places if place.is_file())


def run_category(category: str, root: Path, quiet: bool = False) -> dict[str, Any]:
    """Train, test, export and report one category.

    Args:
        category: Surface of the embedded data set.
        root: Results folder.
        quiet: Whether to leave out progress bars.

    Returns:
        Metrics by name, with ``seconds``, ``results``, ``checkpoint``, ``exported`` and ``report``.
    """
    from anomalib.engine import Engine

    import anomalib_osdirf.models  # noqa: F401 - the configuration names ours, and there may be no import hook
    from anomalib_osdirf.report.command import measure_latencies
    from anomalib_osdirf.report.page import PAGE_NAME, write_page_or_warn

    start = time.perf_counter()
    engine, model, datamodule = Engine.from_config(
        config_file(),
        **{
            "data.init_args.category": category,
            "default_root_dir": root,
            # The page is made when the exported model is there to be timed.
            "trainer.callbacks.init_args.page": False,
            "trainer.callbacks.init_args.quiet": True,
            "trainer.enable_progress_bar": not quiet,
        },
    )
    metrics = dict(engine.train(model, datamodule=datamodule)[0])
    seconds = time.perf_counter() - start
    checkpoint = Path(str(engine.best_model_path))
    results = checkpoint.parents[2]
    exported = engine.export(model, "openvino", export_root=results, ckpt_path=checkpoint)
    measure_latencies(results)
    files = {
        "checkpoint": checkpoint,
        "exported": exported,
        "report": write_page_or_warn([results], results / PAGE_NAME),
    }
    return {**metrics, "seconds": seconds, "results": results, **files}


def main(arguments: Sequence[str], program: str) -> int:
    """Run the quick start and say where everything is.

    Args:
        arguments: The command line after the subcommand.
        program: Name for the help text.

    Returns:
        The exit status.
    """
    from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
    from anomalib_osdirf.export.options import need

    parser = argparse.ArgumentParser(
        prog=program, description="Train, test and export OSDIRF on the embedded data set."
    )
    parser.add_argument(
        "--category",
        choices=[*CATEGORIES, "all"],
        default="weave",
        help="surface to train on, or all of them, each with a model of its own",
    )
    parser.add_argument("--root", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    options = parser.parse_args(arguments)
    categories = CATEGORIES if options.category == "all" else [options.category]
    need("openvino", "onnx", "onnxscript")
    # Phases are printed whatever the level of logging.
    with (
        quiet(logging.WARNING if options.quiet else logging.INFO),
        redirect_stdout(io.StringIO()) if options.quiet else nullcontext(),
    ):
        runs = {category: run_category(category, options.root, options.quiet) for category in categories}
    report = _report(runs, options.root)
    if options.quiet:
        return 0
    console = Console()
    console.print(_table(runs))
    # Not wrapped: commands are there to be copied.
    console.print(_next_steps(runs[categories[0]], report), soft_wrap=True, highlight=False, markup=False)
    return 0


def _table(runs: dict[str, dict[str, Any]]) -> Table:
    table = Table("", *runs, title="OSDIRF on the embedded data set")
    if len(runs) > 1:
        table.add_column("mean")
    for name in [name for name, value in next(iter(runs.values())).items() if isinstance(value, float)]:
        values = [run[name] for run in runs.values()]
        mean = [sum(values) / len(values)] if len(values) > 1 else []
        table.add_row(name, *(f"{value:.3f}" for value in [*values, *mean]))
    return table


def _report(runs: dict[str, dict[str, Any]], root: Path) -> Path | None:
    """Make a page about all runs, if there are several; return the page to look at."""
    from anomalib_osdirf.report.page import PAGE_NAME, write_page_or_warn

    if len(runs) == 1:
        return next(run["report"] for run in runs.values())
    return write_page_or_warn([run["results"] for run in runs.values()], root / PAGE_NAME)


def _next_steps(run: dict[str, Any], report: Path | None) -> str:
    return f"""Report:     {report or "not made, see above"}
Pictures:   {run["results"] / "images"}
Checkpoint: {run["checkpoint"]}
OpenVINO:   {run["exported"]}

Score a folder of images with this model:
  anomalib predict --model OSDIRF --ckpt_path {run["checkpoint"]} --data <folder>
Train on your own parts, good ones in <root>/good and defective ones in <root>/defect:
  anomalib train --config configs/osdirf.yaml --data.init_args.root <root>
Without internet, add:
  --model.init_args.backbone_weights <efficientnet_b4 weights, .safetensors or .pth>"""
