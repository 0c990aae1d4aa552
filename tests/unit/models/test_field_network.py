# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The network from image to field: its two outputs, its objective, and how its denoiser is judged and kept."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomalib_osdirf.diffusion import NoiseSchedule, ddim_inversion, linear_denoiser_loss
from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.models.osdirf.torch_model import one_step_field
from anomalib_osdirf.processes import ALONE, DistributedContext
from threads import played

DIM, GRID = 6, 4
ARGUMENTS: dict[str, Any] = {
    "read": one_step_field,
    "timesteps": [200],
    "backbone": "test_efficientnet",
    "layers": None,
    "feature_dim": DIM,
    "whiten": False,
    "grid_size": GRID,
    "denoiser": "conv_mlp",
    "prediction_type": "v_prediction",
    "ema_decay": 0.9,
}


def _network(**arguments: Any) -> FieldNetwork:
    """Make a network whose projection and denoisers do something."""
    torch.manual_seed(0)
    network = FieldNetwork(**{**ARGUMENTS, **arguments}).eval()
    weight = network.projection.weight
    weight.copy_(torch.randn(weight.shape) / weight.shape[1] ** 0.5)
    for part in (network.denoiser, network.ema.module, network.kept):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.1)
    return network


def _without_projection() -> FieldNetwork:
    """Make a network whose features are taken as they are."""
    network = _network(feature_dim=None)
    network.projection.weight.copy_(torch.eye(network.projection.out_channels))
    network.projection.bias.zero_()
    return network


def _images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(("read", "timesteps"), [(one_step_field, [300]), (ddim_inversion, [333, 666, 999])])
def test_the_field_is_read_from_coarse_features_by_the_kept_denoiser(
    read: Callable[..., Tensor], timesteps: list[int]
) -> None:
    network = _network(read=read, timesteps=timesteps)
    field, fine = network(_images())
    torch.testing.assert_close(fine, network.projection(network.backbone(_images())))
    assert fine.shape == (3, DIM, 2 * GRID, 2 * GRID)

    def denoiser(timestep: int) -> Callable[[Tensor], Tensor]:
        return lambda z: network.kept(z, torch.full((3,), timestep))

    schedule = NoiseSchedule()
    expected = read([denoiser(one) for one in timesteps], coarse(fine), [schedule.abar(one) for one in timesteps])
    torch.testing.assert_close(field, expected)


@torch.no_grad()
@pytest.mark.parametrize(("read", "timesteps"), [(one_step_field, [300]), (ddim_inversion, [333, 666, 999])])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("denoiser", ["conv_mlp", "unet", "none"])
def test_a_frozen_network_gives_the_same_numbers(
    read: Callable[..., Tensor], timesteps: Sequence[int], prediction_type: str, denoiser: str
) -> None:
    network = _network(read=read, timesteps=timesteps, prediction_type=prediction_type, denoiser=denoiser)
    for frozen, own in zip(network.freeze().eval()(_images()), network(_images()), strict=True):
        torch.testing.assert_close(frozen, own, rtol=1e-4, atol=1e-4)


def test_a_frozen_network_has_no_weights_of_the_training() -> None:
    network = _network()
    own, frozen = (sum(one.numel() for one in part.parameters()) for part in (network, network.freeze()))
    assert frozen < own / 2


