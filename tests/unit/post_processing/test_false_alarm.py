# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The post-processor on made-up scores and maps of normal and anomalous images."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUROC
from torch import Tensor

from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.post_processing.p_values import normalise


def _batch(scores: Tensor, anomalous: bool = False) -> ImageBatch:
    """Maps are largest in a corner, by as much as the score."""
    maps = torch.rand((len(scores), 1, 6, 5), generator=torch.Generator().manual_seed(0))
    maps[:, 0, 0, 0] = 2 + scores
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 6, 5),
        pred_score=scores,
        anomaly_map=maps,
        gt_label=torch.full((len(scores),), anomalous),
    )


def _scores(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def _fitted(rate: float = 0.05, *more: ImageBatch, **arguments: Any) -> FalseAlarmPostProcessor:
    post_processor = FalseAlarmPostProcessor(rate, **arguments)
    for batch in (_batch(_scores(99)), *more):
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def test_the_rate_is_the_share_of_normal_images_above_the_thresholds() -> None:
    post_processor, scores = _fitted(), _scores(99).sort().values
    assert float(post_processor.image_threshold) == pytest.approx(float(scores[-5]))
    assert float(post_processor.pixel_threshold) == pytest.approx(2 + float(scores[-5]))
    batch = _batch(_scores(20_000, seed=1))
    post_processor.post_process_batch(batch)
    low, high = post_processor.calibration["image_interval"]
    assert low < batch.pred_label.float().mean() < high
    torch.testing.assert_close(batch.pred_mask.flatten(1).any(dim=1), batch.pred_label)


def test_held_out_training_images_set_the_thresholds_that_as_many_validation_images_would() -> None:
    """They have no labels: all are normal."""
    reference, other, batch = _fitted(), FalseAlarmPostProcessor(0.05), _batch(_scores(99))
    other.add(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map), normal=True)
    other.fit("training")
    for name, value in reference.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.source == "training"


def test_anomalous_validation_images_change_nothing() -> None:
    reference, other = _fitted(), _fitted(0.05, _batch(torch.arange(50.0) + 9, anomalous=True))
    for name, value in reference.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_threshold_is_exactly_one_half() -> None:
    post_processor = _fitted()
    threshold = post_processor.image_threshold
    assert post_processor.image_scale(threshold) == 0.5
    assert post_processor.image_scale(threshold + 1e-3) > 0.5


def test_what_is_exported_says_what_lightning_says() -> None:
    post_processor, batch = _fitted(), _batch(_scores(30, seed=2) * 4)
    exported = post_processor(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map))
    post_processor.post_process_batch(batch)
    for name, value in exported._asdict().items():
        assert torch.equal(getattr(batch, name), value), name


def test_maps_alone_have_scores_and_scores_alone_have_labels() -> None:
    post_processor, batch = _fitted(), _batch(_scores(9, seed=3).abs())
    from_map = post_processor(InferenceBatch(anomaly_map=batch.anomaly_map - 2))
    alone = post_processor(InferenceBatch(pred_score=batch.pred_score))
    torch.testing.assert_close(from_map.pred_score.flatten(), alone.pred_score)
    assert alone.pred_mask is None
    assert alone.pred_label is not None


def test_normalised_scores_are_those_of_numpy() -> None:
    scale = _fitted().image_scale
    raw = torch.cat([torch.linspace(-300, 300, 2001), scale.knots])
    np.testing.assert_allclose(scale(raw).numpy(), normalise(raw.numpy(), scale.knots.numpy()), atol=3e-7)


def test_ranking_is_that_of_the_raw_scores() -> None:
    """Far above, where anomalib cuts scores off, and far below."""
    post_processor = _fitted()
    raw, labels = torch.tensor([-80.0, -75, 900, 950, 1000, 1100]), torch.tensor([0, 1, 0, 1, 0, 1])
    normalised = post_processor.image_scale(raw)
    assert (normalised.diff() > 0).all()
    metric = AUROC(fields=["pred_score", "gt_label"])
    metric.update(SimpleNamespace(pred_score=normalised, gt_label=labels))
    assert metric.compute() == pytest.approx(6 / 9)


def test_before_a_fit_scores_are_raw() -> None:
    scores = _scores(5)
    result = FalseAlarmPostProcessor(0.1)(InferenceBatch(pred_score=scores))
    assert torch.equal(result.pred_score, scores)


