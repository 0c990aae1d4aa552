# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A model for tests of what runs exported models: its map is an image's brightness, its score the brightest pixel."""

import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper


def brightness_model(folder: Path, size: int | str = "side", batch: int = 1, **metadata: Any) -> Path:
    """Write ``model.onnx``, with metadata beside it if there is any.

    Args:
        folder: Where to.
        size: Height and width that it takes, any if it is a name.
        batch: Images that it takes at once.
        **metadata: Metadata.
    """
    axes = [helper.make_tensor(name, TensorProto.INT64, [len(value)], value) for name, value in _AXES.items()]
    nodes = [
        helper.make_node("ReduceMean", ["input", "channels"], ["anomaly_map"], keepdims=1),
        helper.make_node("ReduceMax", ["anomaly_map", "rest"], ["pred_score"], keepdims=0),
    ]
    names = {"anomaly_map": [batch, 1, size, size], "pred_score": [batch]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])]
    graph = helper.make_graph(nodes, "brightness", inputs, outputs, axes)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    if metadata:
        (folder / "model.json").write_text(json.dumps(metadata), "utf-8")
    return folder / "model.onnx"


_AXES = {"channels": [1], "rest": [1, 2, 3]}
