# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What runtimes without dynamic shapes ask of an exported file."""

from pathlib import Path

import numpy as np

# They compute a shape, have one that depends on values, or contain other graphs.
_DYNAMIC = {"Shape", "ShapeOf", "Size", "Range", "ConstantOfShape", "NonZero", "Loop", "If", "Scan", "TensorIterator"}


def check_static(file: Path) -> None:
    """Hold an ONNX or OpenVINO file to fixed shapes everywhere and to operations that keep them."""
    shapes, operations = (_onnx if file.suffix == ".onnx" else _openvino)(file)
    assert not operations & _DYNAMIC
    assert shapes
    assert not [name for name, is_static in shapes.items() if not is_static]


def _onnx(file: Path) -> tuple[dict[str, bool], set[str]]:
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    known = {value.name: value.type.tensor_type for value in [*graph.input, *graph.value_info, *graph.output]}
    names = [*(value.name for value in graph.input), *(name for node in graph.node for name in node.output if name)]
    shapes = {
        name: name in known
        and known[name].HasField("shape")
        and all(size.HasField("dim_value") for size in known[name].shape.dim)
        for name in names
    }
    return shapes, {node.op_type for node in graph.node}


def _openvino(file: Path) -> tuple[dict[str, bool], set[str]]:
    import openvino

    nodes = openvino.Core().read_model(file).get_ops()
    shapes = {
        f"{node.get_friendly_name()}:{output.get_index()}": output.get_partial_shape().is_static
        for node in nodes
        for output in node.outputs()
    }
    return shapes, {node.get_type_name() for node in nodes}


def outputs_of(file: Path, images: np.ndarray, settings: dict[str, str] | None = None) -> dict[str, np.ndarray]:
    """Run a file by its own runtime, OpenVINO with ``settings``."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {"input": images}), strict=True))
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", settings or {})
    return {name: value for output, value in compiled(images).items() for name in output.get_names()}
