# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Denoisers, states and densities other than the default's, from training to exported models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.density import build_density
from exactness import compare, predict, textured_files

MakeModel = Callable[..., OSDIRF]
MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize(
    "arguments",
    [
        {"denoiser": "unet", "density": "position", "max_steps": 2},
        {"state": "noised", "shrinkage": "auto", "max_steps": 2},
        {"denoiser": "none", "state": "clean", "density": "channel"},
    ],
    ids=lambda arguments: next(iter(arguments.values())),
)
def test_exports_say_what_engine_predict_says(
    arguments: dict[str, Any],
    tiny: MakeModel,
    folder: MakeFolder,
    engine: MakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, run = tiny(**arguments, post_processor=True), engine()
    run.fit(model, datamodule=folder())
    loaded = OSDIRF.load_from_checkpoint(str(run.best_model_path))
    predicted = predict(loaded, textured_files(tmp_path / "images"), tmp_path)
    for kind in ("onnx", "openvino"):
        compare(predicted, Path(str(engine().export(loaded, kind, export_root=tmp_path / kind))), 1e-5, 1e-4)


@pytest.mark.parametrize("density", ["channel", "position"])
def test_density_is_fitted_on_the_quantised_network(
    density: str, tiny: MakeModel, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    import openvino

    model = tiny(density=density, image_score="max", max_steps=1)
    engine().fit(model, datamodule=folder())
    data = folder()
    path = engine().export(model, "openvino", export_root=tmp_path, compression_type="INT8_PTQ", datamodule=data)
    compiled = openvino.compile_model(str(path), "CPU")
    values = json.loads(Path(str(path)).with_suffix(".json").read_text(encoding="utf-8"))
    scores = [compiled(item.image[None].numpy())["pred_score"].item() for item in data.val_data]
    span = values["image_max"] - values["image_min"]
    ends = [(values[f"image_{name}"] - values["image_threshold"]) / span + 0.5 for name in ("min", "max")]
    assert [min(scores), max(scores)] == pytest.approx(np.clip(ends, 0, 1).tolist(), abs=1e-4)


def test_without_a_denoiser_nothing_is_trained_and_features_are_the_field(
    tiny: MakeModel, folder: MakeFolder, engine: MakeEngine
) -> None:
    model, run = tiny(denoiser="none", state="clean", image_score="max"), engine()
    metrics = run.train(model, datamodule=folder())[0]
    assert run.trainer.global_step == 0
    assert metrics["image_AUROC"] >= 0
    loaded = OSDIRF.load_from_checkpoint(str(run.best_model_path)).eval()
    data = folder()
    data.setup("fit")
    images = loaded.pre_processor(torch.stack([item.image for item in data.train_data]))
    with torch.no_grad():
        z = loaded.model.whitening(loaded.model.extract_features(images))
        density = build_density("position_full", z.shape[1], z.shape[2])
        density.fit([z])
        expected = density(z).flatten(1).amax(dim=1)
        torch.testing.assert_close(loaded.model(images).pred_score, expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_with_a_noise_field_loads_as_invad_and_back(
    tiny: MakeModel, folder: MakeFolder, engine: MakeEngine
) -> None:
    run = engine()
    run.fit(tiny(state="noised", max_steps=1), datamodule=folder())
    inverting = engine()
    inverting.train(InvAD(), datamodule=folder(), ckpt_path=run.best_model_path)
    back = OSDIRF.load_from_checkpoint(str(inverting.best_model_path), state="noised")
    engine().validate(back, datamodule=folder())
    original = OSDIRF.load_from_checkpoint(str(run.best_model_path))
    torch.testing.assert_close(back.post_processor.image_threshold, original.post_processor.image_threshold)


@pytest.mark.parametrize(
    ("model_class", "arguments", "match"),
    [
        (OSDIRF, {"denoiser": "none"}, "denoiser=none takes the features themselves as the field, not state='scaled'"),
        (InvAD, {"denoiser": "none"}, "denoiser=none leaves InvAD nothing to invert with"),
        (OSDIRF, {"density": "standard", "shrinkage": 0.5}, r"shrinkage=0\.5 needs density=position_full"),
        (InvAD, {"shrinkage": "auto"}, "shrinkage='auto' needs density=position_full, not standard"),
    ],
)
def test_arguments_that_do_not_go_together(model_class: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_class(backbone="test_efficientnet", pre_trained=False, **arguments)
