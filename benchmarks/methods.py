# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSDIRF against InvAD, on one checkpoint, and DiffusionAD, trained for as long: the README's table.

On the embedded data set, and on folders laid out as train/good, test/<good or defect>, ground_truth/<defect>:

    python benchmarks/methods.py --root mtd --backbone mobilenetv2_100 --weights mobilenetv2_100.safetensors

InvAD is OSDIRF's denoiser read out in another way, in each of its settings; both have whitened features here, since
InvAD takes a latent of N(0, I) for normal. DiffusionAD is the small preset (configs/diffusionad.yaml), with as many
steps as fit into the time that OSDIRF took. All test images count, no metric has a threshold. Speed is that of the
torch network that scores, from pre-processed images to map and score, the models taking turns. What is finished is kept
in the output folder and not run again: the same command goes on where it was interrupted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from mvtec_folder import mvtec_folder
from torchvision.transforms.v2 import Resize

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.data import SyntheticSurfaces

CONFIGS = Path(__file__).parents[1] / "configs"
QUIET: dict[str, Any] = {"visualizer": False}
INVAD: dict[str, dict[str, Any]] = {
    "InvAD, released steps": {},
    "InvAD, paper's steps": {"timestep_spacing": "paper"},
    "InvAD, released steps, fitted density": {"density": "position_full"},
}
# 80 is the timestep that suits OSDIRF with whitened features.
WHITENED: dict[str, Any] = {"whiten": True, "timestep": 80}
DIFFUSIONAD = "DiffusionAD, small"
# The difference of a short and a longer training is what the steps between take.
TRIES = (5, 25)
BATCHES = (1, 32)
COLUMNS = {
    "evaluations": "{:d}",
    "M trained parameters": "{:.1f}",
    "image_AUROC": "{:.3f}",
    "pixel_AUROC": "{:.3f}",
    "image size": "{:d}",
    **{f"images/s, batch {batch}": "{:.0f}" for batch in BATCHES},
    "training steps": "{:d}",
    "training seconds": "{:.0f}",
}

MakeData = Callable[[int | None], AnomalibDataModule]
Row = dict[str, Any]


class Results:
    """Finished rows by data set and method, kept in a file.

    Args:
        folder: Folder of the file.
        settings: What the rows depend on.

    Raises:
        ValueError: If the file is of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file = folder / "methods.json"
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        self.rows: dict[str, dict[str, Row]] = {}
        if self.file.is_file():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["settings"] != self.settings:
                msg = f"{self.file} holds rows of other settings, {kept['settings']}; choose another --output."
                raise ValueError(msg)
            self.rows = kept["rows"]

    def row(self, data: str, label: str, measure: Callable[[], Row]) -> Row:
        """Return a row, measured unless it is there already."""
        rows = self.rows.setdefault(data, {})
        if label not in rows:
            rows[label] = measure()
            self.save()
        return rows[label]

    def save(self) -> None:
        """Write all rows, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        text = json.dumps({"settings": self.settings, "rows": self.rows}, indent=2, default=float)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.file)


def engine(output: Path, **arguments: Any) -> Engine:  # noqa: ANN401
    """Make a quiet engine on the machine's accelerator."""
    return Engine(default_root_dir=output, devices=1, enable_progress_bar=False, **arguments)


def train(model: Any, data: AnomalibDataModule, output: Path, **arguments: Any) -> Row:  # noqa: ANN401
    """Train, and return the checkpoint, the steps and the seconds."""
    run = engine(output, **arguments)
    start = time.perf_counter()
    run.fit(model, datamodule=data)
    return {
        "checkpoint": str(run.best_model_path),
        "training steps": run.trainer.global_step,
        "training seconds": time.perf_counter() - start,
    }


def test(model: Any, data: AnomalibDataModule, output: Path) -> Row:  # noqa: ANN401
    """Return the metrics, and what is to be known of the network."""
    metrics = dict(engine(output).test(model, datamodule=data)[0])
    return {
        **metrics,
        "evaluations": evaluations(model),
        "M trained parameters": sum(one.numel() for one in trained_part(model).parameters()) / 1e6,
        "image size": examples(model, 1).shape[-1],
    }


