# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of everything that OSDIRF fits on its training images, on generated features, as the images become more.

    python benchmarks/streaming_memory.py

The features have MobileNetV2's channels on the default grids. Moments of all positions together (for standardisation
and PCA), moments of each position of the map's grid, kinds of image, density and score constants are fitted as in a
training. The cache is left out: it has a limit of its own.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from anomalib_osdirf.density import BlockGaussian, PositionMixture, SumByKind, image_score
from anomalib_osdirf.features import PCAWhitening, StreamingMoments

BANK = 64


def resident() -> float:
    """Memory of this process in MB, 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text("utf-8").split()[1]) * resource.getpagesize() / 1e6 if status.is_file() else 0.0


def peak() -> float:
    """Largest memory of this process so far in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Features:
    """Any number of generated feature maps on the map's grid, of which only a batch exists at a time.

    Args:
        arguments: Sizes.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        generator = torch.Generator().manual_seed(0)
        size = (arguments.map_grid_size, arguments.map_grid_size)
        mixing = torch.randn(arguments.channels, arguments.channels, generator=generator)
        noise = torch.randn(BANK, arguments.channels, *size, generator=generator)
        self.bank = torch.einsum("cd,ndhw->nchw", mixing, noise) + 5

    def __call__(self) -> Iterator[Tensor]:
        """Yield the batches, the same ones in each pass."""
        generator = torch.Generator().manual_seed(1)
        for first in range(0, self.arguments.images, self.arguments.batch):
            count = min(self.arguments.batch, self.arguments.images - first)
            chosen = torch.randint(BANK, (count,), generator=generator)
            scale = 1 + 0.1 * torch.randn(count, self.arguments.channels, 1, 1, generator=generator)
            yield self.bank[chosen] * scale


def watched(name: str, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield batches, and print the memory whenever their images have become ten times as many."""
    start, seen, next_look = time.perf_counter(), 0, 100
    for batch in batches:
        yield batch
        seen += len(batch)
        if seen >= next_look:
            next_look *= 10
            seconds = time.perf_counter() - start
            print(f"| {name} | {seen} | {resident():.0f} | {peak():.0f} | {seconds:.0f} |", flush=True)


@torch.no_grad()
def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--channels", type=int, default=168, help="channels of the backbone's layers")
    parser.add_argument("--grid-size", type=int, default=16)
    parser.add_argument("--map-grid-size", type=int, default=32)
    parser.add_argument("--feature-dim", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    features = Features(arguments)
    ratio = arguments.map_grid_size // arguments.grid_size
    print(f"Before: {resident():.0f} MB\n\n| pass | images | MB | largest MB | s |\n|---|---|---|---|---|")

    moments, details = StreamingMoments(), StreamingMoments()
    for batch in watched("features", features()):
        moments.update(avg_pool2d(batch, ratio).permute(0, 2, 3, 1).flatten(0, 2))
        details.update(batch.flatten(2).permute(2, 0, 1))
    whitening = PCAWhitening(arguments.channels, arguments.feature_dim)
    whitening.fit(moments)
    map_density = BlockGaussian(arguments.feature_dim, arguments.map_grid_size)
    map_density.fit_moments(details.affine(whitening.weight, whitening.bias), StreamingMoments())

    def fields(name: str) -> Iterator[Tensor]:
        return (whitening(avg_pool2d(batch, ratio)) for batch in watched(name, features()))

    density, score = PositionMixture(arguments.feature_dim, arguments.grid_size), SumByKind(2)
    passes = itertools.count(1)
    density.cluster(lambda: fields(f"clusters, pass {next(passes)}"), lambda: fields("kinds"))
    density.fit(fields("density"))
    maps = ((density.map(field), density.choose(field)) for field in fields("score"))
    terms = ((torch.stack([image_score(nll, term) for term in ("max", "top_k")], dim=1), kind) for nll, kind in maps)
    score.fit(terms, density.num_kinds)
    sizes = {
        "of all positions together": moments.scatter.nbytes,
        "of each position of the map's grid": details.scatter.nbytes,
        "of a kind's field": 8 * arguments.feature_dim**2 * arguments.grid_size**2,
    }
    print(f"\nKinds: {density.num_kinds}")
    print("Moments: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
