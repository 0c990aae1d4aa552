# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of everything that OSDIRF fits on its training images, on generated features, as the images become more.

    python benchmarks/streaming_memory.py

The features have MobileNetV2's channels on the default grids; PCA and scorer are fitted as in a training. The cache is
not counted: it has a limit of its own.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from anomalib_osdirf.features import PCAProjection, StreamingMoments, coarse
from anomalib_osdirf.models.scorer import Scorer

BANK = 64


def resident() -> float:
    """Memory of this process in MB, 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text("utf-8").split()[1]) * resource.getpagesize() / 1e6 if status.is_file() else 0.0


def peak() -> float:
    """Largest memory of this process so far in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Features:
    """Any number of generated fine features, of which only a batch exists at a time.

    Args:
        arguments: Sizes.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        generator = torch.Generator().manual_seed(0)
        size = (2 * arguments.grid_size, 2 * arguments.grid_size)
        mixing = torch.randn(arguments.channels, arguments.channels, generator=generator)
        noise = torch.randn(BANK, arguments.channels, *size, generator=generator)
        self.bank = torch.einsum("cd,ndhw->nchw", mixing, noise) + 5

    def __call__(self, name: str) -> Iterator[Tensor]:
        """Yield the batches, the same ones in each pass, and print the memory at every tenfold number of images."""
        generator = torch.Generator().manual_seed(1)
        start, next_look = time.perf_counter(), 100
        for first in range(0, self.arguments.images, self.arguments.batch):
            count = min(self.arguments.batch, self.arguments.images - first)
            chosen = torch.randint(BANK, (count,), generator=generator)
            scale = 1 + 0.1 * torch.randn(count, self.arguments.channels, 1, 1, generator=generator)
            yield self.bank[chosen] * scale
            if first + count >= next_look:
                next_look *= 10
                seconds = time.perf_counter() - start
                print(f"| {name} | {first + count} | {resident():.0f} | {peak():.0f} | {seconds:.0f} |", flush=True)


@torch.no_grad()
def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--channels", type=int, default=128, help="channels of the backbone's layers")
    parser.add_argument("--grid-size", type=int, default=16)
    parser.add_argument("--feature-dim", type=int, default=96)
    parser.add_argument("--density", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    features = Features(arguments)
    print(f"Before: {resident():.0f} MB\n\n| pass | images | MB | largest MB | s |\n|---|---|---|---|---|")
    moments = StreamingMoments()
    for batch in features("features"):
        moments.update(coarse(batch).permute(0, 2, 3, 1).flatten(0, 2))
    projection = PCAProjection(arguments.channels, arguments.feature_dim, whiten=False)
    projection.fit(moments)
    passes = itertools.count(1)

    def images() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        seen = 0
        for batch in features(f"scorer, pass {next(passes)}"):
            fine = projection(batch)
            yield coarse(fine), fine, torch.arange(seen, seen + len(fine))
            seen += len(fine)

    scorer = Scorer(arguments.density)
    scorer.fit(images)
    print(f"\n{scorer.structure}, {scorer.clusters.count} clusters of images")


if __name__ == "__main__":
    main()
