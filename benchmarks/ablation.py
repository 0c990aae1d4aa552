# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The ablation behind OSDIRF's defaults: one training for each network, everything else read out of it.

On folders laid out as train/good, test/<good or defect>, ground_truth/<defect> (masks are optional), and on the
embedded surfaces:

    python benchmarks/ablation.py --root mtd elpv_mono --category weave --weights mobilenetv2_100.safetensors

A study varies one thing about OSDIRF's defaults (:data:`STUDIES`), or about those with other ``--whiten``,
``--timestep``, ``--steps`` or ``--precision``; networks that studies share are trained once for each data set and seed.
"features" are the same Gaussian on the same features without a denoiser: only what is above them is the method's merit.
Results go to ``ablation.csv``, one row for each read-out; tables in Markdown and plots lie beside it. The same command
goes on where it was interrupted, and processes with different data sets may share an output folder. Pixel metrics are
those of maps at half size, at 4000 thresholds: within .002 of the model's own test.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from math import ceil, isnan, nan
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from mvtec_folder import mvtec_folder
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn

from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES
from anomalib_osdirf.denoisers import fold
from anomalib_osdirf.density import BlockGaussian, build_density
from anomalib_osdirf.diffusion import inverse_residual_field
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.feature_diffusion import warmup_cosine
from anomalib_osdirf.models.feature_network import upsampled
from anomalib_osdirf.models.osdirf import OSDIRF, OSDIRFModel

FEATURES = "features"
NETWORK = ("images", "feature_dim", "whiten", "grid", "denoiser", "prediction_type", "steps", "precision")
READ_OUT = ("state", "timestep", "density")
KEYS = ("data", "seed", *NETWORK, *READ_OUT)
SCORES = ("max", "top_k", "mean", "max_top_k")
IMAGE = tuple(f"{score}_{metric}" for score in SCORES for metric in ("AUROC", "AP", "F1Max"))
# Of the field's map alone, and with the features' own density on the finer grid added.
PIXEL = ("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")
COMBINED = tuple(name.replace("pixel", "combined") for name in PIXEL)

PRECISIONS = ("32-true", "bf16-mixed")  # of the training, by the names of Lightning's Trainer
DEFAULTS: dict[str, Any] = {
    "images": 0,
    "feature_dim": 96,
    "whiten": False,
    "grid": 16,
    "denoiser": "mlp",
    "prediction_type": "v_prediction",
    "steps": 600,
    "precision": "32-true",
    "state": "scaled",
    "timestep": 120,
    "density": "position_full",
}
STUDIES: dict[str, dict[str, Sequence[Any]]] = {
    "timestep": {
        "timestep": (0, 30, 80, 120, 150, 300, 500, 800),
        "density": ("standard", "channel", "position", "position_full"),
    },
    "shrinkage": {"density": ("position_full", "position_full:auto", "position_full:0.1", "position_full:0.5")},
    "state": {"state": ("scaled", "clean", "noised"), "timestep": (80, 120, 150, 300)},
    "prediction_type": {"prediction_type": ("v_prediction", "epsilon"), "timestep": (80, 120, 150, 300)},
    "grid": {"grid": (8, 16), "timestep": (80, 120, 150, 300)},
    "features": {"feature_dim": (48, 96, 0)},  # 0: every channel, standardised
    "whitening": {"whiten": (True, False), "timestep": (80, 120, 150, 180)},
    "denoiser": {"denoiser": ("mlp", "unet", "dit_s")},
    "steps": {"steps": (150, 300, 600, 1200)},
    "precision": {"precision": PRECISIONS},
    "few_shot": {
        "images": (5, 10, 50, 200, 0),
        "steps": (240, 480, 600),
        "density": ("standard", "position_full", "position_full:auto"),
    },
}
_MAP_SIDE = 128
_DETAILS_GRID = 32
_AUPRO_LIMIT = 0.3
_BATCH = 32
_LEARNING_RATE = 1e-3

