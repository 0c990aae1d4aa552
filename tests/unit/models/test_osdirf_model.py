# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF as a torch module: its field, its start, and what deployment and precision do to it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.osdirf import OSDIRFModel
from anomalib_osdirf.models.scorer import DENSITIES

ARGUMENTS: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": 5,
    "grid_size": 4,
    "denoiser": "conv_mlp",
    "ema_decay": 0.9,
    "timestep": 200,
    "density": "position",
}
Fit = Callable[[OSDIRFModel, Tensor], OSDIRFModel]


def _images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def _model(**arguments: Any) -> OSDIRFModel:
    torch.manual_seed(0)
    return OSDIRFModel(**{**ARGUMENTS, **arguments}).eval()


def _trained(**arguments: Any) -> OSDIRFModel:
    """Make a model whose denoisers do something."""
    model = _model(**arguments)
    for part in (model.network.denoiser, model.network.ema.module, model.network.kept):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def _assert_same(one: Any, other: Any, images: Tensor, rtol: float, atol: float) -> None:
    found, expected = one(images), other(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=rtol, atol=atol)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=rtol, atol=atol)


@torch.no_grad()
def test_field_is_the_noise_in_scaled_features_that_the_denoiser_tells(fit: Fit) -> None:
    """Predicted through the velocity, in float64."""
    model = fit(_trained(), _images())
    field, fine = model.network(_images())
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[200]
    z = np.sqrt(abar) * coarse(fine).double()
    velocity = model.network.kept.network.double()(z, torch.full((12,), 200))  # type: ignore[operator, union-attr]
    expected = np.sqrt(1 - abar) * z + np.sqrt(abar) * velocity
    np.testing.assert_allclose(field.numpy(), expected.numpy(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("density", DENSITIES)
def test_an_untrained_denoiser_scores_as_none_does(density: str, fit: Fit) -> None:
    untrained, none = _model(density=density), _model(density=density, denoiser="none")
    none.network.backbone.load_state_dict(untrained.network.backbone.state_dict())
    for model in (untrained, none):
        fit(model, _images())
    _assert_same(untrained, none, _images(5, seed=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("density", ["position", "mixture", "standard"])
def test_a_frozen_model_gives_the_same_numbers(density: str, fit: Fit) -> None:
    model = fit(_trained(density=density), _images())
    frozen = model.freeze()
    assert (model.is_frozen, frozen.is_frozen) == (False, True)
    _assert_same(frozen, model, _images(5, seed=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("density", ["position", "mixture", "standard"])
def test_state_dict_restores_a_model(density: str, fit: Fit) -> None:
    model, other = fit(_trained(density=density), _images()), OSDIRFModel(**ARGUMENTS).eval()
    other.load_state_dict(model.state_dict())
    _assert_same(other, model, _images(5, seed=1), rtol=0, atol=0)


def test_scores_do_not_depend_on_the_batch(fit: Fit) -> None:
    model, images = fit(_trained(), _images()), _images(5, seed=1)
    with torch.no_grad():
        together = model(images).pred_score
        alone = torch.cat([model(image[None]).pred_score for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_half_precision_of_a_trainer_does_not_reach_the_scores(fit: Fit) -> None:
    model, images = fit(_trained(), _images()), _images(5, seed=1)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert found.pred_score.dtype == torch.float32
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)


def _floats(model: OSDIRFModel) -> dict[str, Tensor]:
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in values.items() if value.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_the_trained_denoiser_alone(dtype: torch.dtype, fit: Fit) -> None:
    """Statistics, densities, averages and the schedule keep every bit."""
    model = fit(_trained(), _images())
    before = _floats(model)
    for name, value in _floats(model.to(dtype)).items():
        if name.startswith("network.denoiser."):
            assert value.dtype == dtype
        else:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_double_precision_is_for_all(fit: Fit) -> None:
    """Back in single precision, scores are what they were."""
    model, images = fit(_trained(), _images()), _images(2, seed=1)
    with torch.no_grad():
        expected = model(images).pred_score
        model.double()
        assert {value.dtype for value in _floats(model).values()} == {torch.float64}
        torch.testing.assert_close(model.float()(images).pred_score, expected)


def test_half_precision_trains_on_a_loss_in_single_precision() -> None:
    model = _trained().bfloat16()
    features = torch.rand(2, model.network.backbone.out_channels, 8, 8)
    loss = model.network.training_loss(features.bfloat16(), torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = [one.grad for one in model.network.denoiser.parameters() if one.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_model_that_was_never_fitted_does_not_score() -> None:
    with pytest.raises(RuntimeError):
        _model()(_images(1))


@pytest.mark.parametrize(
    "arguments", [{"density": "kde"}, {"timestep": 1000}, {"timestep": -1}, {"timestep": 0.5}, {"ema_decay": 1}]
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}='?{value}"):
        OSDIRFModel(**{**ARGUMENTS, **arguments})
