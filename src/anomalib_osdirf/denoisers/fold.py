# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A denoiser at one fixed timestep as a plain network: same numbers, fewer weights, fewer operations.

At a fixed timestep its embedding and every adaLN shift, scale and gate are constants.
"""

import copy
from collections.abc import Iterable
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn

from anomalib_osdirf.denoisers.conv_mlp import NORM_EPS, ConvMLP, DepthwiseConv2d
from anomalib_osdirf.denoisers.dit import DiT
from anomalib_osdirf.denoisers.identity import NoDenoiser
from anomalib_osdirf.denoisers.unet import UNet, fold_unet
from anomalib_osdirf.denoisers.velocity import FoldedVelocityDenoiser, VelocityDenoiser


@singledispatch
def fold(denoiser: nn.Module, timestep: int) -> nn.Module:
    """Fold a timestep into a denoiser.

    Args:
        denoiser: A denoiser of this package, called as ``denoiser(z, timesteps)``.
        timestep: The timestep.

    Returns:
        A module called as ``folded(z)`` with z of shape ``(B, D, h, w)``, with copies of the weights.

    Raises:
        TypeError: If no function is registered for this type of denoiser.
    """
    msg = f"{type(denoiser).__name__} can't be folded at timestep {timestep}; register a function with fold.register."
    raise TypeError(msg)


def _copy(
    layer: nn.Linear | nn.Conv2d, gate: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
) -> nn.Linear:
    """Copy gate * layer(x * (1 + scale) + shift) into one linear layer; in float64, so that folding rounds once.

    Gate is of shape ``(out,)``, scale and shift are ``(in,)``; the layer may be a 1 x 1 convolution.
    """
    bias = cast("Tensor", layer.bias)
    folded_weight, folded_bias = layer.weight.double().flatten(1), bias.double()
    if shift is not None and scale is not None:
        folded_bias = folded_bias + folded_weight @ shift.double()
        folded_weight = folded_weight * (1 + scale.double())
    if gate is not None:
        folded_weight, folded_bias = folded_weight * gate.double()[:, None], folded_bias * gate.double()
    size_out, size_in = folded_weight.shape
    copied = nn.utils.skip_init(nn.Linear, size_in, size_out, device=bias.device, dtype=bias.dtype)
    copied.weight.copy_(folded_weight)
    copied.bias.copy_(folded_bias)
    return copied.requires_grad_(requires_grad=False)


def _on_grid(layer: nn.Linear) -> nn.Conv2d:
    """Turn a linear layer on tokens into the same layer on a grid, a 1 x 1 convolution."""
    convolution = nn.utils.skip_init(
        nn.Conv2d, layer.in_features, layer.out_features, 1, device=layer.weight.device, dtype=layer.weight.dtype
    )
    convolution.weight.copy_(layer.weight[:, :, None, None])
    convolution.bias.copy_(layer.bias)
    return convolution.requires_grad_(requires_grad=False)


class FoldedChannelNorm(nn.Module):
    """:func:`~anomalib_osdirf.denoisers.conv_mlp.channel_norm` in elementary steps.

    OpenVINO's CPU plugin keeps their precision, unlike that of a layer norm between transpositions of the grid. A
    reciprocal square root converts to a square root and a division; with it the network takes 1.6 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the same shape."""
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + NORM_EPS) ** -0.5


class FoldedConvMLPBlock(nn.Module):
    """Residual block with a plain norm: scale, shift and gate have gone into the perceptron."""

    def __init__(self, depthwise: nn.Conv2d, mlp: nn.Sequential) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.norm = FoldedChannelNorm()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(B, width, h, w)`` to the same shape."""
        return hidden + self.mlp(self.norm(self.depthwise(hidden)))


class FoldedAttention(nn.Module):
    """Self-attention in its elementary steps, with the scale 1 / sqrt(d) folded into the queries.

    Three layers instead of one, because OpenVINO's CPU plugin forgets the precision of a split; and without a scale to
    apply, attention converts to the plain products that :mod:`anomalib_osdirf.export.openvino_precision` can mark.
    """

    def __init__(self, qkv: nn.Linear, output: nn.Linear, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = output.in_features
        layers = []
        for part in range(3):
            layer = nn.Linear(width, width, device=qkv.weight.device, dtype=qkv.weight.dtype)
            scale = (width // num_heads) ** -0.5 if part == 0 else 1.0
            layer.weight.copy_(scale * qkv.weight[part * width : (part + 1) * width])
            layer.bias.copy_(scale * qkv.bias[part * width : (part + 1) * width])
            layers.append(layer.requires_grad_(requires_grad=False))
        self.query, self.key, self.value = layers
        self.output = output

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)) for layer in (self.query, self.key, self.value)
        )
        weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).softmax(dim=-1)
        return self.output((weights @ value.transpose(1, 2)).transpose(1, 2).flatten(2))