Settings = dict[str, Any]


class Images:
    """Features of a data set, not yet averaged onto a grid, and what is known of its test images.

    Args:
        datamodule: anomalib datamodule.
        backbone: The frozen backbone that extracts them.
        file: Where they are kept.
    """

    def __init__(self, datamodule: Any, backbone: Any, file: Path) -> None:  # noqa: ANN401
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            torch.save(self._extract(datamodule, backbone), temporary)
            temporary.replace(file)
        kept = torch.load(file, weights_only=True)
        self.train, self.test = kept["train"].float(), kept["test"].float()
        self.fine_train, self.fine_test = kept["fine_train"], kept["fine_test"]
        self.labels: NDArray[np.int64] = kept["labels"].numpy()
        self.masks: NDArray[np.bool_] | None = kept["masks"].numpy() if kept["masks"].any() else None
        self.regions: list[tuple[int, NDArray[np.int64]]] = []
        for index, mask in enumerate(self.masks if self.masks is not None else ()):
            count, components = cv2.connectedComponents(mask.astype(np.uint8))
            self.regions += [(index, np.flatnonzero(components == number)) for number in range(1, count)]

    @staticmethod
    @torch.no_grad()
    def _extract(datamodule: Any, backbone: Any) -> dict[str, Tensor]:  # noqa: ANN401
        pre_processor: PreProcessor = OSDIRF.configure_pre_processor()
        datamodule.prepare_data()
        datamodule.setup(TrainerFn.FITTING)
        datamodule.setup(TrainerFn.TESTING)
        features: dict[str, list[Tensor]] = {"train": [], "test": [], "fine_train": [], "fine_test": []}
        labels, masks = [], []
        for split, data in (("train", datamodule.train_data), ("test", datamodule.test_data)):
            for item in data:
                maps = backbone.maps(pre_processor(item.image[None]))
                features[split].append(backbone.coarse(maps).half())
                features[f"fine_{split}"].append(backbone.fine(maps, _DETAILS_GRID).half())
                if split == "test":
                    labels.append(int(item.gt_label))
                    mask = torch.zeros(1, 1) if item.gt_mask is None else item.gt_mask.float()
                    resized = nn.functional.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), size=2 * [_MAP_SIDE])
                    masks.append(resized[0, 0] > 0.5)
        tensors = {name: torch.cat(parts) for name, parts in features.items()}
        return tensors | {"labels": torch.tensor(labels), "masks": torch.stack(masks)}


# ---------------------------------------------------------------------- networks


def build(settings: Settings, backbone: str, seed: int) -> OSDIRFModel:
    """Build OSDIRF's network."""
    torch.manual_seed(seed)
    return OSDIRFModel(
        timestep=0,
        state="scaled",
        image_score="max",
        backbone=backbone,
        layers=None,
        feature_dim=settings["feature_dim"] or None,
        whiten=settings["whiten"],
        grid_size=settings["grid"],
        denoiser=settings["denoiser"],
        prediction_type=settings["prediction_type"],
        density="standard",
        ema_decay=0.999,
    )


