# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Whole benchmarks, small: runs, resuming, failures, and anomalib's own benchmark on the same file."""

import copy
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.components.runners import SerialRunner

from anomalib_osdirf.__main__ import main
from anomalib_osdirf.benchmark import command, run
from anomalib_osdirf.benchmark.plan import BUILD_ENTRY

OURS: dict[str, Any] = {
    "name": "ours",
    "class_path": "OSDIRF",
    "init_args": {
        "backbone": "test_efficientnet",
        "pre_trained": False,
        "feature_dim": 8,
        "grid_size": 4,
        "max_steps": 2,
    },
}
PEER: dict[str, Any] = {
    "name": "peer",
    "class_path": "Padim",
    "init_args": {"backbone": "test_efficientnet", "layers": ["blocks.1"], "n_features": 8, "pre_trained": False},
}


def _config(root: Path, entries: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    folder = {
        "name": "parts",
        "root": str(root),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/dent",
        "mask_dir": "masks",
        "num_workers": 0,
    }
    model = {
        "class_path": BUILD_ENTRY,
        "init_args": {"image_size": 64, "entry": {"grid": [[entry] for entry in entries]}},
    }
    return {
        "accelerator": "cpu",
        "benchmark": {"seed": 0, "model": model, "data": {"class_path": "Folder", "init_args": folder}},
        "report": {"output": str(output), "rounds": 1, "openvino": False},
    }


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., int]:
    """Return a runner of our subcommand."""

    def start(config: dict[str, Any], *options: str) -> int:
        file = tmp_path / "benchmark.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return main(["benchmark", "--config", str(file), *options])

    return start


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do jobs in this process, since starting one takes long, and list them."""
    done: list[str] = []

    def perform(module: str, folder: Path, job: dict[str, Any], *_: object) -> dict[str, Any]:
        run.write_json(folder / run.JOB, job)
        done.append(job["entry"]["name"] if "entry" in job else "speed")
        import_module(module).main(folder)
        result: dict[str, Any] = json.loads((folder / run.RESULT).read_text(encoding="utf-8"))
        return result

    monkeypatch.setattr(command, "_in_a_process", perform)
    return done


def test_a_run_in_a_process_of_its_own(
    parts: Path, tmp_path: Path, benchmark: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    config = _config(parts, [PEER], output)
    config["report"]["rounds"] = 0
    assert benchmark(config) == 0
    result = json.loads(next(output.rglob("runs/**/result.json")).read_text(encoding="utf-8"))
    assert 0.5 <= result["metrics"]["parts"]["image_AUROC"] <= 1
    assert {"pixel_AUPRO", "image_AP", "pixel_F1Max"} < set(result["metrics"]["parts"])
    assert result["peak_bytes"] > 1e8
    assert result["checkpoint_bytes"] > 1e4
    assert not list(output.rglob("work"))
    assert not (output / "speed").exists()
    assert (output / "report.md").is_file()
    assert "peer" in capfd.readouterr().out


def test_one_failure_neither_stops_the_others_nor_goes_unnoticed_and_the_rest_is_not_done_again(
    parts: Path,
    tmp_path: Path,
    benchmark: Callable[..., int],
    in_this_process: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = {**OURS, "name": "broken", "init_args": {**OURS["init_args"], "grid_size": 64}}
    config = _config(parts, [broken, OURS, PEER], tmp_path / "results")
    assert benchmark(config) == 1
    assert in_this_process == ["broken", "ours", "peer", "speed"]
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\[\d/", line)]
    assert lines == [
        "[1/4] broken on parts, seed 0",
        "[2/4] ours on parts, seed 0",
        "[3/4] peer on parts, seed 0",
        "[4/4] Speed on parts",
    ]
    report = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert "- broken on parts, seed 0: ValueError: grid_size=64" in report
    assert "| ours | 0." in report or "| ours | 1." in report
    speed = json.loads(next(tmp_path.rglob("speed/**/result.json")).read_text(encoding="utf-8"))
    assert {name: set(rates) for name, rates in speed["images_per_second"].items()} == {
        "ours": {"1", "32"},
        "peer": {"1", "32"},
    }
    assert min(rate for rates in speed["images_per_second"].values() for rate in rates.values()) > 0
    in_this_process.clear()
    capsys.readouterr()
    assert benchmark(config) == 1
    assert in_this_process == ["broken"]
    # Without the broken one, nothing is left to do, and nothing has failed.
    in_this_process.clear()
    assert benchmark(_config(parts, [OURS, PEER], tmp_path / "results")) == 0
    assert in_this_process == []


def test_a_process_that_dies_leaves_an_error(tmp_path: Path) -> None:
    result = command._in_a_process("no_such_module", tmp_path / "run", {"seed": 0})
    assert "the process ended with status 1 and no result" in result["error"]
    assert json.loads((tmp_path / "run" / run.RESULT).read_text(encoding="utf-8")) == result
    assert "no_such_module" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_a_result_is_written_in_whole_or_not_at_all(tmp_path: Path) -> None:
    run.write_json(tmp_path / "result.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(tmp_path / "result.json", {"a": object()})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"a": 1}


def test_many_categories_in_one_model_are_reported_one_by_one(parts: Path, tmp_path: Path) -> None:
    """And all test images count, although Folder sets half of them aside by default."""
    folder = _config(parts, [PEER], tmp_path)["benchmark"]["data"]
    without_masks = copy.deepcopy(folder)
    without_masks["init_args"]["mask_dir"] = None
    without_masks["init_args"]["normal_test_dir"] = "train/good"
    without_masks["init_args"]["abnormal_dir"] = "masks"
    data = {
        "class_path": "MultiCategory",
        "init_args": {"name": "all", "categories": {"parts": folder, "plain": without_masks}},
    }
    job = {
        "entry": {**PEER, "max_epochs": None},
        "data": data,
        "label": "all",
        "seed": 0,
        "backbone_weights": {},
        "image_size": 64,
        "accelerator": "cpu",
        "openvino": True,
    }
    result = run.perform(job, tmp_path)
    assert set(result["metrics"]) == {"parts", "plain"}
    assert "pixel_AUPRO" in result["metrics"]["parts"]
    assert "pixel_AUPRO" not in result["metrics"]["plain"]
    assert result["openvino_bytes"] > 1e4
    assert (tmp_path / run.CHECKPOINT).is_file()


def test_anomalibs_benchmark_tabulates_the_same_entries(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with different arguments, which it can't put into one table by itself."""
    monkeypatch.chdir(tmp_path)
    config = _config(parts, [OURS, PEER], tmp_path)
    table: Any = SerialRunner(BenchmarkJobGenerator("cpu")).run(config["benchmark"])
    assert len(table) == 2
    assert table["image_AP"].between(0, 1).all()
    assert [entry[0]["name"] for entry in table["model.init_args.entry"]] == ["ours", "peer"]
