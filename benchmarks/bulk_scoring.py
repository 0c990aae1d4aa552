# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Bulk scoring at size: images per second with 1 and 2 workers, memory over time, killed with SIGKILL and resumed.

    python benchmarks/bulk_scoring.py --model results/OSDIRF/SyntheticSurfaces/latest/weights/openvino/model.xml

Images are drawn like the embedded data set's weave, 256 x 256 JPEG files: some pictures, a part of them defective,
each turned, lit and with noise of its own. Memory is the sum of the resident sizes of all processes of a run, Ray's
included, so what processes share counts several times; its drift is the mean of the last fifth of a run less that of
the second fifth. A run that is killed is counted by its rows on disk. Linux only.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from anomalib_osdirf.data.surface_drawing import SURFACES, draw_surface

CATEGORY, SIDE = "weave", 256
PICTURES, DEFECTIVE = 48, 6  # so many drawings, each n-th of them with a defect
INTERVAL = 1.0  # seconds between looks at memory
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Watched:
    """A run, as seen from outside."""

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    processes: set[int] = field(default_factory=set)

    @property
    def under_way(self) -> slice:
        """From the first part that was seen to the last: neither start nor end."""
        return slice(bisect_right(self.rows, self.rows[0]), bisect_left(self.rows, max(self.rows)) + 1)

    @property
    def speed(self) -> float:
        """Images per second."""
        seconds, rows = self.seconds[self.under_way], self.rows[self.under_way]
        return (rows[-1] - rows[0]) / (seconds[-1] - seconds[0])

    @property
    def drift(self) -> float:
        """Bytes that a run has more in its last fifth than in its second."""
        sizes = self.bytes[self.under_way]
        fifth = len(sizes) // 5
        return mean(sizes[-fifth:]) - mean(sizes[fifth : 2 * fifth])


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw images that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(count) if not (folder / f"{number:06d}.jpg").exists()]
    if not missing:
        return
    defects = list(SURFACES[CATEGORY].defects)
    kinds = [defects[index % len(defects)] if index % DEFECTIVE == 0 else None for index in range(PICTURES)]
    pictures = [draw_surface(CATEGORY, kind, SIDE, (seed, index))[0] for index, kind in enumerate(kinds)]
    for number in missing:
        rng = np.random.default_rng((seed, number))
        turned = np.flip(pictures[number % PICTURES], axis=[axis for axis in (0, 1) if rng.random() < 0.5])
        changed = turned.astype(np.int16) + rng.integers(-5, 6) + rng.integers(-1, 2, turned.shape, dtype=np.int16)
        pixels = np.clip(changed, 0, 255).astype(np.uint8)[..., ::-1]
        cv2.imwrite(str(folder / f"{number:06d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])


def run(arguments: list[str], output: Path, kill_at: int | None = None) -> Watched:
    """Score, and look on; kill the run's first process when so many rows are on disk.

    Raises:
        RuntimeError: If the run fails, or ends before it could be killed.
    """
    command = [sys.executable, "-m", "anomalib_osdirf", "score", *arguments, "--output", str(output)]
    watched = Watched()
    print("$", " ".join(command), flush=True)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            processes = tree(process.pid)
            watched.processes |= set(processes)
            watched.seconds.append(time.perf_counter())
            watched.bytes.append(sum(processes.values()))
            watched.rows.append(max([rows_on_disk(output), *watched.rows[-1:]]))  # parts vanish when they are merged
            if kill_at is not None and watched.rows[-1] >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(INTERVAL)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        msg = f"the run ended with status {process.returncode}"
        raise RuntimeError(msg)
    return watched


def wait_for_the_end_of(processes: set[int]) -> float:
    """Return the seconds that processes live on."""
    start = time.perf_counter()
    while any(Path(f"/proc/{number}").exists() for number in processes):
        time.sleep(0.1)
    return time.perf_counter() - start


def rows_on_disk(output: Path) -> int:
    """Count the rows of parts, or of the file that they became."""
    parts = list(output.with_name(f"{output.name}.parts").glob("*.parquet"))
    try:
        return sum(pq.read_metadata(part).num_rows for part in parts or [output] if part.exists())
    except OSError:  # it was removed meanwhile
        return 0


def tree(process: int) -> dict[int, int]:
    """Return the resident bytes of a process and of all below it."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)], sizes[int(folder.name)] = int(stat[1]), int(stat[21]) * PAGE
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {number: sizes[number] for number in found if number in sizes}


def check(output: Path, images: Path, count: int) -> dict[str, float]:
    """Hold the rows to the images: each once, each with a score."""
    table = pq.read_table(output)
    paths = table["path"].to_pylist()
    expected = {str(images / f"{number:06d}.jpg") for number in range(count)}
    found: dict[str, float] = {
        "rows": len(paths),
        "different images": len(set(paths)),
        "missing": len(expected - set(paths)),
        "errors": table.num_rows - table["error"].null_count,
        "anomalous": sum(table["label"].to_pylist()),
        "ms of a worker per image": 1000 * mean(table["seconds"].to_pylist()),
    }
    if found["rows"] != count or set(paths) != expected:
        msg = f"not each image once: {found}"
        raise RuntimeError(msg)
    return found


def figures(watched: Watched) -> dict[str, float]:
    """Return a run's figures."""
    return {
        "images/s": watched.speed,
        "seconds, all": watched.seconds[-1] - watched.seconds[0],
        "peak MB": max(watched.bytes) / 1e6,
        "drift MB": watched.drift / 1e6,
        "processes": len(watched.processes),
    }


def main() -> None:
    """Print the figures, and keep them in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported OpenVINO model")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--scaling-images", type=int, default=4_000, help="images for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/bulk_scoring"))
    options = parser.parse_args()
    root = options.output.absolute()
    images = root / "images"
    draw(images, options.images, options.seed)
    for old in root.glob("*.parquet"):
        old.unlink()
    for parts in root.glob("*.parquet.parts"):  # of a benchmark that was interrupted
        shutil.rmtree(parts)
    some = root / "some.txt"
    some.write_text("\n".join(str(images / f"{number:06d}.jpg") for number in range(options.scaling_images)), "utf-8")
    results: dict[str, Any] = {"seed": options.seed, "CPUs": os.cpu_count()}
    common = ["--model", str(options.model), "--save-every", "2"]
    for workers in options.workers:
        output = root / f"{workers}.parquet"
        watched = run([*common, "--input", str(some), "--workers", str(workers)], output)
        results[f"{options.scaling_images} images, workers: {workers}"] = {
            **figures(watched),
            **check(output, images, options.scaling_images),
        }
    everything = [*common, "--input", str(images)]
    output = root / "all.parquet"
    watched = run(everything, output)
    results[f"{options.images} images"] = {**figures(watched), **check(output, images, options.images)}
    (root / "memory.json").write_text(json.dumps({"seconds": watched.seconds, "bytes": watched.bytes}), "utf-8")

    output = root / "killed.parquet"
    killed = run(everything, output, kill_at=options.images // 2)
    gone = wait_for_the_end_of(killed.processes)
    before = rows_on_disk(output)
    resumed = run(everything, output)
    results["killed"] = {**figures(killed), "rows on disk": before, "seconds until all processes ended": gone}
    results["resumed"] = {**figures(resumed), **check(output, images, options.images)}
    same = (
        pq.read_table(root / "all.parquet").sort_by("path")["score"] == pq.read_table(output).sort_by("path")["score"]
    )
    results["resumed"]["scores as in one go"] = same
    text = json.dumps(results, indent=2)
    print(text)
    (root / "bulk_scoring.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
