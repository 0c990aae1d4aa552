# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One table: OSDIRF with and without its denoiser beside anomalib's PatchCore and PaDiM, on all data sets.

    python benchmarks/evidence.py --data DATA --threads 1

DATA has the folders mtd, elpv_mono, aliens and paper/<kind>, laid out as train/good, test/<good or defect> and
ground_truth/<defect>, and backbones/mobilenetv2_100.safetensors. EfficientNet-Lite0's weights come with the extra
`weights`. The embedded surfaces are drawn. tables.py makes the tables of what is measured.

All models see images of 256 x 256, normalised as the backbone was trained. All test images count, and no metric has a
threshold. The fit's seconds include the validation that anomalib ends a fit with, all test images scored once; those of
PatchCore are fewer than anomalib's own would be, see quick_patchcore.py. The milliseconds are those of the warm torch
network on one pre-processed image at a time, the median of 40. On one thread they are CPU time, which other processes
lengthen less, as they do the CPU seconds of the fit; `load` is the machine's load average at the end. Each row is
appended to the CSV file when it has been measured, and is not measured again.
"""

import argparse
import csv
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mvtec_folder import folder_arguments

from anomalib_osdirf.benchmark import run
from anomalib_osdirf.benchmark.command import finish
from anomalib_osdirf.benchmark.entry import Entry, local_weights, model_class
from anomalib_osdirf.benchmark.plan import Plan, Run
from anomalib_osdirf.benchmark.report import METRICS
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES

HERE = Path(__file__).resolve().parent
SIZE = 256
FOLDERS = ("paper/BDP01", "paper/BRG01", "paper/BRG03", "paper/FLR01", "paper/FVN01", "paper/GLA01", "aliens")
LARGE = ("elpv_mono", "mtd")  # 10 % of whose patches are out of reach for PatchCore on a CPU
DATA_SETS = (*FOLDERS, *CATEGORIES, *LARGE)  # from small to large
PACKAGED = "tf_efficientnet_lite0"  # whose weights pip brings
BACKBONES = ("mobilenetv2_100", PACKAGED)
NO_DENOISER = {"denoiser": "none"}
STRIDES_8_16, STRIDES_4_8_16 = ["blocks.2", "blocks.4"], ["blocks.1", "blocks.2", "blocks.4"]  # of both backbones
METHODS: dict[str, Callable[[str], Entry]] = {  # by data set
    "OSDIRF": lambda _: Entry("OSDIRF", "OSDIRF"),
    "OSDIRF-none": lambda _: Entry("OSDIRF, no denoiser", "OSDIRF", NO_DENOISER),
    "strides-8": lambda _: Entry("OSDIRF, strides 8 and 16", "OSDIRF", {"layers": STRIDES_8_16}),
    "strides-8-none": lambda _: Entry(
        "no denoiser, strides 8 and 16", "OSDIRF", {**NO_DENOISER, "layers": STRIDES_8_16}
    ),
    "strides-2-none": lambda _: Entry(
        "no denoiser, strides 2 to 16", "OSDIRF", {**NO_DENOISER, "layers": ["blocks.0", *STRIDES_4_8_16]}
    ),
    "PatchCore": lambda data: Entry(
        f"PatchCore {1 if data in LARGE else 10} %",
        "quick_patchcore.QuickPatchcore",
        {"layers": STRIDES_8_16, "coreset_sampling_ratio": 0.01 if data in LARGE else 0.1},
    ),
    "PaDiM": lambda _: Entry("PaDiM", "Padim", {"layers": STRIDES_4_8_16, "n_features": 100}),
}
ONE_SEED = ("strides-8-none", "strides-2-none", "PatchCore", "PaDiM")
KEYS = ("data", "backbone", "method", "seed")
ACCURACY = [name for name in METRICS if name != "mAD"]
COSTS = ("fit_seconds", "fit_cpu_seconds", "ms_per_image", "peak_mb", "checkpoint_mb")
COLUMNS = (*KEYS, *ACCURACY, *COSTS, "explained", "threads", "load", "version")
WARM_UP, TIMED = 5, 40


def planned(data: str, backbone: str, method: str, seed: int, options: argparse.Namespace) -> Run:
    """Describe the measurement of a row."""
    entry = METHODS[method](data)
    surface = {"root": str(options.work / "surfaces"), "category": data}
    specification = (
        {"class_path": "SyntheticSurfaces", "init_args": surface}
        if data in CATEGORIES
        else {"class_path": "Folder", "init_args": folder_arguments(options.data / data)}
    )
    file = (options.weights or options.data / "backbones") / f"{backbone}.safetensors"
    return Run(
        entry=Entry(entry.name, entry.class_path, {**entry.init_args, "backbone": backbone}),
        data=specification,
        label=data,
        seed=seed,
        backbone_weights={} if backbone == PACKAGED else {backbone: str(file)},
        image_size=SIZE,
        accelerator="cpu",
        openvino=False,
    )


def measure(one: Run, work: Path) -> dict[str, Any]:
    """Train and test in a process of its own, time the model that comes of it, and return the row.

    Raises:
        RuntimeError: If the training or the test fails.
    """
    result = finish(one, Plan([one], work))
    folder = one.folder(work)
    if "error" in result:
        msg = f"{result['error']}; see {folder}"
        raise RuntimeError(msg)
    with local_weights(one.backbone_weights):
        model = model_class(one.entry).load_from_checkpoint(folder / run.CHECKPOINT, map_location="cpu").eval()
    images, seconds = model.pre_processor(torch.rand(1, 3, SIZE, SIZE)), []
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        for _ in range(WARM_UP + TIMED):
            start = clock()
            model.model(images)
            seconds.append(clock() - start)
    explained = getattr(model, "explained_share", None)  # share of the held-out loss, where the model knows one
    row = {
        **result["metrics"][one.label],
        **{name: result[name] for name in ("fit_seconds", "fit_cpu_seconds")},
        "ms_per_image": 1000 * statistics.median(seconds[WARM_UP:]),
        "peak_mb": result["peak_bytes"] / 1e6,
        "checkpoint_mb": result["checkpoint_bytes"] / 1e6,
        **({} if explained is None else {"explained": float(explained)}),
    }
    shutil.rmtree(folder)
    row = {name: f"{value:.5g}" for name, value in row.items() if name in COLUMNS}
    load = f"{os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else ""
    return {**row, "threads": torch.get_num_threads(), "load": load, "version": revision()}


def revision() -> str:
    """Return the package's version and the commit it is of."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{version('anomalib-osdirf')} {commit}".strip()


def read(file: Path) -> list[dict[str, str]]:
    """Return the rows that there are."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(file: Path, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Write a row in one piece, so that several processes may share the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--weights", type=Path, help="folder of the backbones' weights; DATA/backbones by default")
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=DATA_SETS, metavar="NAME")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="peers and other layers: the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "evidence.csv")
    parser.add_argument("--work", type=Path, default=Path("results/evidence"), help="for what a run leaves behind")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or a run would go on without its parent
    # For the processes to come.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    torch.set_num_threads(options.threads)
    wanted = itertools.product(options.backbones, options.data_sets, options.methods, options.seeds)
    for backbone, data, method, seed in wanted:
        key = dict(zip(KEYS, (data, backbone, METHODS[method](data).name, str(seed)), strict=True))
        done = any(row.items() >= key.items() for row in read(options.results))
        if done or (method in ONE_SEED and seed != options.seeds[0]):
            continue
        print(time.strftime("%H:%M:%S"), *key.values(), flush=True)
        try:
            append(options.results, {**key, **measure(planned(data, backbone, method, seed, options), options.work)})
        except RuntimeError as error:  # the others are measured all the same
            print(error, flush=True)


if __name__ == "__main__":
    main()
