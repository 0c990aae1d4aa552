# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf quickstart``: train, test and export OSDIRF on the embedded data, nothing to download."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table


def config_file() -> Path:
    """Return ``quickstart.yaml``: inside the installed package, or in ``configs/`` of an editable checkout."""
    package = Path(__file__).parent
    places = (package / "configs" / "quickstart.yaml", package.parents[1] / "configs" / "quickstart.yaml")
    return next(place for place in places if place.is_file())


def run_category(category: str, root: Path) -> dict[str, Any]:
    """Train, test and export one category.

    Args:
        category: Surface of the embedded data set.
        root: Results folder.

    Returns:
        Metrics by name, with ``seconds``, ``results``, ``checkpoint`` and ``exported``.
    """
    from anomalib.engine import Engine

    start = time.perf_counter()
    engine, model, datamodule = Engine.from_config(
        config_file(), **{"data.init_args.category": category, "default_root_dir": root}
    )
    metrics = dict(engine.train(model, datamodule=datamodule)[0])
    seconds = time.perf_counter() - start
    checkpoint = Path(str(engine.best_model_path))
    results = checkpoint.parents[2]
    exported = engine.export(model, "openvino", export_root=results, ckpt_path=checkpoint)
    return {**metrics, "seconds": seconds, "results": results, "checkpoint": checkpoint, "exported": exported}


def main(arguments: Sequence[str], program: str) -> int:
    """Run the quick start and say where everything is.

    Args:
        arguments: The command line after the subcommand.
        program: Name for the help text.

    Returns:
        The exit status.
    """
    from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES

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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    categories = CATEGORIES if options.category == "all" else [options.category]
    runs = {category: run_category(category, options.root) for category in categories}
    console = Console()
    console.print(_table(runs))
    console.print(Panel(_next_steps(next(iter(runs.values()))), title="What to do next", expand=False))
    return 0


def _table(runs: dict[str, dict[str, Any]]) -> Table:
    columns = [name for name, value in next(iter(runs.values())).items() if isinstance(value, float)]
    table = Table("surface", *columns, title="OSDIRF on the embedded data set")
    for category, run in runs.items():
        table.add_row(category, *(f"{run[name]:.3f}" for name in columns))
    if len(runs) > 1:
        table.add_section()
        table.add_row("mean", *(f"{sum(run[name] for run in runs.values()) / len(runs):.3f}" for name in columns))
    return table


def _next_steps(run: dict[str, Any]) -> str:
    return "\n".join(
        (
            f"Pictures:   {run['results'] / 'images'}",
            f"Checkpoint: {run['checkpoint']}",
            f"OpenVINO:   {run['exported']}",
            "",
            "Score a folder of images with this model:",
            f"  anomalib predict --model OSDIRF --ckpt_path {run['checkpoint']} --data <folder>",
            "Train on your own parts, good ones in <root>/good and defective ones in <root>/defect:",
            "  anomalib train --model OSDIRF --data Folder --data.name parts --data.root <root> \\",
            "    --data.normal_dir good --data.abnormal_dir defect",
            "Without internet, add:  --model.backbone_weights <efficientnet_b4 weights, .safetensors or .pth>",
        )
    )
