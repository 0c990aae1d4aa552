# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF's read-out against the denoiser that was not folded."""

from typing import Any

import numpy as np
import torch

from anomalib_osdirf.models.osdirf import OSDIRFModel

ARGUMENTS: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": 6,
    "grid_size": 4,
    "denoiser": "mlp",
    "prediction_type": "epsilon",
    "density": "position_full",
    "ema_decay": 0.9,
    "timestep": 300,
    "state": "noised",
    "image_score": "max",
}


def _model(seed: int) -> OSDIRFModel:
    torch.manual_seed(seed)
    model = OSDIRFModel(**ARGUMENTS).eval()
    with torch.no_grad():
        for parameter in model.ema.module.parameters():
            parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def test_noised_field_is_the_denoisers_answer_to_one_fixed_noise() -> None:
    model = _model(0)
    z = torch.randn(3, 6, 4, 4)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[300]
    assert model.noise is not None
    state = np.sqrt(abar) * z + np.sqrt(1 - abar) * model.noise
    expected = model.ema.module(state.float(), torch.full((3,), 300))
    torch.testing.assert_close(model.deployed().field(z), expected, rtol=1e-4, atol=1e-5)
    assert 0.8 < float(model.noise.std()) < 1.2


def test_noise_is_fixed_kept_and_converted_with_the_model() -> None:
    model = _model(1)
    torch.testing.assert_close(model.noise, _model(2).noise)
    assert "noise" in model.state_dict()
    assert model.noise is not None
    assert model.bfloat16().noise.dtype == torch.float32
    deployed = model.double().deployed()
    assert deployed.field(torch.randn(1, 6, 4, 4).double()).dtype == torch.float64
