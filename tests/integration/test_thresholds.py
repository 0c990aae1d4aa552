# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Default thresholds on a user's own folders: without masks, without defects, with hardly any image."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.inference.reading import read_image
from anomalib_osdirf.inference.scoring import Score, load_scorer
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.report import ReportCallback
from anomalib_osdirf.report.page import Run
from anomalib_osdirf.report.results import Results
from conftest import TINY, Trained, pre_processor
from exactness import TOLERANCES, compare, export, predict
from small_data import small_folder
from textures import textured_image

DEFECT = np.s_[16:32, 16:32]  # of 64 x 64, see textured_image


@pytest.fixture(scope="module")
def own_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: 60 good parts, eight with a defect, no mask."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(7)
    for folder, count in (("good", 60), ("defect", 8)):
        (root / folder).mkdir()
        for index in range(count):
            image = textured_image(rng, 64, 64, defect=folder == "defect")
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), image)
    return root


def own_folder(root: Path, **arguments: Any) -> Folder:
    return Folder(**{"name": "own", "root": root, "normal_dir": "good", "num_workers": 0, "seed": 0, **arguments})


@pytest.fixture(scope="module")
def unmasked(own_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train on them."""
    root = tmp_path_factory.mktemp("unmasked")
    callback = ReportCallback(root / "report", page=False, quiet=True)
    engine = Engine(
        default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False, callbacks=[callback]
    )
    model = OSDIRF(**{**TINY, "grid_size": 8}, seed=0, pre_processor=pre_processor(128))
    engine.train(model, datamodule=own_folder(own_parts, abnormal_dir="defect"))
    return Trained(root, Path(str(engine.best_model_path)), {})


def assert_masks_lie_on_the_defect(score: Callable[[np.ndarray], Score]) -> None:
    """Images that nobody has seen: the mask of one without a defect is empty."""
    rng = np.random.default_rng(3)
    for defect in (False, True):
        image = textured_image(rng, 64, 64, defect).astype(np.float32) / 255
        result = score(image)
        assert result.mask is not None
        assert result.label is defect
        assert result.mask.any() == defect
        if defect:
            assert result.mask[DEFECT].any()
            assert result.mask.mean() < 0.5


def test_without_masks_a_checkpoint_finds_where_the_defect_is(unmasked: Trained) -> None:
    assert_masks_lie_on_the_defect(load_scorer(unmasked.checkpoint).score)


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_without_masks_exports_say_what_engine_predict_says(
    kind: str, unmasked: Trained, own_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score by the best F1, the map by normal images."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    predicted = predict(OSDIRF(), own_parts / "defect", tmp_path, unmasked.checkpoint)
    assert all(batch.pred_mask.any() and not batch.pred_mask.all() for batch in predicted)
    compare(predicted, export(kind, tmp_path, unmasked.checkpoint), *TOLERANCES[kind])


def test_without_masks_a_raw_export_is_normalised_alike(unmasked: Trained, tmp_path: Path) -> None:
    raw = export("onnx", tmp_path, unmasked.checkpoint, onnx_kwargs={"post_processor": False})
    assert_masks_lie_on_the_defect(load_scorer(raw).score)


def test_without_masks_a_quantised_model_finds_where_the_defect_is(
    unmasked: Trained, own_parts: Path, tmp_path: Path
) -> None:
    """Its thresholds are of the same kinds, and its own."""
    data = own_folder(own_parts, abnormal_dir="defect")
    file = export("openvino", tmp_path, unmasked.checkpoint, "INT8_PTQ", datamodule=data)
    values = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    own = OSDIRF.load_from_checkpoint(unmasked.checkpoint).post_processor
    assert set(values["calibration"]) == set(own.calibration) == {"pixel"}
    assert values["pixel_threshold"] != float(own.pixel_threshold)
    assert_masks_lie_on_the_defect(load_scorer(file).score)


def test_the_report_has_the_models_threshold(unmasked: Trained) -> None:
    """No defective image is on it, and called good."""
    run = Run(Results(unmasked.results / "report"))
    assert run.rate is None
    assert run.threshold[0] == 0.5
    assert run.metrics["image miss rate"].value == 0


def test_a_test_takes_the_checkpoints_thresholds(
    unmasked: Trained, own_parts: Path, engine: Callable[..., Engine]
) -> None:
    model = OSDIRF()
    engine().test(model, datamodule=own_folder(own_parts, abnormal_dir="defect"), ckpt_path=unmasked.checkpoint)
    saved = torch.load(unmasked.checkpoint, weights_only=True)
    assert model.post_processor.calibration == saved["anomalib_post_processor_config"]["calibration"]
    assert model.post_processor.pixel_threshold == saved["state_dict"]["post_processor._pixel_threshold"]


@pytest.mark.parametrize("model_class", [OSDIRF, InvAD])
def test_good_parts_alone_give_scores_with_a_meaning(
    model_class: Any, own_parts: Path, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    """No metric that takes defects has a value; scores are neither all alike nor cut off."""
    callback = ReportCallback(tmp_path / "report", page=False, quiet=True)
    model = model_class(**TINY, seed=0, pre_processor=pre_processor())
    metrics = engine(callbacks=[callback]).train(model, datamodule=own_folder(own_parts))[0]
    assert np.isnan(metrics["image_AUROC"])
    run = Run(Results(tmp_path / "report"))
    assert set(model.post_processor.calibration) == {"image", "pixel"}
    assert run.rate == pytest.approx(1 / (model.model.scorer.num_images + 1))
    assert ((run.scores > 0) & (run.scores < 1)).all()
    assert len(set(run.scores)) == len(run.scores)


@pytest.mark.parametrize("count", [2, 3])
def test_a_handful_of_images_gives_thresholds(
    count: int, own_parts: Path, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    (tmp_path / "few").mkdir()
    for index in range(count):
        shutil.copy(own_parts / "good" / f"{index:02d}.png", tmp_path / "few")
    model = OSDIRF(**TINY, seed=0, pre_processor=pre_processor())
    data = own_folder(tmp_path, normal_dir="few", normal_test_dir="few")
    engine(limit_val_batches=0).fit(model, datamodule=data)
    assert model.post_processor.calibration["image"]["images"] == count
    result = model.eval()(torch.rand(2, 3, 64, 64))
    for values in (result.pred_score, result.anomaly_map):
        assert ((values >= 0) & (values <= 1)).all()


def test_no_normal_image_to_set_a_threshold_by_is_said(
    own_parts: Path, engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    """DiffusionAD scores no training image as if it were new."""
    small = {"base_channels": 8, "channel_multipliers": (1, 2), "attention_levels": 0, "segmentation_channels": 8}
    size = DiffusionAD.configure_pre_processor((64, 64))
    model = DiffusionAD(**small, residual_blocks=1, max_steps=1, pre_processor=size)
    engine(limit_val_batches=0).fit(model, datamodule=own_folder(own_parts))
    assert "There is no threshold" in caplog.text


def test_a_checkpoint_with_anomalibs_post_processor_keeps_it(parts: Path, engine: Callable[..., Engine]) -> None:
    session, post_processor = engine(), PostProcessor()
    model = OSDIRF(**TINY, post_processor=post_processor, pre_processor=pre_processor())
    session.fit(model, datamodule=small_folder(parts))
    restored = OSDIRF.load_from_checkpoint(str(session.best_model_path)).post_processor
    assert not isinstance(restored, FalseAlarmPostProcessor)
    assert restored.image_threshold == post_processor.image_threshold


def test_a_threshold_is_set_in_checkpoint_and_export_alike(unmasked: Trained, own_parts: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    shutil.copy(unmasked.checkpoint, checkpoint)
    model = OSDIRF.load_from_checkpoint(checkpoint, map_location="cpu")
    model.to_openvino(tmp_path, onnx_kwargs={"verbose": False})
    exported = next(tmp_path.rglob("*.xml"))
    images = [read_image(file, 10**6) for file in sorted(own_parts.rglob("0*.png"))]
    model.post_processor = None
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        raw = model.eval()(batch).pred_score.flatten().numpy()
    value = float(np.sort(raw)[-4:-2].mean())
    before = [load_scorer(file).score(images[0]) for file in (checkpoint, exported)]
    for file in (checkpoint, exported):
        assert main(["threshold", str(file), repr(value)]) == 0
    for file, old in zip((checkpoint, exported), before, strict=True):
        scorer = load_scorer(file)
        scores = [scorer.score(image) for image in images]
        assert [score.label for score in scores] == (raw > value).tolist()
        assert [score.score > 0.5 for score in scores] == (raw > value).tolist()
        np.testing.assert_array_equal(scores[0].map, old.map)
    assert json.loads(exported.with_suffix(".json").read_text("utf-8"))["image_threshold"] == pytest.approx(value)


def test_a_threshold_is_not_set_in_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert main(["threshold", str(tmp_path / "model.onnx"), "3"]) == 1
    assert "MODEL" in capsys.readouterr().err
