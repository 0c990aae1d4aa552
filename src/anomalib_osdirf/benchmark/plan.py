# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a benchmark's configuration: its runs, and how to measure and report them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

from anomalib_osdirf.benchmark.entry import Entry, build_data, check_weights, parse_model

BUILD_ENTRY = "anomalib_osdirf.benchmark.build_entry"
_SECTIONS = ("accelerator", "benchmark", "report")
_GRID = ("seed", "model", "data")
_ENTRY_ARGUMENTS = ("entry", "backbone_weights", "image_size")


@dataclass(frozen=True)
class Run:
    """One training and test.

    Attributes:
        entry: The model.
        data: Its data: ``class_path`` and ``init_args``.
        label: Name of the data set in tables.
        seed: Seed of the run.
        backbone_weights: Files of backbones' weights by name.
        image_size: Side of the images.
        accelerator: Lightning's name of the device.
        openvino: Whether to export to OpenVINO, for the size.
    """

    entry: Entry
    data: dict[str, Any]
    label: str
    seed: int
    backbone_weights: dict[str, str]
    image_size: int | None
    accelerator: str
    openvino: bool

    def job(self) -> dict[str, Any]:
        """Return everything that determines the result, as plain values."""
        return {**vars(self), "entry": self.entry.as_dict()}

    @property
    def digest(self) -> str:
        """Short checksum of the job, which identifies the run."""
        return digest(self.job())

    def folder(self, output: Path) -> Path:
        """Folder of the run's result, log and weights."""
        return output / "runs" / slug(self.label) / slug(self.entry.name) / f"seed{self.seed}-{self.digest}"


@dataclass
class Plan:
    """A whole benchmark: all runs, data set by data set."""

    runs: list[Run]
    output: Path
    rounds: int = 20

    @property
    def models(self) -> list[str]:
        """Names of the models in the order of the file."""
        return list(dict.fromkeys(run.entry.name for run in self.runs))

    @property
    def labels(self) -> list[str]:
        """Names of the data sets in the order of the file."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Seeds in the order of the file."""
        return list(dict.fromkeys(run.seed for run in self.runs))


def read_plan(file: Path, output: Path | None = None) -> Plan:
    """Read a configuration file; an ``output`` folder takes the place of the file's.

    Raises:
        ValueError: If it can't be read, or has an unknown or impossible setting.
    """
    config = _load(file)
    _check_keys("the configuration", config, _SECTIONS)
    grid = config.get("benchmark")
    if not isinstance(grid, dict):
        msg = f"{file} has no section benchmark; give it seed, model and data, as configs/benchmark.yaml has."
        raise ValueError(msg)  # noqa: TRY004 - whoever wrote the file reads it
    _check_keys("benchmark", grid, _GRID)
    for key in ("model", "data"):
        if not grid.get(key):
            raise ValueError(f"benchmark has no {key}; give class_path and init_args, or a grid of them.")
    report = config.get("report") or {}
    _check_keys("report", report, ("output", "rounds", "openvino"))
    rounds = report.get("rounds", 20)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
        msg = f"report.rounds={rounds!r} is not a number of rounds; use 20 or more, or 0 to measure no speed."
        raise ValueError(msg)
    accelerator = config.get("accelerator", "auto")
    if isinstance(accelerator, list) and len(accelerator) == 1:
        accelerator = accelerator[0]
    if not isinstance(accelerator, str):
        msg = f"accelerator={accelerator!r} is not one device: speeds on several do not belong into one table."
        raise ValueError(msg)  # noqa: TRY004
    combinations = list(get_iterator_from_grid_dict({"seed": 0, **grid}))
    runs = [_run(one, accelerator, bool(report.get("openvino", True))) for one in combinations]
    runs = _labelled(runs)
    _check_names(runs)
    for run in runs:
        check_weights(run.backbone_weights)
    for entry in _distinct(run.entry for run in runs):
        parse_model(entry)
    for label, data in {run.label: run.data for run in runs}.items():
        _check_data(label, data)
    return Plan(
        runs=sorted(runs, key=lambda run: [one.label for one in runs].index(run.label)),
        output=output or Path(report.get("output", "results/benchmark")),
        rounds=rounds,
    )


def digest(values: Mapping[str, Any]) -> str:
    """Short checksum of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(name: str) -> str:
    """Turn a name into one for a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def _load(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"config={str(file)!r} can't be read: {error.strerror}; give the path of a YAML file."
        raise ValueError(msg) from error
    except yaml.YAMLError as error:
        raise ValueError(f"config={str(file)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config={str(file)!r} is not a mapping with a section benchmark.")  # noqa: TRY004 - whoever wrote the file reads it
    return config


def _check_keys(where: str, section: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in section:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}; known are {', '.join(known)}.")


def _run(one: dict[str, Any], accelerator: str, openvino: bool) -> Run:
    model, weights, size = one["model"], {}, None
    if isinstance(model, str):
        model = {"class_path": model}
    if model.get("class_path") == BUILD_ENTRY:
        arguments = model.get("init_args") or {}
        _check_keys(BUILD_ENTRY, arguments, _ENTRY_ARGUMENTS)
        if "entry" not in arguments:
            raise ValueError(f"{BUILD_ENTRY} has no entry; give it a grid of models.")
        entry = Entry.parse(arguments["entry"])
        weights = {str(name): str(file) for name, file in (arguments.get("backbone_weights") or {}).items()}
        size = arguments.get("image_size", 256)
    else:
        entry = Entry.parse(model)
    data, seed = one["data"], one["seed"]
    if not isinstance(data, dict) or "class_path" not in data:
        raise ValueError(f"data={data!r} has no class_path; give that of a datamodule, such as Folder.")
    if not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not a whole number; give one, or a grid of them.")  # noqa: TRY004 - whoever wrote the file reads it
    init_args = data.get("init_args") or {}
    class_name = str(data["class_path"]).rpartition(".")[2]
    label = str(init_args.get("name") or init_args.get("category") or class_name)
    return Run(entry, data, label, seed, weights, size, accelerator, openvino)


def _labelled(runs: list[Run]) -> list[Run]:
    """Add the class to the names of data sets that have the same one."""
    by_label: dict[str, set[str]] = {}
    for run in runs:
        by_label.setdefault(run.label, set()).add(digest(run.data))
    twice = {label for label, digests in by_label.items() if len(digests) > 1}
    result = []
    for run in runs:
        class_name = str(run.data["class_path"]).rpartition(".")[2]
        label = f"{class_name} {run.label}" if run.label in twice else run.label
        result.append(Run(**{**vars(run), "label": label}))
    return result


def _check_names(runs: list[Run]) -> None:
    """Refuse two models or data sets that the tables could not tell apart."""
    for what, pairs in (
        ("models", {(run.entry.name, digest(run.entry.as_dict())) for run in runs}),
        ("data sets", {(run.label, digest(run.data)) for run in runs}),
    ):
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two {what} are called {name!r}; give them different names.")


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    return list({digest(entry.as_dict()): entry for entry in entries}.values())


def _check_data(label: str, data: dict[str, Any]) -> None:
    datamodule = build_data(data)
    root = getattr(datamodule, "root", None)
    # Only these are never downloaded or drawn.
    if type(datamodule).__name__ in {"Folder", "Tabular"} and root is not None and not Path(root).is_dir():
        raise ValueError(f"data {label!r}: root={str(root)!r} does not exist; give the folder that the images are in.")
