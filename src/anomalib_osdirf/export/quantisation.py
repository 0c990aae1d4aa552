# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""INT8 quantisation of OpenVINO models by NNCF: what is quantised, and on which images."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# What NNCF takes statistics from by default, too; fewer will do where there are no more.
_CALIBRATION_IMAGES = 300
_CONVOLUTIONS = ("Convolution", "GroupConvolution")
_QUANTISED = "FakeQuantize"


class CalibrationImages:
    """Training images, every other one with a synthetic anomaly: without those, NNCF clips what anomalies look like.

    Args:
        datamodule: anomalib datamodule.
        pre_processor: The model's pre-processor, whose resize the images go through.
        count: Number of images, spread over the training set; ``None`` takes up to 300.

    Raises:
        ValueError: If there are fewer training images than asked for.
    """

    def __init__(self, datamodule: Any, pre_processor: nn.Module | None, count: int | None = None) -> None:  # noqa: ANN401
        set_up(datamodule, pre_processor)
        self.dataset = datamodule.train_data
        available = len(self.dataset)
        if count is not None and not 1 <= count <= available:
            msg = (
                f"calibration_images={count} can't be had: the datamodule has {available} training images; ask for 1 "
                f"to {available}, or leave calibration_images out."
            )
            raise ValueError(msg)
        count = min(count or _CALIBRATION_IMAGES, available)
        self.indices = np.linspace(0, available - 1, count).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield images of shape ``(1, 3, H, W)`` in [0, 1], the same ones every time."""
        for number, index in enumerate(self.indices):
            image = self.dataset[index].image
            if number % 2:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(index)
                    image, _ = PerlinAnomalyGenerator(probability=1.0)(image)
            yield image.clamp(0, 1)[None].numpy()


def set_up(datamodule: Any, pre_processor: nn.Module | None) -> None:  # noqa: ANN401
    """Set a datamodule up as the trainer does: images come resized as the model wants them, so that they stack."""
    if datamodule.trainer is None:
        datamodule.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=pre_processor))
    datamodule.setup("fit")


def floating_point_scope(model: Any, weights: Tensor | None) -> Any:  # noqa: ANN401 - openvino.Model, nncf.IgnoredScope
    """Name what must stay in floating point: all before the first and behind the last convolution, and the whitening.

    Before lies the resize, behind lie density, map and score. The whitening blows small directions of the features up,
    and their rounding errors with them.

    Args:
        model: The ``openvino.Model``.
        weights: Weights of the whitening, shape ``(D, C)``, or ``None``.

    Returns:
        NNCF's ignored scope.
    """
    import nncf

    nodes = model.get_ordered_ops()
    behind: set[str] = set()
    for node in nodes:
        sources = [node.input_value(index).get_node() for index in range(node.get_input_size())]
        if node.get_type_name() in _CONVOLUTIONS or any(source.get_friendly_name() in behind for source in sources):
            behind.add(node.get_friendly_name())
    before: set[str] = set()
    for node in reversed(nodes):
        targets = [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
        if node.get_type_name() in _CONVOLUTIONS or any(target.get_friendly_name() in before for target in targets):
            before.add(node.get_friendly_name())
    kept = [node for node in nodes if not {node.get_friendly_name()} <= behind & before]
    if weights is not None:
        kept += [node for node in nodes if node.get_type_name() == "Convolution" and _has_weights(node, weights)]
    # A weight is kept by its operation, not by its own name: it has no convolution before it, wherever it is used.
    names = {node.get_friendly_name() for node in kept if node.get_type_name() != "Constant"}
    return nncf.IgnoredScope(names=sorted(names), validate=False)


def _has_weights(convolution: Any, weights: Tensor) -> bool:  # noqa: ANN401
    constant = convolution.input_value(1).get_node()
    if constant.get_type_name() != "Constant":
        return False
    return bool(np.array_equal(constant.data.squeeze(), weights.detach().cpu().numpy().squeeze()))


def is_quantised(model: Any) -> bool:  # noqa: ANN401
    """Tell whether any activation of an ``openvino.Model`` is quantised."""
    return any(node.get_type_name() == _QUANTISED for node in model.get_ops())


def quantise(model: Any, images: CalibrationImages, scope: Any) -> Any:  # noqa: ANN401
    """Quantise weights and activations after training (``INT8_PTQ``).

    Args:
        model: The ``openvino.Model`` up to raw score and map.
        images: Images to calibrate on.
        scope: What stays in floating point.

    Returns:
        The quantised model.
    """
    import nncf

    return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), ignored_scope=scope)


def quantise_within(
    model: Any,  # noqa: ANN401
    images: CalibrationImages,
    scope: Any,  # noqa: ANN401
    measure: Callable[[Any], float],
    max_drop: float,
) -> Any:  # noqa: ANN401
    """Quantise, and take back to floating point what costs too much of a metric (``INT8_ACQ``).

    Args:
        model: The ``openvino.Model`` up to raw score and map.
        images: Images to calibrate on.
        scope: What stays in floating point in any case.
        measure: Metric of a compiled model, the larger the better.
        max_drop: Largest loss of the metric.

    Returns:
        The quantised model.

    Raises:
        RuntimeError: If nothing could be quantised within ``max_drop``.
    """
    import nncf

    quantised = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(images),
        nncf.Dataset([None]),
        lambda compiled, _: measure(compiled),
        max_drop=max_drop,
        subset_size=len(images),
        ignored_scope=scope,
    )
    if not is_quantised(quantised):
        msg = (
            f"max_drop={max_drop} can't be met by any quantised part of this model, what is left is the float32 model; "
            "allow a larger max_drop, or export with compression_type=INT8_PTQ or FP16."
        )
        raise RuntimeError(msg)
    return quantised


def validate(datamodule: Any, compiled: Any) -> list[ImageBatch]:  # noqa: ANN401
    """Score the validation images.

    Args:
        datamodule: anomalib datamodule, set up.
        compiled: The compiled model up to raw score and map.

    Returns:
        Batches with raw scores ``(B,)``, raw maps ``(B, 1, H, W)`` and what is known of the truth. Of the images only
        a pixel is kept, so that all batches fit into memory.
    """
    batches = []
    for batch in datamodule.val_dataloader():
        outputs = compiled(batch.image.numpy())
        batch.pred_score = torch.from_numpy(outputs["pred_score"].copy()).reshape(-1)
        batch.anomaly_map = torch.from_numpy(outputs["anomaly_map"].copy())
        batch.image = batch.image[..., :1, :1].clone()
        batches.append(batch)
    return batches


def refit(post_processor: Any, batches: Sequence[ImageBatch]) -> Any:  # noqa: ANN401
    """Fit thresholds and minima and maxima on a model's own validation scores.

    Args:
        post_processor: anomalib's post-processor, which is left as it is.
        batches: What :func:`validate` returned.

    Returns:
        A refitted copy.
    """
    fitted = copy.deepcopy(post_processor)
    for batch in batches:
        fitted.on_validation_batch_end(None, None, batch)
    fitted.on_validation_epoch_end(None, None)
    return fitted
