# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Weights, file size and operations of each denoiser before and after its timestep is folded in.

python benchmarks/folding.py
"""

import argparse
import io

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_osdirf.denoisers import DENOISERS, build_denoiser, fold


def megabytes(network: nn.Module) -> float:
    """Size of the saved weights."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell() / 1e6


def operations(network: nn.Module, *inputs: torch.Tensor) -> float:
    """Millions of floating-point operations, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops() / 1e6


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96, help="channels of the whitened features")
    parser.add_argument("--grid-size", type=int, default=8)
    parser.add_argument("--timestep", type=int, default=120)
    arguments = parser.parse_args()
    z = torch.randn(1, arguments.dim, arguments.grid_size, arguments.grid_size)
    print("| denoiser | M weights and constants | MB | M operations, one image | largest difference |")
    print("|---|---|---|---|---|")
    for name in DENOISERS:
        torch.manual_seed(0)
        denoiser = build_denoiser(name, arguments.dim, arguments.grid_size).eval()
        for parameter in denoiser.parameters():  # a new one predicts zero
            nn.init.normal_(parameter, std=0.02)
        folded = fold(denoiser, arguments.timestep)
        timesteps = torch.tensor([arguments.timestep])
        with torch.no_grad():
            expected, actual = denoiser(z, timesteps), folded(z)
        difference = float((actual - expected).abs().amax() / expected.abs().amax())
        counts = [
            sum(tensor.numel() for tensor in network.state_dict().values()) / 1e6 for network in (denoiser, folded)
        ]
        print(
            f"| {name} | {counts[0]:.2f} -> {counts[1]:.2f} | {megabytes(denoiser):.1f} -> {megabytes(folded):.1f} "
            f"| {operations(denoiser, z, timesteps):.0f} -> {operations(folded, z):.0f} | {difference:.0e} |"
        )


if __name__ == "__main__":
    main()