def train(network: OSDIRFModel, features: Tensor, seed: int, max_steps: int, precision: str) -> float:
    """Train the denoiser as OSDIRF does by default, and return the CPU seconds that it took, all threads together."""
    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    optimizer = torch.optim.AdamW(network.denoiser.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    network.train()
    for step in range(max_steps):
        share = warmup_cosine(step, min(100, max_steps // 10), max_steps, 0.0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = share * _LEARNING_RATE
        chosen = torch.randint(len(features), (min(_BATCH, len(features)),), generator=generator)
        with bfloat16:
            loss = network.training_loss(features[chosen], generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.denoiser.parameters(), 1.0)
        optimizer.step()
        network.ema.update_parameters(network.denoiser)
    network.eval()
    return time.process_time() - start


def trained(network: OSDIRFModel, features: Tensor, seed: int, settings: Settings, file: Path) -> float:
    """Train, or load what was trained before; return the CPU seconds that the training took."""
    if not file.is_file():
        seconds = train(network, features, seed, settings["steps"], settings["precision"])
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        torch.save({"seconds": seconds, "ema": network.ema.state_dict()}, temporary)
        temporary.replace(file)
    kept = torch.load(file, weights_only=True)
    network.ema.load_state_dict(kept["ema"])
    return float(kept["seconds"])


@torch.no_grad()
def reduced(network: OSDIRFModel, features: Tensor) -> Tensor:
    """Features on the network's grid, after PCA."""
    return torch.cat([network.whitening(network.backbone.pool(part)) for part in features.split(64)])


@torch.no_grad()
def fields(network: OSDIRFModel, z: Tensor, timestep: int, state: str) -> Tensor:
    """Inverse residual fields of such features, with the fixed noise of ``OSDIRFModel`` for ``noised``."""
    denoiser, abar = fold(network.ema.module, timestep), network.schedule.abar(timestep)
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0)) if state == "noised" else None
    return torch.cat([inverse_residual_field(denoiser, part, abar, state, noise) for part in z.split(64)])


# ---------------------------------------------------------------------- read-outs


@torch.no_grad()
def negative_log_densities(training: Tensor, test: Tensor, density: str) -> tuple[Tensor, Tensor]:
    """Fit a density on training fields ``(N, D, h, w)``, and return its values on both, ``(N, h, w)``, nats.

    Args:
        training: Fields of training images.
        test: Fields of test images.
        density: Name, and shrinkage behind a colon if it is not the default.
    """
    name, _, shrinkage = density.partition(":")
    strength = float(shrinkage) if shrinkage[:1].isdigit() else shrinkage or "oas"
    fitted = build_density(name, training.shape[1], training.shape[-1], strength)
    fitted.fit(training.split(64))
    of_training, of_test = (torch.cat([fitted(part) for part in each.split(64)]) for each in (training, test))
    return of_training, of_test


@torch.no_grad()
def details_map(network: OSDIRFModel, training: Tensor, test: Tensor) -> Tensor:
    """Negative log density of the test images' features on the finer grid, shape ``(N, h, w)``, nats."""
    density = BlockGaussian(network.whitening.out_channels, _DETAILS_GRID)
    density.fit(network.whitening(part.float()) for part in training.split(32))
    return torch.cat([density(network.whitening(part.float())) for part in test.split(32)])


def image_scores(training: Tensor, test: Tensor) -> dict[str, NDArray[np.float64]]:
    """Image scores by name; the constants of the sum are the training images'."""

    def terms(nll: Tensor) -> dict[str, Tensor]:
        values = nll.flatten(1).sort(dim=1, descending=True).values
        third = values[:, : max(1, round(values.shape[1] / 3))]
        return {"max": values[:, 0], "top_k": third.mean(dim=1), "mean": values.mean(dim=1)}

    of_training, of_test = terms(training), terms(test)
    deviations = {one: of_training[one].std().clamp_min(1e-6) for one in ("max", "top_k")}
    total = sum((of_test[one] - of_training[one].mean()) / deviation for one, deviation in deviations.items())
    assert isinstance(total, Tensor)
    return {name: value.double().numpy() for name, value in {**of_test, "max_top_k": total}.items()}


def image_metrics(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> tuple[float, float, float]:
    """AUROC, AP and F1max."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), float(f1.max())


def pixel_metrics(images: Images, maps: Tensor) -> tuple[float, float, float, float]:
    """AUROC, AP, F1max and AUPRO (false-positive rate up to 0.3) of maps ``(N, _MAP_SIDE, _MAP_SIDE)``."""
    assert images.masks is not None
    values = maps.flatten(1).numpy()
    truth = images.masks.reshape(len(values), -1)
    edges = np.unique(np.quantile(values.ravel()[::7], np.linspace(0, 1, 4001)))
    bins = np.searchsorted(edges, values)
    count = len(edges) + 1

    def cumulated(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.cumsum(np.bincount(chosen, minlength=count)[::-1]).astype(float)

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


def read_out(
    images: Images, both: tuple[Tensor, Tensor], density: str, details: Tensor | None
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Return the metrics of the fields of training and test images, and the default image scores."""
    of_training, of_test = negative_log_densities(*both, density)
    scores = image_scores(of_training, of_test)
    row: dict[str, float] = {}
    for name, values in scores.items():
        row |= {f"{name}_{key}": v for key, v in zip(("AUROC", "AP", "F1Max"), image_metrics(images.labels, values))}  # noqa: B905
    if images.masks is not None:
        size = (_MAP_SIDE, _MAP_SIDE)
        maps = upsampled(of_test[:, None], size)[:, 0]
        row |= dict(zip(PIXEL, pixel_metrics(images, maps), strict=True))
        if details is not None and density.startswith(DEFAULTS["density"]):
            maps += upsampled(details[:, None], size)[:, 0]
            row |= dict(zip(COMBINED, pixel_metrics(images, maps), strict=True))
    return {name: round(value, 5) for name, value in row.items()}, scores["max_top_k"]


# ---------------------------------------------------------------------- running


class Table:
    """Rows kept in a CSV file, each written as soon as it is known.

    Args:
        file: The file.
    """

    columns = (*KEYS, "training_seconds", *IMAGE, *PIXEL, *COMBINED)

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, str]] = []
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as stream:
                self.rows = list(csv.DictReader(stream))

    def has(self, **key: object) -> bool:
        """Tell whether there is a row with these values."""
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: Settings) -> None:
        """Append a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = not self.file.is_file()
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(row.get(name, "")) for name in self.columns})


def settings_of(study: str) -> list[Settings]:
    """All settings of a study: the defaults, with its values in their places."""
    varied = STUDIES[study]
    return [DEFAULTS | dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def default_steps(images: int) -> int:
    """Steps that OSDIRF trains for by default, given the number of training images; 0 are all of them."""
    batches = ceil(images / _BATCH) or OSDIRF.default_steps
    return min(OSDIRF.default_steps, OSDIRF.default_epochs * batches)


def without_denoiser(settings: Settings) -> Settings:
    """Return the settings of the same features and density with nothing trained."""
    empty = dict.fromkeys(("prediction_type", "steps", "precision", "state", "timestep"), "")
    return {**settings, "denoiser": FEATURES, **empty}


def by_network(wanted: list[Settings]) -> dict[tuple[Any, ...], list[Settings]]:
    """Group settings by the network that they are read out of, each once."""
    groups: dict[tuple[Any, ...], list[Settings]] = {}
    for settings in wanted:
        group = groups.setdefault(tuple(settings[name] for name in NETWORK), [])
        if settings not in group:
            group.append(settings)
    return groups


class Ablation:
    """The ablation on one data set.

    Args:
        name: The data set's name.
        images: The data set.
        arguments: The command line's.
        table: Where rows go.
    """

    def __init__(self, name: str, images: Images, arguments: argparse.Namespace, table: Table) -> None:
        self.name = name
        self.images = images
        self.arguments = arguments
        self.table = table
        self.details: dict[tuple[Any, ...], Tensor] = {}

    def run(self, seed: int, wanted: list[Settings]) -> None:
        """Train what there is no network of yet, and read out what there is no row of yet."""
        for group in by_network(wanted).values():
            if group[0]["images"] >= len(self.images.train):  # as many, or more, is "all"
                continue
            everything = group
            if seed == self.arguments.seeds[0]:  # features know no seed
                everything = [*{str(one): one for one in map(without_denoiser, group)}.values(), *group]
            missing = [one for one in everything if not self.table.has(data=self.name, seed=seed, **one)]
            if missing:
                self._read_out(seed, group[0], missing)

    def _read_out(self, seed: int, settings: Settings, missing: list[Settings]) -> None:
        """Add rows that one network, or its features, serve for."""
        network = build(settings, self.arguments.backbone, seed)
        count = len(self.images.train)
        chosen = torch.linspace(0, count - 1, settings["images"] or count).round().long()
        training = self.images.train[chosen]
        moments = StreamingMoments()
        for part in training.split(64):
            moments.update(part.permute(0, 2, 3, 1).flatten(0, 2))
        network.whitening.fit(moments)
        key = (settings["images"], settings["feature_dim"], settings["whiten"])
        if key not in self.details and self.images.masks is not None:
            self.details[key] = details_map(network, self.images.fine_train[chosen], self.images.fine_test)
        z, z_test = reduced(network, training), reduced(network, self.images.test)
        seconds = 0.0
        if any(one["denoiser"] != FEATURES for one in missing):
            name = "-".join(str(part) for part in (self.name, seed, *(settings[one] for one in NETWORK)))
            pooled = torch.cat([network.backbone.pool(part) for part in training.split(64)])
            file = self.arguments.output / "networks" / f"{name}.pt"
            seconds = trained(network, pooled, seed, settings, file)
        questions = itertools.groupby(
            sorted(missing, key=lambda one: (str(one["state"]), str(one["timestep"]))),
            key=lambda one: (one["denoiser"], one["timestep"], one["state"]),
        )
        for (denoiser, timestep, state), rows in questions:
            none = denoiser == FEATURES
            both = (z, z_test) if none else tuple(fields(network, each, timestep, state) for each in (z, z_test))
            for one in rows:
                metrics, scores = read_out(self.images, both, one["density"], self.details.get(key))
                self._keep_scores(seed, one, scores)
                spent = 0.0 if none else round(seconds, 1)
                self.table.add({"data": self.name, "seed": seed, **one, "training_seconds": spent, **metrics})
                print(self.name, seed, *one.values(), *metrics.values(), flush=True)

    def _keep_scores(self, seed: int, one: Settings, scores: NDArray[np.float64]) -> None:
        """Keep the scores of the first seed's default network, and of its features, for the histograms."""
        fixed = (name for name in (*NETWORK, *READ_OUT) if name not in {"density", "denoiser"})
        default = all(one[name] in {DEFAULTS[name], ""} for name in fixed) and ":" not in one["density"]
        if seed == self.arguments.seeds[0] and one["denoiser"] in {DEFAULTS["denoiser"], FEATURES} and default:
            file = self.arguments.output / "scores" / f"{self.name}-{one['denoiser']}-{one['density']}.csv"
            file.parent.mkdir(exist_ok=True)
            np.savetxt(file, np.c_[self.images.labels, scores], "%g", ",", header="label,score", comments="")


