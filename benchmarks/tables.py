# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README, model card and docs/measurements.md from what evidence.py and contamination.py measured.

    python benchmarks/tables.py

A table stands between the comments `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Figures are means over seeds, in the
last page with the standard deviation; the kinds of paper are one row where a method has all of them.
"""

import csv
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.csv"
CONTAMINATION = ROOT / "benchmarks" / "results" / "contamination.csv"
README = ROOT / "README.md"
CARD = ROOT / "src" / "anomalib_osdirf" / "models" / "osdirf" / "README.md"
MEASUREMENTS = ROOT / "docs" / "measurements.md"
BACKBONES = {"mobilenetv2_100": "MobileNetV2", "tf_efficientnet_lite0": "EfficientNet-Lite0"}
KINDS_OF_PAPER = 6
DATA_SETS = {
    "mtd": "magnetic tiles (mtd)",
    "elpv_mono": "solar cells (elpv_mono)",
    "aliens": "toys in changing poses (aliens)",
    "paper": "paper, six kinds",
    "loose_parts": "loose_parts",
    "weave": "weave",
    "brushed_metal": "brushed_metal",
    "printed_parts": "printed_parts",
}
METHODS = {"OSDIRF": "OSDIRF", "OSDIRF, no denoiser": "no denoiser", "PatchCore": "PatchCore", "PaDiM": "PaDiM"}
OTHER_LAYERS = ("OSDIRF, strides 8 and 16", "no denoiser, strides 8 and 16", "no denoiser, strides 2 to 16")
ALL_METHODS = METHODS | {name: name for name in OTHER_LAYERS}
CONTAMINATED = ("no denoiser", "no denoiser, left out", "OSDIRF", "OSDIRF, left out", "PatchCore", "PaDiM")
FIGURES = {"image_AUROC": "image AUROC", "pixel_AUPRO": "AUPRO", "pixel_AP": "pixel AP", "explained": "explained"}
ALL_FIGURES = {
    "image_AUROC": "image AUROC",
    "image_AP": "AP",
    "image_F1Max": "F1max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "AP",
    "pixel_F1Max": "F1max",
    "pixel_AUPRO": "AUPRO",
    "fit_cpu_seconds": "fit, CPU s",
    "ms_per_image": "CPU ms an image",
}

Key = tuple[str, str, str]  # backbone, data set, method


def figures(figure: str) -> dict[Key, list[float]]:
    """Return a figure of each seed, by backbone, data set and method. Paper has its kinds and their mean."""
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row[figure]]
    seeds: dict[Key, dict[str, list[float]]] = {}
    for row in rows:
        method = re.sub(r" \d+ %$", "", row["method"])  # PatchCore's share of patches
        for data in {row["data"], row["data"].partition("/")[0]}:
            seeds.setdefault((row["backbone"], data, method), {}).setdefault(row["seed"], []).append(float(row[figure]))
    found = {}
    for key, values in seeds.items():
        size = KINDS_OF_PAPER if key[1] == "paper" else 1
        if whole := [statistics.fmean(one) for one in values.values() if len(one) == size]:
            found[key] = whole
    return found


def comparison() -> str:
    """Tabulate the image AUROC where all methods have one."""
    found, backbone = figures("image_AUROC"), "mobilenetv2_100"
    lines = [f"| image AUROC | {' | '.join(METHODS.values())} |", "|---" * (1 + len(METHODS)) + "|"]
    shown = [data for data in DATA_SETS if all((backbone, data, method) in found for method in METHODS)]
    for data in shown:
        cells = (f"{statistics.fmean(found[backbone, data, method]):.3f}" for method in METHODS)
        lines.append(f"| {DATA_SETS[data]} | {' | '.join(cells)} |")
    means = (statistics.fmean(statistics.fmean(found[backbone, data, method]) for data in shown) for method in METHODS)
    lines.append(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def evidence() -> str:
    """Tabulate everything of each backbone, data set and method."""
    found = {figure: figures(figure) for figure in FIGURES}
    lines = [f"| data set | method | seeds | {' | '.join(FIGURES.values())} |", "|---" * (3 + len(FIGURES)) + "|"]
    for backbone, name in BACKBONES.items():
        for data, described in DATA_SETS.items():
            for method, label in METHODS.items():
                key = (backbone, data, method)
                if key in found["image_AUROC"]:
                    cells = (f"{statistics.fmean(found[one][key]):.3f}" if key in found[one] else "" for one in FIGURES)
                    seeds = len(found["image_AUROC"][key])
                    lines.append(f"| {described}, {name} | {label} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measurements() -> str:
    """Tabulate every figure that was measured."""
    found = {figure: figures(figure) for figure in ALL_FIGURES}
    lines = [f"| data set | backbone | method | {' | '.join(ALL_FIGURES.values())} |"]
    lines.append("|---" * (3 + len(ALL_FIGURES)) + "|")
    keys = sorted(found["image_AUROC"], key=lambda key: (key[1], key[0], list(ALL_METHODS).index(key[2])))
    for key in keys:
        backbone, data, method = key
        cells = (cell(found[figure].get(key, []), digits(figure)) for figure in ALL_FIGURES)
        lines.append(f"| {data} | {BACKBONES[backbone]} | {ALL_METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def contamination() -> str:
    """Tabulate image AUROC and AUPRO by data set and share of defective training images."""
    with CONTAMINATION.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    methods = [name for name in CONTAMINATED if any(row["method"] == name for row in rows)]
    found = {(row["data"], float(row["share"]), row["method"]): row for row in rows}
    lines = [f"| data set | defective | {' | '.join(methods)} |", "|---" * (2 + len(methods)) + "|"]
    for data, share in sorted({key[:2] for key in found}):
        cells = []
        for method in methods:
            row = found.get((data, share, method), {})
            figures = [row[name] for name in ("image_AUROC", "pixel_AUPRO") if row.get(name)]
            cells.append(" / ".join(f"{float(figure):.3f}" for figure in figures))
        lines.append(f"| {data} | {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def digits(figure: str) -> int:
    """Return how many digits a figure is written with."""
    return {"fit_cpu_seconds": 0, "ms_per_image": 1}.get(figure, 3)


def cell(values: list[float], places: int) -> str:
    """Write the mean over seeds, and their standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{deviation}" if values else ""


def tables() -> dict[str, tuple[Path, str]]:
    """Return page and text of each table."""
    return {
        "comparison": (README, comparison()),
        "evidence": (CARD, evidence()),
        "measurements": (MEASUREMENTS, measurements()),
        "contamination": (MEASUREMENTS, contamination()),
    }


def filled(page: str, name: str, text: str) -> str:
    """Put a table into a page."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for name, (file, text) in tables().items():
        file.write_text(filled(file.read_text(encoding="utf-8"), name, text), encoding="utf-8")
