# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionAD through anomalib's engine and command line: training, checkpoints, exports, bad input."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_osdirf import OSDIRF, DiffusionAD
from anomalib_osdirf.__main__ import main
from conftest import StopAt, interrupted
from exactness import TOLERANCES, compare, export, predict, textured_files, unclip
from processor import has_bfloat16, precisions
from textures import textured_image

MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]

SMALL: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_levels": 1,
    "segmentation_channels": 8,
    "learning_rate": 1e-3,
    "segmentation_learning_rate": 1e-3,
    "checkpoint_every_n_steps": 2,
    "max_steps": 6,
}
QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


def _small(**arguments: Any) -> DiffusionAD:
    return DiffusionAD(**{**SMALL, "pre_processor": DiffusionAD.configure_pre_processor((64, 64)), **arguments})


class Finished:
    """A finished training: its model, checkpoint and metrics."""

    def __init__(self, model: DiffusionAD, checkpoint: Path, metrics: dict[str, float]) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.metrics = metrics


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    datamodule = Folder(
        "parts",
        root=parts,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/dent",
        mask_dir="masks",
        val_split_mode="same_as_test",
        train_batch_size=5,
        num_workers=0,
        seed=0,
    )
    root = tmp_path_factory.mktemp("diffusionad")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    # Trained enough for scores to differ: normalising a narrow span would enlarge rounding errors.
    model = _small(
        seed=0, ema_decay=0.5, max_steps=24, segmentation_learning_rate=2e-2, patch_size=2, pixel_deviation=0.2
    )
    metrics = engine.train(model, datamodule=datamodule)[0]
    return Finished(model, Path(str(engine.best_model_path)), dict(metrics))


def _scores(model: DiffusionAD, datamodule: Folder, engine: Engine, checkpoint: Path | None = None) -> dict[str, float]:
    batches = engine.predict(model, datamodule=datamodule, ckpt_path=checkpoint)
    assert batches is not None
    return {item.image_path: float(item.pred_score) for batch in batches for item in batch}


# ---------------------------------------------------------------------- training


def test_checkpoint_is_plain_data_and_complete(finished: Finished) -> None:
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    state = checkpoint["state_dict"]
    for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert torch.isfinite(state[f"post_processor.{name}"])
    assert state["model.num_steps"] == 24
    assert state["model.noise"].shape == (2, 3, 256, 256)


def test_no_argument_needs_repeating(finished: Finished, folder: MakeFolder, engine: MakeEngine) -> None:
    reference = _scores(DiffusionAD.load_from_checkpoint(finished.checkpoint), folder(), engine())
    assert _scores(DiffusionAD(), folder(), engine(), finished.checkpoint) == pytest.approx(reference, abs=1e-5)
    metrics = engine().test(_small(), datamodule=folder(), ckpt_path=finished.checkpoint)[0]
    assert dict(metrics) == pytest.approx(finished.metrics, abs=1e-6)


