# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Endurance: one image after another without Lightning, the memory as they go by, and outputs that must not change.

    python benchmarks/soak.py --model results/weights/openvino/model.xml --plot soak.png
    TRUST_REMOTE_CODE=1 python benchmarks/soak.py --model results/weights/torch/model.pt

An OpenVINO or ONNX model or a checkpoint is served as by the app and by bulk scoring, a torch export (``.pt``) by
anomalib's ``TorchInferencer``. Some images are drawn like the embedded data set's weave, one in four with a defect, and
read and scored over and over; each time, score, label, map and mask must be those of the first, bit by bit. The memory
must not grow: its slope is Theil and Sen's, over all looks at it after a tenth of the predictions. The status is 1 if
either fails. Linux only.
"""

import argparse
import hashlib
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import theilslopes

from anomalib_osdirf.data.surface_drawing import SURFACES, draw_surface
from anomalib_osdirf.inference.reading import read_image
from anomalib_osdirf.inference.scoring import load_scorer
from anomalib_osdirf.progress import say

CATEGORY, SIDE = "weave", 256
DEFECTIVE = 4  # each n-th image has a defect
LOOKS = 200  # at the memory, in a run
ROWS = 10  # of the table
WARM_UP = 0.1  # share of the predictions

Predict = Callable[[Path], Sequence[Any]]


@dataclass
class Soak:
    """What a run has shown."""

    predictions: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    changed: int = 0  # outputs that were not those of the first time

    def slope(self) -> tuple[float, float, float]:
        """Growth in MB per prediction after the warm-up, and its 95 % interval."""
        warm = [index for index, done in enumerate(self.predictions) if done >= WARM_UP * self.predictions[-1]]
        found = theilslopes([self.megabytes[index] for index in warm], [self.predictions[index] for index in warm])
        return float(found.slope), float(found.low_slope), float(found.high_slope)

    def growth(self) -> float:
        """Growth in MB over all predictions, at the slope."""
        return self.slope()[0] * self.predictions[-1]


def draw(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """Draw images: tiles of a weave, mirrored until they fill the image, each image with noise of its own.

    Args:
        folder: Where to.
        count: Number of images.
        height: Pixels.
        width: Pixels.

    Returns:
        PNG files, each :data:`DEFECTIVE`-th from the first on with a defect in its first tile.
    """
    defects = list(SURFACES[CATEGORY].defects)
    files = []
    for index in range(count):
        normal, _ = draw_surface(CATEGORY, None, SIDE, (0, index))
        missing = (max(0, height - SIDE), max(0, width - SIDE))
        pixels = np.pad(normal, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")[:height, :width].copy()
        if index % DEFECTIVE == 0:
            defect = defects[index // DEFECTIVE % len(defects)]
            pixels[:SIDE, :SIDE] = draw_surface(CATEGORY, defect, SIDE, (0, index))[0][:height, :width]
        noise = np.random.default_rng(index).integers(-2, 3, pixels.shape, dtype=np.int8)
        files.append(folder / f"{index:03d}.png")
        cv2.imwrite(str(files[-1]), cv2.cvtColor(cv2.add(pixels, noise, dtype=cv2.CV_8U), cv2.COLOR_RGB2BGR))
    return files


def predictor(model: Path, threads: int | None) -> tuple[str, Predict]:
    """Load a model.

    Args:
        model: Exported model or checkpoint.
        threads: Threads that an OpenVINO or ONNX model computes with.

    Returns:
        Who serves it, and what gives the outputs of an image file.
    """
    if model.suffix == ".pt":
        from anomalib.deploy import TorchInferencer

        inferencer = TorchInferencer(model, device="cpu")

        def predict_torch(file: Path) -> Sequence[Any]:
            batch = inferencer.predict(file)
            return batch.pred_score, batch.pred_label, batch.anomaly_map, batch.pred_mask

        return "TorchInferencer", predict_torch
    scorer = load_scorer(model, threads=threads)

    def predict(file: Path) -> Sequence[Any]:
        image = read_image(file, max_pixels=10**9)
        score = scorer.score(image)
        return score.score, score.label, score.map, score.mask

    return scorer.runtime, predict


def soak(
    predict: Predict, files: Sequence[Path], predictions: int, look: Callable[[Soak], None], minutes: float = math.inf
) -> Soak:
    """Score files over and over.

    Args:
        predict: Gives an image's outputs.
        files: Images.
        predictions: Number of predictions.
        look: Is shown what there is so far, whenever the memory was looked at.
        minutes: Longest time.

    Returns:
        Memory over time, and how many outputs have changed.
    """
    soaked, first, start = Soak(), {}, time.perf_counter()
    every = max(1, predictions // LOOKS)
    for number in range(predictions):
        file = files[number % len(files)]
        found = digest(predict(file))
        soaked.changed += first.setdefault(file, found) != found
        if (number + 1) % every == 0 or number + 1 == predictions:
            soaked.predictions.append(number + 1)
            soaked.megabytes.append(resident())
            soaked.seconds.append(time.perf_counter() - start)
            look(soaked)
            if soaked.seconds[-1] > 60 * minutes:
                break
    return soaked


def digest(outputs: Sequence[Any]) -> str:
    """Describe outputs to the last bit."""
    described = hashlib.blake2b()
    for output in outputs:
        values = np.asarray(output)
        described.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    return described.hexdigest()


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * resource.getpagesize() / 1e6


def peak() -> float:
    """Largest memory of this process so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def table(soaked: Soak, title: str) -> Table:
    """Show memory and speed as the predictions go by."""
    shown = Table("predictions", "MB", "predictions/s", title=title)
    every = max(1, len(soaked.predictions) // ROWS)
    done, seconds = 0, 0.0
    for index in sorted({0, *range(every - 1, len(soaked.predictions), every), len(soaked.predictions) - 1}):
        speed = (soaked.predictions[index] - done) / (soaked.seconds[index] - seconds)
        done, seconds = soaked.predictions[index], soaked.seconds[index]
        shown.add_row(str(done), f"{soaked.megabytes[index]:.1f}", f"{speed:.1f}")
    return shown


def plot(soaked: Soak, file: Path) -> None:
    """Draw memory against predictions."""
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(soaked.predictions, soaked.megabytes)
    axes.set(xlabel="predictions", ylabel="resident memory, MB", ylim=(0, 1.1 * max(soaked.megabytes)))
    figure.savefig(file, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures.

    Args:
        arguments: Command line; the process's own where it is ``None``.

    Returns:
        1 if an output has changed or the memory has grown, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=".xml, .onnx, .ckpt or .pt file")
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, with fewer predictions")
    parser.add_argument("--images", type=int, default=32, help="different images")
    parser.add_argument("--size", type=int, nargs=2, default=(SIDE, SIDE), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, help="of an OpenVINO or ONNX model; one for each core by default")
    parser.add_argument("--allowed-mb", type=float, default=10.0, help="growth over the whole run")
    parser.add_argument("--plot", type=Path, help="PNG file of the memory")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        files = draw(Path(folder), options.images, *options.size)
        kind, predict = predictor(options.model, options.threads)
        before = peak()

        def look(soaked: Soak) -> None:
            if len(soaked.predictions) % (LOOKS // ROWS) == 0:
                done, megabytes = soaked.predictions[-1], soaked.megabytes[-1]
                say(f"{done} predictions, {megabytes:.1f} MB, {done / soaked.seconds[-1]:.1f} predictions/s", console)

        soaked = soak(predict, files, options.predictions, look, options.minutes)
    height, width = options.size
    console.print(table(soaked, f"{kind}, {options.images} images of {width} x {height}"))
    slope, low, high = (10_000 * value for value in soaked.slope())
    say(f"Slope: {slope:.3f} MB per 10,000 predictions (95 % interval {low:.3f} to {high:.3f}).", console)
    say(f"Largest: {peak():.0f} MB, {before:.0f} MB before the first prediction.", console)
    say(f"Changed outputs: {soaked.changed} of {soaked.predictions[-1]}.", console)
    if options.plot:
        plot(soaked, options.plot)
    if grown := soaked.growth() > options.allowed_mb:
        say(f"Memory grows by {soaked.growth():.1f} MB, more than --allowed-mb {options.allowed_mb:g}.", console)
    return int(grown or soaked.changed > 0)


if __name__ == "__main__":
    sys.exit(main())
