# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of a benchmark's results."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from anomalib_osdirf.benchmark.plan import Plan, Run

IMAGE_METRICS = {"image_AUROC": "image AUROC", "image_AP": "image AP", "image_F1Max": "image F1max"}
PIXEL_METRICS = {
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "pixel_F1Max": "pixel F1max",
    "pixel_AUPRO": "AUPRO",
}
MAD = "mAD"
METRICS = {**IMAGE_METRICS, **PIXEL_METRICS, MAD: MAD}
_COSTS = (
    "fit_seconds",
    "images_per_second_1",
    "images_per_second_32",
    "peak_bytes",
    "checkpoint_bytes",
    "openvino_bytes",
)
_MARKERS = "osD^vP*X<>hd"


@dataclass
class Outcome:
    """The result of a report: its tables, the names of its files, and whether anything failed."""

    markdown: str
    files: list[str]
    failed: bool


@dataclass(frozen=True)
class Figure:
    """Mean over seeds of a mean over categories, and its standard deviation; ``None`` for one seed."""

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


def mean_anomaly_detection(metrics: Mapping[str, float]) -> float | None:
    """Compute mAD: the plain mean of the three image metrics, the three pixel metrics and AUPRO.

    It is ``None`` unless all seven are there.

    Example:
        >>> mean_anomaly_detection({"image_AUROC": 1.0}) is None
        True
    """
    names = (*IMAGE_METRICS, *PIXEL_METRICS)
    if not all(name in metrics for name in names):
        return None
    return statistics.fmean(metrics[name] for name in names)


def average(values: Iterable[Mapping[str, float]]) -> Figure | None:
    """Average each seed's metric by category, over categories and then over seeds; ``None`` without values."""
    means = [statistics.fmean(by_category.values()) for by_category in values if by_category]
    if not means:
        return None
    return Figure(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None)


def rows(
    plan: Plan, results: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make one row for each category of each run, and one for each failed run."""
    table = []
    for run in plan.runs:
        result = results[run.digest]
        speed = speeds.get(run.label, {}).get("images_per_second", {}).get(run.entry.name, {})
        row = {
            "model": run.entry.name,
            "data": run.label,
            "category": run.label,
            "seed": run.seed,
            **{name: result.get(name) for name in _COSTS},
            "images_per_second_1": speed.get("1"),
            "images_per_second_32": speed.get("32"),
            "error": result.get("error"),
        }
        for category, metrics in result.get("metrics", {run.label: {}}).items():
            known = {name: metrics[name] for name in METRICS if name in metrics}
            total = mean_anomaly_detection(metrics)
            table.append({**row, "category": category, **known, **({} if total is None else {MAD: total})})
    return table


def figures(plan: Plan, table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """Average each metric of each model over categories and seeds.

    A model with a failed run has no figures: means over different categories can't be compared.
    """
    result: dict[str, dict[str, Figure]] = {}
    for model in plan.models:
        own = [row for row in table if row["model"] == model]
        result[model] = {}
        if any(row["error"] for row in own):
            continue
        for metric in METRICS:
            seeds = [
                {(row["data"], row["category"]): row[metric] for row in own if row["seed"] == seed and metric in row}
                for seed in plan.seeds
            ]
            figure = average(seeds)  # type: ignore[arg-type]
            if figure is not None:
                result[model][metric] = figure
    return result


def write(plan: Plan, results: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]) -> Outcome:
    """Write ``report.md``, ``results.csv`` and, where speed was measured, the plot."""
    table = rows(plan, results, speeds)
    accuracy = figures(plan, table)
    costs = {model: _costs([row for row in table if row["model"] == model]) for model in plan.models}
    problems = _problems(plan.runs, results, speeds)
    markdown = "\n\n".join(
        part
        for part in (
            f"# Benchmark of {len(plan.models)} models",
            _conditions(plan, results),
            "## Accuracy\n\n" + _accuracy_table(accuracy, plan),
            "## Cost\n\n" + _cost_table(costs),
            "## Categories\n\n" + _category_table(plan, table),
            _listing("Not run", plan.not_run),
            _listing("Failed", problems),
            _listing("No OpenVINO export", _export_errors(plan.runs, results)),
        )
        if part
    )
    (plan.output / "report.md").write_text(markdown + "\n", encoding="utf-8")
    _write_csv(plan.output / "results.csv", table)
    files = ["report.md", "results.csv"]
    if any(costs[model]["images_per_second_1"] and accuracy[model] for model in plan.models):
        files += plot(plan.output, accuracy, costs)
    return Outcome(markdown, files, failed=bool(problems))


def _costs(own: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Average what a run costs over runs, and take the largest of memory."""
    runs = {(row["data"], row["seed"]): row for row in own}.values()
    result: dict[str, float | None] = {}
    for name in _COSTS:
        values = [row[name] for row in runs if row[name] is not None]
        combine = max if name == "peak_bytes" else statistics.fmean
        result[name] = combine(values) if values else None
    return result


def _conditions(plan: Plan, results: Mapping[str, dict[str, Any]]) -> str:
    machines = [result["machine"] for result in results.values() if "machine" in result]
    where = "; ".join(
        dict.fromkeys(f"{one['device']}, {one['threads']} threads, torch {one['torch']}" for one in machines)
    )
    speed = f" Speeds are medians of {plan.rounds} rounds, models taking turns, torch forward." if plan.rounds else ""
    seeds = ", ".join(map(str, plan.seeds))
    return (
        f"Data: {', '.join(plan.labels)}. Seeds: {seeds}. Measured on: {where or 'nothing finished'}.\n\n"
        "All test images count, no metric has a threshold. Figures are means over categories, ± is the standard "
        f"deviation over seeds; {MAD} is the mean of the other seven columns, over categories with masks. Training "
        "time includes the validation at its end; peak memory is that of the run's own process, or of the GPU where "
        f"one was used.{speed}"
    )


def _accuracy_table(accuracy: Mapping[str, Mapping[str, Figure]], plan: Plan) -> str:
    present = {metric for figures_of_model in accuracy.values() for metric in figures_of_model}
    metrics = [metric for metric in METRICS if metric in (present or IMAGE_METRICS)]
    lines = [[model, *(str(accuracy[model].get(metric, "-")) for metric in metrics)] for model in plan.models]
    return _markdown(["model", *(METRICS[metric] for metric in metrics)], lines)


def _cost_table(costs: Mapping[str, Mapping[str, float | None]]) -> str:
    header = {
        "fit_seconds": ("training, s", 1.0),
        "images_per_second_1": ("images/s, batch 1", 1.0),
        "images_per_second_32": ("images/s, batch 32", 1.0),
        "peak_bytes": ("peak memory, MB", 1e6),
        "checkpoint_bytes": ("checkpoint, MB", 1e6),
        "openvino_bytes": ("OpenVINO, MB", 1e6),
    }
    names = [name for name in header if any(cost[name] is not None for cost in costs.values())] or ["fit_seconds"]

    def cell(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.1f}"

    lines = [[model, *(cell(cost[name], header[name][1]) for name in names)] for model, cost in costs.items()]
    return _markdown(["model", *(header[name][0] for name in names)], lines)


def _category_table(plan: Plan, table: Sequence[Mapping[str, Any]]) -> str:
    present = {name for row in table for name in row}
    metrics = [metric for metric in METRICS if metric in (present & METRICS.keys() or IMAGE_METRICS)]
    lines = []
    for data, category in dict.fromkeys((row["data"], row["category"]) for row in table):
        for model in plan.models:
            own = [row for row in table if (row["data"], row["category"], row["model"]) == (data, category, model)]
            cells = [average({category: row[metric]} for row in own if metric in row) for metric in metrics]
            if own:
                lines.append([category, model, *("-" if cell is None else str(cell) for cell in cells)])
    return _markdown(["category", "model", *(METRICS[metric] for metric in metrics)], lines)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells)


