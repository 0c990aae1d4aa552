# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The ablation behind OSDIRF's defaults: one training for each network, everything else read out of it.

On folders laid out as train/good, test/<good or defect>, ground_truth/<defect> (masks are optional):

    python benchmarks/ablation.py --root mtd elpv_mono --weights mobilenetv2_100.safetensors

A network is trained for each data set, seed, denoiser, prediction type and grid; timesteps, states, densities and image
scores are read out of it. "features" are the same Gaussian on the same features without a denoiser: only what is above
them is the method's merit. Results go to ``ablation.csv``, one row for each read-out, plots beside it; the same command
goes on where it was interrupted. Pixel metrics are those of maps at half size, at 4000 thresholds: within .002 of the
model's own test.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import pyplot as plt
from mvtec_folder import mvtec_folder
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn

from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
from anomalib_osdirf.denoisers import fold
from anomalib_osdirf.density import build_density
from anomalib_osdirf.diffusion import inverse_residual_field
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.feature_diffusion import warmup_cosine
from anomalib_osdirf.models.feature_network import upsampled
from anomalib_osdirf.models.osdirf import OSDIRF, OSDIRFModel

FEATURES = "features"
KEYS = ("data", "seed", "images", "denoiser", "prediction_type", "grid", "state", "timestep", "density")
SCORES = ("max", "top_k", "mean", "max_top_k")
PIXEL = ("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")
IMAGE = tuple(f"{score}_{metric}" for score in SCORES for metric in ("AUROC", "AP", "F1Max"))
_MAP_SIDE = 128
_AUPRO_LIMIT = 0.3
_BATCH = 32


class Images:
    """Features of a data set, not yet averaged onto a grid, and what is known of its test images.

    Args:
        datamodule: anomalib datamodule.
        backbone: The model whose frozen backbone extracts them.
        file: Where they are kept.
    """

    def __init__(self, datamodule: Any, backbone: nn.Module, file: Path) -> None:  # noqa: ANN401
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            torch.save(self._extract(datamodule, backbone), temporary)
            temporary.replace(file)
        kept = torch.load(file, weights_only=True)
        self.train, self.test = kept["train"].float(), kept["test"].float()
        self.labels: NDArray[np.int64] = kept["labels"].numpy()
        self.masks: NDArray[np.bool_] | None = kept["masks"].numpy() if kept["masks"].any() else None
        self.regions: list[tuple[int, NDArray[np.int64]]] = []
        for index, mask in enumerate(self.masks if self.masks is not None else ()):
            count, components = cv2.connectedComponents(mask.astype(np.uint8))
            self.regions += [(index, np.flatnonzero(components == number)) for number in range(1, count)]

    @staticmethod
    @torch.no_grad()
    def _extract(datamodule: Any, backbone: nn.Module) -> dict[str, Tensor]:  # noqa: ANN401
        pre_processor: PreProcessor = OSDIRF.configure_pre_processor()
        datamodule.prepare_data()
        datamodule.setup(TrainerFn.FITTING)
        datamodule.setup(TrainerFn.TESTING)
        features: dict[str, list[Tensor]] = {"train": [], "test": []}
        labels, masks = [], []
        for split, data in (("train", datamodule.train_data), ("test", datamodule.test_data)):
            for item in data:
                features[split].append(backbone(pre_processor(item.image[None])).half())
                if split == "test":
                    labels.append(int(item.gt_label))
                    mask = torch.zeros(1, 1) if item.gt_mask is None else item.gt_mask.float()
                    resized = nn.functional.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), size=2 * [_MAP_SIDE])
                    masks.append(resized[0, 0] > 0.5)
        return {
            "train": torch.cat(features["train"]),
            "test": torch.cat(features["test"]),
            "labels": torch.tensor(labels),
            "masks": torch.stack(masks),
        }


