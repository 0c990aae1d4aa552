# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSDIRF against InvAD, on one checkpoint, and DiffusionAD, trained for as long: the README's table.

On the embedded data set, and on folders laid out as train/good, test/<good or defect>, ground_truth/<defect>:

    python benchmarks/methods.py --root mtd --backbone mobilenetv2_100 --weights mobilenetv2_100.safetensors

InvAD is OSDIRF's denoiser read out in another way, in each of its settings; DiffusionAD is the small preset
(configs/diffusionad.yaml), with as many steps as fit into the time that OSDIRF took. All test images count, no metric
has a threshold.
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
    "InvAD, paper's steps": {},
    "InvAD, released steps": {"timestep_spacing": "released"},
    "InvAD, paper's steps, fitted density": {"density": "position_full"},
}


def engine(output: Path, **arguments: Any) -> Engine:  # noqa: ANN401
    """Make a quiet engine on the machine's accelerator."""
    return Engine(default_root_dir=output, devices=1, enable_progress_bar=False, **arguments)


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


def seconds_to_train(model: Any, data: AnomalibDataModule, output: Path, **arguments: Any) -> float:  # noqa: ANN401
    """Train and return how long that took."""
    start = time.perf_counter()
    engine(output, **arguments).fit(model, datamodule=data)
    return time.perf_counter() - start


def throughput(model: Any, batch: int, rounds: int) -> Callable[[], float]:  # noqa: ANN401
    """Return a measurement of images per second, from pre-processed images to map and score."""
    with torch.no_grad():
        images = model.pre_processor(torch.rand(batch, 3, 256, 256, device=model.device))
    network = model.model.eval().deployed()

    def measure() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(rounds):
                network(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return rounds * batch / (time.perf_counter() - start)

    return measure


def run(name: str, make_data: Callable[[], AnomalibDataModule], arguments: argparse.Namespace, osdirf: OSDIRF) -> list:
    """Train and test all methods on one data set, and return the table's rows."""
    output = arguments.output / name
    start = time.perf_counter()
    first = engine(output)
    first.fit(osdirf, datamodule=make_data())
    seconds = time.perf_counter() - start
    models: dict[str, tuple[Any, float]] = {"OSDIRF": (osdirf, seconds)}
    for label, options in INVAD.items():
        models[label] = (InvAD.load_from_checkpoint(str(first.best_model_path), **options, **QUIET), seconds)
    # The difference of a short and a longer training is what the steps between take.
    tries = {
        n: seconds_to_train(small_diffusionad(arguments.seed, n), make_data(), output / "try", limit_val_batches=0)
        for n in (3, 13)
    }
    steps = round(10 * seconds / (tries[13] - tries[3]))
    diffusionad = small_diffusionad(arguments.seed, steps)
    trained = seconds_to_train(diffusionad, make_data(), output)
    models[f"DiffusionAD, small, {steps} steps"] = (diffusionad, trained)
    rows = []
    for label, (model, trained) in models.items():
        metrics = dict(engine(output).test(model, datamodule=make_data())[0])
        rows.append({"data": name, "model": label, "training seconds": trained, **metrics})
    measurements = {
        (label, batch): throughput(model, batch, max(1, 8 // batch))
        for label, (model, _) in models.items()
        for batch in (1, 32)
    }
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in measurements}
    for turn in range(arguments.rounds + 1):
        for key, measure in measurements.items():
            rate = measure()
            if turn:
                rates[key].append(rate)
    for row in rows:
        model = models[row["model"]][0]
        row["images/s, batch 1"], row["images/s, batch 32"] = (
            statistics.median(rates[row["model"], batch]) for batch in (1, 32)
        )
        row["evaluations"] = evaluations(model)
        row["M parameters"] = sum(one.numel() for one in trained_part(model).parameters()) / 1e6
    return rows


def evaluations(model: Any) -> int:  # noqa: ANN401
    """Evaluations of the denoiser per image."""
    return {"OSDIRF": 1, "DiffusionAD": 2}.get(model.name) or len(model.model.timesteps)


def trained_part(model: Any) -> torch.nn.Module:  # noqa: ANN401
    """Return what is trained: the denoiser, or both of DiffusionAD's networks."""
    part: torch.nn.Module = model.model.networks if model.name == "DiffusionAD" else model.model.denoiser
    return part


def main() -> None:
    """Print a Markdown table and keep it in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded one")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="for the data sets given by --root")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--category", default="weave", help="surface of the embedded data set")
    parser.add_argument("--output", type=Path, default=Path("results/methods"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the speed measurement, models taking turns")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    rows = run(
        arguments.category,
        lambda: SyntheticSurfaces(category=arguments.category, train_batch_size=16),
        arguments,
        OSDIRF(**{**quickstart, "seed": arguments.seed, **QUIET}),
    )
    for root in arguments.root:
        model = OSDIRF(backbone=arguments.backbone, backbone_weights=arguments.weights, seed=arguments.seed, **QUIET)
        rows += run(root.name, lambda root=root: mvtec_folder(root), arguments, model)  # type: ignore[misc]
    columns = {
        "evaluations": "{:d}",
        "M parameters": "{:.1f}",
        "image_AUROC": "{:.3f}",
        "pixel_AUROC": "{:.3f}",
        "images/s, batch 1": "{:.0f}",
        "images/s, batch 32": "{:.0f}",
        "training seconds": "{:.0f}",
    }
    lines = ["| data | model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [form.format(row.get(name, float("nan"))) for name, form in columns.items()]
        lines.append(f"| {row['data']} | {row['model']} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    (arguments.output / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (arguments.output / "methods.json").write_text(json.dumps(rows, indent=2, default=float), encoding="utf-8")


if __name__ == "__main__":
    main()
