# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Thresholds from normal images alone: the false-alarm rate on test images against the rate that was asked for.

On the embedded data set, and on folders laid out as train/good, test/<good or defect>:

    python benchmarks/thresholds.py --root mtd elpv_mono --backbone mobilenetv2_100 \
        --weights mobilenetv2_100.safetensors

OSDIRF is trained on four fifths of the training images. Thresholds come from three kinds of scores: of those images
under the finished model, of the same images under densities fitted on others, and of the fifth that was held out. The
plot and the table show how many normal test images lie above each. A band, or "expected" in the table, is where that
share lies in 95 of 100 cases if the scores are like those of new images: it has the uncertainty of the threshold and
that of counting among so many test images. Scores are kept in the output folder: the same command goes on where it was
interrupted.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from matplotlib import pyplot as plt
from mvtec_folder import mvtec_folder
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.post_processing.tail import calibrate, supports

LEVELS = ("image", "pixel")
SOURCES = {
    "training": "training images, as they are",
    "cross-fitted": "training images, cross-fitted",
    "held out": "held-out images",
}
COLOURS = dict(zip(SOURCES, ("#d55e00", "#0072b2", "#009e73"), strict=True))
RATES = (0.1, 0.05, 0.02, 0.01)

Scores = dict[str, NDArray[np.float64]]


class Recorder(FalseAlarmPostProcessor):
    """Keeps the scores that its thresholds are from."""

    def note_training(self, rows: Tensor) -> None:
        """Keep them, and note them."""
        self.recorded = rows.double().cpu().numpy()[:, :2]
        super().note_training(rows)


@torch.no_grad()
def raw_scores(model: OSDIRF, dataset: Any) -> NDArray[np.float64]:
    """Scores and largest map values of a data set's normal images, ``(N, 2)``."""
    rows = []
    for index in np.flatnonzero((dataset.samples.label_index == 0).to_numpy()):
        result = model.model(model.pre_processor(dataset[int(index)].image[None]))
        rows.append([float(result.pred_score), float(result.anomaly_map.max())])
    return np.array(rows)


def measure(data: AnomalibDataModule, arguments: argparse.Namespace, seed: int, output: Path) -> Scores:
    """Train on what is not held out, and score everything normal."""
    post_processor = Recorder(0.5, images="training")
    model = OSDIRF(
        backbone="filter_bank" if isinstance(data, SyntheticSurfaces) else arguments.backbone,
        backbone_weights=None if isinstance(data, SyntheticSurfaces) else arguments.weights,
        seed=seed,
        max_steps=arguments.max_steps,
        post_processor=post_processor,
        visualizer=False,
    )
    Engine(default_root_dir=output, devices=1, enable_progress_bar=False).fit(model, datamodule=data)
    model.eval()
    return {
        "cross-fitted": post_processor.recorded,
        "training": raw_scores(model, data.train_data),
        "held out": raw_scores(model, data.val_data),
        "test": raw_scores(model, data.test_data),
    }


def obtained(scores: Scores, source: str, column: int, rate: float) -> tuple[float, float, float] | None:
    """Share of test images above the threshold of a rate, and where it lies if the scores are like new images'."""
    values, test = scores[source][:, column], scores["test"][:, column]
    if not supports(len(values), rate):
        return None
    alarms, new = rate * (len(values) + 1), len(test)
    low, high = stats.betabinom(new, alarms, len(values) + 1 - alarms).ppf([0.025, 0.975]) / new
    return float(np.mean(test > calibrate(values, rate).threshold)), float(low), float(high)


def draw(kept: dict[str, Scores], output: Path) -> None:
    """Draw rates obtained against rates asked for, a row for each data set."""
    mpl.rcParams["svg.hashsalt"] = "thresholds"
    figure, axes = plt.subplots(len(kept), 2, figsize=(9, 3.6 * len(kept)), squeeze=False, layout="constrained")
    for row, (name, scores) in zip(axes, kept.items(), strict=True):
        for column, axis in enumerate(row):
            for source, label in SOURCES.items():
                rates = np.geomspace(1 / (len(scores[source]) + 1), 0.5, 40)
                found = [obtained(scores, source, column, rate) for rate in rates]
                points = np.array([(rate, *one) for rate, one in zip(rates, found, strict=True) if one is not None])
                smallest = 0.5 / len(scores["test"])
                drawn = np.maximum(points, smallest)  # no alarm at all is drawn at the lower edge
                axis.plot(drawn[:, 0], drawn[:, 1], color=COLOURS[source], label=f"{label} ({len(scores[source])})")
                if source == "held out":
                    axis.fill_between(drawn[:, 0], drawn[:, 2], drawn[:, 3], color=COLOURS[source], alpha=0.15)
            axis.plot([1e-3, 0.5], [1e-3, 0.5], color="grey", linestyle=":")
            axis.set(xscale="log", yscale="log", title=f"{name}, {LEVELS[column]} threshold")
            axis.set(xlabel="rate asked for", ylabel=f"share of {len(scores['test'])} normal test images")
            axis.legend(fontsize=7)
    for suffix in ("png", "svg"):
        figure.savefig(output / f"thresholds.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def table(kept: dict[str, Scores]) -> str:
    """Rates obtained, in Markdown."""
    lines = ["| data | threshold | from | images | " + " | ".join(f"{100 * rate:g} %" for rate in RATES) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(RATES))
    for name, scores in kept.items():
        for column, level in enumerate(LEVELS):
            for source, label in SOURCES.items():
                cells = []
                for rate in RATES:
                    found = obtained(scores, source, column, rate)
                    if found is None:
                        cells.append("-")
                        continue
                    share, low, high = (100 * value for value in found)
                    outside = "" if low <= share <= high else ", outside"
                    cells.append(f"{share:.1f} % (expected {low:.1f} to {high:.1f}{outside})")
                lines.append(f"| {name} | {level} | {label} | {len(scores[source])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="folders of data sets")
    parser.add_argument("--surfaces", nargs="*", default=["weave"], help="surfaces of the embedded data set")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="backbone for the folders")
    parser.add_argument("--weights", help="its weights, a local file")
    parser.add_argument("--num-train", type=int, default=250, help="training images of a surface")
    parser.add_argument("--num-test", type=int, default=400, help="normal test images of a surface")
    parser.add_argument("--max-steps", type=int, help="the default training's by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/thresholds"))
    arguments = parser.parse_args()
    held_out: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.2, "seed": arguments.seed}
    data: dict[str, AnomalibDataModule] = {
        surface: SyntheticSurfaces(
            root=arguments.output / "surfaces",
            category=surface,
            num_train=arguments.num_train,
            num_test_good=arguments.num_test,
            num_test_per_defect=1,
            **held_out,
        )
        for surface in arguments.surfaces
    }
    data |= {root.name: mvtec_folder(root, **held_out) for root in arguments.root}
    kept: dict[str, Scores] = {}
    for name, datamodule in data.items():
        file = arguments.output / f"{name}-{arguments.seed}.npz"
        if not file.is_file():
            found = measure(datamodule, arguments, arguments.seed, arguments.output / "runs")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **found)
        kept[name] = dict(np.load(file))
    draw(kept, arguments.output)
    print(f"python benchmarks/thresholds.py, seed {arguments.seed}\n\n{table(kept)}")


if __name__ == "__main__":
    main()