def build(arguments: argparse.Namespace, denoiser: str, prediction_type: str, grid: int, seed: int) -> OSDIRFModel:
    """Build OSDIRF's network with a denoiser of its own."""
    torch.manual_seed(seed)
    return OSDIRFModel(
        timestep=0,
        state="scaled",
        image_score="max",
        backbone=arguments.backbone,
        layers=None,
        feature_dim=arguments.feature_dim,
        grid_size=grid,
        denoiser=denoiser,
        prediction_type=prediction_type,
        density="standard",
        ema_decay=0.999,
    )


def train(network: OSDIRFModel, features: Tensor, seed: int, arguments: argparse.Namespace) -> float:
    """Train the denoiser as OSDIRF does by default, and return the seconds that it took."""
    optimizer = torch.optim.AdamW(network.denoiser.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    network.train()
    for step in range(arguments.max_steps):
        share = warmup_cosine(step, min(100, arguments.max_steps // 10), arguments.max_steps, 0.0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = share * arguments.learning_rate
        chosen = torch.randint(len(features), (_BATCH,), generator=generator)
        loss = network.training_loss(features[chosen], generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.denoiser.parameters(), 1.0)
        optimizer.step()
        network.ema.update_parameters(network.denoiser)
    network.eval()
    return time.perf_counter() - start


@torch.no_grad()
def negative_log_densities(training: Tensor, test: Tensor, density: str) -> tuple[Tensor, Tensor]:
    """Fit a density on training fields ``(N, D, h, w)``, and return its values on both, ``(N, h, w)``, nats."""
    fitted = build_density(density, training.shape[1], training.shape[-1])
    fitted.fit(training.split(64))
    return tuple(torch.cat([fitted(part) for part in fields.split(64)]) for fields in (training, test))  # type: ignore[return-value]


def image_scores(training: Tensor, test: Tensor) -> dict[str, NDArray[np.float64]]:
    """Image scores by name; the constants of the sum are the training images'."""

    def terms(nll: Tensor) -> dict[str, Tensor]:
        values = nll.flatten(1).sort(dim=1, descending=True).values
        third = values[:, : max(1, round(values.shape[1] / 3))]
        return {"max": values[:, 0], "top_k": third.mean(dim=1), "mean": values.mean(dim=1)}

    of_training, of_test = terms(training), terms(test)
    standardised = [(of_test[one] - of_training[one].mean()) / of_training[one].std() for one in ("max", "top_k")]
    return {name: value.double().numpy() for name, value in {**of_test, "max_top_k": sum(standardised)}.items()}  # type: ignore[union-attr, dict-item]


def image_metrics(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> tuple[float, float, float]:
    """AUROC, AP and F1max."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), float(f1.max())


def pixel_metrics(images: Images, nll: Tensor) -> tuple[float, float, float, float]:
    """AUROC, AP, F1max and AUPRO (false-positive rate up to 0.3), at up to 4000 thresholds."""
    assert images.masks is not None
    maps = upsampled(nll[:, None], (_MAP_SIDE, _MAP_SIDE)).flatten(1).numpy()
    truth = images.masks.reshape(len(maps), -1)
    edges = np.unique(np.quantile(maps.ravel()[::7], np.linspace(0, 1, 4001)))
    bins = np.searchsorted(edges, maps)
    count = len(edges) + 1

    def cumulated(values: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.cumsum(np.bincount(values, minlength=count)[::-1]).astype(float)

    positives, negatives = cumulated(bins[truth]), cumulated(bins[~truth])
    recall, false_rate = positives / positives[-1], negatives / negatives[-1]
    precision = positives / np.maximum(positives + negatives, 1)
    overlap = sum(cumulated(bins[index][pixels]) / len(pixels) for index, pixels in images.regions)
    overlap = np.asarray(overlap) / len(images.regions)
    rates = np.append(false_rate[false_rate <= _AUPRO_LIMIT], _AUPRO_LIMIT)
    return (
        float(np.trapezoid(np.r_[0, recall], np.r_[0, false_rate])),
        float(np.sum(precision * np.diff(np.r_[0, recall]))),
        float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()),
        float(np.trapezoid(np.r_[0, np.interp(rates, false_rate, overlap)], np.r_[0, rates]) / _AUPRO_LIMIT),
    )


class Table:
    """Rows kept in a CSV file, each written as soon as it is known.

    Args:
        file: The file.
    """

    columns = (*KEYS, "training_seconds", *IMAGE, *PIXEL)

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, str]] = []
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as stream:
                self.rows = list(csv.DictReader(stream))

    def has(self, **key: object) -> bool:
        """Tell whether there is a row with these values."""
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = not self.file.is_file()
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(row.get(name, "")) for name in self.columns})


def read_out(images: Images, training: Tensor, test: Tensor, key: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure one read-out."""
    nll, of_test = negative_log_densities(training, test, key["density"])
    row: dict[str, Any] = {**key, "training_seconds": round(seconds, 1)}
    for name, scores in image_scores(nll, of_test).items():
        for metric, value in zip(("AUROC", "AP", "F1Max"), image_metrics(images.labels, scores), strict=True):
            row[f"{name}_{metric}"] = round(value, 5)
    if images.masks is not None:
        row |= {name: round(v, 5) for name, v in zip(PIXEL, pixel_metrics(images, of_test), strict=True)}
    return row


def chosen_images(count: int, wanted: int | None) -> Tensor:
    """Indices of the training images: all, or some spread over the set."""
    return torch.linspace(0, count - 1, min(count, wanted or count)).round().long()


@torch.no_grad()
def whitened(network: OSDIRFModel, features: Tensor) -> Tensor:
    """Features on the network's grid, whitened."""
    return torch.cat([network.whitening(network.backbone.pool(part)) for part in features.split(64)])


@torch.no_grad()
def fields(network: OSDIRFModel, z: Tensor, timestep: int, state: str) -> Tensor:
    """Inverse residual fields of whitened features."""
    denoiser, abar = fold(network.ema.module, timestep), network.schedule.abar(timestep)
    return torch.cat([inverse_residual_field(denoiser, part, abar, state) for part in z.split(64)])


def ablate(name: str, images: Images, arguments: argparse.Namespace, table: Table) -> None:
    """Train what there is no network of yet, and read out what there is no row of yet."""
    networks = itertools.product(
        arguments.seeds, arguments.images, arguments.denoisers, arguments.prediction_types, arguments.grids
    )
    for seed, wanted, denoiser, prediction_type, grid in networks:
        chosen = chosen_images(len(images.train), wanted)
        key = {"data": name, "seed": seed, "images": len(chosen), "grid": grid}
        own = {**key, "denoiser": denoiser, "prediction_type": prediction_type}
        outputs = list(itertools.product(arguments.states, arguments.timesteps, arguments.densities))
        features = [{**key, "denoiser": FEATURES, "density": density} for density in arguments.densities]
        missing = [
            {**own, "state": state, "timestep": timestep, "density": density}
            for state, timestep, density in outputs
            if not table.has(**own, state=state, timestep=timestep, density=density)
        ]
        if not missing and all(table.has(**one) for one in features):
            continue
        network = build(arguments, denoiser, prediction_type, grid, seed)
        training = images.train[chosen]
        moments = StreamingMoments()
        for part in training.split(64):
            moments.update(part.permute(0, 2, 3, 1).flatten(0, 2))
        network.whitening.fit(moments)
        z, z_test = whitened(network, training), whitened(network, images.test)
        for one in features:
            if not table.has(**one):
                empty = {"prediction_type": "", "state": "", "timestep": ""}
                table.add(read_out(images, z, z_test, {**one, **empty}, 0.0))
        if not missing:
            continue
        file = arguments.output / "networks" / ("-".join(str(value) for value in own.values()) + ".pt")
        if file.is_file():
            kept = torch.load(file, weights_only=True)
            network.ema.load_state_dict(kept["ema"])
        else:
            pooled = torch.cat([network.backbone.pool(part) for part in training.split(64)])
            kept = {"seconds": train(network, pooled, seed, arguments), "ema": network.ema.state_dict()}
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        for one in missing:
            both = [fields(network, each, one["timestep"], one["state"]) for each in (z, z_test)]
            row = read_out(images, both[0], both[1], one, kept["seconds"])
            table.add(row)
            print({column: row.get(column) for column in (*KEYS, "max_top_k_AUROC", *PIXEL)}, flush=True)


# ---------------------------------------------------------------------- plots

Means = dict[tuple[str, ...], tuple[float, float]]

STYLES = ("-o", "--s", ":^", "-.D", "-v", "--x", ":P")


def mean_rows(rows: Iterable[dict[str, str]], by: Sequence[str], metric: str) -> Means:
    """Mean and standard deviation over seeds."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row[metric]:
            groups.setdefault(tuple(row[name] for name in by), []).append(float(row[metric]))
    return {key: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for key, v in groups.items()}


def plot(table: Table, output: Path) -> Iterator[Path]:
    """Draw AUROC against timestep, a line for each network and density, and AUROC against training seconds."""
    mpl.use("Agg")
    for metric, label in (("max_top_k_AUROC", "image AUROC"), ("pixel_AUPRO", "AUPRO (FPR up to 0.3)")):
        data = sorted({row["data"] for row in table.rows if row[metric]})
        if not data:
            continue
        figure, axes = plt.subplots(1, len(data), figsize=(4.2 * len(data), 3.6), squeeze=False)
        for axis, name in zip(axes[0], data, strict=True):
            rows = [row for row in table.rows if row["data"] == name]
            lines: dict[str, list[tuple[int, float, float]]] = {}
            by = ("denoiser", "prediction_type", "grid", "state", "density", "timestep")
            for key, (mean, deviation) in mean_rows(rows, by, metric).items():
                if key[0] == FEATURES:
                    axis.axhline(mean, color="0.6", linestyle="--", linewidth=0.8)
                else:
                    lines.setdefault(" ".join(key[:-1]), []).append((int(key[-1]), mean, deviation))
            for (line, points), style in zip(sorted(lines.items()), itertools.cycle(STYLES), strict=False):
                timesteps, means, deviations = zip(*sorted(points), strict=True)
                axis.errorbar(timesteps, means, deviations, fmt=style, markersize=4, linewidth=1, label=line)
            axis.set(title=name, xlabel="timestep of the noise schedule", ylabel=label)
        axes[0][0].legend(fontsize=6)
        figure.tight_layout()
        for suffix in ("png", "svg"):
            file = output / f"timesteps-{metric}.{suffix}"
            figure.savefig(file, dpi=150)
            yield file
        plt.close(figure)


def main() -> None:
    """Run what is missing, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded ones")
    parser.add_argument("--category", nargs="*", choices=CATEGORIES, default=[], help="surfaces of the embedded data")
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--feature-dim", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, nargs="+", default=[0], help="training images; 0: all")
    parser.add_argument("--denoisers", nargs="+", default=["mlp"])
    parser.add_argument("--prediction-types", nargs="+", default=["v_prediction", "epsilon"])
    parser.add_argument("--grids", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--timesteps", type=int, nargs="+", default=[0, 30, 60, 100, 150, 200, 300, 500, 800])
    parser.add_argument("--states", nargs="+", default=["scaled"])
    parser.add_argument("--densities", nargs="+", default=["standard", "position_full"])
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("results/ablation"))
    arguments = parser.parse_args()
    table = Table(arguments.output / "ablation.csv")
    sources: dict[str, Any] = {root.name: mvtec_folder(root) for root in arguments.root}
    sources |= {category: SyntheticSurfaces(category=category) for category in arguments.category}
    if not sources:
        parser.error("there are no data: give --root, --category or both")
    for name, datamodule in sources.items():
        network = build(arguments, "mlp", "epsilon", min(arguments.grids), 0)
        network.backbone.load_pretrained(arguments.weights)
        file = arguments.output / "features" / f"{name}-{arguments.backbone}.pt"
        ablate(name, Images(datamodule, network.backbone.folded(), file), arguments, table)
    for file in plot(table, arguments.output):
        print(file)


if __name__ == "__main__":
    main()
