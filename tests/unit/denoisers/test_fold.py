# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Folding a timestep changes nothing but the size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anomalib_osdirf.denoisers import ConvMLP, DiT, UNet, VelocityDenoiser, build_denoiser, fold


@settings(deadline=None, max_examples=25)
@given(timestep=st.integers(0, 999), seed=st.integers(0, 2**31), transformer=st.booleans(), velocity=st.booleans())
def test_folding_changes_nothing(timestep: int, seed: int, transformer: bool, velocity: bool) -> None:
    torch.manual_seed(seed)
    denoiser: nn.Module = DiT(6, 3, 32, 2, 4) if transformer else ConvMLP(6, width=32, depth=2)
    if velocity:
        denoiser = VelocityDenoiser(denoiser)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        z = torch.randn(2, 6, 3, 3)
        expected = denoiser(z, torch.full((2,), timestep))
        error = (fold(denoiser, timestep)(z) - expected).abs().max() / expected.abs().max()
    assert float(error) <= 1e-5


@pytest.mark.parametrize("velocity", [False, True])
def test_folding_a_unet_changes_nothing_but_its_biases(velocity: bool) -> None:
    torch.manual_seed(0)
    denoiser: nn.Module = UNet(6, 4, width=64)
    if velocity:
        denoiser = VelocityDenoiser(denoiser)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        z = torch.randn(2, 6, 4, 4)
        before = [parameter.clone() for parameter in denoiser.parameters()]
        for timestep in (0, 150, 999):
            expected = denoiser(z, torch.full((2,), timestep))
            error = (fold(denoiser, timestep)(z) - expected).abs().max() / expected.abs().max()
            assert float(error) <= 1e-5
    for parameter, value in zip(denoiser.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("name", ["conv_mlp", "dit_s"])
def test_folded_network_is_smaller_and_on_its_own(name: str) -> None:
    denoiser = build_denoiser(name, 96, 8)
    folded = fold(denoiser, 125)
    size = sum(parameter.numel() for parameter in denoiser.parameters())
    assert sum(parameter.numel() for parameter in folded.parameters()) < 0.75 * size
    own = {parameter.data_ptr() for parameter in folded.parameters()}
    assert not own & {parameter.data_ptr() for parameter in denoiser.parameters()}


def test_folded_conv_mlp_has_no_modulation() -> None:
    """Input and output layers, and for each block a depthwise convolution and two layers."""
    layers = [module for module in fold(build_denoiser("conv_mlp", 8, 4), 125).modules() if not list(module.children())]
    convolutions = [module for module in layers if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 2 + 3 * 3
    assert all(module in convolutions or not list(module.parameters()) for module in layers)


def test_folding_leaves_the_denoiser_alone() -> None:
    denoiser = VelocityDenoiser(ConvMLP(6, width=32, depth=1))
    before = [value.clone() for value in denoiser.state_dict().values()]
    with torch.no_grad():
        for parameter in fold(denoiser, 125).parameters():
            parameter.add_(1)
    assert all(torch.equal(*pair) for pair in zip(before, denoiser.state_dict().values(), strict=True))


def test_unknown_denoiser() -> None:
    with pytest.raises(TypeError, match="Linear"):
        fold(nn.Linear(2, 2), 3)
