# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""INT8 quantisation of OpenVINO models by NNCF: the quantised operations, and the calibration images."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from rich.console import Console
from torch import Tensor, nn

from anomalib_osdirf.progress import has_bars

# What NNCF takes statistics from by default, too; fewer will do where there are no more.
_CALIBRATION_IMAGES = 300
_CONVOLUTIONS = ("Convolution", "GroupConvolution")
_SMALL_CONVOLUTION = 2**15
_QUANTISED = "FakeQuantize"
# Names of the outputs that the scorer is fitted on.
FIELD = "field"
FINE = "fine"
_FORMS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    np.asarray,
    np.negative,
    lambda array: array.swapaxes(-2, -1) if array.ndim > 1 else array,
)


class CalibrationImages:
    """Training images, every other one with a synthetic anomaly: without those, NNCF clips what anomalies look like.

    They are spread over the training set and resized by the pre-processor; a ``count`` of ``None`` takes up to 300.
    """

    def __init__(self, datamodule: Any, pre_processor: nn.Module | None, count: int | None = None) -> None:
        set_up(datamodule, pre_processor)
        self.dataset = datamodule.train_data
        available = len(self.dataset)
        if count is not None and not 1 <= count <= available:
            raise ValueError(
                f"calibration_images={count} is not in 1 to {available}, the number of training images; choose one of "
                "these, or drop calibration_images."
            )
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


def set_up(datamodule: Any, pre_processor: nn.Module | None) -> None:
    """Set a datamodule up as the trainer does: images come resized as the model wants them, so that they stack."""
    if datamodule.trainer is None:
        datamodule.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=pre_processor))
    datamodule.setup("fit")


def floating_point_scope(model: Any, weights: Tensor | None) -> Any:  # openvino.Model, nncf.IgnoredScope
    """Name what must stay in floating point: all up to the first and behind the last convolution, and the PCA.

    Before lies the resize, behind lie densities, map and score. The first convolution costs little and rounding the
    image a lot; the PCA, of ``weights`` ``(D, C)``, may blow small directions of the features up, and their rounding
    errors with them.
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
    kept += [node for node in nodes if node.get_type_name() == "Convolution"][:1]
    if weights is not None:
        kept += [node for node in nodes if node.get_type_name() == "Convolution" and _has_weights(node, weights)]
    # A weight is kept by its operation, not by its own name: it has no convolution before it, wherever it is used.
    names = {node.get_friendly_name() for node in kept if node.get_type_name() != "Constant"}
    return nncf.IgnoredScope(names=sorted(names), validate=False)


def _has_weights(convolution: Any, weights: Tensor) -> bool:
    constant = convolution.input_value(1).get_node()
    if constant.get_type_name() != "Constant":
        return False
    return bool(np.array_equal(constant.data.squeeze(), weights.detach().cpu().numpy().squeeze()))


def compress_weights(model: Any, scope: Any) -> Any:
    """Store weights in 8 bits and compute in floating point (``INT8``), where that costs no accuracy.

    Depthwise and small convolutions keep theirs, as the ``scope`` does: they are a small part of the file, and rounding
    them is most of the error.
    """
    import nncf

    small = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() in _CONVOLUTIONS
        and (node.get_type_name() != "Convolution" or np.prod(node.input(1).get_shape()) < _SMALL_CONVOLUTION)
    ]
    return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=[*scope.names, *small], validate=False))


def is_quantised(model: Any) -> bool:
    """Tell whether any activation of an ``openvino.Model`` is quantised."""
    return any(node.get_type_name() == _QUANTISED for node in model.get_ops())


def quantise(model: Any, images: CalibrationImages, scope: Any) -> Any:
    """Quantise weights and activations after training (``INT8_PTQ``), but for the ``scope``."""
    import nncf

    # NNCF draws its bars into log files, too.
    with nullcontext() if has_bars(Console()) else redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=scope,
            preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: SiLU's have a short negative side
        )


def quantise_within(
    model: Any,
    images: CalibrationImages,
    scope: Any,
    measure: Callable[[Any, Iterable[int]], tuple[float, list[float]]],
    num_validation_images: int,
    max_drop: float,
) -> Any:
    """Quantise, and take back to floating point what costs too much of a metric (``INT8_ACQ``).

    ``measure`` returns the metric of a compiled model on validation images, given by their indices, the larger the
    better; and the raw score of each, by which NNCF finds the images that quantisation changes most.

    Raises:
        RuntimeError: If nothing could be quantised within ``max_drop``.
    """
    import nncf

    quantised = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(images),
        nncf.Dataset(list(range(num_validation_images))),
        measure,
        max_drop=max_drop,
        subset_size=len(images),
        ignored_scope=scope,
        preset=nncf.QuantizationPreset.MIXED,
    )
    if not is_quantised(quantised):
        raise RuntimeError(
            f"max_drop={max_drop} is not met by quantising any part of this model, which leaves the float32 model; "
            "allow a larger max_drop, or export with compression_type=INT8_PTQ or FP16."
        )
    return quantised


class ScoresAndFields(NamedTuple):
    """Outputs of a network with fields, see :class:`~anomalib_osdirf.models.field_network.FieldNetwork`."""

    pred_score: Tensor
    anomaly_map: Tensor
    field: Tensor
    fine: Tensor


class WithFields(nn.Module):
    """A field model that returns field and fine features beside its scores."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = model.network
        self.scorer = model.scorer

    def forward(self, images: Tensor) -> ScoresAndFields:
        """Score pre-processed images ``(B, 3, H, W)``."""
        field, fine = self.network(images)
        batch = self.scorer(field, fine, images.shape[-2:])
        return ScoresAndFields(batch.pred_score, batch.anomaly_map, field, fine)


def hide_fields(model: Any) -> None:
    """Remove the outputs that :class:`WithFields` adds: anomalib's inferencer takes no others than its own."""
    for result in [result for result in model.get_results() if {FIELD, FINE} & result.output(0).get_names()]:
        model.remove_result(result)


def replace_constants(model: Any, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Give an ``openvino.Model`` other values of some buffers, in place.

    The old ones are in it as they are, negative (a subtraction becomes an addition), or with their last two dimensions
    transposed.

    Raises:
        RuntimeError: If a buffer is not found in the model.
    """
    from openvino import opset13 as ops

    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    for name, value in old.items():
        found = False
        for form in _FORMS:
            before, after = (form(tensor.cpu().numpy()).reshape(-1) for tensor in (value, new[name]))
            for node in constants:
                if node.data.size == before.size and np.array_equal(node.data.reshape(-1), before):
                    constant = ops.constant(after.reshape(node.data.shape).astype(node.data.dtype))
                    for target in node.output(0).get_target_inputs():
                        target.replace_source_output(constant.output(0))
                    found = True
        if not found:
            msg = f"The buffer {name} was not found in the converted model; please report this with OpenVINO's version."
            raise RuntimeError(msg)