# ---------------------------------------------------------------------- tables and plots

STYLES = ("-o", "--s", ":^", "-.D", "-v", "--x")
LABELS = {
    "max_top_k_AUROC": "image AUROC",
    "combined_AUROC": "pixel AUROC",
    "combined_AUPRO": "AUPRO (FPR up to 0.3)",
}
Means = dict[tuple[str, ...], tuple[float, float]]


def means(table: Table, metric: str, by: Sequence[str], **fixed: object) -> Means:
    """Mean and standard deviation over seeds (NaN for one), of the rows with the given values, by others."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in table.rows:
        if row[metric] and all(row[name] == str(value) for name, value in fixed.items()):
            groups.setdefault(tuple(row[name] for name in by), []).append(float(row[metric]))
    return {key: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else nan) for key, v in groups.items()}


def others(study: str) -> Settings:
    """Return the defaults of what a study does not vary."""
    return {name: value for name, value in DEFAULTS.items() if name not in STUDIES[study]}


def cell(metrics: Sequence[tuple[float, float] | None]) -> str:
    """Write image AUROC, and pixel AUROC / AUPRO where there are masks; with deviations where seeds are several."""
    written = [f"{mean:.3f}" + ("" if isnan(std) else f" ± {std:.3f}") for mean, std in filter(None, metrics)]
    return written[0] + (", " + " / ".join(written[1:]) if written[1:] else "") if written else "-"


def study_table(table: Table, study: str, data: Sequence[str]) -> Iterator[str]:
    """Write a study as a Markdown table with a column for each data set."""
    varied = tuple(STUDIES[study])
    found = {
        (name, metric): means(table, metric, varied, data=name, **others(study)) for name in data for metric in LABELS
    }
    plain = {
        (name, metric): means(table, metric, (), data=name, **without_denoiser(DEFAULTS)).get(())
        for name in data
        for metric in LABELS
    }
    yield f"### {study}"
    yield ""
    yield "| " + " | ".join([*varied, *data]) + " |"
    yield "|---" * (len(varied) + len(data)) + "|"
    for values in itertools.product(*STUDIES[study].values()):
        key = tuple(str(value) for value in values)
        cells = [cell([found[name, metric].get(key) for metric in LABELS]) for name in data]
        if set(cells) != {"-"}:
            yield "| " + " | ".join([*key, *cells]) + " |"
    features = [cell([plain[name, metric] for metric in LABELS]) for name in data]
    yield "| " + " | ".join(["no denoiser", *[""] * (len(varied) - 1), *features]) + " |"
    yield ""


def best_settings(table: Table, data: Sequence[str]) -> Iterator[str]:
    """Say what each data set's best setting would have gained over the default, seeds averaged."""
    yield "### What each data set's best setting would have gained"
    yield ""
    yield "| data | metric | default | best | gain | settings of the best |"
    yield "|---|---|---|---|---|---|"
    of_images = [name for name in IMAGE if name.endswith("AUROC")]
    for name, (metric, label) in itertools.product(data, LABELS.items()):
        columns = of_images if metric in of_images else [metric, metric.replace("combined", "pixel")]
        default = means(table, metric, (), data=name, **DEFAULTS).get(())
        found = {
            (column, *key): mean
            for column in columns
            for key, (mean, _) in means(table, column, (*NETWORK, *READ_OUT), data=name).items()
            if key[0] == str(DEFAULTS["images"]) and FEATURES not in key
        }
        if default is None or not found:
            continue
        best = max(found, key=lambda key: found[key])
        setting = dict(zip((*NETWORK, *READ_OUT), best[1:], strict=True))
        changed = [f"{key} {value}" for key, value in setting.items() if value != str(DEFAULTS[key])]
        chosen = ", ".join([*changed, *([best[0].rsplit("_", 1)[0]] if best[0] != metric else [])])
        yield (
            f"| {name} | {label} | {default[0]:.3f} | {found[best]:.3f} | {found[best] - default[0]:+.3f} | "
            f"{chosen or 'the default'} |"
        )
    yield ""


