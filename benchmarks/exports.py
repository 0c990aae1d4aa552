# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Size, accuracy, latency and throughput of OpenVINO exports: OSDIRF against PatchCore and PaDiM on one backbone.

All models run in one process, interleaved, at the same precision (float32 wherever they are not quantised). Example, on
a folder laid out as train/good, test/<good or defect>, ground_truth/<defect>:

    python benchmarks/exports.py --root mtd --backbone mobilenetv2_100 --weights mobilenetv2_100.safetensors
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import timm
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore
from lightning.pytorch.trainer.states import TrainerFn
from mvtec_folder import mvtec_folder
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.export.instructions import avoid_broken_instructions
from anomalib_osdirf.features import build_backbone

DEVICE = "device precision"  # float32 weights, computed in whatever the device prefers
EXPORTS = {
    "OSDIRF": ("FP32", DEVICE, "FP16", "INT8", "INT8_PTQ", "INT8_ACQ"),
    "PatchCore 1 %": ("FP32", "FP16"),  # anomalib's INT8_PTQ of PatchCore takes more than 24 GB
    "PaDiM": ("FP32", "FP16"),  # OpenVINO 2026.4 crashes on compiling anomalib's INT8_PTQ of PaDiM
}
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def datamodule(root: Path, every: int = 1) -> Folder:
    """Return the data set with each ``every``-th of its training images."""
    data = mvtec_folder(root, eval_batch_size=8)  # PatchCore compares a whole batch with its memory bank at once
    if every > 1:
        data.setup(TrainerFn.FITTING)
        data.train_data.subsample(range(0, len(data.train_data), every), inplace=True)
    return data


def export_all(arguments: argparse.Namespace) -> dict[str, Path]:
    """Train what there is no export of yet, and export it; an interrupted run goes on where it was."""
    overlay = {"pretrained_cfg_overlay": {"file": arguments.weights}} if arguments.weights else {}
    builders = {
        "OSDIRF": partial(OSDIRF, backbone=arguments.backbone, backbone_weights=arguments.weights, seed=arguments.seed),
        "PatchCore 1 %": partial(
            Patchcore,
            backbone=arguments.backbone,
            layers=arguments.patchcore_layers,
            coreset_sampling_ratio=0.01 * arguments.patchcore_every,
        ),
        "PaDiM": partial(Padim, backbone=arguments.backbone, layers=arguments.padim_layers, n_features=100),
    }
    files: dict[str, Path] = {}
    original = timm.create_model
    for name in arguments.models:
        build = builders[name]
        root = arguments.output / name.replace(" ", "_").replace("%", "percent")
        wanted = {key: root / key.replace(" ", "_") for key in EXPORTS[name]}
        missing = [key for key, folder in wanted.items() if not (folder / "weights/openvino/model.bin").is_file()]
        if missing:
            torch.manual_seed(arguments.seed)
            # The peers take no weights file of their own.
            timm.create_model = partial(original, **overlay) if name != "OSDIRF" else original
            model = build()
            engine = Engine(default_root_dir=root, accelerator="cpu", devices=1)
            checkpoint = arguments.checkpoint if name == "OSDIRF" else next(root.rglob("model.ckpt"), None)
            if checkpoint:
                model = type(model).load_from_checkpoint(checkpoint)
            else:
                every = arguments.patchcore_every if name.startswith("PatchCore") else 1
                engine.fit(model, datamodule=datamodule(arguments.root, every))
            timm.create_model = original
            for key in missing:
                start = time.perf_counter()
                data = datamodule(arguments.root)
                if name != "OSDIRF":  # or its images come unresized and do not stack
                    data.trainer = SimpleNamespace(model=model)
                engine.export(
                    model,
                    "openvino",
                    wanted[key],
                    input_size=None if name == "OSDIRF" else (256, 256),
                    compression_type=CompressionType[key] if key not in {"FP32", DEVICE} else None,
                    datamodule=data,
                    max_drop=arguments.max_drop,
                    onnx_kwargs={"inference_precision": "any"} if key == DEVICE else None,
                )
                print(f"{name} {key}: exported in {time.perf_counter() - start:.0f} s", flush=True)
        for key, folder in wanted.items():
            files[f"{name} {key}"] = folder / "weights/openvino/model.xml"
    files["bare backbone FP32"] = bare_backbone(arguments)
    return files


def bare_backbone(arguments: argparse.Namespace) -> Path:
    """The frozen network alone, batch norms folded, without resize."""
    file: Path = arguments.output / "backbone" / "model.xml"
    network = build_backbone(arguments.backbone, None, 8).folded().network
    example = torch.rand(1, 3, 256, 256)
    openvino.save_model(openvino.convert_model(network, example_input=example), file, compress_to_fp16=False)
    return file


def fixed_batch(model: Any) -> int:
    """Batch size that a compiled model insists on: two for anomalib's PatchCore, none (one) for the others."""
    batch = model.input(0).get_partial_shape()[0]
    return batch.get_length() if batch.is_static else 1


