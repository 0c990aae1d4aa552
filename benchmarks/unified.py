# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for all categories against a model for each, with one kind of image or several in the density.

On folders laid out as train/good, test/<good or defect>, ground_truth/<defect> (masks are optional), and on the
embedded surfaces:

    python benchmarks/unified.py --root mtd elpv_mono --weights mobilenetv2_100.safetensors

Features are extracted once, and may be those of the ablation (--features); a network is trained for each category and
one for all of them, and the package's own read-outs are measured on all test images, category by category. "F1, one
threshold" is the mean of the categories' F1 at the one threshold that is best for it, "own" at the best ones of their
own. Rows go to ``unified.csv``, tables to ``unified.md``; the same command goes on where it was interrupted.
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import DEFAULTS, Images, image_metrics, pixel_metrics, trained
from mvtec_folder import mvtec_folder
from numpy.typing import NDArray
from torch import Tensor

from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
from anomalib_osdirf.density import MIXTURE, PositionMixture
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.osdirf import OSDIRF, OSDIRFModel

MAP_SIDE = 128
BATCH = 32
SINGLE, UNIFIED = "single", "unified"
KEYS = ("model", "seed", "steps", "denoiser", "density", "clusters", "category")
IMAGE = ("image_AUROC", "image_AP", "image_F1Max")
PIXEL = ("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")
COLUMNS = (*KEYS, "kinds", "chosen", "training_seconds", *IMAGE, "F1_one_threshold", *PIXEL)

Row = dict[str, Any]


def build(arguments: argparse.Namespace, seed: int, **own: object) -> OSDIRFModel:
    """Build OSDIRF's network with its defaults but for some arguments."""
    defaults = dict(OSDIRF(pre_trained=False, backbone=arguments.backbone).hparams)
    names = ("layers", "feature_dim", "whiten", "grid_size", "denoiser", "prediction_type", "timestep", "state")
    more = ("density", "image_score", "map_grid_size", "ema_decay", "backbone")
    torch.manual_seed(seed)
    return OSDIRFModel(**{**{name: defaults[name] for name in (*names, *more)}, **own}).eval()


class ReadOut:
    """A network of some categories, its weights trained or loaded, read out with one density.

    Args:
        arguments: The command line's.
        names: The categories, all of them for one model.
        data: Their images.
        key: Seed, steps, denoiser, density and clusters.
    """

    def __init__(self, arguments: argparse.Namespace, names: Sequence[str], data: dict[str, Images], key: Row) -> None:
        self.data = {name: data[name] for name in names}
        own = {"denoiser": key["denoiser"], "state": "clean" if key["denoiser"] == "none" else "scaled"}
        if key["density"] == MIXTURE:
            own["num_clusters"] = key["clusters"]
        model = build(arguments, key["seed"], density=key["density"], **own)
        moments = StreamingMoments()
        for features in self._batches("train"):
            moments.update(features.permute(0, 2, 3, 1).flatten(0, 2))
        model.whitening.fit(moments)
        self.seconds = 0.0
        if key["denoiser"] != "none":
            label = names[0] if len(names) == 1 else UNIFIED
            file = arguments.output / "networks" / f"{label}-{key['denoiser']}-{key['steps']}-{key['seed']}.pt"
            training = torch.cat([images.train for images in self.data.values()])
            self.seconds = trained(model, training, key["seed"], {**DEFAULTS, "steps": key["steps"]}, file)
        self.network = model.eval().deployed()
        self._fit()

    def _batches(self, split: str, names: Sequence[str] | None = None) -> Iterator[Tensor]:
        for name in names or self.data:
            yield from (part.float() for part in getattr(self.data[name], split).split(BATCH))

    @torch.no_grad()
    def _fit(self) -> None:
        network = self.network
        network.find_kinds(lambda: map(network.whitening, self._batches("train")))
        network.fit(lambda: map(network.field_of, self._batches("train")))
        details = StreamingMoments()
        for fine in self._batches("fine_train"):
            details.update(network.whitening(fine).flatten(2).permute(2, 0, 1))
        network.fit_details(details)

    @torch.no_grad()
    def score(self, name: str) -> tuple[NDArray[np.float64], Tensor, str]:
        """Return scores, maps ``(N, MAP_SIDE, MAP_SIDE)`` and numbers of images by kind of a category's tests."""
        scores, maps, chosen = [], [], []
        for features, fine in zip(self._batches("test", [name]), self._batches("fine_test", [name]), strict=True):
            field = self.network.field_of(features)
            batch = self.network.read_out(field, (MAP_SIDE, MAP_SIDE), self.network.whitening(fine))
            scores.append(batch.pred_score)
            maps.append(batch.anomaly_map[:, 0])
            chosen.append(self.network.density.choose(field))
        counts = (
            ""
            if not isinstance(self.network.density, PositionMixture)
            else " ".join(map(str, torch.cat(chosen).bincount().tolist()))
        )
        return torch.cat(scores).double().numpy(), torch.cat(maps), counts