def save(figure: Any, output: Path, name: str) -> None:  # noqa: ANN401
    """Save a figure as PNG and SVG."""
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(output / f"{name}.{suffix}", dpi=110)
        print(output / f"{name}.{suffix}")
    plt.close(figure)


def panels(count: int) -> tuple[Any, Any]:
    """Make a row of axes."""
    figure, axes = plt.subplots(1, count, figsize=(3.6 * count, 3.4), squeeze=False)
    return figure, axes[0]


def plot_timesteps(table: Table, data: Sequence[str], output: Path) -> None:
    """AUROC and AUPRO against the timestep, a line for each density."""
    for metric, title in (("max_top_k_AUROC", "image AUROC"), ("pixel_AUPRO", "AUPRO of the field's map")):
        shown = [name for name in data if means(table, metric, (), data=name, **others("timestep"))]
        if not shown:
            continue
        figure, axes = panels(len(shown))
        for axis, name in zip(axes, shown, strict=True):
            found = means(table, metric, ("density", "timestep"), data=name, **others("timestep"))
            for density, style in zip(STUDIES["timestep"]["density"], STYLES, strict=False):
                points = sorted((int(t), *value) for (which, t), value in found.items() if which == density)
                if points:
                    x, y, error = zip(*points, strict=True)
                    axis.errorbar(x, y, error, fmt=style, color="black", markersize=4, linewidth=1, label=density)
            plain = means(table, metric, (), data=name, **without_denoiser(DEFAULTS))
            if () in plain:
                axis.axhline(plain[()][0], color="0.5", linewidth=2, label="position_full, no denoiser")
            axis.set(title=name, xlabel="timestep", ylabel=title)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        save(figure, output, "timesteps-" + metric.split("_")[-1])