@pytest.mark.parametrize("half", [False, True])
def test_loss_is_the_mean_squared_error_of_the_predicted_noise(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_osdirf.models.field_network._has_bfloat16", lambda: half)
    network, features = _network(), torch.rand(3, _network().backbone.out_channels, 2 * GRID, 2 * GRID)
    loss = network.training_loss(features, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(3, DIM, GRID, GRID, generator=generator)
    timesteps = torch.randint(1000, (3,), generator=generator)
    z = network.projection(coarse(features))
    abar = NoiseSchedule().alphas_cumprod[timesteps][:, None, None, None]
    predicted = network.denoiser(abar.sqrt() * z + (1 - abar).sqrt() * noise, timesteps)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (predicted - noise).square().mean(), rtol=0.02 if half else 1e-5, atol=0)


def test_mean_loss_of_several_processes_is_that_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_osdirf.models.field_network._has_bfloat16", lambda: False)
    network, features = _network(), torch.rand(5, _network().backbone.out_channels, 2 * GRID, 2 * GRID)

    def loss(processes: DistributedContext) -> Tensor:
        own = processes.part(features)
        return network.training_loss(own, torch.Generator().manual_seed(7), processes, len(features)).detach()

    for count in (2, 3):
        losses = [loss(DistributedContext(rank, count)) for rank in range(count)]
        torch.testing.assert_close(torch.stack(losses).mean(), loss(ALONE))


class _Linear(nn.Module):
    """The best linear denoiser of uncorrelated channels, times a factor."""

    def __init__(self, variance: Tensor, factor: float) -> None:
        super().__init__()
        self.variance = variance
        self.factor = factor

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        abar = NoiseSchedule().alphas_cumprod[timesteps][:, None]
        gain = (1 - abar).sqrt() / (abar * self.variance + 1 - abar)
        return self.factor * gain[:, :, None, None] * z


def _judged(factor: float, processes: DistributedContext = ALONE) -> float:
    """Return the explained share of a linear denoiser on Gaussian features."""
    network = _without_projection()
    dim = network.projection.out_channels
    network.variance.copy_(torch.linspace(0.1, 3, dim))
    z = network.variance.sqrt()[:, None, None] * torch.randn(120, dim, 8, 8, generator=torch.Generator().manual_seed(1))
    network.ema.module = _Linear(network.variance, factor)
    return network.explained_share(z[processes.rank :: processes.count], processes)


def test_the_best_linear_denoiser_explains_nothing() -> None:
    assert _judged(1.0) == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5])
def test_a_worse_denoiser_explains_less_than_nothing(factor: float) -> None:
    """By as much as the error that a wrong factor adds."""
    variance, abar = (
        torch.linspace(0.1, 3, _without_projection().projection.out_channels),
        NoiseSchedule().alphas_cumprod,
    )
    abar = abar[[100, 200, 300, 400, 500]]
    best = linear_denoiser_loss(abar, variance)
    # E (eps - factor g z_t)^2 = 1 - (2 factor - factor^2) (1 - best), with g the best gain
    losses = 1 - (2 * factor - factor**2) * (1 - best)
    expected = 1 - float(losses.sum() / best.sum())
    assert expected < 0
    assert _judged(factor) == pytest.approx(expected, abs=0.02)


def test_all_processes_judge_alike() -> None:
    """One of them may have no image to judge by."""
    shares = played(3, lambda processes: _judged(0.5, processes))
    assert shares[0] == shares[1] == shares[2] == pytest.approx(_judged(0.5), abs=0.02)
    network = _without_projection()
    features = torch.randn(1, network.projection.out_channels, GRID, GRID)
    alone, *shares = (
        network.explained_share(features),
        *played(2, lambda processes: network.explained_share(features[processes.rank :: processes.count], processes)),
    )
    assert shares == pytest.approx([alone, alone])


def test_keeping_takes_the_present_average_for_the_field() -> None:
    network = _network()
    network.keep(0.25, 70)
    assert (float(network.kept_share), int(network.kept_step)) == (0.25, 70)
    kept = {name: value.clone() for name, value in network.kept.state_dict().items()}
    torch.testing.assert_close(kept, dict(network.ema.module.state_dict()))
    for parameter in network.ema.module.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(dict(network.kept.state_dict()), kept)


@torch.no_grad()
def test_a_denoiser_that_is_left_out_gives_the_features_scaled() -> None:
    """The trained one stays as it is."""
    network = _network()
    network.keep(0.25, 70)
    trained = {name: value.clone() for name, value in network.denoiser.state_dict().items()}
    network.remove_denoiser()
    field, fine = network(_images())
    abar = network.schedule.abar(200)
    torch.testing.assert_close(field, (abar * (1 - abar)) ** 0.5 * coarse(fine), rtol=1e-4, atol=1e-5)
    assert (float(network.kept_share), int(network.kept_step)) == (0.0, 0)
    torch.testing.assert_close(dict(network.denoiser.state_dict()), trained)


def test_only_the_denoiser_is_trained() -> None:
    trained = {name.split(".")[0] for name, one in _network().named_parameters() if one.requires_grad}
    assert trained == {"denoiser"}


@torch.no_grad()
def test_state_dict_restores_the_network() -> None:
    network, other = _network(), FieldNetwork(**ARGUMENTS).eval()
    network.keep(0.25, 70)
    other.load_state_dict(network.state_dict())
    assert (float(other.kept_share), int(other.kept_step)) == (0.25, 70)
    torch.testing.assert_close(other(_images()), network(_images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"feature_dim": 0}, {"grid_size": 0}, {"denoiser": "mlp"}]
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}='?{value}"):
        FieldNetwork(**{**ARGUMENTS, **arguments})
