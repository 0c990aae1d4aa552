# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Means and tables, on results made up in the test."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_osdirf.benchmark import report
from anomalib_osdirf.benchmark.entry import Entry
from anomalib_osdirf.benchmark.plan import Plan, Run

ALL = ("image_AUROC", "image_AP", "image_F1Max", "pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two models on two data sets with three seeds."""
    runs = [
        Run(Entry(name, "Padim"), {"class_path": "Folder"}, label, seed, {}, 64, "cpu", openvino=True)
        for label in ("tiles", "cells")
        for name in ("ours", "theirs")
        for seed in (0, 1, 2)
    ]
    return Plan(runs, tmp_path, rounds=20)


@pytest.fixture
def results(plan: Plan) -> dict[str, dict[str, Any]]:
    """All metrics on tiles, image metrics on cells."""
    rng = np.random.default_rng(0)
    return {
        run.digest: {
            "metrics": {run.label: {name: float(rng.random()) for name in (ALL if run.label == "tiles" else ALL[:3])}},
            "fit_seconds": 10.0 * (run.seed + 1),
            "peak_bytes": 1e6 * (run.seed + 1),
            "checkpoint_bytes": 2e6,
            "openvino_bytes": 3e6,
            "machine": {"device": "cpu (x)", "threads": 1, "torch": "2"},
        }
        for run in plan.runs
    }


SPEEDS: dict[str, dict[str, Any]] = {
    label: {"images_per_second": {"ours": {"1": 100.0, "32": 200.0}, "theirs": {"1": 50.0, "32": 60.0}}, "errors": {}}
    for label in ("tiles", "cells")
}


def _values(plan: Plan, results: dict[str, dict[str, Any]], model: str, metric: str) -> np.ndarray:
    """Seeds by data sets."""
    return np.array(
        [
            [
                results[run.digest]["metrics"][run.label][metric]
                for run in plan.runs
                if (run.entry.name, run.seed) == (model, seed) and metric in results[run.digest]["metrics"][run.label]
            ]
            for seed in plan.seeds
        ]
    )


def test_mad_is_the_plain_mean_of_seven_metrics(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    table = report.tabulate(plan, results, SPEEDS)
    tiles = table[table.data == "tiles"]
    assert tiles[report.MAD].to_numpy() == pytest.approx(tiles[list(ALL)].to_numpy().mean(axis=1))


@pytest.mark.parametrize("metric", ALL)
def test_figures_are_means_over_categories_and_deviations_over_seeds(
    metric: str, plan: Plan, results: dict[str, dict[str, Any]]
) -> None:
    mean, deviation = report.averages(report.tabulate(plan, results, SPEEDS), ["model"])
    per_seed = _values(plan, results, "theirs", metric).mean(axis=1)
    assert mean.loc["theirs", metric] == pytest.approx(per_seed.mean())
    assert deviation.loc["theirs", metric] == pytest.approx(per_seed.std(ddof=1))


def test_mad_counts_categories_with_masks_only(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    mean, _ = report.averages(report.tabulate(plan, results, SPEEDS), ["model"])
    expected = np.mean([_values(plan, results, "ours", name)[:, 0] for name in ALL])
    assert mean.loc["ours", report.MAD] == pytest.approx(expected)


def test_one_seed_has_no_deviation(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    plan.runs = [run for run in plan.runs if run.seed == 0]
    assert "±" not in report.write(plan, results, SPEEDS).markdown.split("## Accuracy")[1]


def test_report_and_csv_are_written(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    outcome = report.write(plan, results, SPEEDS)
    assert not outcome.failed
    assert (plan.output / "report.md").read_text("utf-8") == f"{outcome.markdown}\n"
    per_seed = _values(plan, results, "ours", "image_AUROC").mean(axis=1)
    accuracy, costs = (line for line in outcome.markdown.splitlines() if line.startswith("| ours |"))
    assert accuracy.split(" | ")[1] == f"{per_seed.mean():.3f} ± {per_seed.std(ddof=1):.3f}"
    assert costs == "| ours | 20.0 | 100.0 | 200.0 | 3.0 | 2.0 | 3.0 |"
    with (plan.output / "results.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(plan.runs)
    first = lines[0]
    assert float(first["pixel_AUPRO"]) == results[plan.runs[0].digest]["metrics"]["tiles"]["pixel_AUPRO"]
    assert [line["mAD"] == "" for line in lines] == [line["data"] == "cells" for line in lines]


def test_a_model_that_failed_somewhere_has_no_mean_and_the_others_have(
    plan: Plan, results: dict[str, dict[str, Any]]
) -> None:
    broken = next(run for run in plan.runs if run.entry.name == "theirs" and run.label == "cells")
    results[broken.digest] = {"error": "RuntimeError: no | luck"}
    outcome = report.write(plan, results, SPEEDS)
    assert outcome.failed
    assert "- theirs on cells, seed 0: RuntimeError: no | luck" in outcome.markdown
    accuracy = outcome.markdown.split("## Accuracy")[1].splitlines()[4:6]
    assert [set(line.split(" | ")[1:]) == {"-", "- |"} for line in accuracy] == [False, True]


def test_a_failed_speed_measurement_is_told(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    speeds = {
        "tiles": {"images_per_second": {}, "errors": {"ours": "MemoryError: too much"}},
        "cells": {"error": "died"},
    }
    outcome = report.write(plan, results, speeds)
    assert outcome.failed
    assert "- speed of ours on tiles: MemoryError: too much" in outcome.markdown
    assert "- speed on cells: died" in outcome.markdown
