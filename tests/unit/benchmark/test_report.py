# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Means, tables and the plot, on results made up in the test."""

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
    return Plan(runs, tmp_path, rounds=20, not_run={"Heavy": "too heavy"})


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


def test_mad_is_the_plain_mean_of_seven_metrics() -> None:
    metrics = {name: index / 10 for index, name in enumerate(ALL)}
    assert report.mean_anomaly_detection({**metrics, "image_F1Score": 9.0}) == pytest.approx(0.3)
    assert report.mean_anomaly_detection(dict.fromkeys(ALL[:-1], 1.0)) is None


@pytest.mark.parametrize("metric", ALL)
def test_figures_are_means_over_categories_and_deviations_over_seeds(
    metric: str, plan: Plan, results: dict[str, dict[str, Any]]
) -> None:
    figure = report.figures(plan, report.rows(plan, results, SPEEDS))["theirs"][metric]
    per_seed = _values(plan, results, "theirs", metric).mean(axis=1)
    assert figure.mean == pytest.approx(per_seed.mean())
    assert figure.deviation == pytest.approx(per_seed.std(ddof=1))


def test_mad_counts_categories_with_masks_only(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    figure = report.figures(plan, report.rows(plan, results, SPEEDS))["ours"][report.MAD]
    expected = np.mean([_values(plan, results, "ours", name)[:, 0] for name in ALL])
    assert figure.mean == pytest.approx(expected)


def test_one_seed_has_no_deviation() -> None:
    assert report.average([{"a": 0.5, "b": 1.0}]) == report.Figure(0.75)
    assert str(report.Figure(0.75)) == "0.750"
    assert report.average([{}]) is None


def test_report_csv_and_plot_are_written(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    outcome = report.write(plan, results, SPEEDS)
    assert not outcome.failed
    for name in ("report.md", "results.csv", "accuracy_speed.png", "accuracy_speed.svg"):
        assert name in outcome.files
        assert (plan.output / name).stat().st_size > 0
    figure = report.figures(plan, report.rows(plan, results, SPEEDS))["ours"]["image_AUROC"]
    accuracy, costs = (line for line in outcome.markdown.splitlines() if line.startswith("| ours |"))
    assert accuracy.split(" | ")[1] == str(figure)
    assert costs == "| ours | 20.0 | 100.0 | 200.0 | 3.0 | 2.0 | 3.0 |"
    assert "- Heavy: too heavy" in outcome.markdown
    drawn = (plan.output / "accuracy_speed.svg").read_text(encoding="utf-8")
    assert "images per second" in drawn
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
    accuracy = next(line for line in outcome.markdown.splitlines() if line.startswith("| theirs |"))
    assert set(accuracy.split(" | ")[1:]) == {"-", "- |"}
    assert report.figures(plan, report.rows(plan, results, SPEEDS))["ours"]["image_AUROC"].mean > 0


def test_a_failed_speed_measurement_is_told(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    speeds = {
        "tiles": {"images_per_second": {}, "errors": {"ours": "MemoryError: too much"}},
        "cells": {"error": "died"},
    }
    outcome = report.write(plan, results, speeds)
    assert outcome.failed
    assert "- speed of ours on tiles: MemoryError: too much" in outcome.markdown
    assert "- speed on cells: died" in outcome.markdown
    assert "accuracy_speed.png" not in outcome.files
