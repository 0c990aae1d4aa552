# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OpenVINO models that request float32, whatever precision the device defaults to.

OpenVINO's CPU plugin computes in bfloat16 where the processor can, its GPU plugin in float16, unless an operation is
marked. A mark (rt_info ``precise_0``) is saved with the model, but the plugin forgets it wherever it replaces an
operation by another of its own. So operations that it would replace are written here as ones that it leaves alone, with
the same result; which those are was found by compiling (OpenVINO 2026.4) and is held by a test.
"""

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MARK = "precise_0"
# What holds no computation: a mark there would keep float16 weights from being saved as such.
_UNMARKED = ("Constant", "Parameter", "Result")
_SMALL_CONSTANT = 2**12


def keep_float32(model: Any, names: Collection[str] | None = None) -> None:  # openvino.Model
    """Make a model carry its precision, in place.

    Args:
        model: The ``openvino.Model``, before its weights are compressed.
        names: The operations that shall carry it, by name: those of a quantised model that are not quantised. ``None``
            for all.
    """
    from openvino import Type
    from openvino import opset13 as ops

    quantised = set() if names is None else {node.get_friendly_name() for node in model.get_ops()} - set(names)
    for node in model.get_ordered_ops():
        rewrite = _REWRITES.get(node.get_type_name())
        if rewrite is None or node.get_friendly_name() in quantised:
            continue
        if node.get_output_element_type(0) == Type.f32:
            rewrite(ops, node)
    model.validate_nodes_and_infer_types()
    for node in model.get_ops():
        # OpenVINO up to 2025.4 can't compile models whose integers are marked.
        computes = node.get_type_name() not in _UNMARKED and node.get_output_element_type(0).is_real()
        if computes and node.get_friendly_name() not in quantised:
            node.get_rt_info()[_MARK] = ""


def keep_small_constants(model: Any) -> Any:  # openvino.Model
    """Mark constants that stay in float32 when weights are saved in float16.

    Biases, depthwise convolutions and the like are two per cent of a file, and rounding them is most of the error.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.data.size < _SMALL_CONSTANT:
            node.get_rt_info()[_MARK] = ""
    return through_file(model)