def test_resumed_training_ends_as_the_undisturbed_one(folder: MakeFolder, engine: MakeEngine) -> None:
    arguments = {"ema_decay": 0.5, "learning_rate_schedule": "cosine", "drawn_textures": True}
    undisturbed = _small(seed=0, **arguments)
    engine().fit(undisturbed, datamodule=folder())
    kept = interrupted(engine(callbacks=[StopAt(5)]), _small(seed=0, **arguments), folder())
    torch.manual_seed(1)
    resumed, run = _small(**arguments), engine()
    run.fit(resumed, datamodule=folder(), ckpt_path=kept)
    assert run.trainer.global_step == 6
    torch.testing.assert_close(resumed.state_dict(), undisturbed.state_dict(), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.isfinite(resumed.post_processor.image_threshold)


def test_duration_accumulation_clipping_and_precision(folder: MakeFolder, engine: MakeEngine) -> None:
    for model_arguments, trainer_arguments, steps in (
        ({"max_epochs": 1}, {}, 3),
        ({}, {"max_steps": 2, "precision": "bf16-mixed"}, 2),
        ({}, {"max_epochs": 2, "accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, 2),
    ):
        run = engine(**trainer_arguments)
        model = _small(**model_arguments)
        run.fit(model, datamodule=folder())
        assert run.trainer.global_step == steps
        assert model.model.num_steps == steps
        rates = [group["lr"] for group in run.trainer.optimizers[0].param_groups]
        assert rates == [1e-3, 1e-3]


def test_learning_rates_decay(folder: MakeFolder, engine: MakeEngine) -> None:
    run = engine()
    run.fit(_small(learning_rate_schedule="cosine", max_steps=2), datamodule=folder())
    (scheduler,) = run.trainer.lr_scheduler_configs
    assert scheduler.scheduler.base_lrs == [1e-3, 1e-3]
    assert scheduler.scheduler.get_last_lr() == pytest.approx([0, 0], abs=1e-9)


def test_foregrounds_and_textures(folder: MakeFolder, engine: MakeEngine, parts: Path, tmp_path: Path) -> None:
    for source in (parts / "train/good").iterdir():
        cv2.imwrite(str(tmp_path / source.name), np.full((80, 72), 255, np.uint8))
    for arguments in (
        {"foreground_masks": str(tmp_path), "anomaly_source_path": str(parts / "test")},
        {"foreground": "auto", "anomaly_source_path": str(parts / "test"), "shuffled_patches": True},
    ):
        model = _small(max_steps=1, **arguments)
        engine().fit(model, datamodule=folder())
        assert model.model.num_steps == 1


def test_loss_that_is_not_finite_stops_training(folder: MakeFolder, engine: MakeEngine) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: object) -> None:
            if trainer.global_step == 3:
                module.model.networks["reconstruction"].unet.conv_out.bias.data.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"step 3 .* nan"):
        engine(callbacks=[Poison()]).fit(_small(), datamodule=folder())


# ---------------------------------------------------------------------- command line


@pytest.mark.slow
def test_commands(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = [
        "--data=Folder",
        "--data.name=parts",
        f"--data.root={parts}",
        "--data.normal_dir=train/good",
        "--data.normal_test_dir=test/good",
        "--data.abnormal_dir=test/dent",
        "--data.val_split_mode=same_as_test",
        "--data.num_workers=0",
    ]
    model = [
        "--model=DiffusionAD",
        "--model.base_channels=8",
        "--model.channel_multipliers=[1,2]",
        "--model.residual_blocks=1",
        "--model.attention_levels=0",
        "--model.segmentation_channels=2",
        "--model.max_steps=2",
        "--model.pre_processor=anomalib.pre_processing.PreProcessor",
        "--model.pre_processor.transform=torchvision.transforms.v2.Resize",
        "--model.pre_processor.transform.size=[64,64]",
    ]
    assert main(["train", *model, *data, *QUIET]) == 0
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    trained = ["--model=DiffusionAD", "--model.base_channels=8", f"--ckpt_path={checkpoint}"]
    assert main(["test", *trained, *data, *QUIET]) == 0
    assert main(["predict", *trained, f"--data={parts / 'test' / 'dent'}", *QUIET]) == 0
    assert main(["export", *trained, "--export_type=torch", "--export_root=out"]) == 0
    assert list((tmp_path / "out").rglob("model.pt"))


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--model.help", "DiffusionAD"])
    output = capsys.readouterr().out
    for name in ("channel_multipliers", "anomaly_source_path", "foreground_masks", "segmentation_learning_rate"):
        # Older versions of jsonargparse write the long form.
        assert re.search(rf"--model\.(init_args\.)?{name} ", output)


@pytest.mark.parametrize("name", ["diffusionad", "diffusionad_paper"])
def test_configs_are_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        _, model, _ = Engine.from_config(config)
    assert isinstance(model, DiffusionAD)


# ---------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def unclipped(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unclip(finished.checkpoint, DiffusionAD, tmp_path_factory.mktemp("unclipped"))


@pytest.fixture(scope="module")
def exported(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    files = {kind: export(kind, root, unclipped, None, DiffusionAD()) for kind in ("torch", "onnx", "openvino")}
    for compression in ("FP16", "INT8"):
        files[compression] = export("openvino", root / compression, unclipped, compression, DiffusionAD())
    return files


@pytest.fixture(scope="module")
def predicted(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("predicted")
    return predict(DiffusionAD(), textured_files(root / "images"), root, unclipped)


@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_exports_say_what_engine_predict_says(
    kind: str, exported: dict[str, Path], predicted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    compare(predicted, exported[kind], *TOLERANCES[kind])


@pytest.mark.skipif(not has_bfloat16(), reason="OpenVINO does not compute in bfloat16 on this processor")
def test_openvino_model_carries_float32(exported: dict[str, Path]) -> None:
    assert "bf16" not in precisions(exported["openvino"])


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_exports_take_any_batch(
    kind: str, exported: dict[str, Path], unclipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    run = _runtime(kind, exported[kind])
    reference = DiffusionAD.load_from_checkpoint(unclipped).eval()
    for batch, height, width in ((1, 64, 64), (5, 90, 70)):
        rng = np.random.default_rng(batch)
        images = np.stack([textured_image(rng, height, width).transpose(2, 0, 1) for _ in range(batch)])
        images = images.astype(np.float32) / 255
        with torch.no_grad():
            expected = reference(torch.from_numpy(images))
        score, anomaly_map = run(images)
        np.testing.assert_allclose(score.ravel(), expected.pred_score.numpy(), atol=1e-5)
        np.testing.assert_allclose(anomaly_map.reshape(expected.anomaly_map.shape), expected.anomaly_map, atol=1e-4)


def test_exports_hold_the_averaged_weights_once(exported: dict[str, Path], finished: Finished) -> None:
    loaded = torch.load(exported["torch"], weights_only=False)["model"].model
    full = finished.model.model
    # Both timesteps' networks share all but the biases that a timestep is folded into.
    count = sum(parameter.numel() for parameter in full.networks.parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == pytest.approx(count, rel=0.05)
    for name, value in full.ema.module["segmentation"].state_dict().items():
        torch.testing.assert_close(loaded.segmentation.state_dict()[name], value, rtol=0, atol=0)


def _runtime(kind: str, file: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    if kind == "torch":
        model = TorchInferencer(file, device="cpu").model

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            with torch.no_grad():
                result = model(torch.from_numpy(image))
            return result.pred_score.numpy(), result.anomaly_map.numpy()

    elif kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            score, anomaly_map = session.run(["pred_score", "anomaly_map"], {"input": image})
            return score, anomaly_map

    else:
        import openvino

        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            result = compiled(image)
            return result["pred_score"], result["anomaly_map"]

    return predict


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 12}, "base_channels=12"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers=\[1, 0\]"),
        ({"channel_multipliers": [1.5]}, r"channel_multipliers=\[1.5\]"),
        ({"channel_multipliers": []}, r"channel_multipliers=\[\]"),
        ({"residual_blocks": 0}, "residual_blocks=0"),
        ({"pixel_deviation": 0.0}, "pixel_deviation=0.0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"patch_size": 1.5}, "patch_size=1.5"),
        ({"segmentation_channels": 0}, "segmentation_channels=0"),
        ({"attention_levels": 3}, "attention_levels=3"),
        ({"timestep_n": 300}, "timestep_n=300"),
        ({"timestep_b": 1000}, "timestep_b=1000"),
        ({"timestep_boundary": 1000}, "timestep_boundary=1000"),
        ({"guidance_strength": -1.0}, "guidance_strength=-1.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"foreground": "object"}, "foreground='object'"),
        ({"foreground": "auto", "foreground_masks": "masks"}, "exclude each other"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"segmentation_learning_rate": -1.0}, "segmentation_learning_rate=-1.0"),
        ({"learning_rate_schedule": "step"}, "learning_rate_schedule='step'"),
        ({"gradient_clip_norm": -1.0}, "gradient_clip_norm=-1.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"pre_processor": OSDIRF.configure_pre_processor((64, 64))}, r"a Normalize, but .* images in \[0, 1\]; leave"),
    ],
)
def test_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**arguments)


@pytest.mark.parametrize("name", ["anomaly_source_path", "foreground_masks"])
def test_missing_folder_is_found_before_anything_is_written(
    name: str, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name}='gone'"):
        engine().fit(_small(**{name: "gone"}), datamodule=folder())
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_missing_foreground_mask(folder: MakeFolder, engine: MakeEngine, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "00.png"), np.ones((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"foreground_masks .* 11"):
        engine().fit(_small(foreground_masks=str(tmp_path)), datamodule=folder())


def test_image_size_that_does_not_fit(folder: MakeFolder, engine: MakeEngine) -> None:
    model = _small(pre_processor=DiffusionAD.configure_pre_processor((80, 64)))
    with pytest.raises(ValueError, match=r"80 x 64 .* 96 x 64"):
        engine().fit(model, datamodule=folder())


def test_model_that_was_never_trained(folder: MakeFolder, engine: MakeEngine, tmp_path: Path) -> None:
    for action in (
        lambda: engine().test(_small(), datamodule=folder()),
        lambda: engine().export(_small(), "onnx", export_root=tmp_path / "export"),
    ):
        with pytest.raises(RuntimeError, match="was never fitted"):
            action()
    assert not (tmp_path / "export").exists()
