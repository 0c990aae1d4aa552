# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for several categories beside a model for each, with the denoiser and without.

On folders laid out as train/good, test/<good or defect>, ground_truth/<defect> (masks are optional), and on the
embedded surfaces:

    python benchmarks/unified.py --root mtd elpv_mono --weights mobilenetv2_100.safetensors

All test images count, and no metric has a threshold.
`explained` is the share of the noise that the denoiser explains on held-out images. Rows are appended to unified.csv;
what is there is not measured again.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from mvtec_folder import mvtec_folder

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import MultiCategory, SyntheticSurfaces
from anomalib_osdirf.data.synthetic_surfaces import CATEGORIES

UNIFIED = "all"
KEYS = ("model", "denoiser", "seed", "category")
METRICS = ("image_AUROC", "image_AP", "image_F1Max", "pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")
COLUMNS = (*KEYS, "explained", *METRICS)


def datamodules(arguments: argparse.Namespace, names: list[str]) -> dict[str, AnomalibDataModule]:
    """Open the data sets of these names."""
    roots = {root.name: root for root in arguments.root}
    return {
        name: mvtec_folder(roots[name]) if name in roots else SyntheticSurfaces(category=name, num_workers=0)
        for name in names
    }


def measure(arguments: argparse.Namespace, names: list[str], denoiser: str, seed: int) -> list[dict[str, Any]]:
    """Train and test one model on these categories; return a row for each, and one for their mean."""
    model = OSDIRF(
        backbone=arguments.backbone,
        backbone_weights=arguments.weights,
        denoiser=denoiser,
        seed=seed,
        max_steps=arguments.max_steps,
        visualizer=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator=arguments.accelerator, devices=1, logger=False)
        data = MultiCategory(datamodules(arguments, names))
        engine.fit(model, datamodule=data)
        found = engine.test(model, datamodule=data)[0]
    key = {"model": UNIFIED if len(names) > 1 else "own", "denoiser": denoiser, "seed": seed}
    rows = []
    for category in [*names, "mean"] if len(names) > 1 else names:
        own = {name: f"{found[f'{category}/{name}']:.5g}" for name in METRICS if f"{category}/{name}" in found}
        rows.append({**key, "category": category, "explained": f"{model.explained_share:.4f}", **own})
    return rows


def main() -> None:
    """Measure what is missing, and print all rows as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="*", default=[], help="data sets besides the embedded ones")
    parser.add_argument("--category", nargs="*", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="local weights file of the backbone")
    parser.add_argument("--denoisers", nargs="+", default=["conv_mlp", "none"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-steps", type=int, help="of a training; the model's default unless given")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/unified.csv"))
    arguments = parser.parse_args()
    names = [*(root.name for root in arguments.root), *arguments.category]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if arguments.output.is_file():
        with arguments.output.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    for seed in arguments.seeds:
        for denoiser in arguments.denoisers:
            for members in [names, *([name] for name in names)]:
                key = ("own" if len(members) == 1 else UNIFIED, denoiser, str(seed), members[0])
                if any(tuple(str(row[name]) for name in KEYS) == key for row in rows):
                    continue
                rows += measure(arguments, members, denoiser, seed)
                with arguments.output.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.DictWriter(stream, COLUMNS, restval="")
                    writer.writeheader()
                    writer.writerows(rows)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(name, '')) for name in COLUMNS)} |")


if __name__ == "__main__":
    main()