def through_file(model: Any) -> Any:  # openvino.Model
    """Save a model in float32 and read it back: OpenVINO takes notice of marks in files only."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        openvino.save_model(model, file, compress_to_fp16=False)
        return openvino.Core().read_model(file.read_bytes(), file.with_suffix(".bin").read_bytes())


def _replace(node: Any, new: Any) -> None:
    new.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))


def _input(node: Any, index: int) -> Any:
    return node.input_value(index).get_node()


def _is_constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")


def _static(output: Any, unknown: int) -> list[int]:
    """Shape of an output with ``unknown`` in the place of dynamic dimensions."""
    return [size.get_length() if size.is_static else unknown for size in output.get_partial_shape()]


def _filled(ops: Any, output: Any, value: float) -> Any:
    """Constant that broadcasts to an output; with more than one element, because scalars make the plugin replace."""
    return ops.constant(np.full(_static(output, unknown=1), value, np.float32))


def _subtract(ops: Any, node: Any) -> None:
    subtrahend, minus_one = node.input_value(1), _filled(ops, node.output(0), -1)
    minuend, inner = node.input_value(0), subtrahend.get_node()
    for index in (0, 1):
        # A product or a sum that is multiplied would be merged with this product.
        if inner.get_type_name() == "Multiply" and _is_constant(_input(inner, index)):
            minus_one = ops.constant(-_input(inner, index).data)
        elif inner.get_type_name() == "Add" and _is_constant(_input(inner, index)):
            minuend = ops.add(minuend, ops.constant(-_input(inner, index).data)).output(0)
        else:
            continue
        subtrahend = inner.input_value(1 - index)
        break
    _replace(node, ops.add(minuend, ops.multiply(subtrahend, minus_one)))


def _divide(ops: Any, node: Any) -> None:
    _replace(node, ops.multiply(node.input_value(0), ops.power(node.input_value(1), _filled(ops, node.output(0), -1))))


def _add(ops: Any, node: Any) -> None:
    """Spell the bias of a matrix product out for each row: a plain one would be merged into the product."""
    for index in (0, 1):
        bias, product = _input(node, index), _input(node, 1 - index)
        if _is_constant(bias) and product.get_type_name() == "MatMul":
            rows, columns = _static(product.output(0), unknown=1)[-2:]
            if rows > 1 and bias.data.size == columns == bias.data.shape[-1]:
                spelled_out = np.repeat(bias.data.reshape(1, columns), rows, axis=0)
                node.input(index).replace_source_output(ops.constant(spelled_out).output(0))


def _matmul(ops: Any, node: Any) -> None:
    """Bring both factors to the same rank."""
    ranks = [node.input_value(index).get_partial_shape().rank.get_length() for index in (0, 1)]
    for index in (0, 1):
        missing = ranks[1 - index] - ranks[index]
        if missing > 0 and not _is_constant(_input(node, index)):
            shape = [1] * missing + _static(node.input_value(index), unknown=-1)
            if shape.count(-1) < 2:
                reshaped = ops.reshape(node.input_value(index), np.array(shape, np.int64), special_zero=False)
                node.input(index).replace_source_output(reshaped.output(0))


def _reshape(ops: Any, node: Any) -> None:
    shape = _static(node.output(0), unknown=-1)
    if shape.count(-1) < 2:
        _replace(node, ops.reshape(node.input_value(0), np.array(shape, np.int64), special_zero=False))


def _swish(ops: Any, node: Any) -> None:
    """Write x sigmoid(x) as y + y tanh(y) with y = x / 2, the half taken by the affine map before it.

    That is a linear layer, or the last part of a normalisation; behind a convolution the plugin keeps the precision.
    """
    add = _input(node, 0)
    if add.get_type_name() != "Add" or len(add.output(0).get_target_inputs()) > 1:
        return
    for index in (0, 1):
        bias, product = _input(add, index), _input(add, 1 - index)
        if product.get_type_name() not in {"MatMul", "Multiply"} or not _is_constant(bias):
            continue
        if not _is_constant(_input(product, 1)) or len(product.output(0).get_target_inputs()) > 1:
            continue
        half = np.float32(0.5)  # a power of two: nothing is rounded
        add.input(index).replace_source_output(ops.constant(half * bias.data).output(0))
        product.input(1).replace_source_output(ops.constant(half * _input(product, 1).data).output(0))
        _replace(node, ops.add(add, ops.multiply(add, ops.tanh(add))))


def _attention(ops: Any, node: Any) -> None:
    """Take scaled dot-product attention apart."""
    if node.get_input_size() < 5 or len(_static(node.output(0), unknown=1)) != 4:
        return
    mask, scale = _input(node, 3), _input(node, 4)
    if not _is_constant(scale) or scale.data.size != 1 or not mask.get_output_element_type(0).is_real():
        return
    query, factor = node.input_value(0), scale.data.item()
    inner = query.get_node()
    if inner.get_type_name() == "Multiply" and _is_constant(_input(inner, 1)) and _input(inner, 1).data.size == 1:
        query, factor = inner.input_value(0), factor * _input(inner, 1).data.item()  # two products would be merged
    if factor != 1:
        query = ops.multiply(query, _filled(ops, query, factor)).output(0)
    key, order = node.input_value(1), np.arange(4)
    if key.get_node().get_type_name() == "Transpose" and _is_constant(_input(key.get_node(), 1)):
        key, order = _input(node, 1).input_value(0), _input(_input(node, 1), 1).data  # one transposition, not two
    is_transposed = np.array_equal(order, np.arange(4))  # the plugin would take such a transposition into the product
    if not is_transposed:
        key = ops.transpose(key, np.asarray(order)[[0, 1, 3, 2]]).output(0)
    product = ops.matmul(query, key, transpose_a=False, transpose_b=is_transposed)
    if not _is_constant(mask) or mask.data.any():
        product = ops.add(product, node.input_value(3))
    weights = _elementary_softmax(ops, product.output(0), axis=3)
    _replace(node, ops.matmul(weights, node.input_value(2), transpose_a=False, transpose_b=False))


def _multiply(ops: Any, node: Any) -> None:
    """Take a factor of each column or attention head into the matrix product before it, as the plugin would."""
    for index in (0, 1):
        factor, product = _input(node, index), _input(node, 1 - index)
        if not _is_constant(factor) or product.get_type_name() != "MatMul":
            continue
        if not _is_constant(_input(product, 1)):
            is_by_head = factor.data.size > 1 and factor.data.shape[-2:] == (1, 1)
            if is_by_head and _input(product, 0).get_type_name() != "FakeQuantize":
                scaled = ops.multiply(product.input_value(0), factor)
                _replace(node, ops.matmul(scaled, product.input_value(1), **product.get_attributes()))
            continue
        columns = _static(product.output(0), unknown=-1)[-1]
        if factor.data.size == columns and len(product.output(0).get_target_inputs()) == 1:
            row = factor.data.reshape(columns)
            scaled = _input(product, 1).data * (row[:, None] if product.get_attributes()["transpose_b"] else row)
            product.input(1).replace_source_output(ops.constant(scaled).output(0))
            _replace(node, product)
            return


def _mvn(ops: Any, node: Any) -> None:
    """Normalise the last of four dimensions as that of three: the plugin takes the other apart."""
    shape, axes = _static(node.output(0), unknown=-1), _input(node, 1)
    if len(shape) == 4 and -1 not in shape[1:] and _is_constant(axes) and axes.data.tolist() in ([-1], [3]):
        source = node.input_value(0)
        if source.get_node().get_type_name() == "Reshape":  # two of them would be merged
            source = source.get_node().input_value(0)
        rows = ops.reshape(source, np.array([-1, shape[1] * shape[2], shape[3]]), special_zero=False)
        attributes = {name: node.get_attributes()[name] for name in ("normalize_variance", "eps", "eps_mode")}
        normalised = ops.mvn(rows, np.array([-1]), **attributes)
        _replace(node, ops.reshape(normalised, np.array([-1, *shape[1:]]), special_zero=False))


def _broadcast(ops: Any, node: Any) -> None:
    """Repeat a constant for each image, and drop what repeats nothing: the plugin replaces a broadcast by a product."""
    value, shape = _input(node, 0), _static(node.output(0), unknown=-1)
    if _is_constant(value) and shape[0] == -1 and list(value.data.shape) == [1, *shape[1:]]:
        batch = ops.gather(node.input_value(1), np.array([0]), np.array(0))
        others = ops.constant(np.ones(len(shape) - 1, batch.get_output_element_type(0).to_dtype()))
        _replace(node, ops.tile(value, ops.concat([batch, others], 0)))
    elif node.input_value(0).get_partial_shape() == node.output(0).get_partial_shape() and -1 not in shape[1:]:
        for target in node.output(0).get_target_inputs():  # only the batch is unknown, and it is that of the input
            target.replace_source_output(node.input_value(0))


def _slice(ops: Any, node: Any) -> None:
    """Gather what one of several slices of a tensor is: the plugin replaces them by a split."""
    source, bounds = node.input_value(0), [_input(node, index) for index in range(1, node.get_input_size())]
    others = [
        target for target in source.get_target_inputs() if target.get_node().get_type_name() in {"Gather", "Slice"}
    ]
    if len(others) < 2 or len(bounds) != 4 or not all(_is_constant(one) and one.data.size == 1 for one in bounds):
        return
    start, stop, step, axis = (int(bound.data.item()) for bound in bounds)
    size = source.get_partial_shape()[axis]
    if size.is_static:
        _replace(node, _gathered(ops, source, range(size.get_length())[start:stop:step], axis))


def _gathered(ops: Any, source: Any, wanted: Sequence[int], axis: int) -> Any:
    return ops.gather(source, np.array(wanted), np.array(axis))


def _split(ops: Any, node: Any) -> None:
    """Gather each part of a split."""
    axis = int(_input(node, 1).data.item())
    size = node.get_output_partial_shape(0)[axis]
    if size.is_static:
        for number, output in enumerate(node.outputs()):
            first = number * size.get_length()
            part = _gathered(ops, node.input_value(0), range(first, first + size.get_length()), axis)
            for target in output.get_target_inputs():
                target.replace_source_output(part.output(0))


def _softmax(ops: Any, node: Any) -> None:
    _replace(node, _elementary_softmax(ops, node.input_value(0), node.get_attributes()["axis"]))


def _elementary_softmax(ops: Any, values: Any, axis: int) -> Any:
    axes = np.array([axis], np.int64)
    minus_one = _filled(ops, values, -1)
    exponential = ops.exp(ops.add(values, ops.multiply(ops.reduce_max(values, axes, keep_dims=True), minus_one)))
    return ops.multiply(exponential, ops.power(ops.reduce_sum(exponential, axes, keep_dims=True), minus_one))


def _interpolate(ops: Any, node: Any) -> None:
    """Use the version of the operation that the CPU plugin knows."""
    from openvino.utils.node_factory import NodeFactory

    if node.get_type_info().version_id != "opset11":
        return
    before, after = _static(node.input_value(0), unknown=-1)[2:], _static(node.output(0), unknown=-1)[2:]
    if -1 in before + after:
        return
    scales = np.array(after, np.float32) / np.array(before, np.float32)
    inputs = [ops.constant(np.array(after, np.int64)), ops.constant(scales), ops.constant(np.array([2, 3], np.int64))]
    attributes = {**node.get_attributes(), "shape_calculation_mode": "sizes"}
    factory = NodeFactory("opset4")
    _replace(
        node, factory.create("Interpolate", [node.input_value(0), *(value.output(0) for value in inputs)], attributes)
    )


def _pad(ops: Any, node: Any) -> None:
    """Use the first version of the operation: the plugin converts later ones to it."""
    del ops  # whose version it is
    from openvino import opset1

    begin, end, *value = (node.input_value(index) for index in range(1, node.get_input_size()))
    mode = node.get_attributes()["pad_mode"]
    if node.get_type_info().version_id != "opset1":
        _replace(node, opset1.pad(node.input_value(0), begin, end, mode, *value))


_REWRITES: dict[str, Callable[[Any, Any], None]] = {
    "Add": _add,
    "Broadcast": _broadcast,
    "Divide": _divide,
    "Interpolate": _interpolate,
    "MVN": _mvn,
    "MatMul": _matmul,
    "Multiply": _multiply,
    "Pad": _pad,
    "ScaledDotProductAttention": _attention,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _reshape,
    "Subtract": _subtract,
    "Swish": _swish,
    "Unsqueeze": _reshape,
}
