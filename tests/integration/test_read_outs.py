# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Denoisers, states and densities other than the default's, from training to exported models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.density import build_density
from anomalib_osdirf.export.quantisation import replace_constants
from conftest import TINY

MakeModel = Callable[..., OSDIRF]
MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"denoiser": "unet", "density": "position_full", "shrinkage": "auto"}, marks=pytest.mark.slow),
        {"state": "noised", "density": "position"},
        {"density": "mixture_full", "num_clusters": 1},
        {"denoiser": "none", "state": "clean", "density": "channel"},
    ],
    ids=lambda arguments: next(iter(arguments.values())),
)
def test_exported_scores_are_the_models_also_when_the_density_is_fitted_anew(
    arguments: dict[str, Any], tiny: MakeModel, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    import openvino

    model, run = tiny(**arguments, max_steps=2), engine()
    run.fit(model, datamodule=folder())
    loaded = OSDIRF.load_from_checkpoint(str(run.best_model_path))
    file = engine().export(loaded, "openvino", export_root=tmp_path, onnx_kwargs={"post_processor": False})
    network = openvino.Core().read_model(str(file))
    images = torch.rand(2, 3, 64, 64)

    def compare() -> None:
        with torch.no_grad():
            expected = loaded.model(loaded.pre_processor(images))
        result = openvino.compile_model(network, "CPU")(images.numpy())
        for name in ("pred_score", "anomaly_map"):
            value = torch.from_numpy(result[name].copy()).reshape(getattr(expected, name).shape)
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-4)

    compare()
    # As a quantised network gets its own density.
    deployed = loaded.model.deployed()
    before = {name: value.clone() for name, value in deployed.fitted_buffers().items()}
    deployed.fit(lambda: [torch.randn(9, TINY["feature_dim"], 4, 4)])
    replace_constants(network, before, deployed.fitted_buffers())
    compare()


def test_without_a_denoiser_nothing_is_trained_and_features_are_the_field(
    tiny: MakeModel, folder: MakeFolder, engine: MakeEngine
) -> None:
    model, run = tiny(denoiser="none", state="clean", density="position_full", image_score="max"), engine()
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
    torch.testing.assert_close(
        back.post_processor.image_threshold, original.post_processor.image_threshold, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model_class", "arguments", "match"),
    [
        (OSDIRF, {"denoiser": "none"}, "denoiser=none takes the features themselves as the field, not state='scaled'"),
        (InvAD, {"denoiser": "none"}, "denoiser=none leaves InvAD nothing to invert with"),
        (OSDIRF, {"density": "standard", "shrinkage": 0.5}, r"shrinkage=0\.5 needs density=position_full"),
        (InvAD, {"shrinkage": "auto"}, "shrinkage='auto' needs density=position_full or mixture_full, not standard"),
    ],
)
def test_arguments_that_do_not_go_together(model_class: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_class(backbone="test_efficientnet", pre_trained=False, **arguments)