def small_diffusionad(seed: int, max_steps: int) -> DiffusionAD:
    """Build the small preset's model."""
    arguments = yaml.safe_load((CONFIGS / "diffusionad.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    size = arguments.pop("pre_processor")["init_args"]["transform"]["init_args"]["size"]
    arguments |= {
        "seed": seed,
        "max_steps": max_steps,
        "pre_processor": PreProcessor(Resize(tuple(size), antialias=True)),
    }
    return DiffusionAD(**arguments)


def diffusionad_batch() -> int:
    """Return the small preset's batch size."""
    data = yaml.safe_load((CONFIGS / "diffusionad.yaml").read_text(encoding="utf-8"))["data"]
    return int(data["init_args"]["train_batch_size"])


def train_diffusionad(make_data: MakeData, seed: int, budget: float, output: Path) -> Row:
    """Train the small preset for about as many seconds as the budget has; its learning rate wants to know the steps."""
    batch = diffusionad_batch()
    short, longer = (
        train(small_diffusionad(seed, steps), make_data(batch), output / "try", limit_val_batches=0) for steps in TRIES
    )
    spent = longer["training seconds"] - short["training seconds"]
    if spent <= 0:
        msg = f"{TRIES[1]} steps took no longer than {TRIES[0]}; run this on a machine that does nothing else."
        raise RuntimeError(msg)
    steps = max(1, round((TRIES[1] - TRIES[0]) * budget / spent))
    return train(small_diffusionad(seed, steps), make_data(batch), output)


def examples(model: Any, batch: int) -> torch.Tensor:  # noqa: ANN401
    """Return a batch of pre-processed images."""
    with torch.no_grad():
        images: torch.Tensor = model.pre_processor(torch.rand(batch, 3, 256, 256, device=model.device))
    return images


def throughput(model: Any, batch: int, rounds: int) -> Callable[[], float]:  # noqa: ANN401
    """Return a measurement of images per second, from pre-processed images to map and score."""
    images, network = examples(model, batch), model.model.eval().deployed()

    def measure() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(rounds):
                network(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return rounds * batch / (time.perf_counter() - start)

    return measure


def measure_speed(rows: dict[str, Row], models: dict[str, Any], rounds: int) -> None:
    """Add images per second to the rows: medians over rounds in which all models take turns."""
    measurements = {
        (label, batch): throughput(model, batch, max(1, 8 // batch))
        for label, model in models.items()
        for batch in BATCHES
    }
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in measurements}
    for turn in range(rounds + 1):
        for key, measure in measurements.items():
            rate = measure()
            if turn:  # the first one warms up
                rates[key].append(rate)
    for (label, batch), values in rates.items():
        rows[label][f"images/s, batch {batch}"] = statistics.median(values)


def run(
    name: str, make_data: MakeData, make_osdirf: Callable[[], OSDIRF], arguments: argparse.Namespace, results: Results
) -> None:
    """Fill in the table's rows of one data set."""
    output = arguments.output / name

    def osdirf() -> Row:
        if name in arguments.osdirf:
            trained = {"checkpoint": str(arguments.osdirf[name])}
        else:
            trained = train(make_osdirf(), make_data(None), output)
        return trained | test(OSDIRF.load_from_checkpoint(trained["checkpoint"], **QUIET), make_data(None), output)

    reference = results.row(name, "OSDIRF", osdirf)
    trained = {key: reference[key] for key in ("training steps", "training seconds") if key in reference}
    budget = arguments.budget or reference.get("training seconds")
    if budget is None:
        msg = f"--osdirf {name}=... does not say how long that training took; give --budget, in seconds."
        raise ValueError(msg)

    def invad(**options: Any) -> InvAD:  # noqa: ANN401
        model: InvAD = InvAD.load_from_checkpoint(reference["checkpoint"], **options, **QUIET)
        return model

    for label, options in INVAD.items():
        results.row(name, label, lambda options=options: trained | test(invad(**options), make_data(None), output))

    def diffusionad() -> Row:
        own = train_diffusionad(make_data, arguments.seed, budget, output)
        return own | test(DiffusionAD.load_from_checkpoint(own["checkpoint"], **QUIET), make_data(None), output)

    last = results.row(name, DIFFUSIONAD, diffusionad)
    rows = results.rows[name]
    if any(f"images/s, batch {BATCHES[0]}" not in row for row in rows.values()):
        models = {
            "OSDIRF": OSDIRF.load_from_checkpoint(reference["checkpoint"], **QUIET),
            **{label: invad(**options) for label, options in INVAD.items()},
            DIFFUSIONAD: DiffusionAD.load_from_checkpoint(last["checkpoint"], **QUIET),
        }
        measure_speed(rows, models, arguments.rounds)
        results.save()


def evaluations(model: Any) -> int:  # noqa: ANN401
    """Evaluations of the denoiser per image."""
    return {"OSDIRF": 1, "DiffusionAD": 2}.get(model.name) or len(model.model.timesteps)


def trained_part(model: Any) -> torch.nn.Module:  # noqa: ANN401
    """Return what is trained: the denoiser, or both of DiffusionAD's networks."""
    part: torch.nn.Module = model.model.networks if model.name == "DiffusionAD" else model.model.denoiser
    return part


def table(rows: dict[str, dict[str, Row]]) -> str:
    """Format the rows in Markdown."""
    lines = ["| data | model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, models in rows.items():
        for label, row in models.items():
            cells = [form.format(row[column]) if column in row else "" for column, form in COLUMNS.items()]
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def named_file(text: str) -> tuple[str, Path]:
    """Read an argument NAME=FILE."""
    name, _, file = text.partition("=")
    if not Path(file).is_file():
        msg = f"{text!r} does not name a checkpoint; write NAME=FILE, with the data set's folder or surface as NAME."
        raise argparse.ArgumentTypeError(msg)
    return name, Path(file)


def main() -> None:
    """Print a Markdown table and keep it in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded one")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="for the data sets given by --root")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--category", nargs="*", default=["weave"], help="surfaces of the embedded data set")
    parser.add_argument(
        "--osdirf", type=named_file, nargs="*", default=[], metavar="NAME=FILE", help="OSDIRF's checkpoints, if any"
    )
    parser.add_argument("--budget", type=float, help="seconds to train DiffusionAD for, instead of OSDIRF's")
    parser.add_argument("--max-steps", type=int, help="steps to train OSDIRF for, instead of its default")
    parser.add_argument("--output", type=Path, default=Path("results/methods"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the speed measurement, models taking turns")
    arguments = parser.parse_args()
    arguments.osdirf = dict(arguments.osdirf)
    names = [*arguments.category, *(root.name for root in arguments.root)]
    unknown = [name for name in arguments.osdirf if name not in names]
    if unknown:
        parser.error(f"--osdirf names {unknown[0]}, which is none of the data sets: {', '.join(names)}")
    settings = ("backbone", "weights", "osdirf", "budget", "max_steps", "seed")
    results = Results(arguments.output, {name: getattr(arguments, name) for name in settings})
    print(f"seed {arguments.seed}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    own: dict[str, Any] = {"seed": arguments.seed, **QUIET, **WHITENED}
    if arguments.max_steps is not None:
        own["max_steps"] = arguments.max_steps
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    for category in arguments.category:

        def surfaces(batch: int | None, category: str = category) -> AnomalibDataModule:
            batch = batch or quickstart["data"]["init_args"]["train_batch_size"]
            return SyntheticSurfaces(category=category, train_batch_size=batch)

        def on_surfaces() -> OSDIRF:
            return OSDIRF(**{**quickstart["model"]["init_args"], **own})

        run(category, surfaces, on_surfaces, arguments, results)
    for root in arguments.root:

        def images(batch: int | None, root: Path = root) -> AnomalibDataModule:
            return mvtec_folder(root, **({"train_batch_size": batch} if batch else {}))

        def on_images() -> OSDIRF:
            return OSDIRF(backbone=arguments.backbone, backbone_weights=arguments.weights, **own)

        run(root.name, images, on_images, arguments, results)
    markdown = table(results.rows)
    print(markdown)
    (arguments.output / "methods.md").write_text(markdown, encoding="utf-8")


if __name__ == "__main__":
    main()
