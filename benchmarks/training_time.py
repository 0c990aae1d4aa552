# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Time of an epoch of OSDIRF's training with and without the feature cache, and of the pass that fills the cache.

On a drawn surface at the default size (256 x 256 pixels, batches of 32, the default denoiser), with random weights in
the backbones, which take as long as trained ones:

    python benchmarks/training_time.py

The first epoch is left out, the median of the others is shown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import SyntheticSurfaces


class Clock(Callback):
    """Times epochs, and what comes before the first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.before_training = 0.0
        self.epochs: list[float] = []

    def on_fit_start(self, *_: object) -> None:
        """Begin with the feature pass, which the model makes after this."""
        self.start = time.perf_counter()

    def on_train_start(self, *_: object) -> None:
        """End of the feature pass."""
        self.before_training = time.perf_counter() - self.start

    def on_train_epoch_start(self, *_: object) -> None:
        """Begin an epoch."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        """End an epoch."""
        self.epochs.append(time.perf_counter() - self.start)


def measure(backbone: str, cached: bool, arguments: argparse.Namespace) -> Clock:
    """Train for a few epochs."""
    clock = Clock()
    data = SyntheticSurfaces(root=arguments.root, num_train=arguments.images, num_workers=arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
        engine = Engine(
            default_root_dir=folder, accelerator=arguments.accelerator, devices=1, callbacks=[clock], **quiet
        )
        model = OSDIRF(
            backbone=backbone,
            pre_trained=False,
            feature_cache=cached,
            max_epochs=1 + (10 if cached else 1) * arguments.epochs,
            checkpoint_every_n_steps=0,
            seed=0,
            visualizer=False,
        )
        engine.fit(model, datamodule=data)
    return clock


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2_100", "efficientnet_b4"])
    parser.add_argument("--images", type=int, default=150, help="training images")
    parser.add_argument("--epochs", type=int, default=2, help="epochs without the cache; with it, ten times as many")
    parser.add_argument("--workers", type=int, default=0, help="worker processes that read images")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument(
        "--root", type=Path, default=Path("datasets/SyntheticSurfaces"), help="where surfaces are drawn"
    )
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{arguments.images} images, {arguments.workers} workers, {arguments.accelerator}, {threads} threads\n")
    print("| backbone | feature pass, images/s | epoch without cache, s | epoch with cache, s | times faster |")
    print("|---|---|---|---|---|")
    for backbone in arguments.backbones:
        cached, uncached = (measure(backbone, one, arguments) for one in (True, False))
        quick, slow = (statistics.median(clock.epochs[1:]) for clock in (cached, uncached))
        speed = arguments.images / cached.before_training
        print(f"| {backbone} | {speed:.1f} | {slow:.2f} | {quick:.3f} | {slow / quick:.1f} |", flush=True)


if __name__ == "__main__":
    main()
