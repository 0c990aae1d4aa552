# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD's read-out against a float64 reference, and against OSD-IRF's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalib_osdirf.models.feature_network import FeatureNetwork
from anomalib_osdirf.models.invad import InvADModel
from anomalib_osdirf.models.osdirf import OSDIRFModel

SHARED: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": 6,
    "grid_size": 4,
    "denoiser": "mlp",
    "prediction_type": "epsilon",
    "density": "standard",
    "ema_decay": 0.9,
}
INVAD: dict[str, Any] = {"num_inference_steps": 3, "timestep_spacing": "paper", "image_score": "nll_diff"}
OWN: dict[str, Any] = {"timestep": 700, "state": "clean", "image_score": "mean"}


def _randomise(model: FeatureNetwork) -> None:
    """Give a new model weights that do something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.ema.module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    model.whitening.weight.copy_(torch.randn(model.whitening.weight.shape, generator=generator) / 5)


@pytest.fixture
def make() -> Callable[..., InvADModel]:
    def build(**arguments: Any) -> InvADModel:
        model = InvADModel(**{**SHARED, **INVAD, **arguments}).eval()
        _randomise(model)
        return model

    return build


def _fields(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_latent_is_the_inversion_by_the_unfolded_denoiser(make: Callable[..., InvADModel]) -> None:
    model = make()
    z = _fields(2)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    state = z.double()
    denoiser = model.ema.module.double()
    with torch.no_grad():
        for timestep, following in ((333, abar[666]), (666, abar[999]), (999, 0.0)):
            eps = denoiser(state, torch.tensor([timestep, timestep]))
            clean = (state - np.sqrt(1 - abar[timestep]) * eps) / np.sqrt(abar[timestep])
            state = np.sqrt(following) * clean + np.sqrt(1 - following) * eps
        denoiser.float()
        np.testing.assert_allclose(model.deployed().field(z).numpy(), state.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("image_score", ["nll", "diff", "nll_diff"])
def test_scores_are_standardised_by_training_images_alone(make: Callable[..., InvADModel], image_score: str) -> None:
    network = make(image_score=image_score).deployed()
    training, test = _fields(40), 1.5 * _fields(5, seed=1)
    network.fit(lambda: training.split(7))

    def terms(fields: Tensor) -> np.ndarray:
        length = np.linalg.norm(fields.double().numpy(), axis=1).reshape(len(fields), -1)
        nll = 0.5 * (length**2).sum(axis=1) + 0.5 * 6 * 16 * np.log(2 * np.pi)
        both = {"nll": nll, "diff": length.max(axis=1) - length.min(axis=1)}
        return np.stack([both[name] for name in image_score.split("_")], axis=1)

    expected = ((terms(test) - terms(training).mean(axis=0)) / terms(training).std(axis=0)).sum(axis=1)
    batch = network.read_out(test, (8, 8))
    np.testing.assert_allclose(batch.pred_score.numpy(), expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([network.read_out(one[None], (8, 8)).pred_score for one in test])
    torch.testing.assert_close(alone, batch.pred_score)


def test_map_is_the_length_of_the_latent(make: Callable[..., InvADModel]) -> None:
    network = make().deployed()
    field = _fields(2)
    anomaly_map = network.read_out(field, (4, 4)).anomaly_map
    torch.testing.assert_close(anomaly_map[:, 0], field.norm(dim=1))
    assert network.read_out(field, (32, 24)).anomaly_map.shape == (2, 1, 32, 24)


def test_map_of_a_fitted_density_is_the_mahalanobis_length(make: Callable[..., InvADModel]) -> None:
    network = make(density="position_full").deployed()
    training = 3 * _fields(400) + 5
    network.fit(lambda: training.split(100))
    near, far = (network.read_out(training[:1] + offset, (4, 4)).anomaly_map.mean() for offset in (0, 30))
    assert near == pytest.approx(6**0.5, rel=0.3)
    assert far > 3 * near


def _without_score(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith("score.")}


def test_score_of_several_terms_is_their_standardised_sum() -> None:
    model = OSDIRFModel(**{**SHARED, **OWN, "image_score": "max_top_k"}).eval()
    _randomise(model)
    network, training = model.deployed(), _fields(30)
    network.fit(lambda: training.split(10))
    of_training = network.density(training).flatten(1).sort(dim=1, descending=True).values
    maximum, third = of_training[:, 0], of_training[:, :5].mean(dim=1)  # a third of 16 positions
    expected = sum((one - one.mean()) / one.std(unbiased=False) for one in (maximum, third))
    torch.testing.assert_close(network.read_out(training, (4, 4)).pred_score, expected, rtol=1e-4, atol=1e-4)


def test_one_step_is_osdirf_with_clean_features(make: Callable[..., InvADModel]) -> None:
    invad = make(num_inference_steps=1, timestep_spacing=[700], image_score="nll")
    osdirf = OSDIRFModel(**{**SHARED, **OWN}).eval()
    osdirf.load_state_dict({**osdirf.state_dict(), **_without_score(invad.state_dict())})
    training = _fields(30)
    for model in (invad, osdirf):
        model.deployed().fit(lambda: [training])
    images = torch.rand(6, 3, 64, 64)
    with torch.no_grad():
        z = invad.whitening(invad.extract_features(images))
        torch.testing.assert_close(invad.deployed().field(z), osdirf.deployed().field(z))
        field = osdirf.deployed().field(z)
        several, one = invad.deployed().read_out(field, (4, 4)), osdirf.deployed().read_out(field, (4, 4))
    nll = 0.5 * several.anomaly_map.square() + 3 * np.log(2 * np.pi)
    torch.testing.assert_close(nll, one.anomaly_map)
    total = (several.pred_score - invad.score.offset) / invad.score.scale
    torch.testing.assert_close(0.5 * total / 16 + 3 * np.log(2 * np.pi), one.pred_score)


def test_identical_training_images_leave_a_finite_score(make: Callable[..., InvADModel]) -> None:
    network = make().deployed()
    network.fit(lambda: [_fields(1).expand(5, -1, -1, -1)])
    assert torch.isfinite(network.read_out(_fields(2, seed=3), (4, 4)).pred_score).all()


def test_half_precision_is_for_the_trained_denoiser_alone(make: Callable[..., InvADModel]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    model.bfloat16()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype == (torch.bfloat16 if name.startswith("denoiser.") else torch.float32)
            if not name.startswith("denoiser."):
                torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    loss = model.training_loss(torch.rand(2, model.backbone.out_channels, 4, 4), torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.double().ema.module.output.weight.dtype == torch.float64


def test_unknown_image_score() -> None:
    with pytest.raises(ValueError, match="image_score='top_k' is unknown; use one of nll, diff, nll_diff"):
        InvADModel(**{**SHARED, **INVAD, "image_score": "top_k"})
