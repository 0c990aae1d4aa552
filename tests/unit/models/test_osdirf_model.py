# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSDIRF's read-out: its map, and the state with noise."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from anomalib_osdirf.density import PositionMixture
from anomalib_osdirf.density.gaussian import oas_shrinkage
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.feature_network import upsampled
from anomalib_osdirf.models.osdirf import OSDIRFModel

ARGUMENTS: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": 5,
    "grid_size": 4,
    "denoiser": "mlp",
    "prediction_type": "v_prediction",
    "density": "standard",
    "ema_decay": 0.9,
    "timestep": 100,
    "state": "scaled",
    "image_score": "max_top_k",
}


def _fitted(images: torch.Tensor, **arguments: Any) -> OSDIRFModel:
    torch.manual_seed(0)
    model = OSDIRFModel(**{**ARGUMENTS, **arguments}).eval()
    moments = StreamingMoments()
    moments.update(model.backbone(images).permute(0, 2, 3, 1).flatten(0, 2))
    model.whitening.fit(moments)
    network = model.deployed()
    network.fit(lambda: [network.field_of(model.extract_features(images))])
    if model.map_grid_size is not None:
        details = StreamingMoments()
        details.update(network.details_of(images).flatten(2).permute(2, 0, 1))  # type: ignore[union-attr]
        network.fit_details(details)
    return model


@torch.no_grad()
def test_map_is_the_sum_of_both_negative_log_densities() -> None:
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both, field = _fitted(images, map_grid_size=7), _fitted(images)
    maps = both.backbone.fine(both.backbone.maps(images), 7)
    vectors = both.whitening(maps).flatten(2).permute(2, 0, 1).double()  # (49, 12, 5)
    expected = []
    for position in vectors:
        covariance = np.cov(position.T, bias=True)
        shrinkage = float(oas_shrinkage(torch.from_numpy(covariance), 12))
        covariance = (1 - shrinkage) * covariance + (shrinkage * np.trace(covariance) / 5 + 1e-6) * np.eye(5)
        expected.append(-multivariate_normal(position.mean(dim=0).numpy(), covariance).logpdf(position.numpy()))
    grid = torch.from_numpy(np.stack(expected, axis=1)).float().unflatten(1, (7, 7))
    difference = both(images).anomaly_map - field(images).anomaly_map
    torch.testing.assert_close(difference, upsampled(grid[:, None], (64, 64)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both(images).pred_score, field(images).pred_score)


@torch.no_grad()
def test_kinds_are_told_by_whitened_features_whatever_the_denoiser_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(
        PositionMixture, "cluster", lambda _, features, fields, __: seen.append((*features(), *fields()))
    )
    for whiten in (True, False):
        model = _fitted(images, whiten=whiten)
        model.density = PositionMixture(5, 4)
        network = model.deploy()
        z = network.whitening(model.extract_features(images))
        assert torch.allclose(z.var(dim=(0, 2, 3), correction=0), torch.ones(5), atol=1e-3) is whiten
        network.find_kinds(lambda z=z: [z])
        torch.testing.assert_close(seen[-1][1], network.field(z))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-3)


def test_grid_of_the_map_must_be_positive() -> None:
    with pytest.raises(ValueError, match="map_grid_size=0 is not a positive number of positions; use 32, or null"):
        OSDIRFModel(**ARGUMENTS, map_grid_size=0)


NOISED: dict[str, Any] = {
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
    model = OSDIRFModel(**NOISED).eval()
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