def accuracy(compiled: dict[str, Any], data: Folder) -> dict[str, tuple[float, float, float]]:
    """Image AUROC, pixel AUROC (every other pixel of every other row), both on the image files as they are.

    And the largest difference of the normalised image score from that of the same model in float32.
    """
    data.setup("test")
    scores: dict[str, list[float]] = {name: [] for name in compiled}
    maps: dict[str, list[np.ndarray]] = {name: [] for name in compiled}
    labels, masks = [], []
    for item in data.test_data:
        image = item.image[None].numpy()
        resized = resize(item.image[None], [256, 256], antialias=True).numpy()
        labels.append(int(item.gt_label))
        for name, model in compiled.items():
            fixed_size = model.input(0).get_partial_shape()[2].is_static
            outputs = model(np.repeat(resized if fixed_size else image, fixed_batch(model), axis=0))
            scores[name].append(outputs["pred_score"].reshape(-1)[0])
            maps[name].append(outputs["anomaly_map"][0].squeeze()[::2, ::2].astype(np.float32))
        mask = item.gt_mask if item.gt_mask is not None else torch.zeros(image.shape[-2:])
        size = tuple(2 * side for side in maps[next(iter(maps))][-1].shape)
        large = torch.nn.functional.interpolate(mask.float().reshape(1, 1, *mask.shape[-2:]), size=size)
        masks.append(large[0, 0, ::2, ::2] > 0.5)
    truth, pixels = torch.tensor(labels), torch.stack(masks).flatten().int()
    return {
        name: (
            float(binary_auroc(torch.tensor(scores[name], dtype=torch.float64).clamp(0, 1), truth)),
            float(binary_auroc(torch.from_numpy(np.stack(maps[name])).flatten().clamp(0, 1), pixels)),
            float(np.abs(np.subtract(scores[name], scores[_in_float32(name)])).max()),
        )
        for name in compiled
    }


def _in_float32(name: str) -> str:
    model = next(model for model in EXPORTS if name.startswith(model))
    return f"{model} FP32"


def configuration(name: str) -> dict[str, str]:
    """OpenVINO's options for an export: float32, but where the device is asked for what it prefers."""
    return {} if name.endswith(DEVICE) else FLOAT32


def latency(compiled: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median milliseconds for one image of 256 x 256, models taking turns; the share of one in a fixed batch."""
    image = np.random.default_rng(0).random((1, 3, 256, 256), np.float32)
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds + 3):
        for name, model in compiled.items():
            images = np.repeat(image, fixed_batch(model), axis=0)
            start = time.perf_counter()
            model(images)
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start) / len(images))
    return {name: statistics.median(values) for name, values in times.items()}


def throughput(files: dict[str, Path], images: int, rounds: int) -> dict[str, float]:
    """Median images per second through an AsyncInferQueue."""
    image = np.random.default_rng(0).random((1, 3, 256, 256), np.float32)
    core = openvino.Core()
    queues = {
        name: openvino.AsyncInferQueue(
            core.compile_model(file, "CPU", {**configuration(name), "PERFORMANCE_HINT": "THROUGHPUT"})
        )
        for name, file in files.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, queue in queues.items():
            batch = np.repeat(image, fixed_batch(core.read_model(files[name])), axis=0)
            start = time.perf_counter()
            for _ in range(images):
                queue.start_async({0: batch})
            queue.wait_all()
            rates[name].append(images * len(batch) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Print a Markdown table and keep it, with the command, in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data set")
    parser.add_argument("--models", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--checkpoint", type=Path, help="a trained OSDIRF, instead of training one")
    parser.add_argument("--patchcore-layers", nargs="+", default=["blocks.2", "blocks.4"])
    parser.add_argument(
        "--patchcore-every",
        type=int,
        default=1,
        help="give PatchCore only each n-th training image, and an n times larger share of its patches to keep: the "
        "same memory bank in size, selected n times faster",
    )
    parser.add_argument("--padim-layers", nargs="+", default=["blocks.1", "blocks.2", "blocks.4"])
    parser.add_argument("--max-drop", type=float, default=0.01, help="image F1 score that INT8_ACQ may lose")
    parser.add_argument("--output", type=Path, default=Path("results/exports"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    avoid_broken_instructions()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}, OpenVINO {openvino.__version__}, {torch.get_num_threads()} threads")
    files = export_all(arguments)
    core = openvino.Core()
    compiled = {name: core.compile_model(file, "CPU", configuration(name)) for name, file in files.items()}
    milliseconds = latency(compiled, arguments.rounds)
    rates = throughput(files, 40, 5)
    scoring = {name: model for name, model in compiled.items() if not name.startswith("bare")}
    areas = accuracy(scoring, datamodule(arguments.root))
    lines = [
        "| model | MB | image AUROC | pixel AUROC | largest score difference | ms, batch 1 | images/s, async |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {}
    for name, file in files.items():
        size = sum(path.stat().st_size for path in (file, file.with_suffix(".bin"))) / 1e6
        image, pixel, difference = areas.get(name, (float("nan"),) * 3)
        rows[name] = {
            "MB": size,
            "image": image,
            "pixel": pixel,
            "difference": difference,
            "ms": milliseconds[name],
            "rate": rates[name],
        }
        lines.append(
            f"| {name} | {size:.1f} | {image:.4f} | {pixel:.4f} | {difference:.4f} | {milliseconds[name]:.1f} | "
            f"{rates[name]:.0f} |"
        )
    print("\n".join(lines))
    (arguments.output / "exports.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (arguments.output / "exports.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
