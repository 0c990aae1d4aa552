# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD's latent, maps and scores against a float64 reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.invad import InvADModel
from anomalib_osdirf.models.invad.torch_model import LatentScorer
from anomalib_osdirf.models.osdirf.torch_model import one_step_field
from anomalib_osdirf.processes import ALONE, DistributedContext
from threads import played

DIM, GRID = 6, 4
ARGUMENTS: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": DIM,
    "whiten": True,
    "grid_size": GRID,
    "denoiser": "conv_mlp",
    "prediction_type": "epsilon",
    "ema_decay": 0.9,
    "num_inference_steps": 3,
    "timestep_spacing": "paper",
    "image_score": "nll_diff",
}
SCORES = ["nll", "diff", "nll_diff"]
Fit = Callable[[InvADModel, Tensor], InvADModel]


def _model(**arguments: Any) -> InvADModel:
    """Make a model whose denoisers do something."""
    torch.manual_seed(0)
    model = InvADModel(**{**ARGUMENTS, **arguments}).eval()
    for part in (model.network.denoiser, model.network.ema.module, model.network.kept):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def _images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def _latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, DIM, GRID, GRID, generator=torch.Generator().manual_seed(seed))


def _fitted(
    latents: Tensor, image_score: str = "nll_diff", processes: DistributedContext = ALONE, **arguments: Any
) -> Any:
    scorer = LatentScorer(image_score)
    numbers = torch.arange(len(latents))[processes.rank :: processes.count]
    scorer.fit(
        lambda: ((latents[batch], latents[batch], batch) for batch in numbers.split(7)),
        processes=processes,
        **arguments,
    )
    return scorer


def _score(scorer: LatentScorer, latents: Tensor, size: tuple[int, int] = (GRID, GRID)) -> InferenceBatch:
    return scorer(latents, latents, size)


def _terms(latents: Tensor, image_score: str) -> np.ndarray:
    length = np.linalg.norm(latents.double().numpy(), axis=1).reshape(len(latents), -1)
    nll = 0.5 * (length**2).sum(axis=1) + 0.5 * DIM * GRID**2 * np.log(2 * np.pi)
    both = {"nll": nll, "diff": length.max(axis=1) - length.min(axis=1)}
    return np.stack([both[name] for name in image_score.split("_")], axis=1)


@torch.no_grad()
def test_latent_is_the_inversion_by_the_unfolded_denoiser(fit: Fit) -> None:
    model = fit(_model(), _images())
    latent, fine = model.network(_images())
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    state, denoiser = coarse(fine).double(), model.network.kept.double()
    for timestep, following in ((333, abar[666]), (666, abar[999]), (999, 0.0)):
        eps = denoiser(state, torch.full((12,), timestep))
        clean = (state - np.sqrt(1 - abar[timestep]) * eps) / np.sqrt(abar[timestep])
        state = np.sqrt(following) * clean + np.sqrt(1 - following) * eps
    np.testing.assert_allclose(latent.numpy(), state.numpy(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_one_step_is_the_residual_field_of_clean_features(fit: Fit) -> None:
    model = fit(_model(num_inference_steps=1, timestep_spacing=[700]), _images())
    latent, fine = model.network(_images())
    z = coarse(fine)
    torch.testing.assert_close(latent, model.network.kept(z, torch.full((12,), 700)))
    abar = float(model.network.schedule.abar(700))
    field = one_step_field([lambda x: model.network.kept(x, torch.full((12,), 700))], z / abar**0.5, [abar])
    torch.testing.assert_close(latent, field, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image_score", SCORES)
def test_scores_are_standardised_by_training_images_alone(image_score: str) -> None:
    training, test = _latents(40), 1.5 * _latents(5, seed=1)
    scorer = _fitted(training, image_score)
    reference = _terms(training, image_score)
    expected = ((_terms(test, image_score) - reference.mean(axis=0)) / reference.std(axis=0)).sum(axis=1)
    found = _score(scorer, test).pred_score
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([_score(scorer, one[None]).pred_score for one in test])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-4)


def test_map_is_the_length_of_the_latent() -> None:
    latents = _latents(2)
    scorer = _fitted(latents)
    torch.testing.assert_close(_score(scorer, latents).anomaly_map[:, 0], latents.norm(dim=1))
    assert _score(scorer, latents, (32, 24)).anomaly_map.shape == (2, 1, 32, 24)


def test_training_images_are_handed_out_with_their_scores() -> None:
    """No density knows them."""
    latents = _latents(20)
    scorer = _fitted(latents)
    rows = scorer.refit(lambda: [(latents, latents, torch.arange(20))], (8, 8))
    expected = _score(scorer, latents, (8, 8))
    maps = expected.anomaly_map.flatten(1)
    torch.testing.assert_close(rows, torch.stack([expected.pred_score, maps.amax(dim=1), maps.amin(dim=1)], dim=1))


def test_constants_are_those_of_one_process() -> None:
    latents, test = _latents(23), _latents(4, seed=1)
    expected = _score(_fitted(latents), test).pred_score
    for scorer in played(3, lambda processes: _fitted(latents, processes=processes)):
        assert scorer.num_images == 23
        torch.testing.assert_close(_score(scorer, test).pred_score, expected, rtol=1e-4, atol=1e-4)


def test_fitting_anew_makes_up_for_a_latent_of_another_scale() -> None:
    latents, test = _latents(20), _latents(4, seed=1)
    scorer = _fitted(latents)
    expected = _score(scorer, test).pred_score
    scorer.refit(lambda: [(2 * latents, latents, torch.arange(20))])
    torch.testing.assert_close(_score(scorer, 2 * test).pred_score, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("latents", [_latents(1).expand(5, -1, -1, -1), torch.zeros(5, DIM, GRID, GRID), _latents(2)])
def test_scores_are_finite(latents: Tensor) -> None:
    assert torch.isfinite(_score(_fitted(latents), _latents(2, seed=3)).pred_score).all()


@torch.no_grad()
def test_a_frozen_model_gives_the_same_numbers(fit: Fit) -> None:
    model = fit(_model(), _images())
    found, expected = model.freeze()(_images(5, seed=1)), model(_images(5, seed=1))
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("image_score", SCORES)
def test_state_dict_restores_a_model(image_score: str, fit: Fit) -> None:
    model = fit(_model(image_score=image_score), _images())
    other = InvADModel(**{**ARGUMENTS, "image_score": image_score}).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(_images(3)).pred_score, model(_images(3)).pred_score, rtol=0, atol=0)


def test_half_precision_leaves_the_constants_alone(fit: Fit) -> None:
    model = fit(_model(), _images())
    before = [value.clone() for value in model.scorer.buffers()]
    model.bfloat16()
    torch.testing.assert_close(list(model.scorer.buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{"image_score": "top_k"}, {"denoiser": "none"}, {"num_inference_steps": 0}, {"timestep_spacing": "cosine"}],
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}='?{value}"):
        InvADModel(**{**ARGUMENTS, **arguments})
