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
from anomalib_osdirf.post_processing.p_values import normalise, p_value, raw_scores


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


def _fitted(rate: float | None = 0.05, *more: ImageBatch, **arguments: Any) -> FalseAlarmPostProcessor:
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
    low, high = post_processor.calibration["image"]["interval"]
    assert low < batch.pred_label.float().mean() < high
    torch.testing.assert_close(batch.pred_mask.flatten(1).any(dim=1), batch.pred_label)


def _rows(count: int, seed: int = 0) -> Tensor:
    """Held-out training images: score, largest and smallest value of the map."""
    batch = _batch(_scores(count, seed))
    maps = batch.anomaly_map.flatten(1)
    return torch.stack([batch.pred_score, maps.amax(dim=1), maps.amin(dim=1)], dim=1)


def test_held_out_training_images_set_the_thresholds_that_as_many_validation_images_would() -> None:
    reference, other = _fitted(), FalseAlarmPostProcessor(0.05)
    other.note_training(_rows(99))
    other.fit()
    for name, value in reference.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.calibration["image"]["source"] == "training"


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


def test_raw_scores_come_back_from_normalised_ones() -> None:
    knots = _fitted().image_scale.knots.double().numpy()
    raw = np.concatenate([np.linspace(-300, 300, 2001), knots])
    np.testing.assert_allclose(raw_scores(normalise(raw, knots), knots), raw, rtol=1e-9, atol=1e-9)


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


# ------------------------------------------------------------------ without a rate


def _batches(masks: bool) -> tuple[ImageBatch, ImageBatch]:
    """Normal images that score 0 to 3, and anomalous ones that score 10 to 14, with maps up to 2 above the score."""
    normal, anomalous = _batch(torch.arange(4.0)), _batch(10 + torch.arange(5.0), anomalous=True)
    if masks:
        normal.gt_mask = torch.zeros(4, 6, 5, dtype=torch.bool)
        anomalous.gt_mask = torch.zeros(5, 6, 5, dtype=torch.bool)
        anomalous.gt_mask[:, 0, 0] = True
    return normal, anomalous


def _default(*batches: ImageBatch, training: int = 0) -> FalseAlarmPostProcessor:
    post_processor = FalseAlarmPostProcessor()
    if training:
        post_processor.note_training(_rows(training))
    for batch in batches:
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def test_the_threshold_of_the_best_f1_lies_midway_between_its_neighbours() -> None:
    post_processor = _default(*_batches(masks=True))
    assert post_processor.image_threshold == (3 + 10) / 2
    assert post_processor.pixel_threshold == (5 + 12) / 2
    assert post_processor.calibration == {}


def test_each_image_is_on_its_side_of_the_threshold_of_the_best_f1() -> None:
    """With anomalib's the lowest defect is on the threshold, and called normal."""
    post_processor = _default(*_batches(masks=True))
    for batch in _batches(masks=True):
        post_processor.post_process_batch(batch)
        assert torch.equal(batch.pred_label, batch.gt_label)
        assert torch.equal(batch.pred_mask.squeeze(1), batch.gt_mask)


def test_with_the_best_f1_scores_are_normalised_as_by_anomalib() -> None:
    post_processor = _default(*_batches(masks=True))
    batch = _batches(masks=True)[0]
    raw = batch.pred_score.clone()
    post_processor.post_process_batch(batch)
    torch.testing.assert_close(batch.pred_score, ((raw - 6.5) / 14 + 0.5).clamp(0, 1))


def test_where_all_are_called_anomalous_none_lies_on_the_threshold() -> None:
    normal, anomalous = _batch(torch.full((1,), 5.0)), _batch(torch.tensor([5.0, 6, 7]), anomalous=True)
    _default(normal, anomalous).post_process_batch(anomalous)
    assert anomalous.pred_label.all()


def test_neighbouring_scores_in_floating_point_are_told_apart() -> None:
    lower = torch.tensor([0.1])
    higher = torch.nextafter(lower, torch.ones(1))
    post_processor = _default(_batch(lower), _batch(higher, anomalous=True))
    assert lower <= post_processor.image_threshold < higher


def test_without_masks_the_pixel_threshold_is_that_of_normal_images() -> None:
    """No normal map exceeds it, and the scores' threshold stays that of the best F1."""
    batches = _batches(masks=False)
    post_processor = _default(*batches)
    assert post_processor.image_threshold == (3 + 10) / 2
    assert post_processor.pixel_threshold == 5
    assert set(post_processor.calibration) == {"pixel"}
    for batch in batches:
        post_processor.post_process_batch(batch)
        shares = batch.pred_mask.flatten(1).float().mean(dim=1)
        assert torch.equal(shares > 0, batch.gt_label)
        assert (shares < 0.1).all()


def test_levels_of_both_kinds_are_exported_and_restored() -> None:
    """The normalised values of each are its own."""
    fitted, restored = _default(*_batches(masks=False)), FalseAlarmPostProcessor()
    restored.load_state_dict(fitted.state_dict())
    restored.load_checkpoint_config(fitted.checkpoint_config())
    batch = _batches(masks=False)[1]
    exported = restored(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map))
    fitted.post_process_batch(batch)
    for name, value in exported._asdict().items():
        assert torch.equal(getattr(batch, name), value), name


