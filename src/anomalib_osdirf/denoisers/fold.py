# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A denoiser at one fixed timestep as a plain network: same numbers, fewer weights, fewer operations.

Everything that depends on the timestep alone, its embedding and every adaLN shift, scale and gate, is a constant then.
"""

from collections.abc import Iterable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_osdirf.denoisers.dit import Attention, DiT
from anomalib_osdirf.denoisers.mlp import PositionMLP


@singledispatch
def fold(denoiser: nn.Module, timestep: int) -> nn.Module:
    """Fold a timestep into a denoiser.

    Args:
        denoiser: A denoiser of this package, called as ``denoiser(z, timesteps)``.
        timestep: The timestep it will always be asked at.

    Returns:
        A module called as ``folded(z)`` with z of shape ``(B, D, h, w)``, with copies of the weights.

    Raises:
        TypeError: If nobody has said how to fold this kind of denoiser.
    """
    msg = f"{type(denoiser).__name__} can't be folded at timestep {timestep}; register a function with fold.register."
    raise TypeError(msg)


def _copy(
    layer: nn.Linear, gate: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
) -> nn.Linear:
    """Copy gate * layer(x * (1 + scale) + shift) into one layer; in float64, so that folding rounds once."""
    weight, bias = layer.weight.double(), layer.bias.double()
    if shift is not None and scale is not None:
        bias = bias + weight @ shift.double()
        weight = weight * (1 + scale.double())
    if gate is not None:
        weight, bias = weight * gate.double()[:, None], bias * gate.double()
    copied = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    copied.weight.copy_(weight)
    copied.bias.copy_(bias)
    return copied.requires_grad_(requires_grad=False)


class FoldedBlock(nn.Module):
    """Residual perceptron whose shift, scale and gate are constants of the position."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __init__(self, norm: nn.LayerNorm, layers: tuple[nn.Linear, nn.Linear], modulation: Tensor) -> None:
        super().__init__()
        shift, scale, gate = modulation.chunk(3, dim=-1)
        self.norm = norm
        self.mlp = nn.Sequential(_copy(layers[0]), nn.SiLU(), _copy(layers[1]))
        for name, value in (("shift", shift), ("scale", 1 + scale), ("gate", gate)):
            self.register_buffer(name, value.contiguous().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape."""
        return tokens + self.gate * self.mlp(self.norm(tokens) * self.scale + self.shift)


class FoldedDiTBlock(nn.Module):
    """Transformer block with plain layer norms: shifts, scales and gates have gone into the linear layers."""

    def __init__(self, norm: nn.LayerNorm, attention: Attention, mlp: nn.Sequential) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.mlp = mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, P, width)`` to the same shape."""
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens + self.mlp(self.norm(tokens))


class FoldedDenoiser(nn.Module):
    """Linear layer, blocks, layer norm, linear layer on the positions of a grid as tokens.

    Args:
        first: First layer.
        position: Added after the first layer, shape ``(P, width)``, or ``None``.
        blocks: Blocks on tokens.
        norm: Last layer norm.
        output: Last layer.
    """

    position: Tensor | None

    def __init__(
        self,
        first: nn.Linear,
        position: Tensor | None,
        blocks: list[nn.Module],
        norm: nn.LayerNorm,
        output: nn.Linear,
    ) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("position", position)
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.output = output

    def forward(self, z: Tensor) -> Tensor:
        """Predict the noise in z ``(B, D, h, w)`` at the folded timestep, same shape."""
        tokens = self.first(z.flatten(2).transpose(1, 2))
        if self.position is not None:
            tokens = tokens + self.position
        noise: Tensor = self.output(self.norm(self.blocks(tokens)))
        return noise.transpose(1, 2).unflatten(2, z.shape[-2:])


@fold.register
@torch.no_grad()
def _fold_mlp(denoiser: PositionMLP, timestep: int) -> nn.Module:
    timesteps = torch.tensor([timestep], device=denoiser.position.device)
    condition = denoiser.condition(timesteps)[0]
    originals: Iterable[Any] = denoiser.blocks
    blocks: list[nn.Module] = [
        FoldedBlock(block.norm, (block.mlp[0], block.mlp[2]), block.modulation(condition)) for block in originals
    ]
    return FoldedDenoiser(_copy(denoiser.input), None, blocks, denoiser.norm, _copy(denoiser.output)).eval()


@fold.register
@torch.no_grad()
def _fold_dit(denoiser: DiT, timestep: int) -> nn.Module:
    timesteps = torch.tensor([timestep], device=denoiser.position.device)
    time = nn.functional.silu(denoiser.time_embedding(timesteps))[0]
    originals: Iterable[Any] = denoiser.blocks
    blocks: list[nn.Module] = []
    for block in originals:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(time).chunk(6)
        attention = Attention(block.attention.output.in_features, block.attention.num_heads)
        attention.qkv = _copy(block.attention.qkv, shift=shift1, scale=scale1)
        attention.output = _copy(block.attention.output, gate=gate1)
        mlp = nn.Sequential(
            _copy(block.mlp[0], shift=shift2, scale=scale2), block.mlp[1], _copy(block.mlp[2], gate=gate2)
        )
        blocks.append(FoldedDiTBlock(block.norm1, attention, mlp))
    shift, scale = denoiser.modulation(time).chunk(2)
    output = _copy(denoiser.output, shift=shift, scale=scale)
    return FoldedDenoiser(_copy(denoiser.input), denoiser.position.clone(), blocks, denoiser.norm, output).eval()