def plot_seconds(table: Table, data: Sequence[str], output: Path) -> None:
    """Image AUROC against CPU seconds of training, a line for each denoiser."""
    figure, axes = panels(len(data))
    free = ("denoiser", "steps")
    fixed = {name: value for name, value in DEFAULTS.items() if name not in free}
    styles = dict(zip(STUDIES["denoiser"]["denoiser"], STYLES, strict=False))  # alike on all axes
    for axis, name in zip(axes, data, strict=True):
        heights = means(table, "max_top_k_AUROC", free, data=name, **fixed)
        seconds = means(table, "training_seconds", free, data=name, **fixed)
        for denoiser, style in styles.items():
            points = sorted((seconds[key][0], *heights[key]) for key in heights if key[0] == denoiser)
            if not points:
                continue
            x, y, error = zip(*points, strict=True)
            axis.errorbar(x, y, error, fmt=style, color="black", markersize=4, linewidth=1, label=denoiser)
        plain = means(table, "max_top_k_AUROC", (), data=name, **without_denoiser(DEFAULTS))
        if () in plain:
            axis.axhline(plain[()][0], color="0.5", linewidth=2, label="no denoiser")
        axis.set(title=name, xlabel="training, features cached (CPU s)", ylabel="image AUROC", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="upper left")
    save(figure, output, "training-seconds")


