# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Quantisation of a whole anomaly detector: the network, and then all that was fitted on its outputs."""

import copy
import logging
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.deploy.export import CompressionType
from anomalib.metrics import F1Score
from torch import Tensor, nn

from anomalib_osdirf.export import quantisation
from anomalib_osdirf.export.instructions import avoid_broken_instructions, make_room_for_signals
from anomalib_osdirf.export.openvino_precision import through_file
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.progress import phase

logger = logging.getLogger(__name__)

_FITTING_BATCH = 32  # images at once, because moments are merged at the same cost for one or many


class Quantiser:
    """Quantises a converted network, and fits density, thresholds, minima and maxima anew on its own outputs.

    Args:
        model: The torch module that was converted; a ``ReadOutNetwork`` with a field, or any other. It is left as it
            is.
        pre_processor: Its pre-processor, whose resize the images go through.
        post_processor: anomalib's post-processor, or ``None``. It is left as it is.
        datamodule: anomalib datamodule.
        calibration_images: How many training images to calibrate on; ``None`` takes up to 300.
        visible: Whether to show progress.

    Raises:
        ValueError: If there are fewer training images than asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        pre_processor: nn.Module | None,
        post_processor: Any,  # noqa: ANN401
        datamodule: Any,  # noqa: ANN401
        calibration_images: int | None,
        visible: bool = False,
    ) -> None:
        self.images = quantisation.CalibrationImages(datamodule, pre_processor, calibration_images)
        self.original: Any = model
        self.model: Any = copy.deepcopy(model)
        self.post_processor = copy.deepcopy(post_processor)
        self.datamodule = datamodule
        self.visible = visible
        self.has_field = hasattr(model, "read_out")

    @property
    def can_validate(self) -> bool:
        """Whether there are validation images to fit a post-processor on."""
        return bool(getattr(self.datamodule, "val_data", None)) and self.post_processor is not None

    def quantise(
        self,
        network: Any,  # noqa: ANN401
        scope: Any,  # noqa: ANN401
        compression: CompressionType,
        metric: Any,  # noqa: ANN401
        max_drop: float,
    ) -> Any:  # noqa: ANN401
        """Quantise an ``openvino.Model`` that ends in raw score and map.

        Args:
            network: The model; with the field as one more output from here on, where there is one.
            scope: What stays in floating point.
            compression: ``INT8_PTQ`` or ``INT8_ACQ``.
            metric: anomalib metric for ``INT8_ACQ``; ``None`` takes the image F1 score.
            max_drop: Largest loss of the metric.

        Returns:
            The quantised model.

        Raises:
            ValueError: If ``INT8_ACQ`` has no images to validate on.
            RuntimeError: If nothing could be quantised within ``max_drop``.
        """
        avoid_broken_instructions()
        logger.info("Calibrating on %d training images, half of them with synthetic anomalies.", len(self.images))
        if self.has_field:
            quantisation.expose_fields(network, self.model.whitening.weight, self.model.details_size)
        if compression == CompressionType.INT8_PTQ:
            return quantisation.quantise(network, self.images, scope)
        if not self.can_validate:
            msg = (
                "compression_type=INT8_ACQ measures a metric on labelled validation images, and there are none, or no "
                "post-processor; use a val_split_mode other than none, or compression_type=INT8_PTQ."
            )
            raise ValueError(msg)
        metric = metric or F1Score(fields=["pred_label", "gt_label"])

        def measure(compiled: Any, indices: Iterable[int]) -> tuple[float, list[float]]:  # noqa: ANN401
            if self.has_field:
                self._fit(compiled)
            batches = self._score(compiled, list(indices), "Metric of the quantised network", from_field=self.has_field)
            raw = [float(batch.pred_score) for batch in batches if batch.pred_score is not None]
            return self._measure(metric, batches), raw

        count = len(self.datamodule.val_data)
        return quantisation.quantise_within(network, self.images, scope, measure, count, max_drop)

    def refit(self, network: Any) -> Any:  # noqa: ANN401
        """Fit density and post-processor on what the quantised network returns, and put the density into it.

        Returns:
            The post-processor.
        """
        if self.has_field:
            self._fit(_compile(network))
            quantisation.replace_constants(network, self.original.fitted_buffers(), self.model.fitted_buffers())
            quantisation.hide_fields(network)
        if self.can_validate and not self._by_training:
            compiled = _compile(network)
            indices = range(len(self.datamodule.val_data))
            batches = self._score(compiled, indices, "Thresholds of the quantised network", from_field=False)
            self._fit_post_processor(batches)
        elif not self._by_training:
            logger.warning(
                "Thresholds are those from before quantisation: there are no validation images to fit them on anew."
            )
        return self.post_processor

    def _fit(self, compiled: Any) -> None:  # noqa: ANN401
        """Fit densities and score constants on the fields of all training images, without any anomaly."""
        dataset, fields, details = self.datamodule.train_data, [], StreamingMoments()
        starts = range(0, len(dataset), _FITTING_BATCH)
        batches = (range(start, min(start + _FITTING_BATCH, len(dataset))) for start in starts)
        for indices in phase("Density fit of the quantised network", batches, len(dataset), self.visible, len):
            outputs = [_fields(compiled(dataset[index].image[None].numpy())) for index in indices]
            fields.append(torch.cat([field for field, _ in outputs]))
            more = [one for _, one in outputs if one is not None]
            if more:
                details.update(torch.cat(more).flatten(2).permute(2, 0, 1))
        left_out = self.model.fit(lambda: fields)
        if details.count:
            self.model.fit_details(details)
        if self._by_training:
            with self.model.leaving_out(left_out, details if details.count else None):
                self._add_training_images(compiled)
            self.post_processor.fit("training")

    @property
    def _by_training(self) -> bool:
        """Whether thresholds are from training images, each left out of the densities' fit."""
        return getattr(self.post_processor, "source", None) == "training"

    def _add_training_images(self, compiled: Any) -> None:  # noqa: ANN401
        """Have the post-processor note what the densities say of training images."""
        dataset = self.datamodule.train_data
        indices = phase("Thresholds of the quantised network", range(len(dataset)), len(dataset), self.visible)
        for index in indices:
            outputs = compiled(dataset[index].image[None].numpy())
            field, details = _fields(outputs)
            result = self.model.read_out(field, outputs["anomaly_map"].shape[-2:], details)
            self.post_processor.add(SimpleNamespace(**result._asdict() | {"gt_label": torch.zeros(1)}))

    def _score(self, compiled: Any, indices: Sequence[int], name: str, from_field: bool) -> list[ImageBatch]:  # noqa: ANN401
        """Score validation images.

        Args:
            compiled: The compiled network.
            indices: Which of the validation images.
            name: What it is for.
            from_field: Take the network's field and the density as it was fitted last, not the network's own.

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
                field, details = _fields(outputs)
                size = outputs["anomaly_map"].shape[-2:]
                batch.update(**self.model.read_out(field, size, details)._asdict())
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

    def _measure(self, metric: Any, batches: Sequence[ImageBatch]) -> float:  # noqa: ANN401
        """Metric of batches, with thresholds fitted on them as the finished model has them."""
        self._fit_post_processor(batches)
        metric.reset()
        for batch in batches:
            self.post_processor.post_process_batch(batch)
            metric.update(batch)
        value = float(metric.compute())
        metric.reset()
        return value


def _fields(outputs: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """Return the field and, where the network has them, the details among a compiled network's outputs."""
    named = {name: value for output, value in outputs.items() for name in output.get_names()}
    field, details = (named.get(name) for name in (quantisation.FIELD, quantisation.DETAILS))
    assert field is not None
    return torch.from_numpy(field.copy()), None if details is None else torch.from_numpy(details.copy())


def _compile(network: Any) -> Any:  # noqa: ANN401
    """Compile a model as a deployer does, from its file."""
    import openvino

    compiled = openvino.compile_model(through_file(network), "CPU")
    make_room_for_signals()
    return compiled
