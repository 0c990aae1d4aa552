# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Quantisation of a whole anomaly detector: the network, and then all that was fitted on its outputs."""

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.deploy.export import CompressionType
from anomalib.metrics import F1Score
from torch import Tensor, nn

from anomalib_osdirf.export import quantisation
from anomalib_osdirf.export.instructions import avoid_broken_instructions, make_room_for_signals
from anomalib_osdirf.export.openvino_precision import through_file
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.progress import phase

logger = logging.getLogger(__name__)

_FITTING_BATCH = 32  # images at once, because moments are merged at the same cost for one or many


class Quantiser:
    """Quantises a converted network, and refits scorer, thresholds, minima and maxima on its outputs.

    Args:
        model: The torch module that was converted, such as a frozen ``FieldModel``; left as it is.
        pre_processor: Its pre-processor, whose resize the images go through.
        post_processor: anomalib's post-processor, or ``None``; left as it is.
        datamodule: anomalib datamodule.
        calibration_images: How many training images to calibrate on; ``None`` takes up to 300.
        visible: Whether to show progress.
    """

    def __init__(
        self,
        model: nn.Module,
        pre_processor: nn.Module | None,
        post_processor: Any,
        datamodule: Any,
        calibration_images: int | None,
        visible: bool = False,
    ) -> None:
        self.images = quantisation.CalibrationImages(datamodule, pre_processor, calibration_images)
        self.original: Any = model
        self.model: Any = copy.deepcopy(model)
        self.post_processor = copy.deepcopy(post_processor)
        self.datamodule = datamodule
        self.visible = visible
        self.has_field = hasattr(model, "scorer")

    @property
    def can_validate(self) -> bool:
        """Whether there are validation images to fit a post-processor on."""
        return bool(getattr(self.datamodule, "val_data", None)) and self.post_processor is not None

    def quantise(self, network: Any, scope: Any, compression: CompressionType, metric: Any, max_drop: float) -> Any:
        """Quantise an ``openvino.Model`` that ends in raw score and map and, where it has fields, those.

        Raises:
            ValueError: If ``INT8_ACQ`` has no images to validate on.
            RuntimeError: If nothing could be quantised within ``max_drop``.
        """
        avoid_broken_instructions()
        logger.info("Calibrating on %d training images, half of them with synthetic anomalies.", len(self.images))
        if compression == CompressionType.INT8_PTQ:
            return quantisation.quantise(network, self.images, scope)
        if not self.can_validate:
            raise ValueError(
                "compression_type=INT8_ACQ measures a metric on labelled validation images, and there are none, or no "
                "post-processor; use a val_split_mode other than none, or compression_type=INT8_PTQ."
            )
        metric = metric or F1Score(fields=["pred_label", "gt_label"])

        def measure(compiled: Any, indices: Iterable[int]) -> tuple[float, list[float]]:
            if self.has_field:
                self._fit(compiled)
            batches = self._score(compiled, list(indices), "Metric of the quantised network", from_field=self.has_field)
            raw = [float(batch.pred_score) for batch in batches if batch.pred_score is not None]
            return self._measure(metric, batches), raw

        count = len(self.datamodule.val_data)
        return quantisation.quantise_within(network, self.images, scope, measure, count, max_drop)

    def refit(self, network: Any) -> Any:
        """Fit scorer and post-processor on what the quantised network returns, put in the former, return the latter."""
        if self.has_field:
            self._fit(_compile(network))
            before, after = (dict(model.scorer.buffers_in_use()) for model in (self.original, self.model))
            quantisation.replace_constants(network, before, after)
            quantisation.hide_fields(network)
        if self._by_training:
            self.post_processor.fit()
        elif self.can_validate:
            compiled = _compile(network)
            indices = range(len(self.datamodule.val_data))
            batches = self._score(compiled, indices, "Thresholds of the quantised network", from_field=False)
            self._fit_post_processor(batches)
        else:
            logger.warning(
                "Thresholds are those from before quantisation: there are no validation images to refit them on."
            )
        return self.post_processor

    def _fit(self, compiled: Any) -> None:
        """Fit the scorer on the fields of all training images, without any anomaly."""
        dataset, outputs = self.datamodule.train_data, []
        starts = range(0, len(dataset), _FITTING_BATCH)
        batches = (range(start, min(start + _FITTING_BATCH, len(dataset))) for start in starts)
        size = (1, 1)
        for indices in phase("Scorer fit of the quantised network", batches, len(dataset), self.visible, len):
            results = [compiled(dataset[index].image[None].numpy()) for index in indices]
            size = results[0]["anomaly_map"].shape[-2:]
            fields, fines = zip(*map(_fields, results), strict=True)
            outputs.append((torch.cat(fields), torch.cat(fines), torch.tensor(indices)))
        held_out = self.model.scorer.refit(lambda: outputs, size)
        if isinstance(self.post_processor, FalseAlarmPostProcessor):
            self.post_processor.note_training(held_out)

    @property
    def _by_training(self) -> bool:
        """Whether both thresholds are from held-out scores of training images."""
        calibration = getattr(self.post_processor, "calibration", {})
        return self.has_field and [one["source"] for one in calibration.values()] == ["training", "training"]

    def _score(self, compiled: Any, indices: Sequence[int], name: str, from_field: bool) -> list[ImageBatch]:
        """Score validation images by the network, or by the scorer as it was fitted last, from the network's field.

        Returns:
            A batch for each image, with raw score ``(1,)``, raw map ``(1, 1, H, W)`` and what is known of the truth. Of
            the image itself only a pixel is kept, so that all batches fit into memory.
        """
        dataset = self.datamodule.val_data
        batches = []
        for index in phase(name, indices, len(indices), self.visible):
            batch = dataset.collate_fn([dataset[index]])
            outputs = compiled(batch.image.numpy())
            if from_field:
                size = outputs["anomaly_map"].shape[-2:]
                batch.update(**self.model.scorer(*_fields(outputs), size)._asdict())
            else:
                batch.pred_score = torch.from_numpy(outputs["pred_score"].copy()).reshape(-1)
                batch.anomaly_map = torch.from_numpy(outputs["anomaly_map"].copy())
            batch.image = batch.image[..., :1, :1].clone()
            batches.append(batch)
        return batches

    def _fit_post_processor(self, batches: Iterable[ImageBatch]) -> None:
        for batch in batches:
            self.post_processor.on_validation_batch_end(None, None, batch)
        self.post_processor.on_validation_epoch_end(None, None)

    def _measure(self, metric: Any, batches: Sequence[ImageBatch]) -> float:
        """Metric of batches, with thresholds fitted on them as the finished model has them."""
        self._fit_post_processor(batches)
        metric.reset()
        for batch in batches:
            self.post_processor.post_process_batch(batch)
            metric.update(batch)
        value = float(metric.compute())
        metric.reset()
        return value


def _fields(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return field and fine features among a compiled network's outputs."""
    return tuple(torch.from_numpy(outputs[name].copy()) for name in (quantisation.FIELD, quantisation.FINE))  # type: ignore[return-value]


def _compile(network: Any) -> Any:
    """Compile a model as a deployer does, from its file."""
    import openvino

    compiled = openvino.compile_model(through_file(network), "CPU")
    make_room_for_signals()
    return compiled
