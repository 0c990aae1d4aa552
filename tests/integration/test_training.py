# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training, checkpoints and resuming through anomalib's engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torchvision.transforms import v2

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.denoisers import registry
from anomalib_osdirf.denoisers.conv_mlp import ConvMLPBlock
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.training import field_training
from anomalib_osdirf.training.field_training import FieldTraining
from conftest import Losses, StopAt, interrupted
from states import assert_same_state

MakeFolder = Callable[..., Folder]
MakeModel = Callable[..., OSDIRF]
MakeEngine = Callable[..., Engine]


def _predictions(model: OSDIRF, datamodule: Folder, engine: Engine, checkpoint: Path | None = None) -> dict[str, Any]:
    batches = engine.predict(model, datamodule=datamodule, ckpt_path=checkpoint)
    assert batches is not None
    items = [item for batch in batches for item in batch]
    return {item.image_path: (float(item.pred_score), item.anomaly_map.clone()) for item in items}


def _assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for path, (score, anomaly_map) in one.items():
        assert score == pytest.approx(other[path][0], abs=tolerance)
        torch.testing.assert_close(anomaly_map, other[path][1], rtol=0, atol=tolerance)


def test_training_reports_every_metric_and_writes_one_checkpoint(trained: Any) -> None:
    names = ["AUROC", "AP", "F1Max"]
    expected = {f"{level}_{name}" for level in ("image", "pixel") for name in names} | {"pixel_AUPRO"}
    assert set(trained.metrics) == expected
    assert [path.name for path in trained.checkpoint.parent.iterdir()] == ["model.ckpt"]
    assert len(list((trained.results / "images").rglob("*.png"))) == 8


def test_checkpoint_is_plain_data_and_complete(trained: Any) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    state = checkpoint["state_dict"]
    for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert torch.isfinite(state[f"post_processor.{name}"])
    assert state["model.scorer._extra_state"]["num_images"] == 12
    assert checkpoint["global_step"] == 6


def test_no_argument_needs_repeating(trained: Any, folder: MakeFolder, engine: MakeEngine) -> None:
    """Backbone, image size and everything else come from the checkpoint."""
    reference = _predictions(OSDIRF.load_from_checkpoint(trained.checkpoint), folder(), engine())
    _assert_same(_predictions(OSDIRF(), folder(), engine(), trained.checkpoint), reference)
    metrics = engine().test(OSDIRF(), datamodule=folder(), ckpt_path=trained.checkpoint)[0]
    assert dict(metrics) == pytest.approx(trained.metrics, abs=1e-6)


def test_argument_that_disagrees_with_the_checkpoint(trained: Any, folder: MakeFolder, engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"timestep=700 .*timestep=200"):
        engine().test(OSDIRF(timestep=700), datamodule=folder(), ckpt_path=trained.checkpoint)