@pytest.mark.parametrize(
    ("normal", "training", "rate", "source"),
    [
        (4, 38, 1 / 39, "training"),
        (40, 38, 1 / 41, "validation"),
        (100, 500, 0.01, "validation"),
        (3, 0, 0.25, "validation"),
    ],
)
def test_without_defects_the_rate_is_1_percent_or_what_the_images_support(
    normal: int, training: int, rate: float, source: str
) -> None:
    post_processor = _default(_batch(_scores(normal, seed=1)), training=training)
    for level in ("image", "pixel"):
        found = post_processor.calibration[level]
        assert (found["false_alarm_rate"], found["source"]) == (pytest.approx(rate), source)


def test_the_log_says_which_rate_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "anomalib_osdirf"):
        _default(*_batches(masks=False)[:1], training=38)
    image, pixel = caplog.messages
    assert "defective validation images" in image
    assert "masks of defects" in pixel
    for message in (image, pixel):
        assert "from 38 training images" in message
        assert "2.6 % (1 % takes 99 images)" in message


@pytest.mark.parametrize("scores", [[4.0], [-4.0, -4.0], [0.0] * 7, [1.0, 2.0]])
def test_few_or_equal_normal_images_have_a_threshold_that_scores_lie_around(scores: list[float]) -> None:
    """The highest of them; what is above has a label, in order and not cut off."""
    post_processor = _default(_batch(torch.tensor(scores)))
    raw = max(scores) + torch.tensor([-50.0, -1, 0, 1, 50, 100])
    result = post_processor(InferenceBatch(pred_score=raw))
    assert result.pred_label.tolist() == [False, False, False, True, True, True]
    assert (result.pred_score.diff() > 0).all()
    assert ((result.pred_score > 0) & (result.pred_score < 1)).all()


def test_defects_alone_leave_the_threshold_to_training_images() -> None:
    """The best F1 would call everything anomalous."""
    post_processor = _default(_batch(5 + torch.arange(3.0), anomalous=True), training=20)
    assert post_processor.calibration["image"]["source"] == "training"


def test_a_later_validation_leaves_what_training_images_set() -> None:
    post_processor = _default(training=20)
    before = post_processor.image_threshold.clone()
    post_processor.on_validation_batch_end(None, None, _batch(100 + _scores(9)))
    assert post_processor.fit() == []
    assert torch.equal(post_processor.image_threshold, before)


def test_without_any_normal_image_nothing_is_set() -> None:
    post_processor = _default(_batch(torch.arange(3.0), anomalous=True))
    assert post_processor.image_threshold.isnan()


def test_a_sensitivity_that_was_asked_for_outlasts_the_checkpoints() -> None:
    other = FalseAlarmPostProcessor(image_sensitivity=0.6)
    other.load_checkpoint_config(FalseAlarmPostProcessor(pixel_sensitivity=0.7).checkpoint_config())
    assert (other.image_sensitivity, other.pixel_sensitivity) == (0.6, 0.7)


def test_scores_of_normal_images_are_kept_for_later_comparisons() -> None:
    """Anomalous ones are left out, whatever sets the threshold, and checkpoints have them."""
    post_processor = _fitted(None, _batch(5 + _scores(20), anomalous=True))
    assert not post_processor.calibration.get("image")
    assert post_processor.normal_scores["images"] == 99
    np.testing.assert_allclose(post_processor.normal_scores["quantiles"], _scores(99).sort().values)
    restored = FalseAlarmPostProcessor()
    restored.load_checkpoint_config(post_processor.checkpoint_config())
    assert restored.normal_scores == post_processor.normal_scores


# ------------------------------------------------------------------ which images


def _datamodule(normal: int, training: int) -> Any:
    frame = pd.DataFrame({"label_index": [0] * normal + [1] * 7})
    return SimpleNamespace(train_data=range(training), val_data=SimpleNamespace(samples=frame))


def _module(reason: str | None) -> Any:
    return SimpleNamespace(reason_no_held_out_scores=reason)


def _source(post_processor: FalseAlarmPostProcessor, normal: int, training: int) -> str:
    if training:
        post_processor.note_training(_rows(training))
    post_processor.on_validation_batch_end(None, None, _batch(_scores(normal)))
    post_processor.fit()
    return post_processor.calibration["image"]["source"]


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
    assert _source(FalseAlarmPostProcessor(0.05, images=images), normal, training) == source


def test_extrapolation_takes_the_larger_set() -> None:
    post_processor = FalseAlarmPostProcessor(1e-4, extrapolate=True)
    assert _source(post_processor, 50, 90) == "training"
    assert _source(post_processor, 90, 50) == "validation"


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


@pytest.mark.parametrize("value", [-20.0, 0.3, 2.0, 5.0])
def test_moved_threshold_lies_at_a_half_and_keeps_order_and_p_values(value: float) -> None:
    post_processor = _fitted()
    rate, before = post_processor.calibration["image"]["false_alarm_rate"], post_processor.image_scale.knots.numpy()
    raw = torch.cat([torch.linspace(-50, 50, 999), torch.tensor([value])])
    expected = p_value(normalise(raw.numpy(), before), rate)
    post_processor.move_image_threshold(value)
    result = post_processor(InferenceBatch(pred_score=raw))
    assert torch.equal(result.pred_label, raw > value)
    assert result.pred_score[-1] == 0.5
    assert torch.equal(result.pred_score.argsort(), raw.argsort())
    moved = post_processor.calibration["image"]
    assert moved["false_alarm_rate"] == pytest.approx(expected[-1], rel=1e-4)
    assert moved["interval"][0] < moved["false_alarm_rate"] < moved["interval"][1]


def test_threshold_that_leaves_no_p_values_is_refused() -> None:
    with pytest.raises(ValueError, match="VALUE"):
        _fitted().move_image_threshold(1e6)
