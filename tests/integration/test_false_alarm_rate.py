# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Thresholds by a false-alarm rate through training, checkpoints, exports, app and report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.inference.reading import read_image
from anomalib_osdirf.inference.scoring import load_scorer
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.report import ReportCallback
from anomalib_osdirf.report.page import Run
from anomalib_osdirf.report.results import Results
from conftest import TINY, Trained, pre_processor
from exactness import TOLERANCES, compare, export, predict, textured_files
from small_data import small_folder

RATE = 0.2  # four images are enough
COMMAND = [
    "--model=OSDIRF",
    "--model.backbone=test_efficientnet",
    "--model.pre_trained=false",
    "--model.feature_dim=8",
    "--model.grid_size=4",
    "--model.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
]


def good_parts(parts: Path) -> Folder:
    """Nothing but good parts, as a factory has at the start."""
    return Folder("parts", root=parts, normal_dir="train/good", num_workers=0, seed=0)


@pytest.fixture(scope="module")
def calibrated(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train with a false-alarm rate on good parts alone."""
    root = tmp_path_factory.mktemp("calibrated")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    model = OSDIRF(**TINY, seed=0, false_alarm_rate=RATE, pre_processor=pre_processor())
    engine.fit(model, datamodule=good_parts(parts))
    checkpoint = Path(str(engine.best_model_path))
    return Trained(checkpoint.parents[2], checkpoint, {})


def test_good_parts_alone_give_thresholds(calibrated: Trained) -> None:
    model = OSDIRF.load_from_checkpoint(calibrated.checkpoint)
    post_processor = model.post_processor
    assert isinstance(post_processor, FalseAlarmPostProcessor)
    assert post_processor.calibration["image"]["source"] == "training"
    assert post_processor.calibration["image"]["images"] == model.model.scorer.num_images
    assert torch.isfinite(torch.stack([post_processor.image_threshold, post_processor.pixel_threshold])).all()


def test_training_images_are_held_out_of_their_own_density(calibrated: Trained, parts: Path) -> None:
    """The threshold is the second largest of ten held-out scores; the finished model's second largest is far below."""
    model, data = OSDIRF.load_from_checkpoint(calibrated.checkpoint).eval(), good_parts(parts)
    data.setup("fit")
    images = [torch.from_numpy(read_image(Path(file), 10**6)) for file in data.train_data.samples.image_path]
    scores = torch.stack([model(image.permute(2, 0, 1)[None]).pred_score for image in images])
    assert len(scores) == model.model.scorer.num_images
    assert len(scores) == 10
    assert scores.flatten().topk(2).values[1] < 0.4  # where nothing is held out it is the threshold, 0.5


@pytest.fixture(scope="module")
def exported(calibrated: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {kind: export(kind, root, calibrated.checkpoint) for kind in ("torch", "onnx", "openvino")}


@pytest.fixture(scope="module")
def predicted(calibrated: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("predicted")
    return predict(OSDIRF(), textured_files(root / "images"), root, calibrated.checkpoint)


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_exports_say_what_engine_predict_says(
    kind: str,
    exported: dict[str, Path],
    predicted: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    assert len({float(batch.pred_score) for batch in predicted}) == len(predicted)
    compare(predicted, exported[kind], *TOLERANCES[kind])


def test_the_app_shows_p_values_of_exports_and_checkpoints(
    calibrated: Trained, exported: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    image = read_image(parts / "test" / "good" / "00.png", 10**6)
    raw = export("openvino", tmp_path, calibrated.checkpoint, onnx_kwargs={"post_processor": False})
    results = [load_scorer(file).score(image) for file in (exported["openvino"], calibrated.checkpoint, raw)]
    for result in results:
        assert result.p_value == pytest.approx(RATE ** (result.score / (1 - result.score)), rel=1e-4)
        assert result.score == pytest.approx(results[0].score, abs=1e-4)
    metadata = json.loads(exported["openvino"].with_suffix(".json").read_text(encoding="utf-8"))
    assert metadata["calibration"]["image"]["false_alarm_rate"] == RATE
    assert metadata["calibration"]["image"]["source"] == "training"


def test_nothing_needs_repeating_and_the_report_has_p_values(
    calibrated: Trained, parts: Path, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    callback = ReportCallback(tmp_path / "report", quiet=True)
    trained = engine(callbacks=[callback])
    trained.test(OSDIRF(), datamodule=small_folder(parts), ckpt_path=calibrated.checkpoint)
    run = Run(Results(tmp_path / "report"))
    model = OSDIRF.load_from_checkpoint(calibrated.checkpoint)
    raw = torch.tensor(run.results.scores)
    np.testing.assert_allclose(run.scores, model.post_processor.image_scale(raw).numpy(), atol=1e-6)
    assert run.rate == RATE
    assert run.threshold[0] == 0.5
    assert "for 20 % of false alarms" in run.threshold[1]
    assert "p-value" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_a_finished_training_gets_other_thresholds_without_training(
    trained: Trained, parts: Path, engine: Callable[..., Engine]
) -> None:
    before = torch.load(trained.checkpoint, weights_only=True)["state_dict"]
    session = engine()
    arguments = {**TINY, "seed": 0, "pre_processor": pre_processor(), "false_alarm_rate": RATE}
    session.train(OSDIRF(**arguments), datamodule=small_folder(parts), ckpt_path=trained.checkpoint)
    model = OSDIRF.load_from_checkpoint(str(session.best_model_path))
    assert model.post_processor.false_alarm_rate == RATE
    assert model.post_processor.calibration["image"]["source"] == "validation"
    assert torch.equal(model.state_dict()["model.network.projection.weight"], before["model.network.projection.weight"])
    assert Path(str(session.best_model_path)) != trained.checkpoint


def test_other_thresholds_need_a_training_to_be_set(
    trained: Trained, parts: Path, engine: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError, match=r"false_alarm_rate=0.2"):
        engine().test(OSDIRF(false_alarm_rate=RATE), datamodule=small_folder(parts), ckpt_path=trained.checkpoint)


def test_invad_has_thresholds_from_training_images_too(parts: Path, engine: Callable[..., Engine]) -> None:
    model = InvAD(**TINY, seed=0, false_alarm_rate=RATE, pre_processor=pre_processor())
    engine().fit(model, datamodule=good_parts(parts))
    assert model.post_processor.calibration["image"]["source"] == "training"
    assert torch.isfinite(model.post_processor.image_threshold)


def test_images_that_do_not_vary_have_no_threshold(parts: Path, tmp_path: Path, engine: Callable[..., Engine]) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    for index in range(10):
        shutil.copy(parts / "train/good/00.png", folder / f"{index}.png")
    model = OSDIRF(**TINY, seed=0, false_alarm_rate=RATE, pre_processor=pre_processor())
    with pytest.raises(ValueError, match=r"All \d+ normal images"):
        engine().fit(model, datamodule=Folder("same", root=tmp_path, normal_dir="same", num_workers=0, seed=0))


def test_too_few_images_are_refused_before_the_training(parts: Path, engine: Callable[..., Engine]) -> None:
    model = OSDIRF(**TINY, false_alarm_rate=0.01, pre_processor=pre_processor())
    with pytest.raises(ValueError, match=r"false_alarm_rate=.* 12 training images.* 99 or more"):
        engine().fit(model, datamodule=small_folder(parts))
    assert model.trainer.global_step == 0


def test_a_refusal_at_the_end_keeps_the_training(parts: Path, tmp_path: Path, engine: Callable[..., Engine]) -> None:
    """Dataloaders do not tell beforehand how many normal images they have."""
    data = small_folder(parts)
    session, model = engine(), OSDIRF(**TINY, false_alarm_rate=0.01, pre_processor=pre_processor())
    data.trainer = SimpleNamespace(model=model)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"false_alarm_rate=.*give 99 or more"):
        session.fit(model, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    kept = OSDIRF.load_from_checkpoint(checkpoint)
    assert kept.model.scorer.num_images == 12
    assert kept.post_processor.image_threshold.isnan()


def test_a_rate_and_another_post_processor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"false_alarm_rate=0.1 and a FalseAlarmPostProcessor"):
        OSDIRF(**TINY, false_alarm_rate=0.1, post_processor=FalseAlarmPostProcessor(0.2))


def test_a_post_processor_of_ones_own_is_restored_too(
    parts: Path, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    post_processor = FalseAlarmPostProcessor(0.001, extrapolate=True, images="training")
    session = engine()
    session.fit(
        OSDIRF(**TINY, post_processor=post_processor, pre_processor=pre_processor()), datamodule=small_folder(parts)
    )
    restored = OSDIRF.load_from_checkpoint(str(session.best_model_path)).post_processor
    assert (restored.false_alarm_rate, restored.extrapolate, restored.images) == (0.001, True, "training")
    assert torch.equal(restored.image_scale.knots, post_processor.image_scale.knots)


@pytest.mark.parametrize("name", ["Patchcore", "DiffusionAD"])
def test_models_without_a_density_have_thresholds_from_validation_images(
    name: str, parts: Path, engine: Callable[..., Engine]
) -> None:
    post_processor = FalseAlarmPostProcessor(RATE)
    model: Any
    if name == "Patchcore":
        model = Patchcore(
            "resnet18", ["layer1"], pre_trained=False, post_processor=post_processor, pre_processor=pre_processor()
        )
    else:
        small = {"base_channels": 8, "channel_multipliers": (1, 2), "attention_levels": 0, "segmentation_channels": 8}
        size = DiffusionAD.configure_pre_processor((64, 64))
        model = DiffusionAD(**small, residual_blocks=1, max_steps=2, post_processor=post_processor, pre_processor=size)
    session = engine()
    session.fit(model, datamodule=small_folder(parts))
    assert post_processor.calibration["image"]["source"] == "validation"
    assert post_processor.calibration["image"]["images"] == 4
    restored = type(model).load_from_checkpoint(
        str(session.best_model_path), post_processor=FalseAlarmPostProcessor(RATE)
    )
    assert torch.equal(restored.post_processor.image_scale.knots, post_processor.image_scale.knots)


def test_one_rate_for_many_categories(parts: Path, engine: Callable[..., Engine]) -> None:
    data = MultiCategory({name: small_folder(parts) for name in ("one",)})
    model = OSDIRF(**TINY, false_alarm_rate=RATE, pre_processor=pre_processor())
    engine().fit(model, datamodule=data)
    assert model.post_processor.calibration["image"]["images"] == 4


@pytest.mark.slow
def test_quantised_models_have_thresholds_of_their_own(calibrated: Trained, parts: Path, tmp_path: Path) -> None:
    file = export("openvino", tmp_path, calibrated.checkpoint, "INT8_PTQ", datamodule=good_parts(parts))
    metadata = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    own = OSDIRF.load_from_checkpoint(calibrated.checkpoint).post_processor
    assert metadata["calibration"]["image"]["source"] == "training"
    assert metadata["image_threshold"] != float(own.image_threshold)
    scorer = load_scorer(file)
    scores = [scorer.score(read_image(one, 10**6)).score for one in (parts / "train" / "good").iterdir()]
    assert np.mean(np.array(scores) > 0.5) <= RATE


def test_command_line_with_nothing_but_good_parts(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data=Folder", "--data.name=parts", f"--data.root={parts}", "--data.normal_dir=train/good"]
    arguments = [*COMMAND, "--model.false_alarm_rate=0.2", *data, "--data.num_workers=0", "--data.seed=0"]
    with caplog.at_level("INFO", "anomalib_osdirf"):
        assert main(["train", *arguments]) == 0
    assert "Image threshold" in caplog.text
    assert "the false-alarm rate 20 % lies between" in caplog.text
    assert len(list(tmp_path.rglob("model.ckpt"))) == 1