def test_checkpoint_loads_without_hub_or_weights_file(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    model = tiny(pre_trained=True, backbone_weights=str(weights))
    run = engine()
    run.fit(model, datamodule=folder())
    weights.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("looked for weights")

    monkeypatch.setattr("anomalib_osdirf.features.backbone.Backbone.load_pretrained", refuse)
    checkpoint = Path(str(run.best_model_path))
    expected = _predictions(model, folder(), engine())
    _assert_same(_predictions(OSDIRF.load_from_checkpoint(checkpoint), folder(), engine()), expected)
    _assert_same(_predictions(OSDIRF(), folder(), engine(), checkpoint), expected)
    assert Path(str(engine().export(OSDIRF(), "torch", export_root=tmp_path, ckpt_path=checkpoint))).is_file()
    engine().fit(OSDIRF.load_from_checkpoint(checkpoint), datamodule=folder())
    engine(max_steps=8).fit(OSDIRF(), datamodule=folder(), ckpt_path=checkpoint)


@pytest.mark.usefixtures("keep_denoiser")
@pytest.mark.parametrize("cached", [True, False])
def test_resumed_training_ends_as_the_undisturbed_one(
    cached: bool, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser that is kept is that of step 4, at which the checkpoint is saved."""
    monkeypatch.setattr(field_training, "_JUDGED_EVERY", 4)
    arguments = {"feature_cache": cached, "max_steps": 8}
    torch.manual_seed(7)
    undisturbed = tiny(**arguments)
    initial = {key: value.clone() for key, value in undisturbed.model.network.denoiser.state_dict().items()}
    torch.manual_seed(3)
    engine().fit(undisturbed, datamodule=folder())

    broken_off = tiny(**arguments)
    broken_off.model.network.backbone.load_state_dict(undisturbed.model.network.backbone.state_dict())
    broken_off.model.network.denoiser.load_state_dict(initial)
    broken_off.model.network.ema.module.load_state_dict(initial)
    broken_off.model.network.kept.load_state_dict(initial)
    torch.manual_seed(3)
    kept = interrupted(engine(callbacks=[StopAt(5)]), broken_off, folder())

    resumed = tiny(**arguments)
    run = engine()
    run.fit(resumed, datamodule=folder(), ckpt_path=kept)
    assert run.trainer.global_step == 8
    assert_same_state(resumed.state_dict(), undisturbed.state_dict(), rtol=1e-4, atol=1e-5)
    assert int(resumed.model.network.kept_step) == 4
    _assert_same(*(_predictions(model, folder(), engine()) for model in (resumed, undisturbed)))
    assert resumed.model.scorer.num_images == 12
    assert torch.isfinite(resumed.post_processor.image_threshold)


def test_train_with_ckpt_path_tests_the_resumed_model(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    kept = interrupted(engine(callbacks=[StopAt(5)]), tiny(), folder())
    resumed = engine()
    model = tiny()
    metrics = resumed.train(model, datamodule=folder(), ckpt_path=kept)[0]
    finished = OSDIRF.load_from_checkpoint(str(resumed.best_model_path))
    assert dict(metrics) == pytest.approx(engine().test(finished, datamodule=folder())[0], abs=1e-6)
    assert model.post_processor.image_threshold == finished.post_processor.image_threshold


def test_trainer_arguments_win_over_the_models(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    for arguments, steps in (({"max_steps": 4}, 4), ({"max_epochs": 4}, 8), ({}, 6)):  # two steps an epoch
        run = engine(**arguments)
        run.fit(tiny(), datamodule=folder())
        assert run.trainer.global_step == steps
    run = engine()
    run.fit(tiny(max_epochs=1), datamodule=folder())
    assert run.trainer.global_step == 2


def test_default_number_of_steps(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OSDIRF, "default_steps", 4)
    model, run = tiny(max_steps=None), engine()
    run.fit(model, datamodule=folder())
    assert run.trainer.global_step == 4
    assert model.lr_schedulers().get_last_lr() == [pytest.approx(0.0, abs=1e-9)]  # the schedule ends there, too


def test_fast_dev_run_writes_no_checkpoint(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    engine(fast_dev_run=True).fit(tiny(), datamodule=folder())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_seed_makes_a_training_repeatable(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    models = []
    for seed in (5, 5, 6):
        models.append(tiny(seed=seed))
        engine().fit(models[-1], datamodule=folder())
    one, other, different = (model.model.network.denoiser.state_dict() for model in models)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not torch.allclose(one["network.output.weight"], different["network.output.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("shares", "kept"),
    [((0.3, 0.31, 0.2, 0.21), 0.3), ((0.3, 0.4, 0.4, 0.5), 0.0), ((0.3, 0.31, 0.4, 0.5), 0.0)],
    ids=["generalises", "memorises", "memorises at the end"],
)
def test_a_denoiser_is_kept_unless_it_memorises_the_training_images(
    folder: MakeFolder,
    tiny: MakeModel,
    engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    shares: tuple[float, ...],
    kept: float,
) -> None:
    found = iter(shares)  # on held-out images and on those that it was trained on, at two steps
    monkeypatch.setattr(field_training, "_JUDGED_EVERY", 3)
    monkeypatch.setattr(FieldNetwork, "explained_share", lambda *_: next(found))
    monkeypatch.setattr(FieldTraining, "_compare_with_none", lambda _, fitted, __: fitted)
    model = tiny()
    engine().fit(model, datamodule=folder())
    assert model.explained_share == pytest.approx(kept)


def test_interim_validation(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    model = tiny(check_val_every_n_epoch=1)
    run = engine()
    run.fit(model, datamodule=folder())
    assert model.model.scorer.num_images == 12
    assert torch.isfinite(model.post_processor.image_threshold)


def test_training_without_validation_data(folder: MakeFolder, tiny: MakeModel, engine: MakeEngine) -> None:
    run = engine(limit_val_batches=0)
    run.fit(tiny(), datamodule=folder())
    loaded = OSDIRF.load_from_checkpoint(run.best_model_path)
    assert loaded.model.scorer.num_images == 12


def test_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine
) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: object) -> None:
            if trainer.global_step == 3:
                module.model.network.denoiser.network.output.bias.data.fill_(float("nan"))

    run = engine(callbacks=[Poison()])
    with pytest.raises(RuntimeError, match=r"step 3 .* nan; .* in (\S+);") as error:
        run.fit(tiny(), datamodule=folder())
    kept = str(error.value).split("kept in ")[1].split(";")[0]
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for key, value in state.items() if key.startswith("model.network.ema."))


def test_cache_leaves_the_datamodule_alone_and_decodes_no_image_twice(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    datamodule = folder()
    reads: list[int] = []
    original = datamodule.train_dataloader
    datamodule.setup()
    dataset_type = type(datamodule.train_data)
    read = dataset_type.__getitem__

    def counted(self: Any, index: int) -> Any:
        if self is datamodule.train_data:
            reads.append(index)
        return read(self, index)

    monkeypatch.setattr(dataset_type, "__getitem__", counted)
    run = engine()
    run.fit(tiny(), datamodule=datamodule)
    assert sorted(reads) == list(range(12))
    assert datamodule.train_dataloader == original
    assert run.trainer.datamodule is datamodule
    assert isinstance(next(iter(datamodule.train_dataloader())), ImageBatch)


@pytest.mark.usefixtures("float32_training")
def test_losses_are_the_same_with_and_without_the_cache(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine
) -> None:
    curves = []
    for cached in (True, False):
        keeper = Losses()
        model = tiny(feature_cache=cached, seed=0, max_steps=40, checkpoint_every_n_steps=0)
        engine(callbacks=[keeper]).fit(model, datamodule=folder())
        curves.append(keeper.losses)
    assert len(curves[0]) == len(set(curves[0])) == 40
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_augmentation_switches_the_cache_off(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        engine().fit(tiny(), datamodule=folder(train_augmentations=v2.RandomHorizontalFlip()))
    assert "the datamodule augments (RandomHorizontalFlip)" in caplog.text


def test_cache_beyond_the_limit_is_a_file_with_the_same_result(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for limit in (4.0, 0.0):
        torch.manual_seed(0)
        model = tiny(cache_memory_gb=limit)
        with caplog.at_level("INFO"):
            engine().fit(model, datamodule=folder())
        results.append(_predictions(model, folder(), engine()))
    _assert_same(*results)
    assert "MiB in memory" in caplog.text
    assert "MiB in a memory-mapped temporary file" in caplog.text


def test_mixed_precision_trains_the_denoiser_and_scores_in_float32(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine
) -> None:
    weights = []
    for precision in ("32-true", "bf16-mixed"):
        model, run = tiny(seed=0), engine(precision=precision)
        run.fit(model, datamodule=folder())
        weights.append(model.model.network.denoiser.state_dict())
        _assert_same(*(_predictions(model, folder(), engine(precision=one)) for one in ("32-true", precision)))
    exact, mixed = weights
    torch.testing.assert_close(exact, mixed, rtol=0.1, atol=1e-2)
    assert any(not torch.equal(exact[name], mixed[name]) for name in exact)


def test_gradient_checkpointing_trains_to_the_same_weights(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, computed = [], []
    compute = ConvMLPBlock.compute
    monkeypatch.setattr(ConvMLPBlock, "compute", lambda *inputs: computed.append(1) or compute(*inputs))
    for again in (False, True):
        model = tiny(seed=0, gradient_checkpointing=again)
        computed.clear()
        engine(limit_val_batches=0).fit(model, datamodule=folder())
        weights.append((len(computed), model.model.network.denoiser.state_dict()))
    (once, kept), (twice, recomputed) = weights
    torch.testing.assert_close(kept, recomputed, rtol=0, atol=1e-6)
    assert twice > once


@pytest.mark.parametrize(
    "arguments",
    [
        {"denoiser": "dit_s", "max_steps": 2},
        {"density": "standard", "feature_dim": None, "timestep": 0},
        {"density": "position", "backbone": "filter_bank", "layers": None},
        {"density": "mixture", "timestep": 999},
        {"denoiser": "none"},
    ],
    ids=lambda arguments: next(iter(arguments.values())),
)
def test_other_arguments_train_and_score(
    arguments: dict[str, Any],
    folder: MakeFolder,
    tiny: MakeModel,
    engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry._TRANSFORMERS, "dit_s", (48, 2, 6))  # all blocks are alike
    metrics = engine().train(tiny(**arguments), datamodule=folder())[0]
    assert np.isfinite(list(metrics.values())).all()
    if arguments.get("density") != "standard":  # which is not fitted on anything
        assert metrics["image_AUROC"] > 0.9


def test_scores_depend_neither_on_the_batch_nor_on_chance(trained: Any, folder: MakeFolder, engine: MakeEngine) -> None:
    model = OSDIRF.load_from_checkpoint(trained.checkpoint).eval()
    images = 3 * torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        together = model.model(images)
        shuffled = model.model(images.flip(0))
        for index in range(5):
            alone = model.model(images[index : index + 1])
            torch.testing.assert_close(alone.pred_score[0], together.pred_score[index], rtol=1e-5, atol=0)
            torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(shuffled.pred_score.flip(0), together.pred_score, rtol=1e-5, atol=0)
    assert together.anomaly_map.shape == (5, 1, 64, 64)
    _assert_same(_predictions(model, folder(), engine()), _predictions(model, folder(eval_batch_size=1), engine()))
