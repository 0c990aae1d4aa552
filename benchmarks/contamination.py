# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What defective images among the training images cost, and what `expected_contamination` gets back.

    python benchmarks/contamination.py --data DATA

DATA is that of evidence.py, as are backbone, image size and what a row says. Defective test images, drawn by the seed,
move into the training images until they are the given share of them; they are no test images any more. *left out* is
OSDIRF that is told the share, or 0.05 where there are none. PatchCore keeps 1 % of its patches. Rows that the CSV file
has are not measured again.
"""

import argparse
import os
import random
import shutil
import time
from pathlib import Path

import torch
from evidence import (
    BACKBONES,
    CATEGORIES,
    FOLDERS,
    HERE,
    LARGE,
    NO_DENOISER,
    SIZE,
    STRIDES_4_8_16,
    STRIDES_8_16,
    append,
    read,
    revision,
)
from mvtec_folder import folder_arguments

from anomalib_osdirf.benchmark.command import finish
from anomalib_osdirf.benchmark.entry import Entry
from anomalib_osdirf.benchmark.plan import Plan, Run
from anomalib_osdirf.data import SyntheticSurfaces

BACKBONE = BACKBONES[0]
METHODS = {
    "no denoiser": ("OSDIRF", NO_DENOISER),
    "no denoiser, left out": ("OSDIRF", NO_DENOISER),
    "OSDIRF": ("OSDIRF", {}),
    "OSDIRF, left out": ("OSDIRF", {}),
    "PatchCore": ("quick_patchcore.QuickPatchcore", {"layers": STRIDES_8_16, "coreset_sampling_ratio": 0.01}),
    "PaDiM": ("Padim", {"layers": STRIDES_4_8_16, "n_features": 100}),
}
FIGURES = ("image_AUROC", "pixel_AUPRO")
COLUMNS = ("data", "method", "share", "seed", *FIGURES, "version")


def contaminated(source: Path, target: Path, share: float, seed: int) -> Path:
    """Copy a data set, with defective test images moved into the training images."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    defective = sorted(path for path in (target / "test").glob("*/*") if path.parent.name != "good")
    masks = sorted((target / "ground_truth").glob("*/*"))
    normal = len(list((target / "train" / "good").iterdir()))
    for index in random.Random(seed).sample(range(len(defective)), round(share * normal / (1 - share))):
        path = defective[index]
        path.rename(target / "train" / "good" / f"{path.parent.name}_{path.name}")
        if masks:
            masks[index].unlink()
    for kind in {path.parent for path in (*defective, *masks)}:
        if not any(kind.iterdir()):
            kind.rmdir()
    return target


def measure(
    source: Path, label: str, method: str, share: float, seed: int, options: argparse.Namespace
) -> dict[str, str]:
    """Train and test, and return the figures.

    Raises:
        RuntimeError: If the training or the test fails.
    """
    class_path, arguments = METHODS[method]
    told = {"expected_contamination": share or 0.05} if method.endswith("left out") else {}
    folder = contaminated(source, options.work / "contaminated", share, seed)
    one = Run(
        entry=Entry(method, class_path, {**arguments, **told, "backbone": BACKBONE}),
        data={"class_path": "Folder", "init_args": folder_arguments(folder)},
        label=label,
        seed=seed,
        backbone_weights={BACKBONE: str(options.data / "backbones" / f"{BACKBONE}.safetensors")},
        image_size=SIZE,
        accelerator="cpu",
        openvino=False,
    )
    result = finish(one, Plan([one], options.work))
    left = one.folder(options.work)
    if "error" in result:
        raise RuntimeError(f"{result['error']}; see {left}")
    shutil.rmtree(left)
    metrics = result["metrics"][label]
    return {name: f"{metrics[name]:.5g}" for name in FIGURES if name in metrics}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data-sets", nargs="+", choices=(*FOLDERS, *CATEGORIES, *LARGE), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "contamination.csv")
    parser.add_argument("--work", type=Path, default=Path("results/contamination"), help="for what a run leaves behind")
    parser.set_defaults(data_sets=["aliens", "paper/BRG01", "paper/FVN01", "loose_parts", "weave"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    torch.set_num_threads(1)
    for data in options.data_sets:
        source = options.data / data
        if data in CATEGORIES:
            surface = SyntheticSurfaces(options.work / "surfaces", data)
            surface.prepare_data()
            source = surface.directory
        for seed in options.seeds:
            for share in options.shares:
                for method in options.methods:
                    key = {"data": data, "method": method, "share": f"{share:g}", "seed": str(seed)}
                    if any(row.items() >= key.items() for row in read(options.results)):
                        continue
                    print(time.strftime("%H:%M:%S"), *key.values(), flush=True)
                    try:
                        row = measure(source, data, method, share, seed, options)
                    except RuntimeError as error:  # the others are measured all the same
                        print(error, flush=True)
                    else:
                        append(options.results, {**key, **row, "version": revision()}, COLUMNS)


if __name__ == "__main__":
    main()
