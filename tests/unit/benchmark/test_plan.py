# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's configuration file may ask for, and what it is told where it may not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalib_osdirf.benchmark.plan import BUILD_ENTRY, Plan, read_plan
from anomalib_osdirf.benchmark.run import by_category

CONFIG = Path(__file__).parents[3] / "configs" / "benchmark.yaml"
SMALL: dict[str, Any] = {
    "accelerator": "cpu",
    "benchmark": {
        "seed": {"grid": [0, 1]},
        "model": {
            "class_path": BUILD_ENTRY,
            "init_args": {
                "image_size": 64,
                "entry": {
                    "grid": [
                        [{"name": "ours", "class_path": "OSDIRF", "init_args": {"backbone": "test_efficientnet"}}],
                        [{"class_path": "Padim", "init_args": {"backbone": "resnet18"}}],
                    ]
                },
            },
        },
        "data": {
            "class_path": "SyntheticSurfaces",
            "init_args": {"category": {"grid": ["weave", "brushed_metal"]}},
        },
    },
    "report": {"rounds": 0},
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Plan]:
    """Return a reader of configurations."""

    def read_config(config: Any) -> Plan:
        (tmp_path / "benchmark.yaml").write_text(
            config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8"
        )
        return read_plan(tmp_path / "benchmark.yaml", tmp_path / "results")

    return read_config


def _changed(path: str, value: Any) -> dict[str, Any]:
    """Return the small configuration with one thing changed."""
    config = copy.deepcopy(SMALL)
    *parents, last = path.split("/")
    section = config
    for name in parents:
        section = section[name]
    section[last] = value
    return config


def test_grids_are_multiplied_as_anomalib_does(read: Callable[[Any], Plan]) -> None:
    plan = read(SMALL)
    assert [(run.label, run.entry.name, run.seed) for run in plan.runs if run.seed == 0] == [
        ("weave", "ours", 0),
        ("weave", "Padim", 0),
        ("brushed_metal", "ours", 0),
        ("brushed_metal", "Padim", 0),
    ]
    assert len(plan.runs) == 8
    assert len({run.digest for run in plan.runs}) == 8
    assert {run.image_size for run in plan.runs} == {64}


def test_a_plain_model_of_anomalibs_benchmark_is_understood(read: Callable[[Any], Plan]) -> None:
    plan = read(_changed("benchmark/model", {"class_path": {"grid": ["OSDIRF", "Padim"]}}))
    assert plan.models == ["OSDIRF", "Padim"]
    assert plan.runs[0].image_size is None


def test_the_same_run_has_the_same_digest_and_another_run_another(read: Callable[[Any], Plan]) -> None:
    first, second = read(SMALL), read(SMALL)
    assert [run.digest for run in first.runs] == [run.digest for run in second.runs]
    other = read(_changed("benchmark/model/init_args/image_size", 96))
    assert not {run.digest for run in first.runs} & {run.digest for run in other.runs}


def test_data_sets_of_one_name_are_told_apart(read: Callable[[Any], Plan], parts: Path) -> None:
    folder = {"class_path": "Folder", "init_args": {"name": "weave", "root": str(parts), "normal_dir": "train/good"}}
    surface = {"class_path": "SyntheticSurfaces", "init_args": {"category": "weave"}}
    assert read(_changed("benchmark/data", {"grid": [folder, surface]})).labels == [
        "Folder weave",
        "SyntheticSurfaces weave",
    ]


def test_the_shipped_file_is_valid(tmp_path: Path) -> None:
    plan = read_plan(CONFIG, tmp_path)
    assert {"OSDIRF", "InvAD", "PaDiM", "DFM", "CFlow"} < set(plan.models)
    assert plan.seeds == [0, 1, 2]
    assert plan.rounds >= 20


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("reports", {}, "the unknown key 'reports'"),
        ("benchmark/models", [], "benchmark has the unknown key 'models'"),
        ("benchmark/data", None, "benchmark has no data"),
        ("benchmark/seed", "one", "seed='one'"),
        ("report/round", 3, "report has the unknown key 'round'"),
        ("report/rounds", -1, "rounds=-1"),
        ("accelerator", ["cpu", "cuda"], "is not one device"),
        ("benchmark/model", {"class_path": "Padimm"}, "class_path='Padimm'.*Padim"),
        ("benchmark/model", {"class_path": "no.such.Model"}, "'no.such.Model' is not a model"),
        ("benchmark/model", {"class_path": "Padim", "init_args": {"layer": 1}}, "Padim can't be built.*layer"),
        ("benchmark/model/init_args/entry", [{"class_path": "Padim", "epochs": 1}], "the unknown key 'epochs'"),
        ("benchmark/model/init_args/entry", [{"name": "Padim"}], "has no class_path"),
        ("benchmark/model/init_args/entry", [{"class_path": "Stfpm", "max_epochs": 0}], "max_epochs=0"),
        ("benchmark/model/init_args/entry", "Padim", "is not a model"),
        (
            "benchmark/model/init_args/entry",
            [{"class_path": "Padim", "init_args": {"visualizer": False}}],
            "entry Padim has visualizer",
        ),
        (
            "benchmark/model/init_args/backbone_weights",
            {"resnet18": "nowhere"},
            "'nowhere' for resnet18, which does not",
        ),
        ("benchmark/model/init_args/size", 3, "the unknown key 'size'"),
        ("benchmark/data/class_path", "Floder", "class_path='Floder'"),
        ("benchmark/data/init_args", {"category": "velvet"}, "velvet"),
        (
            "benchmark/data",
            {"class_path": "Folder", "init_args": {"name": "x", "root": "nowhere", "normal_dir": "good"}},
            "root='nowhere'",
        ),
    ],
)
def test_bad_configurations_are_refused_in_a_sentence(
    path: str, value: Any, words: str, read: Callable[[Any], Plan]
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        read(_changed(path, value))
    assert "\n" not in str(raised.value)


def test_two_models_of_one_name_are_refused(read: Callable[[Any], Plan]) -> None:
    entries = [[{"name": "x", "class_path": "Padim"}], [{"name": "x", "class_path": "Patchcore"}]]
    with pytest.raises(ValueError, match="two models are called 'x'"):
        read(_changed("benchmark/model/init_args/entry", {"grid": entries}))


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not YAML"), ("- 1", "is not a mapping"), ("report: {}", "no section benchmark")]
)
def test_what_is_no_configuration_is_refused(text: str, words: str, read: Callable[[Any], Plan]) -> None:
    with pytest.raises(ValueError, match=words):
        read(text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config="):
        read_plan(tmp_path / "nothing.yaml")


def test_metrics_are_sorted_by_category() -> None:
    assert by_category({"image_AUROC": 0.5}, "mtd") == {"mtd": {"image_AUROC": 0.5}}
    several = {"a/image_AUROC": 0.5, "b/image_AUROC": 0.7, "mean/image_AUROC": 0.6}
    assert by_category(several, "all") == {"a": {"image_AUROC": 0.5}, "b": {"image_AUROC": 0.7}}