def test_sensitivity_moves_the_p_value_of_the_threshold() -> None:
    """At 2/3 the exponent is 1/2: the square root of the rate."""
    batch = _batch(_scores(20_000, seed=1))
    _fitted(0.04, image_sensitivity=2 / 3).post_process_batch(batch)
    assert 0.13 < batch.pred_label.float().mean() < 0.27


def test_a_checkpoint_restores_thresholds_scales_and_rate() -> None:
    fitted, other = _fitted(extrapolate=True), FalseAlarmPostProcessor(0.3)
    other.load_state_dict(fitted.state_dict())
    other.load_checkpoint_config(fitted.checkpoint_config())
    assert (other.false_alarm_rate, other.extrapolate) == (0.05, True)
    assert other.calibration == fitted.calibration
    scores = _scores(7)
    assert torch.equal(other.image_scale(scores), fitted.image_scale(scores))


def test_trial_runs_set_nothing() -> None:
    post_processor = FalseAlarmPostProcessor(0.05)
    post_processor.on_validation_batch_end(None, None, _batch(_scores(2)))
    post_processor.on_validation_epoch_end(SimpleNamespace(sanity_checking=True, fast_dev_run=0), None)
    assert post_processor.image_threshold.isnan()


def test_what_was_fitted_outlasts_a_refusal() -> None:
    post_processor = _fitted()
    before = post_processor.checkpoint_config() | {"threshold": float(post_processor.image_threshold)}
    post_processor.on_validation_batch_end(None, None, _batch(_scores(5)))
    with pytest.raises(ValueError, match=r"false_alarm_rate=0\.05 .* 5 held-out normal images"):
        post_processor.on_validation_epoch_end(None, None)
    assert post_processor.checkpoint_config() | {"threshold": float(post_processor.image_threshold)} == before


def _datamodule(normal: int, training: int) -> Any:
    frame = pd.DataFrame({"label_index": [0] * normal + [1] * 7})
    return SimpleNamespace(train_data=range(training), val_data=SimpleNamespace(samples=frame))


def _module(reason: str | None) -> Any:
    return SimpleNamespace(reason_no_held_out_scores=reason)


@pytest.mark.parametrize(
    ("normal", "training", "images", "source"),
    [
        (50, 900, "auto", "validation"),
        (5, 90, "auto", "training"),
        (50, 900, "training", "training"),
        (50, 900, "validation", "validation"),
    ],
)
def test_source_of_the_thresholds(normal: int, training: int, images: str, source: str) -> None:
    post_processor = FalseAlarmPostProcessor(0.05, images=images)
    assert post_processor.choose_source(_module(None), _datamodule(normal, training)) == source


def test_extrapolation_takes_the_larger_set() -> None:
    post_processor = FalseAlarmPostProcessor(1e-4, extrapolate=True)
    assert post_processor.choose_source(_module(None), _datamodule(50, 90)) == "training"
    assert post_processor.choose_source(_module(None), _datamodule(90, 50)) == "validation"


@pytest.mark.parametrize(
    ("normal", "training", "images", "reason", "sentence"),
    [
        (10, 20, "auto", None, "false_alarm_rate=0.01 .* 20 training images"),
        (0, 500, "auto", "it has no density", "false_alarm_rate=0.01 .* 0 held-out normal images.* Training images"),
        (0, 500, "validation", None, "false_alarm_rate=0.01 .* 0 held-out normal images"),
        (500, 500, "training", "it has no density", "images=training"),
    ],
)
def test_too_few_images_are_refused_before_a_training(
    normal: int, training: int, images: str, reason: str | None, sentence: str
) -> None:
    post_processor = FalseAlarmPostProcessor(0.01, images=images)
    trainer = SimpleNamespace(datamodule=_datamodule(normal, training))
    with pytest.raises(ValueError, match=sentence):
        post_processor.on_fit_start(trainer, _module(reason))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"false_alarm_rate": 0}, "false_alarm_rate=0 "),
        ({"false_alarm_rate": 1.5}, "false_alarm_rate=1.5"),
        ({"false_alarm_rate": 0.1, "images": "test"}, "images='test'"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FalseAlarmPostProcessor(**arguments)