def plot_few_shot(table: Table, data: Sequence[str], output: Path) -> None:
    """Image AUROC against the number of training images, trained for as long as OSDIRF does by default."""
    figure, axes = panels(len(data))
    free = ("denoiser", "density", "images", "steps")
    for axis, name in zip(axes, data, strict=True):
        fixed = {key: value for key, value in DEFAULTS.items() if key not in free}
        found = means(table, "max_top_k_AUROC", free, data=name, **fixed)
        plain = {key: value for key, value in without_denoiser(DEFAULTS).items() if key not in free}
        found |= {
            key: value
            for key, value in means(table, "max_top_k_AUROC", free, data=name, **plain).items()
            if key[0] == FEATURES and key[1] == DEFAULTS["density"]
        }
        found = {key[:3]: value for key, value in found.items() if key[3] in {"", str(default_steps(int(key[2])))}}
        lines = sorted({key[:2] for key in found if key[2] == str(STUDIES["few_shot"]["images"][0])})
        for line, style in zip(lines, STYLES, strict=False):
            everything = 1000  # where "all" is drawn
            points = sorted((int(key[2]) or everything, *value) for key, value in found.items() if key[:2] == line)
            x, y, error = zip(*points, strict=True)
            axis.errorbar(x, y, error, fmt=style, color="black", markersize=4, linewidth=1, label=" ".join(line))
        ticks = [count or 1000 for count in STUDIES["few_shot"]["images"]]
        axis.set(title=name, xlabel="training images", ylabel="image AUROC", xscale="log")
        axis.set_xticks(ticks, [str(count or "all") for count in STUDIES["few_shot"]["images"]])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save(figure, output, "few-shot")


