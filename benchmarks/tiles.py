# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles: seconds and largest memory of training, export and scoring, each in a process of its own.

    python benchmarks/tiles.py --output results/tiles

Sheets of 4000 x 3000 pixels are drawn, one in four with a defect in a corner of 256 x 256, and `configs/tiles.yaml` is
trained on the others, with the fixed filters as the backbone unless told otherwise. Linux only.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from soak import DEFECTIVE, draw

from anomalib_osdirf.progress import duration

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "anomalib_osdirf"]
SOAK = [sys.executable, str(Path(__file__).with_name("soak.py"))]


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Run a command.

    Returns:
        Its seconds, and its largest memory in MB.

    Raises:
        RuntimeError: If it fails.
    """
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "TRUST_REMOTE_CODE": "1"})  # of the torch export
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        msg = f"it ended with status {process.returncode}"
        raise RuntimeError(msg)
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/tiles"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--predictions", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(3000, 4000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--backbone", default="filter_bank")
    parser.add_argument("--weights", type=Path, help="file of the backbone's weights")
    options = parser.parse_args()
    for kind in ("good", "defect"):
        (options.output / kind).mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(draw(options.output, options.images, *options.size)):
        file.replace(file.parent / ("good" if index % DEFECTIVE else "defect") / file.name)
    weights = [] if options.weights is None else ["--model.init_args.backbone_weights", str(options.weights)]
    train = [*COMMAND, "train", "--config", str(ROOT / "configs" / "tiles.yaml"), "--trainer.accelerator", "cpu"]
    train += ["--data.init_args.root", str(options.output), "--default_root_dir", str(options.output / "results")]
    train += ["--model.init_args.backbone", options.backbone, *weights]
    steps = {f"training, {options.images} images": measured(train)}
    checkpoint = max(options.output.rglob("model.ckpt"), key=lambda file: file.stat().st_mtime)
    export = [*COMMAND, "export", "--model", "OSDIRF", "--ckpt_path", str(checkpoint), "--export_type", "torch"]
    steps["export"] = measured([*export, "--export_root", str(options.output)])
    size = [str(side) for side in options.size]
    score = [*SOAK, "--predictions", str(options.predictions), "--images", "4", "--allowed-mb", "inf", "--size", *size]
    for name, model in (("checkpoint", checkpoint), ("torch export", next(options.output.rglob("model.pt")))):
        steps[f"scoring, {name}"] = measured([*score, "--model", str(model)])
    table = Table("step", "time", "largest memory, MB")
    for name, (seconds, megabytes) in steps.items():
        table.add_row(name, duration(seconds), f"{megabytes:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
