# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Denoisers: shapes, dependence on time and position, batch independence, equivariance, and learning."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from anomalib_osdirf.denoisers import (
    ConvMLP,
    DiT,
    UNet,
    VelocityDenoiser,
    build_denoiser,
    checkpoint_gradients,
)
from anomalib_osdirf.denoisers.conv_mlp import DepthwiseConv2d, channel_norm
from anomalib_osdirf.denoisers.ema import EMA
from anomalib_osdirf.denoisers.embedding import grid_positions, sine_cosine

SMALL = ("conv_mlp", "dit_s", "unet")  # the others differ in size alone


def _perturbed(denoiser: nn.Module) -> nn.Module:
    """Zero-initialised layers hide mistakes: give every weight a value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser.eval()


def _small(name: str) -> nn.Module:
    if name == "conv_mlp":
        return _perturbed(ConvMLP(6, width=32, depth=2))
    if name == "unet":
        return _perturbed(UNet(6, 4, width=64))
    return _perturbed(DiT(6, 4, width=32, depth=2, num_heads=4))


@pytest.mark.parametrize("name", SMALL)
def test_shape_time_and_batch_independence(name: str) -> None:
    denoiser = _small(name).double()
    z, timesteps = torch.randn(3, 6, 4, 4, dtype=torch.float64), torch.tensor([0, 150, 999])
    noise = denoiser(z, timesteps)
    assert noise.shape == z.shape
    torch.testing.assert_close(noise[1:2], denoiser(z[1:2], timesteps[1:2]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(noise[0], denoiser(z[:1], torch.tensor([500]))[0], atol=1e-3)


@pytest.mark.parametrize("name", ["dit_s", "unet"])
def test_position_matters(name: str) -> None:
    z = torch.randn(1, 6, 1, 1).expand(1, 6, 4, 4)
    noise = _small(name)(z, torch.tensor([100]))
    assert not torch.allclose(noise[..., 0, 0], noise[..., 3, 2], atol=1e-3)


def test_conv_mlp_is_equivariant_under_translation_away_from_the_border() -> None:
    """Two blocks of 5 x 5 see four positions of zero padding."""
    denoiser = _small("conv_mlp").double()
    z, timesteps = torch.randn(1, 6, 16, 16, dtype=torch.float64), torch.tensor([300])
    noise, shifted = denoiser(z, timesteps), denoiser(z.roll((2, 3), dims=(2, 3)), timesteps)
    torch.testing.assert_close(shifted[..., 6:12, 7:12], noise[..., 4:10, 4:9], rtol=1e-9, atol=1e-12)


def test_conv_mlp_sees_its_neighbourhood_alone() -> None:
    denoiser = _small("conv_mlp").double()
    z, timesteps = torch.randn(1, 6, 16, 16, dtype=torch.float64), torch.tensor([300])
    changed = z.clone()
    changed[..., 8, 8] += 1
    moved = (denoiser(changed, timesteps) - denoiser(z, timesteps)).abs().amax(dim=(0, 1)) > 1e-9
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:13, 4:13] = True
    assert torch.equal(moved, expected)


def test_conv_mlp_runs_on_any_grid() -> None:
    assert _small("conv_mlp")(torch.randn(2, 6, 1, 3), torch.tensor([3, 700])).shape == (2, 6, 1, 3)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9])
def test_depthwise_convolution_is_torchs_own(kernel_size: int) -> None:
    layer = DepthwiseConv2d(3, kernel_size).double()
    inputs = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    result = layer(inputs)
    expected = functional.conv2d(inputs, layer.weight, layer.bias, padding=kernel_size // 2, groups=3)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    tensors = (inputs, *layer.parameters())
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_channel_norm_standardises_each_position() -> None:
    x = 3 + 5 * torch.randn(2, 64, 3, 4, dtype=torch.float64)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(channel_norm(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_initial_prediction_is_zero(name: str) -> None:
    assert not build_denoiser(name, 8, 4)(torch.randn(2, 8, 4, 4), torch.tensor([3, 700])).any()


def test_velocity_gives_the_noise() -> None:
    """A network that knows the velocity v = sqrt(abar) eps - sqrt(1 - abar) z gives the noise back, at any timestep."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    timesteps = torch.tensor([0, 125, 500, 999])
    a = abar[timesteps][:, None, None, None]
    z, noise = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64)
    known = lambda z_t, t: a.sqrt() * noise - (1 - a).sqrt() * z  # noqa: E731
    predicted = VelocityDenoiser(known)(a.sqrt() * z + (1 - a).sqrt() * noise, timesteps)
    torch.testing.assert_close(predicted, noise, rtol=0, atol=1e-5)


