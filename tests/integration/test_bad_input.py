# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause: one sentence each, naming the argument and what would work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.inference.scoring import load_scorer
from conftest import TINY, pre_processor
from textures import textured_image

MakeFolder = Callable[..., Folder]
MakeModel = Callable[..., OSDIRF]
MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet"}, "backbone='resnet' is not a timm model; did you mean"),
        ({"backbone": "test_efficientnet", "layers": ["head"]}, r"layers=\['head'\]"),
        ({"denoiser": "unet9"}, "denoiser='unet9'"),
        ({"denoiser": "mlp"}, "denoiser='mlp' is unknown; .* conv_mlp has replaced mlp"),
        ({"density": "full"}, "density='full'"),
        ({"timestep": 1000}, "timestep=1000"),
        ({"feature_dim": 0}, "feature_dim=0"),
        ({"grid_size": 0}, "grid_size=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_epochs": -1}, "max_epochs=-1"),
    ],
)
def test_constructor(arguments: dict[str, Any], message: str, tiny: MakeModel) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_missing_weights_file_is_found_before_any_image_is_read(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"backbone_weights='gone.safetensors'"):
        engine().fit(tiny(pre_trained=True, backbone_weights="gone.safetensors"), datamodule=folder())
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_random_weights_are_never_a_silent_fallback(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    model = tiny(pre_trained=True)
    monkeypatch.setattr("timm.create_model", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="backbone_weights="):
        engine().fit(model, datamodule=folder())


def test_image_too_small_for_the_grid(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"grid_size=8.*128 x 128"):
        engine().fit(tiny(grid_size=8), datamodule=folder())


def test_one_training_image(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "00.png").write_bytes((parts / "train/good/00.png").read_bytes())
    datamodule = folder(normal_dir=tmp_path / "one")
    with pytest.raises(ValueError, match="two normal images"):
        engine().fit(tiny(), datamodule=datamodule)


def _constant(rng: np.random.Generator) -> np.ndarray:
    return np.full((80, 72, 3), 120, np.uint8)


def _textured(rng: np.random.Generator) -> np.ndarray:
    return textured_image(rng, 80, 72)


@pytest.fixture(params=["two", "three", "identical", "constant", "two constant"])
def little(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of few images, or of images that do not vary."""
    folder = tmp_path / "little"
    folder.mkdir()
    textured = [textured_image(np.random.default_rng(seed), 80, 72) for seed in range(3)]
    constant = np.full((80, 72, 3), 120, np.uint8)
    images = {
        "two": textured[:2],
        "three": textured,
        "identical": textured[:1] * 6,
        "constant": [constant] * 6,
        "two constant": [constant] * 2,
    }
    for index, image in enumerate(images[request.param]):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


@pytest.mark.parametrize("model", ["auto", "standard", "InvAD"])
def test_images_that_hardly_vary_give_a_model(
    model: str, little: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine
) -> None:
    made = InvAD(**TINY, pre_processor=pre_processor()) if model == "InvAD" else tiny(density=model)
    run = engine()
    run.train(made, datamodule=folder(normal_dir=little))
    scored = [item for batch in run.predict(made, datamodule=folder()) or [] for item in batch]
    assert len(scored) == 8
    for item in scored:
        assert torch.isfinite(item.pred_score).all()
        assert torch.isfinite(item.anomaly_map).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_grey_images_score_as_their_colour_copies(
    depth: type, trained: Any, engine: MakeEngine, parts: Path, tmp_path: Path
) -> None:
    """anomalib itself reads 16-bit grey images as plain white."""
    for source in (parts / "test/dent").iterdir():
        image = cv2.imread(str(source), cv2.IMREAD_GRAYSCALE)
        assert image is not None
        cv2.imwrite(str(tmp_path / source.name), image.astype(depth) * (257 if depth is np.uint16 else 1))

    def scores(folder: Path) -> list[float]:
        batches = engine().predict(OSDIRF(), data_path=folder, ckpt_path=trained.checkpoint)
        assert batches is not None
        return [float(batch.pred_score) for batch in batches]

    assert scores(tmp_path) == pytest.approx(scores(parts / "test/dent"), abs=1e-5)


def test_training_on_16_bit_grey_images(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, parts: Path, tmp_path: Path
) -> None:
    for source in (parts / "train/good").iterdir():
        image = cv2.imread(str(source), cv2.IMREAD_GRAYSCALE)
        assert image is not None
        cv2.imwrite(str(tmp_path / source.name), image.astype(np.uint16) * 257)
    moments = []
    backbone = tiny().model.network.backbone.state_dict()
    for normal_dir in ("train/good", tmp_path):
        model = tiny()
        model.model.network.backbone.load_state_dict(backbone)
        engine().fit(model, datamodule=folder(normal_dir=normal_dir))
        moments.append(model.model.network.projection.bias)
    torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-3)


def test_model_that_was_never_fitted(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path) -> None:
    for action in (
        lambda: engine().test(tiny(), datamodule=folder()),
        lambda: engine().predict(tiny(), datamodule=folder()),
        lambda: engine().export(tiny(), "torch", export_root=tmp_path / "export"),
        lambda: engine().export(tiny(), "onnx", export_root=tmp_path / "export"),
        lambda: engine().export(tiny(), "openvino", export_root=tmp_path / "export"),
    ):
        with pytest.raises(RuntimeError, match="was never fitted"):
            action()
    assert not (tmp_path / "export").exists()


def test_features_that_are_not_finite(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    model = tiny()
    torch.nn.init.constant_(next(model.model.network.backbone.parameters()), float("nan"))
    with pytest.raises(ValueError, match="Features are not finite"):
        engine().fit(model, datamodule=folder())


def test_checkpoint_of_the_first_release(
    trained: Any, folder: MakeFolder, engine: MakeEngine, parts: Path, tmp_path: Path
) -> None:
    """Version 0.1.0 wrote no structure into its checkpoints."""
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    del checkpoint["osdirf_structure"]
    # As it was called then.
    checkpoint["state_dict"]["model.whitening.weight"] = checkpoint["state_dict"].pop("model.network.projection.weight")
    checkpoint["hyper_parameters"] |= {"state": "scaled", "num_clusters": None, "denoiser": "mlp"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for action in (
        lambda: OSDIRF.load_from_checkpoint(tmp_path / "old.ckpt"),
        lambda: engine().train(OSDIRF(), datamodule=folder(), ckpt_path=tmp_path / "old.ckpt"),
        lambda: engine().test(OSDIRF(), datamodule=folder(), ckpt_path=tmp_path / "old.ckpt"),
        lambda: engine().predict(OSDIRF(), data_path=parts / "test/good", ckpt_path=tmp_path / "old.ckpt"),
        lambda: engine().export(OSDIRF(), "torch", export_root=tmp_path / "out", ckpt_path=tmp_path / "old.ckpt"),
        lambda: load_scorer(tmp_path / "old.ckpt"),
    ):
        with pytest.raises(ValueError, match="ckpt_path holds an OSDIRF") as error:
            action()
        assert "\n" not in str(error.value)