def f1_at(labels: NDArray[np.int64], scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> Any:  # noqa: ANN401
    """F1 of calling anomalous what is above each threshold."""
    called = np.searchsorted(np.sort(scores), thresholds, side="left")
    hits = np.searchsorted(np.sort(scores[labels == 1]), thresholds, side="left")
    positives = (labels == 1).sum()
    return 2 * (positives - hits) / (positives + len(scores) - called)


def f1_at_one_threshold(data: dict[str, Images], scores: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """F1 of each category at the threshold that is best for their mean."""
    thresholds = np.unique(np.concatenate(list(scores.values())))
    f1 = {name: f1_at(data[name].labels, values, thresholds) for name, values in scores.items()}
    best = int(np.mean(list(f1.values()), axis=0).argmax())
    return {name: float(values[best]) for name, values in f1.items()}


def measure(arguments: argparse.Namespace, data: dict[str, Images], key: Row, rows: list[Row]) -> None:
    """Add the rows of one model or of one for each category."""
    if any(is_of(row, key) for row in rows):
        return
    scores, found = {}, {}
    for names in [[name] for name in data] if key["model"] == SINGLE else [list(data)]:
        output = ReadOut(arguments, names, data, key)
        for name, images in output.data.items():
            scores[name], maps, chosen = output.score(name)
            row = {**key, "category": name, "chosen": chosen, "training_seconds": round(output.seconds, 1)}
            row["kinds"] = output.network.density.num_kinds if chosen else 1
            row |= dict(zip(IMAGE, image_metrics(images.labels, scores[name]), strict=True))
            if images.masks is not None:
                row |= dict(zip(PIXEL, pixel_metrics(images, maps), strict=True))
            found[name] = row
            print({column: row.get(column) for column in (*KEYS, "kinds", *IMAGE[:1], *PIXEL[:1])}, flush=True)
    for name, f1 in f1_at_one_threshold(data, scores).items():
        found[name]["F1_one_threshold"] = f1
        rows.append({column: str(found[name].get(column, "")) for column in COLUMNS})
    save(rows, arguments.output / "unified.csv")


def is_of(row: Row, key: Row) -> bool:
    """Tell whether a row is one of some settings."""
    return all(row[name] == str(value) for name, value in key.items())


def save(rows: list[Row], file: Path) -> None:
    """Write the rows, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(file)


def tables(rows: list[Row], names: Sequence[str]) -> Iterator[str]:
    """Yield Markdown tables of image and pixel metrics, means over seeds."""
    settings = [name for name in KEYS if name not in {"seed", "category"}]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)

    def mean(group: list[Row], metric: str, category: str | None = None) -> float | None:
        values = [float(row[metric]) for row in group if category in {None, row["category"]} and row[metric]]
        return statistics.mean(values) if values else None

    def cells(*values: float | None) -> list[str]:
        return ["" if value is None else f"{value:.4f}" for value in values]

    head = [*settings, "kinds", *names, "mean", "F1, one threshold", "own"]
    yield from ("Image AUROC\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|")
    for key, group in groups.items():
        each = [mean(group, "image_AUROC", name) for name in names]
        f1 = [mean(group, metric) for metric in ("F1_one_threshold", "image_F1Max")]
        kinds = ", ".join(sorted({row["kinds"] for row in group}, key=int))
        yield "| " + " | ".join([*key, kinds, *cells(*each, mean(group, "image_AUROC"), *f1)]) + " |"
    for metric in ("pixel_AUROC", "pixel_AUPRO"):
        yield from (
            f"\n{metric}\n",
            "| " + " | ".join([*settings, *names]) + " |",
            "|---" * (len(settings) + len(names)) + "|",
        )
        for key, group in groups.items():
            yield "| " + " | ".join([*key, *cells(*(mean(group, metric, name) for name in names))]) + " |"


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded ones")
    parser.add_argument("--category", nargs="*", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--features", type=Path, help="folder of features; below the output by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[600], help="training steps of the model for all")
    parser.add_argument("--clusters", nargs="+", default=["auto", "5", "16"])
    parser.add_argument("--output", type=Path, default=Path("results/unified"))
    arguments = parser.parse_args()
    sources: dict[str, Any] = {root.name: mvtec_folder(root) for root in arguments.root}
    sources |= {category: SyntheticSurfaces(category=category) for category in arguments.category}
    backbone = build(arguments, 0).backbone
    backbone.load_pretrained(arguments.weights)
    folder = arguments.features or arguments.output / "features"
    data = {
        name: Images(datamodule, backbone.folded(), folder / f"{name}-{arguments.backbone}.pt")
        for name, datamodule in sources.items()
    }
    file, rows = arguments.output / "unified.csv", []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    clusters = [int(count) if count.isdigit() else count for count in arguments.clusters]
    densities = [("position_full", ""), *((MIXTURE, count) for count in clusters)]
    for seed in arguments.seeds:
        for model, steps in ((SINGLE, [600]), (UNIFIED, arguments.steps)):
            for count in steps:
                for denoiser in ("mlp", "none"):
                    for density, number in densities[:2] if model == SINGLE else densities:
                        key = {"model": model, "seed": seed, "steps": count, "denoiser": denoiser}
                        measure(arguments, data, {**key, "density": density, "clusters": number}, rows)
    text = "\n".join(tables(rows, list(data)))
    (arguments.output / "unified.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