def _listing(title: str, reasons: Mapping[str, str]) -> str:
    lines = [f"- {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join([f"## {title}\n", *lines]) if lines else ""


def _problems(
    runs: Iterable[Run], results: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]
) -> dict[str, str]:
    """List what failed: runs and speed measurements."""
    found = {
        f"{run.entry.name} on {run.label}, seed {run.seed}": str(results[run.digest]["error"])
        for run in runs
        if "error" in results[run.digest]
    }
    for label, speed in speeds.items():
        if speed.get("error"):
            found[f"speed on {label}"] = str(speed["error"])
        found |= {f"speed of {name} on {label}": reason for name, reason in speed.get("errors", {}).items()}
    return found


def _export_errors(runs: Iterable[Run], results: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    return {
        run.entry.name: str(results[run.digest]["openvino_error"])
        for run in runs
        if "openvino_error" in results[run.digest]
    }


def _write_csv(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    names = ["model", "data", "category", "seed", *METRICS, *_COSTS, "error"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows(table)


def plot(
    output: Path,
    accuracy: Mapping[str, Mapping[str, Figure]],
    costs: Mapping[str, Mapping[str, float | None]],
) -> list[str]:
    """Draw accuracy against speed, models told apart by marker, and return the names of the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    metrics = [metric for metric in ("image_AUROC", MAD) if any(metric in one for one in accuracy.values())]
    figure = Canvas(figsize=(5.2 * len(metrics), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for (model, figures_of_model), marker in zip(accuracy.items(), cycle(_MARKERS), strict=False):
            speed, value = costs[model]["images_per_second_1"], figures_of_model.get(metric)
            if speed is None or value is None:
                continue
            deviation = value.deviation or 0.0
            bar = [[deviation], [min(deviation, 1 - value.mean)]]
            style: dict[str, Any] = {
                "marker": marker,
                "linestyle": "none",
                "color": "black",
                "mfc": "white",
                "capsize": 3,
            }
            axis.errorbar(speed, value.mean, yerr=bar, elinewidth=0.8, label=model, **style)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(0.3, 0.2)
        axis.set_xlabel("speed at batch size 1, images per second")
        axis.set_ylabel(f"{METRICS[metric]} (1 is perfect)")
        axis.grid(visible=True, color="0.85", linewidth=0.6)
        axis.legend(fontsize=8)
    names = ["accuracy_speed.png", "accuracy_speed.svg"]
    for name in names:
        figure.savefig(output / name, dpi=150)
    return names
