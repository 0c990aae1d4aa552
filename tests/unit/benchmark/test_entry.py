# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Models on equal terms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.engine import Engine
from anomalib.models import Padim, get_model

from anomalib_osdirf.benchmark.entry import Entry, build_entry, build_model, local_weights
from anomalib_osdirf.features.packaged_weights import package_of
from small_data import small_folder

BACKBONE = "test_efficientnet"
PADIM: dict[str, Any] = {
    "class_path": "Padim",
    "init_args": {"backbone": BACKBONE, "layers": ["blocks.1"], "n_features": 8},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a small backbone."""
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(7)
    torch.save(timm.create_model(BACKBONE, pretrained=False).state_dict(), file)
    return file


def test_peers_get_backbone_weights_from_the_file_that_ours_get(weights: Path) -> None:
    files = {BACKBONE: str(weights)}
    ours = build_entry({"class_path": "OSDIRF", "init_args": {"backbone": BACKBONE, "grid_size": 4}}, files)
    peer = build_entry(PADIM, files)
    stem = torch.load(weights, weights_only=True)["conv_stem.weight"]
    assert ours.hparams["backbone_weights"] == str(weights)
    assert torch.equal(peer.state_dict()["model.feature_extractor.feature_extractor.conv_stem.weight"], stem)


@pytest.mark.parametrize("name", ["OSDIRF", "Padim"])
def test_peers_have_packaged_weights_and_normalisation_as_ours_do(name: str) -> None:
    own = {"layers": ["blocks.2"], **({"n_features": 8} if name == "Padim" else {"grid_size": 4})}
    model = build_entry({"class_path": name, "init_args": {"backbone": "tf_efficientnet_lite0", **own}}, image_size=64)
    assert model.pre_processor is not None
    assert model.pre_processor.transform(torch.full((1, 3, 64, 64), 0.75)).unique().tolist() == [0.5]
    if name == "Padim":
        package = package_of("tf_efficientnet_lite0")
        assert package is not None
        weights = package.read(timm.create_model("tf_efficientnet_lite0").state_dict())
        stem = model.state_dict()["model.feature_extractor.feature_extractor.conv_stem.weight"]
        assert torch.equal(stem, weights["conv_stem.weight"])


def test_timm_is_itself_again_afterwards(weights: Path) -> None:
    original = timm.create_model
    with local_weights({BACKBONE: str(weights)}):
        assert timm.create_model is not original
    with pytest.raises(ZeroDivisionError), local_weights({}):
        _ = 1 / 0
    assert timm.create_model is original


def test_metrics_image_size_and_pictures_are_the_same_for_all() -> None:
    init_args = {**PADIM["init_args"], "pre_trained": False}
    models = [
        build_entry({**PADIM, "init_args": init_args}, image_size=96),
        build_entry(
            {"class_path": "OSDIRF", "init_args": {"backbone": BACKBONE, "pre_trained": False, "grid_size": 4}},
            image_size=96,
        ),
    ]
    names = [[metric.name for metric in model.evaluator.test_metrics] for model in models]  # type: ignore[union-attr]
    assert names[0] == names[1]
    for model in models:
        assert model.visualizer is None
        assert model.pre_processor.transform(torch.rand(1, 3, 50, 40)).shape[-2:] == (96, 96)  # type: ignore[union-attr]


def test_nested_arguments_of_an_entry_stay_plain_values() -> None:
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [48, 48]}}
    transform = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [resize]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": transform}}
    init_args = {**PADIM["init_args"], "pre_trained": False, "pre_processor": pre_processor}
    given = json.dumps(init_args)
    model = build_model(Entry("a", "Padim", init_args), {}, 64)
    assert model.pre_processor.transform(torch.rand(1, 3, 50, 40)).shape[-2:] == (48, 48)  # type: ignore[union-attr]
    assert json.dumps(init_args) == given


def test_the_seed_of_a_run_is_ours_too_unless_the_entry_has_one() -> None:
    init_args = {"backbone": BACKBONE, "pre_trained": False, "grid_size": 4}
    assert build_model(Entry("a", "OSDIRF", init_args), {}, 64, seed=3).hparams["seed"] == 3
    assert build_model(Entry("a", "OSDIRF", {**init_args, "seed": 5}), {}, 64, seed=3).hparams["seed"] == 5


def test_a_training_without_an_end_is_refused_and_a_limit_holds(
    weights: Path, parts: Path, engine: Callable[..., Engine]
) -> None:
    """On a model that insists on pre-trained weights, too."""
    files = {BACKBONE: str(weights)}
    entry = {
        "name": "student",
        "class_path": "Stfpm",
        "init_args": {"backbone": BACKBONE, "layers": ["blocks.1"]},
    }
    with pytest.raises(ValueError, match=r"'student' trains by gradient.*max_epochs"):
        build_entry(entry, files)
    model = build_entry({**entry, "max_epochs": 2}, files, image_size=64)
    runner = engine(limit_train_batches=1, limit_val_batches=0)
    runner.fit(model, datamodule=small_folder(parts))
    assert runner.trainer.current_epoch == 2
    assert runner.trainer.global_step == 2
    assert build_entry({**entry, "max_epochs": 3}, files).name == model.name == "Stfpm"
    memory_bank = build_entry({**PADIM, "init_args": {**PADIM["init_args"], "pre_trained": False}})
    assert memory_bank.trainer_arguments["max_epochs"] == 1


def test_anomalibs_benchmark_builds_it_by_its_path() -> None:
    entry = [{**PADIM, "init_args": {**PADIM["init_args"], "pre_trained": False}}]
    model = get_model({"class_path": "anomalib_osdirf.benchmark.build_entry", "init_args": {"entry": entry}})
    assert isinstance(model, Padim)
    assert [metric.name for metric in model.evaluator.test_metrics][1] == "image_AP"  # type: ignore[union-attr]


def test_a_missing_weights_file_is_refused() -> None:
    with pytest.raises(ValueError, match=f"backbone_weights has 'nowhere' for {BACKBONE}"):
        build_entry(PADIM, {BACKBONE: "nowhere"})
