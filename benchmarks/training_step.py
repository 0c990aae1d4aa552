# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one step of the denoiser's training, with and without gradient checkpointing.

On random features of the default size (216 channels of EfficientNet-B4, reduced to 96, on 16 x 16 positions), with
AdamW, clipping and the average of the weights as in a training; each row in a process of its own:

    python benchmarks/training_step.py --denoisers conv_mlp dit_s dit_b --batch-sizes 8
    python benchmarks/training_step.py --denoisers dit_gigant --precision bf16-true --feature-dim 0 --accelerator cuda

Seconds are medians without the first step. Memory is the largest of the device, or of the process on a CPU (packages
included); "before" is what it is before the first step, with the weights and their average alone.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from anomalib_osdirf.denoisers import DENOISERS, checkpoint_gradients
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.osdirf import OSDIRFModel

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # by the names of Lightning's Trainer


def largest_memory(device: str) -> float:
    """Largest memory so far, MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(denoiser: str, batch_size: int, checkpointed: bool, arguments: argparse.Namespace) -> tuple[float, ...]:
    """Train for a few steps; return seconds a step, memory before and the largest, MB."""
    device, precision = arguments.accelerator, arguments.precision
    model = OSDIRFModel(
        timestep=200,
        density="standard",
        backbone="efficientnet_b4",
        layers=None,
        feature_dim=arguments.feature_dim or None,
        grid_size=arguments.grid_size,
        denoiser=denoiser,
        ema_decay=0.999,
    )
    network: Any = model.network
    channels = network.backbone.out_channels
    moments = StreamingMoments()
    moments.update(torch.randn(2048, channels))
    network.projection.fit(moments)
    model.to(device).train()
    if precision == "bf16-true":
        model.bfloat16()
    if checkpointed:
        checkpoint_gradients(network.denoiser)
    weights = list(network.denoiser.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    features = torch.randn(batch_size, channels, 2 * arguments.grid_size, 2 * arguments.grid_size, device=device)
    generator = torch.Generator(device).manual_seed(0)
    before, seconds = largest_memory(device), []
    for _ in range(1 + arguments.steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = network.training_loss(features, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        network.ema.update_parameters(network.denoiser)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), before, largest_memory(device)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", choices=DENOISERS[:-1], default=["conv_mlp", "dit_s"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--feature-dim", type=int, default=96, help="0 for all channels")
    parser.add_argument("--grid-size", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.accelerator}, {torch.get_num_threads()} threads, {arguments.precision}\n")
    print("| denoiser | batch | gradient checkpointing | s a step | images/s | MB before | MB at most |")
    print("|---|---|---|---|---|---|---|")
    for denoiser in arguments.denoisers:
        for batch_size in arguments.batch_sizes:
            for checkpointed in (False, True):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, before, largest = pool.apply(measure, (denoiser, batch_size, checkpointed, arguments))
                cells = (f"{seconds:.2f}", f"{batch_size / seconds:.1f}", f"{before:.0f}", f"{largest:.0f}")
                print("| " + " | ".join([denoiser, str(batch_size), str(checkpointed), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
