# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of OSDIRF and InvAD beside anomalib's PatchCore and PaDiM, on one backbone, 256 x 256, torch.

    python benchmarks/peers.py --backbone mobilenetv2_100

Weights, memory banks and Gaussians are random, which changes neither. PatchCore's banks are as large as 1 % and 10 % of
the patches of so many training images (mtd's 761). Models take turns, the medians count. Memory is the largest that a
process of its own had, which does nothing but import, build one model and score one batch a few times. Linux only.
"""

import argparse
import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from cost_model import invad, medians, osdirf
from torch import nn

SIZE = 256


def patchcore(arguments: argparse.Namespace, share: float) -> nn.Module:
    """Build PatchCore with a memory bank of that share of the training images' patches."""
    model = PatchcoreModel(arguments.layers, arguments.backbone, pre_trained=False).eval()
    features = model.feature_extractor(torch.rand(1, 3, SIZE, SIZE))
    channels = sum(one.shape[1] for one in features.values())
    patches = features[arguments.layers[0]][0, 0].numel()
    model.memory_bank = torch.rand(round(share * arguments.images * patches), channels)
    return model


def padim(arguments: argparse.Namespace) -> nn.Module:
    """Build PaDiM with a Gaussian of 100 channels at each position."""
    model = PadimModel(arguments.backbone, arguments.padim_layers, pre_trained=False, n_features=100).eval()
    side = model.feature_extractor(torch.rand(1, 3, SIZE, SIZE))[arguments.padim_layers[0]].shape[-1]
    model.gaussian.mean = torch.rand(100, side**2)
    model.gaussian.inv_covariance = torch.eye(100).repeat(side**2, 1, 1)
    return model


def builders(arguments: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each model."""
    return {
        "OSDIRF, position": lambda: osdirf(arguments.backbone, "conv_mlp", "position"),
        "OSDIRF, position, 9 clusters": lambda: osdirf(arguments.backbone, "conv_mlp", "position", 9),
        "OSDIRF, mixture": lambda: osdirf(arguments.backbone, "conv_mlp", "mixture"),
        "InvAD, 3 steps": lambda: invad(arguments.backbone, "conv_mlp"),
        "PatchCore 1 %": lambda: patchcore(arguments, 0.01),
        "PatchCore 10 %": lambda: patchcore(arguments, 0.1),
        "PaDiM": lambda: padim(arguments),
    }


@torch.inference_mode()
def memory(arguments: argparse.Namespace, name: str, batch: int) -> float:
    """Largest memory of this process in MB, after it has scored."""
    model, images = builders(arguments)[name](), torch.rand(batch, 3, SIZE, SIZE)
    for _ in range(3):
        model(images)
    # Not the resource usage's, which begins with what the parent had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024 / 1e6  # type: ignore[union-attr]


def main() -> None:
    """Print a Markdown table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--layers", nargs="+", default=["blocks.2", "blocks.4"], help="of PatchCore")
    parser.add_argument("--padim-layers", nargs="+", default=["blocks.1", "blocks.2", "blocks.4"])
    parser.add_argument("--images", type=int, default=761, help="training images that PatchCore's memory bank is of")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/peers.md"))
    arguments = parser.parse_args()
    names = list(builders(arguments))
    rows: dict[str, list[Any]] = {name: [] for name in names}
    spawn = multiprocessing.get_context("spawn")
    for batch in arguments.batches:
        with torch.inference_mode():
            images = torch.rand(batch, 3, SIZE, SIZE)
            runs = {name: partial(make(), images) for name, make in builders(arguments).items()}
            seconds = medians(runs, max(3, arguments.rounds // batch))
        del runs
        for name in names:
            with spawn.Pool(1) as pool:
                rows[name] += [1000 * seconds[name] / batch, pool.apply(memory, (arguments, name, batch))]
    head = " | ".join(f"ms an image, batch {batch} | MB, batch {batch}" for batch in arguments.batches)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    lines = [f"{machine}; {arguments.backbone}, 256 x 256, float32", "", f"| model | {head} |"]
    lines.append("|---" * (1 + 2 * len(arguments.batches)) + "|")
    for name, row in rows.items():
        cells = [f"{value:.1f}" if column % 2 == 0 else f"{value:.0f}" for column, value in enumerate(row)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
