# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A post-processor as the last part of an OpenVINO model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

OPSET = 18  # of ONNX, what torch's exporter writes natively
_INPUTS = ("pred_score", "anomaly_map")


class _PostProcessing(nn.Module):
    """A post-processor as a separate network."""

    def __init__(self, post_processor: nn.Module) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, pred_score: Tensor, anomaly_map: Tensor) -> dict[str, Tensor]:
        result = self.post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map))
        return {name: value for name, value in result._asdict().items() if value is not None}


def without_post_processor(network: Any) -> Any:  # openvino.Model
    """Cut off what :func:`append_post_processor` put behind a model; ``None`` if it has no such parts."""
    import openvino

    raw: dict[str, Any] = {}
    for output in (output for one in network.get_ops() for output in one.outputs()):
        raw |= {name: output for name in _INPUTS if f"raw_{name}" in output.get_names()}
    if set(raw) != set(_INPUTS):
        return None
    for name, output in raw.items():
        output.set_names({name})
    results = [openvino.opset1.result(raw[name]) for name in _INPUTS]
    return openvino.Model(results, network.get_parameters(), network.get_friendly_name())


def append_post_processor(network: Any, post_processor: nn.Module) -> Any:  # openvino.Model
    """Put a fitted post-processor behind an ``openvino.Model`` that ends in raw score and map."""
    import openvino

    module = _PostProcessing(post_processor).eval()
    examples = (torch.rand(2), torch.rand(2, 1, 4, 5))
    batch = torch.export.Dim("batch")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "post_processor.onnx"
        torch.onnx.export(
            module,
            examples,
            file,
            input_names=[f"raw_{name}" for name in _INPUTS],
            output_names=list(module(*examples)),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch}, {0: batch, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}),
        )
        post = openvino.convert_model(file)
    for name in _INPUTS:
        raw = next(result for result in network.get_results() if name in result.output(0).get_names())
        parameter = next(one for one in post.get_parameters() if f"raw_{name}" in one.output(0).get_names())
        source = raw.input_value(0)
        source.set_names({f"raw_{name}"})
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(source)
    return openvino.Model(post.get_results(), network.get_parameters(), network.get_friendly_name())


def drop_inner_names(network: Any) -> None:  # openvino.Model
    """Take the names off a model's inner tensors, in place.

    OpenVINO gives an output the names of a tensor too that an operation without effect reshapes into it, as in graphs
    of fixed shapes, and anomalib's inferencer takes no other names than its own.
    """
    kept = {name for port in (*network.inputs, *network.outputs) for name in port.get_names()}
    kept |= {f"raw_{name}" for name in _INPUTS}
    for node in network.get_ops():
        for output in node.outputs():
            output.set_names(output.get_names() & kept)
