# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's command line, which starts all runs."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anomalib_osdirf.benchmark import report, run, speed
from anomalib_osdirf.benchmark.plan import Plan, Run, digest, read_plan, slug
from anomalib_osdirf.progress import has_bars, say

_LOG = "log.txt"


def main(arguments: Sequence[str], program: str) -> int:
    """Run a benchmark and report it; return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Compare models over data sets and seeds: accuracy, time, memory, size and speed. What is "
        "finished is not done again, so an interrupted benchmark goes on where it was.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/benchmark.yaml")
    parser.add_argument("--output", type=Path, help="folder for results, instead of the file's report.output")
    options = parser.parse_args(arguments)
    console = Console()
    plan = read_plan(options.config, options.output)
    outcome = report.write(plan, *perform(plan, console))
    console.print(Markdown(outcome.markdown))
    say(f"Written to {plan.output}: report.md, results.csv", console)
    return 1 if outcome.failed else 0


def perform(plan: Plan, console: Console) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Do the runs and measurements that are not done yet.

    Returns:
        Results by the runs' digests, and speeds by data set.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    results: dict[str, dict[str, Any]] = {}
    speeds: dict[str, dict[str, Any]] = {}
    total = len(plan.runs) + (len(plan.labels) if plan.rounds else 0)
    with Progress(*columns, console=console, disable=not has_bars(console)) as progress:
        task = progress.add_task("", total=total)

        @contextmanager
        def part(name: str) -> Iterator[None]:
            progress.update(task, description=name)
            if not has_bars(console):
                say(f"[{len(results) + len(speeds) + 1}/{total}] {name}", console)
            yield
            progress.advance(task)

        for label in plan.labels:
            for one in (one for one in plan.runs if one.label == label):
                with part(f"{one.entry.name} on {label}, seed {one.seed}"):
                    results[one.digest] = finish(one, plan)
                if error := results[one.digest].get("error"):
                    say(f"{one.entry.name} on {label} failed: {error}", progress.console)
            if plan.rounds:
                with part(f"Speed on {label}"):
                    speeds[label] = _speed(label, plan, results)
        progress.update(task, description="Done")
    return results, speeds


def finish(one: Run, plan: Plan) -> dict[str, Any]:
    """Return the result of a run, after doing it if there is none yet; one that failed is tried again."""
    folder = one.folder(plan.output)
    result = _read(folder / run.RESULT)
    first = one.seed == plan.seeds[0]  # speed is measured on its models
    gone = first and plan.rounds and not (folder / run.CHECKPOINT).is_file()
    if result is None or "error" in result or gone:
        result = _in_a_process("anomalib_osdirf.benchmark.run", folder, one.job())
        shutil.rmtree(folder / "work", ignore_errors=True)
        if not first:
            shutil.rmtree(folder / Path(run.CHECKPOINT).parent, ignore_errors=True)
    return result


def _speed(label: str, plan: Plan, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Measure the models of a data set, unless the same were measured already."""
    runs = [one for one in plan.runs if one.label == label and one.seed == plan.seeds[0]]
    runs = [one for one in runs if "error" not in results[one.digest]]
    if not runs:
        return {}
    models = {
        one.entry.name: {
            "entry": one.entry.as_dict(),
            "checkpoint": str(one.folder(plan.output) / run.CHECKPOINT),
            "backbone_weights": one.backbone_weights,
            "image_size": one.image_size,
        }
        for one in runs
    }
    job = {"models": models, "rounds": plan.rounds, "accelerator": runs[0].accelerator}
    folder = plan.output / "speed" / f"{slug(label)}-{digest(job)}"
    result = _read(folder / run.RESULT)
    if result is None or result.get("error") or result.get("errors"):
        result = _in_a_process(speed.__name__, folder, job)
    return result


def _in_a_process(module: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in its own process, so that memory is measured per job and a crash ends only that job."""
    shutil.rmtree(folder, ignore_errors=True)
    run.write_json(folder / run.JOB, job)
    with (folder / _LOG).open("w", encoding="utf-8") as log:
        # After Ctrl+C, the run ends with its benchmark.
        process = subprocess.run(
            [sys.executable, "-m", module, str(folder)], stdout=log, stderr=subprocess.STDOUT, check=False
        )
    result = _read(folder / run.RESULT)
    if result is None:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        result = {"job": job, "error": f"the process ended with {how} and no result; see {folder / _LOG}"}
        run.write_json(folder / run.RESULT, result)
    return result


def _read(file: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None
