# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of a benchmark's results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from anomalib_osdirf.benchmark.plan import Plan, Run

MAD = "mAD"
_IMAGE_METRICS = {"image_AUROC": "image AUROC", "image_AP": "image AP", "image_F1Max": "image F1max"}
_OF_MAD = {
    **_IMAGE_METRICS,
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "pixel_F1Max": "pixel F1max",
    "pixel_AUPRO": "AUPRO",
}
METRICS = {**_OF_MAD, MAD: MAD}
_COSTS = {  # heading and unit
    "fit_seconds": ("training, s", 1.0),
    "images_per_second_1": ("images/s, batch 1", 1.0),
    "images_per_second_32": ("images/s, batch 32", 1.0),
    "peak_bytes": ("peak memory, MB", 1e6),
    "checkpoint_bytes": ("checkpoint, MB", 1e6),
    "openvino_bytes": ("OpenVINO, MB", 1e6),
}


@dataclass
class Outcome:
    """The result of a report: its tables, and whether anything failed."""

    markdown: str
    failed: bool


def tabulate(plan: Plan, results: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Make one row for each category of each run, and one for each failed run.

    mAD is the plain mean of the three image metrics, the three pixel metrics and AUPRO, where all seven are there.
    """
    rows = []
    for run in plan.runs:
        result = results[run.digest]
        speed = speeds.get(run.label, {}).get("images_per_second", {}).get(run.entry.name, {})
        costs = {name: result.get(name) for name in _COSTS}
        costs |= {f"images_per_second_{size}": speed.get(size) for size in ("1", "32")}
        for category, metrics in result.get("metrics", {run.label: {}}).items():
            row = {"model": run.entry.name, "data": run.label, "category": category, "seed": run.seed}
            rows.append({**row, **metrics, **costs, "error": result.get("error")})
    columns = ["model", "data", "category", "seed", *METRICS, *_COSTS, "error"]
    table = pd.DataFrame(rows).reindex(columns=columns).astype(dict.fromkeys([*METRICS, *_COSTS], float))
    table[MAD] = table[list(_OF_MAD)].mean(axis=1, skipna=False)
    return table


def averages(table: pd.DataFrame, by: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Average each metric over categories and then over seeds.

    Returns:
        Mean, and standard deviation over seeds (NaN for one seed), with a row for each group of the columns ``by``.
    """
    over_seeds = table.groupby([*by, "seed"], sort=False)[list(METRICS)].mean().groupby(by, sort=False)
    return over_seeds.mean(), over_seeds.std()


def write(plan: Plan, results: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]) -> Outcome:
    """Write ``report.md`` and ``results.csv``."""
    table = tabulate(plan, results, speeds)
    problems = _problems(plan.runs, results, speeds)
    # Means over different categories can't be compared: a model with a failed run has none.
    by_category = table.sort_values(["data", "category"], kind="stable")
    failed = table.model[table.error.notna()].unique()
    complete = table.assign(**{name: table[name].where(~table.model.isin(failed)) for name in METRICS})
    parts = (
        f"# Benchmark of {len(plan.models)} models",
        _conditions(plan, results),
        "## Accuracy\n\n" + _accuracy(complete, ["model"]),
        "## Cost\n\n" + _costs(table),
        "## Categories\n\n" + _accuracy(by_category, ["data", "category", "model"]),
        _listing("Failed", problems),
        _listing("No OpenVINO export", _export_errors(plan.runs, results)),
    )
    markdown = "\n\n".join(part for part in parts if part)
    (plan.output / "report.md").write_text(markdown + "\n", encoding="utf-8")
    table.to_csv(plan.output / "results.csv", index=False)
    return Outcome(markdown, failed=bool(problems))


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


def _accuracy(table: pd.DataFrame, by: list[str]) -> str:
    mean, deviation = averages(table, by)
    metrics = [name for name in METRICS if table[name].notna().any()] or list(_IMAGE_METRICS)
    shown = by[-2:]  # the data's name is in the category's

    def cell(key: Any, metric: str) -> str:  # of pandas
        value, spread = mean.loc[key, metric], deviation.loc[key, metric]
        return "-" if pd.isna(value) else f"{value:.3f}" + ("" if pd.isna(spread) else f" ± {spread:.3f}")

    names = [[key] if isinstance(key, str) else list(key)[-len(shown) :] for key in mean.index]
    lines = [[*name, *(cell(key, one) for one in metrics)] for name, key in zip(names, mean.index, strict=True)]
    return _markdown([*shown, *(METRICS[one] for one in metrics)], lines)


def _costs(table: pd.DataFrame) -> str:
    """Tabulate what a run costs: the largest of memory, means of the others."""
    runs = table.drop_duplicates(["model", "data", "seed"]).groupby("model", sort=False)
    costs = runs[list(_COSTS)].mean().assign(peak_bytes=runs["peak_bytes"].max())
    names = [name for name in _COSTS if costs[name].notna().any()] or ["fit_seconds"]
    lines = [
        [str(model), *("-" if pd.isna(row[name]) else f"{row[name] / _COSTS[name][1]:.1f}" for name in names)]
        for model, row in costs.iterrows()
    ]
    return _markdown(["model", *(_COSTS[name][0] for name in names)], lines)


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
