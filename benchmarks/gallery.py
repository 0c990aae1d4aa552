# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A gallery of what OSDIRF catches and where it fails: image, ground truth and anomaly map.

    python benchmarks/gallery.py --category weave printed_parts --weights mobilenetv2_100.safetensors

Trains with the defaults on each surface of the embedded data and draws one picture of it, as PNG and JPEG. Caught are
the highest scores, one of each kind of defect; failures are the lowest scores of defective images and the highest of
normal ones, whichever side of the threshold they are on. The threshold, 0.5, is the one with the best F1 score on these
very images, as anomalib finds it: on new ones there would be more failures.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.app.overlay import overlay
from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES

ROWS = ("image", "ground truth", "anomaly map")


@dataclass
class Scored:
    """A test image and what the model says of it.

    Args:
        kind: Kind of defect, or ``good``.
        image: ``(H, W, 3)``, in 0 to 1.
        mask: Ground truth ``(H, W)``.
        anomaly_map: Normalised map ``(H, W)``.
        score: Normalised score.
        anomalous: Whether it is above the threshold.
    """

    kind: str
    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    score: float
    anomalous: bool


def score(data: AnomalibDataModule, arguments: argparse.Namespace) -> list[Scored]:
    """Train, find the threshold, and score the test images."""
    model = OSDIRF(
        backbone=arguments.backbone,
        backbone_weights=arguments.weights,
        seed=arguments.seed,
        max_steps=arguments.max_steps,
        visualizer=False,
    )
    engine = Engine(default_root_dir=arguments.output / "runs", devices=1, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    batches = engine.predict(model, dataloaders=data.test_dataloader()) or []
    return [
        Scored(
            kind=Path(item.image_path).parent.name,
            image=cv2.imread(item.image_path)[..., ::-1].astype(np.float32) / 255,  # that of the batch is standardised
            mask=item.gt_mask.squeeze().numpy().astype(np.uint8),
            anomaly_map=item.anomaly_map.squeeze().float().numpy(),
            score=float(item.pred_score),
            anomalous=bool(item.pred_label),
        )
        for batch in batches
        for item in batch
    ]


def chosen(found: list[Scored], count: int) -> tuple[list[Scored], list[Scored]]:
    """Return catches and failures, so many of each."""
    defective = sorted((one for one in found if one.kind != "good"), key=lambda one: one.score)
    normal = sorted((one for one in found if one.kind == "good"), key=lambda one: one.score)
    best = {one.kind: one for one in defective}  # the last one of a kind stays
    caught = sorted(best.values(), key=lambda one: one.score, reverse=True)[:count]
    misses = defective[: count - count // 2]
    return caught, [*misses, *reversed(normal[-(count // 2) :])]


def outlined(one: Scored) -> NDArray[Any]:
    """Draw the border of the ground truth into the image."""
    picture = np.ascontiguousarray((one.image * 255).round().astype(np.uint8))
    contours, _ = cv2.findContours(one.mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for colour, width in ((0, 4), (255, 2)):  # white on black shows on any surface
        cv2.drawContours(picture, contours, -1, (colour,) * 3, width)
    return picture


def draw(caught: list[Scored], failures: list[Scored], title: str) -> Any:  # noqa: ANN401
    """Draw a column for each image, catches first."""
    count = len(caught) + len(failures)
    figure = plt.figure(figsize=(1.45 * count, 5.2), layout="constrained")
    figure.suptitle(f"{title}; scores, threshold 0.5", fontsize=10)
    widths = [len(caught), len(failures)]
    for block, images, name in zip(
        figure.subfigures(1, 2, width_ratios=widths, wspace=0.02),
        (caught, failures),
        ("caught", "failures: lowest of defective, highest of normal images"),
        strict=True,
    ):
        block.suptitle(name, fontsize=9)
        axes = block.subplots(len(ROWS), len(images), squeeze=False)
        for column, one in zip(axes.T, images, strict=True):
            pictures = (one.image, outlined(one), overlay(one.image, one.anomaly_map))
            for axis, picture, label in zip(column, pictures, ROWS, strict=True):
                axis.imshow(picture)
                axis.set(xticks=[], yticks=[])
                if images is caught and one is images[0]:
                    axis.set_ylabel(label, fontsize=8)
            column[0].set_title(f"{one.kind}\n{one.score:.2f}", fontsize=8)
    return figure


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", nargs="+", choices=CATEGORIES, default=["weave"])
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="its weights, a local file")
    parser.add_argument("--count", type=int, default=5, help="catches, and failures, of each surface")
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/gallery"))
    arguments = parser.parse_args()
    mpl.use("Agg")
    for category in arguments.category:
        found = score(SyntheticSurfaces(category=category), arguments)
        missed = sum(one.kind != "good" and not one.anomalous for one in found)
        alarms = sum(one.kind == "good" and one.anomalous for one in found)
        normal = sum(one.kind == "good" for one in found)
        counts = f"{missed} of {len(found) - normal} defective missed, {alarms} of {normal} normal alarmed"
        figure = draw(*chosen(found, arguments.count), f"{category}: {counts}")
        for suffix, options in {"png": {}, "jpg": {"pil_kwargs": {"quality": 75}}}.items():
            file = arguments.output / f"{category}.{suffix}"
            figure.savefig(file, dpi=90, **options)
            print(file)
        plt.close(figure)


if __name__ == "__main__":
    main()
