# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Models on a transformer, from training to exports, and what checkpoint and log say of the backbone."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from anomalib.engine import Engine
from sklearn.metrics import roc_auc_score

from anomalib_osdirf import OSDIRF, InvAD
from conftest import pre_processor
from exactness import TOLERANCES, compare, export, predict, runtime, unclip
from small_data import small_folder

SMALL: dict[str, Any] = {"density": "mixture", "grid_size": 4, "feature_dim": 8, "max_steps": 2, "seed": 0}
# Image size that its patch divides or is rounded to, and layers, by name; behind the last of them it is cut.
FAMILIES = {
    "vit_tiny_patch16_224": (70, ["blocks.0", "blocks.3"]),
    "vit_small_patch14_reg4_dinov2": (56, ["blocks.0", "blocks.1"]),
    "vit_small_patch16_dinov3": (64, ["blocks.0", "blocks.1"]),
    "swin_tiny_patch4_window7_224": (64, ["layers.0", "layers.1"]),
    "convnext_atto": (64, ["stages.0", "stages.1"]),
}
FAST, *SLOW = FAMILIES


@pytest.fixture(scope="module", params=[FAST])
def checkpoint(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformer's checkpoint, with the scores of textured images inside its range."""
    root = tmp_path_factory.mktemp("transformer")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    size, layers = FAMILIES[request.param]
    processor = pre_processor(size)
    model = OSDIRF(backbone=request.param, layers=layers, pre_trained=False, pre_processor=processor, **SMALL)
    engine.fit(model, datamodule=small_folder(parts))
    return unclip(Path(str(engine.best_model_path)), OSDIRF, root)


def test_the_checkpoint_brings_back_size_and_source(checkpoint: Path) -> None:
    model = OSDIRF.load_from_checkpoint(checkpoint)
    assert model.model.network.backbone.image_size == (64, 64)
    assert model.model.network.backbone.weights == "random"


@pytest.mark.parametrize(
    ("checkpoint", "tolerance"),
    # OpenVINO's Swin has been seen 1.7e-5 off.
    [(FAST, 1e-5), *(pytest.param(name, 5e-5 if "swin" in name else 1e-5, marks=pytest.mark.slow) for name in SLOW)],
    indirect=["checkpoint"],
)
def test_openvino_export_of_each_family_does_as_the_checkpoint(
    checkpoint: Path, tolerance: float, parts: Path, tmp_path: Path
) -> None:
    file = export("openvino", tmp_path, checkpoint)
    compare(predict(OSDIRF(), checkpoint.parent / "images", tmp_path, checkpoint), file, tolerance, 1e-4)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
    (tested,) = engine.test(OSDIRF(), datamodule=small_folder(parts), ckpt_path=checkpoint)
    run = runtime(file)
    good, dent = ([run(str(image))[0] for image in (parts / "test" / kind).iterdir()] for kind in ("good", "dent"))
    truth = [0] * len(good) + [1] * len(dent)
    assert tested["image_AUROC"] == pytest.approx(roc_auc_score(truth, [*good, *dent]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "FP16", "INT8"])
def test_exports_give_the_scores_of_predict(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    predicted = predict(OSDIRF(), checkpoint.parent / "images", tmp_path, checkpoint)
    compressed = kind in {"FP16", "INT8"}
    file = export("openvino" if compressed else kind, tmp_path, checkpoint, kind if compressed else None)
    compare(predicted, file, *TOLERANCES[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "FP16"])
def test_invads_exports_give_the_scores_of_predict(parts: Path, tmp_path: Path, kind: str) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
    small = {name: value for name, value in SMALL.items() if name != "density"}
    model = InvAD(backbone="vit_tiny_patch16_224", pre_trained=False, pre_processor=pre_processor(70), **small)
    engine.fit(model, datamodule=small_folder(parts))
    checkpoint = unclip(Path(str(engine.best_model_path)), InvAD, tmp_path)
    predicted = predict(InvAD(), tmp_path / "images", tmp_path, checkpoint)
    file = export("openvino", tmp_path, checkpoint, None if kind == "openvino" else kind, InvAD())
    compare(predicted, file, *TOLERANCES[kind])


@pytest.mark.slow
def test_attention_is_quantised(parts: Path, checkpoint: Path, tmp_path: Path) -> None:
    file = export("openvino", tmp_path, checkpoint, "INT8_PTQ", datamodule=small_folder(parts))
    model = openvino.Core().read_model(file)
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    inputs = [product.input_value(0).get_node().get_type_name() for product in products]
    assert inputs.count("FakeQuantize") > len(products) / 2
    scores = openvino.compile_model(model, "CPU")(torch.rand(3, 3, 70, 90).numpy())["pred_score"]
    assert scores.size == 3


@pytest.mark.parametrize(("size", "warned"), [(None, 0), (64, 1)])
def test_another_normalisation_is_warned_of_once(
    parts: Path, engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture, size: int | None, warned: int
) -> None:
    own = {} if size is None else {"pre_processor": pre_processor(size)}
    model = OSDIRF(backbone="tf_efficientnet_lite0", **SMALL, **own)
    with caplog.at_level(logging.WARNING, "anomalib_osdirf"):
        engine().fit(model, datamodule=small_folder(parts))
    assert len([record for record in caplog.records if "pre_processor" in record.message]) == warned