def plot_histograms(data: Sequence[str], output: Path) -> None:
    """Scores of normal and anomalous test images, for each density; the first seed."""
    rows = [(DEFAULTS["denoiser"], density) for density in STUDIES["timestep"]["density"]]
    rows.append((FEATURES, DEFAULTS["density"]))
    figure, axes = plt.subplots(len(data), len(rows), figsize=(2.8 * len(rows), 2.2 * len(data)), squeeze=False)
    for line, name in zip(axes, data, strict=True):
        for axis, (denoiser, density) in zip(line, rows, strict=True):
            file = output / "scores" / f"{name}-{denoiser}-{density}.csv"
            axis.set_title(f"{name}, {'no denoiser' if denoiser == FEATURES else density}", fontsize=8)
            if not file.is_file():
                continue
            labels, scores = np.loadtxt(file, delimiter=",", skiprows=1).T
            edges = np.linspace(*np.quantile(scores, (0.0, 0.98)), 31)
            normal, anomalous = (np.clip(scores[labels == label], edges[0], edges[-1]) for label in (0, 1))
            axis.hist(normal, edges, color="0.75", label="normal")
            axis.hist(anomalous, edges, histtype="step", color="black", hatch="///", label="anomalous")
            axis.set_xlabel("score (standard deviations of training images)", fontsize=6)
            axis.set_ylabel("images", fontsize=6)
            axis.tick_params(labelsize=6)
    axes[0][0].legend(fontsize=7)
    save(figure, output, "histograms")


def report(table: Table, output: Path) -> None:
    """Write the tables and draw the plots of all rows that there are."""
    mpl.use("Agg")
    data = list(dict.fromkeys(row["data"] for row in table.rows))
    lines = [line for study in STUDIES for line in study_table(table, study, data)]
    (output / "ablation.md").write_text("\n".join([*lines, *best_settings(table, data)]), encoding="utf-8")
    print(output / "ablation.md")
    plot_timesteps(table, data, output)
    plot_seconds(table, data, output)
    plot_few_shot(table, data, output)
    plot_histograms(data, output)


def main() -> None:
    """Run what is missing, and write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded ones")
    parser.add_argument("--category", nargs="*", choices=CATEGORIES, default=[], help="surfaces of the embedded data")
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="of trainings whose study does not say")
    parser.add_argument("--precision", choices=PRECISIONS, default=DEFAULTS["precision"], help="likewise")
    parser.add_argument("--whiten", action=argparse.BooleanOptionalAction, default=DEFAULTS["whiten"], help="likewise")
    parser.add_argument("--timestep", type=int, default=DEFAULTS["timestep"], help="of fields whose study does not say")
    parser.add_argument("--output", type=Path, default=Path("results/ablation"))
    arguments = parser.parse_args()
    DEFAULTS.update({name: vars(arguments)[name] for name in ("steps", "precision", "whiten", "timestep")})
    sources: dict[str, Any] = {root.name: mvtec_folder(root) for root in arguments.root}
    sources |= {category: SyntheticSurfaces(category=category) for category in arguments.category}
    wanted = [settings for study in arguments.studies for settings in settings_of(study)]
    table = Table(arguments.output / "ablation.csv")
    for name, datamodule in sources.items():
        backbone = build(DEFAULTS, arguments.backbone, 0).backbone
        backbone.load_pretrained(arguments.weights)
        file = arguments.output / "features" / f"{name}-{arguments.backbone}.pt"
        ablation = Ablation(name, Images(datamodule, backbone.folded(), file), arguments, table)
        for seed in arguments.seeds:
            ablation.run(seed, wanted)
    table = Table(table.file)  # with the rows of other processes
    if not table.rows:
        parser.error(f"{table.file} has no rows yet, and there are no data: give --root, --category or both")
    report(table, arguments.output)


if __name__ == "__main__":
    main()