def test_velocity_starts_as_the_ideal_denoiser_of_white_features() -> None:
    z = torch.randn(2, 8, 4, 4)
    noise = build_denoiser("conv_mlp", 8, 4, "v_prediction")(z, torch.tensor([3, 700]))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[[3, 700]]
    torch.testing.assert_close(noise, (1 - abar).sqrt()[:, None, None, None] * z, rtol=1e-4, atol=1e-6)


def test_velocity_grows_with_the_features_where_the_noise_does_not() -> None:
    """Far from the training data, a network behind a layer norm saturates; the field must not."""
    z, timestep = 1e3 * torch.randn(1, 6, 4, 4), torch.tensor([125])
    bounded, unbounded = _small("conv_mlp"), VelocityDenoiser(_small("conv_mlp"))
    with torch.no_grad():
        growth = [float(one(10 * z, timestep).norm() / one(z, timestep).norm()) for one in (bounded, unbounded)]
    assert growth[0] < 2
    assert growth[1] > 9


def test_unknown_prediction_type() -> None:
    with pytest.raises(ValueError, match="prediction_type='x0'"):
        build_denoiser("conv_mlp", 8, 4, "x0")


def test_no_network_is_narrower_than_the_features() -> None:
    with torch.device("meta"):
        assert [ConvMLP(dim).input.out_channels for dim in (96, 256, 257, 500)] == [256, 256, 320, 512]
        assert UNet(500, 2).network.conv_in.out_channels >= 500


def test_unet_needs_an_even_grid() -> None:
    with pytest.raises(ValueError, match="grid_size=7"):
        build_denoiser("unet", 8, 7)


def test_conv_mlp_learns_the_ideal_denoiser_of_gaussian_data() -> None:
    """For whitened Gaussian features the ideal prediction is sqrt(1 - abar) z_t (method section 2)."""
    torch.manual_seed(0)
    denoiser = ConvMLP(4, width=64, depth=1)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for _ in range(400):
        z, noise, timesteps = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2), torch.randint(1000, (64,))
        a = abar[timesteps][:, None, None, None]
        loss = (denoiser(a.sqrt() * z + (1 - a).sqrt() * noise, timesteps) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.randn(200, 4, 2, 2)
    for timestep in (200, 500):
        ideal = (1 - abar[timestep]).sqrt() * z
        error = (denoiser(z, torch.full((200,), timestep)) - ideal).square().mean() / ideal.square().mean()
        assert float(error) < 0.1


def test_embeddings() -> None:
    assert sine_cosine(torch.tensor([0]), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert torch.unique(grid_positions(5, 16), dim=0).shape[0] == 25


def test_ema_follows_its_formula_and_can_be_pickled() -> None:
    layer = nn.Linear(1, 1, bias=False)
    averaged = EMA(layer, 0.5)
    expected = None
    for value in (1.0, 2.0, 5.0, -3.0):
        nn.init.constant_(layer.weight, value)
        updates = int(averaged.n_averaged)
        averaged.update_parameters(layer)
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert averaged.module.weight.item() == pytest.approx(expected)
    assert pickle.loads(pickle.dumps(averaged)).module.weight.item() == pytest.approx(expected)


def test_ema_of_half_precision_weights_is_in_full_precision() -> None:
    layer = nn.Linear(3, 3)
    averaged = EMA(layer, 0.999)
    first = layer.weight.detach().clone()
    averaged.update_parameters(layer)
    layer.to(torch.bfloat16)
    nn.init.constant_(layer.weight, 1.0)
    averaged.update_parameters(layer)
    assert averaged.module.weight.dtype == torch.float32
    torch.testing.assert_close(averaged.module.weight.detach(), first + (1 - 2 / 11) * (1 - first))


def test_unknown_denoiser() -> None:
    with pytest.raises(ValueError, match="denoiser='gan'"):
        build_denoiser("gan", 8, 4)


def test_the_name_mlp_leads_to_its_successor() -> None:
    with pytest.raises(ValueError, match=r"denoiser='mlp'.* conv_mlp"):
        build_denoiser("mlp", 8, 4)


@pytest.mark.parametrize(("name", "millions"), [("dit_s", 33), ("dit_b", 130), ("dit_l", 458), ("dit_gigant", 1221)])
def test_sizes_of_the_transformers(name: str, millions: int) -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(name, 272, 16)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_keeps_less_and_has_the_same_gradients(name: str) -> None:
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        denoiser = VelocityDenoiser(_small(name).double().train())
        if checkpointed:
            checkpoint_gradients(denoiser)
        z = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = denoiser(z, torch.tensor([3, 700])).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert kept[1] < 0.8 * kept[0]