class FoldedDiTBlock(nn.Module):
    """Transformer block with plain layer norms: shifts, scales and gates have gone into the linear layers."""

    def __init__(self, norm: nn.LayerNorm, attention: FoldedAttention, mlp: nn.Sequential) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.mlp = mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape."""
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens + self.mlp(self.norm(tokens))


class FoldedDiT(nn.Module):
    """1 x 1 convolution, then blocks and a layer norm on the grid's positions as tokens, then a 1 x 1 convolution.

    The outer layers are convolutions, because OpenVINO's CPU plugin merges a transposition with the linear layer beside
    it and then forgets which precision was asked for.
    """

    position: Tensor

    def __init__(
        self, first: nn.Conv2d, position: Tensor, blocks: list[nn.Module], norm: nn.LayerNorm, output: nn.Conv2d
    ) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("position", position)
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.output = output

    def forward(self, z: Tensor) -> Tensor:
        """Predict the noise in z ``(B, D, h, w)`` at the folded timestep, same shape."""
        tokens = self.first(z).flatten(2).transpose(1, 2) + self.position
        prediction: Tensor = self.output(self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(2, z.shape[-2:]))
        return prediction


@fold.register
@torch.no_grad()
def _fold_conv_mlp(denoiser: ConvMLP, timestep: int) -> nn.Module:
    condition = denoiser.condition(torch.tensor([timestep], device=denoiser.input.weight.device))[0]
    originals: Iterable[Any] = denoiser.blocks
    blocks = []
    for block in originals:
        shift, scale, gate = block.modulation(condition).chunk(3)
        first, activation, second = block.mlp
        mlp = nn.Sequential(
            _on_grid(_copy(first, shift=shift, scale=scale)), activation, _on_grid(_copy(second, gate=gate))
        )
        blocks.append(FoldedConvMLPBlock(_plain_depthwise(block.depthwise), mlp))
    return nn.Sequential(
        _on_grid(_copy(denoiser.input)), *blocks, FoldedChannelNorm(), _on_grid(_copy(denoiser.output))
    ).eval()


def _plain_depthwise(layer: DepthwiseConv2d) -> nn.Conv2d:
    """Copy a depthwise convolution as torch's own layer."""
    plain = nn.utils.skip_init(
        nn.Conv2d,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        padding=layer.padding,
        groups=layer.groups,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    plain.load_state_dict(layer.state_dict())
    return plain.requires_grad_(requires_grad=False)


@fold.register
@torch.no_grad()
def _fold_dit(denoiser: DiT, timestep: int) -> nn.Module:
    timesteps = torch.tensor([timestep], device=denoiser.position.device)
    time = nn.functional.silu(denoiser.time_embedding(timesteps))[0]
    originals: Iterable[Any] = denoiser.blocks
    blocks: list[nn.Module] = []
    for block in originals:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(time).chunk(6)
        attention = FoldedAttention(
            _copy(block.attention.qkv, shift=shift1, scale=scale1),
            _copy(block.attention.proj, gate=gate1),
            block.attention.num_heads,
        )
        mlp = nn.Sequential(
            _copy(block.mlp.fc1, shift=shift2, scale=scale2), block.mlp.act, _copy(block.mlp.fc2, gate=gate2)
        )
        blocks.append(FoldedDiTBlock(block.norm1, attention, mlp))
    shift, scale = denoiser.modulation(time).chunk(2)
    output = _on_grid(_copy(denoiser.output, shift=shift, scale=scale))
    return FoldedDiT(_on_grid(denoiser.input), denoiser.position.clone(), blocks, denoiser.norm, output).eval()


@fold.register
def _fold_nothing(denoiser: NoDenoiser, timestep: int) -> nn.Module:
    del denoiser, timestep
    return nn.Identity()


@fold.register
def _fold_unet(denoiser: UNet, timestep: int) -> nn.Module:
    folded = copy.deepcopy(denoiser)
    folded.network = fold_unet(folded.network, timestep)
    return folded.requires_grad_(requires_grad=False).eval()


@fold.register
def _fold_velocity(denoiser: VelocityDenoiser, timestep: int) -> nn.Module:
    folded = fold(denoiser.network, timestep)
    return FoldedVelocityDenoiser(folded, denoiser.signal[timestep], denoiser.noise[timestep]).eval()
