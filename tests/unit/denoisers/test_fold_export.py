# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A folded denoiser in OpenVINO computes in float32, whatever the processor prefers."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from anomalib_osdirf.denoisers import build_denoiser, fold
from anomalib_osdirf.export.openvino_precision import keep_float32, through_file


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_folded_conv_mlp_is_exact_in_openvino(prediction_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = build_denoiser("conv_mlp", 96, 16, prediction_type)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    z, file = torch.randn(3, 96, 16, 16), tmp_path / "denoiser.onnx"
    with torch.no_grad():
        expected = denoiser.double()(z.double(), torch.full((3,), 125)).numpy()
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        fold(denoiser.float(), 125), (z[:2],), file, dynamo=True, opset_version=18, dynamic_shapes=dynamic
    )
    model = openvino.convert_model(file)
    keep_float32(model)
    compiled = openvino.Core().compile_model(through_file(model), "CPU")
    for batch in (1, 3):
        result = compiled([z[:batch].numpy()])[0]
        assert np.abs(result - expected[:batch]).max() <= 1e-5 * np.abs(expected).max()
