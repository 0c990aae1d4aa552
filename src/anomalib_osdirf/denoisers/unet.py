# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""diffusers' convolutional UNet on the feature grid, and how a timestep is folded into any such UNet."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEAD_WIDTH = 64


class UNet(nn.Module):
    """Noise predictor of two levels, the feature grid and half of it, with self-attention on the coarser one.

    Args:
        dim: Channels D of the feature grid.
        grid_size: Side of the grid, even.
        width: Channels of the first level, a multiple of 64, twice as many on the second; ``None`` takes 128, or D
            rounded up if that is larger, because noise in D dimensions does not pass through a narrower state.

    Raises:
        ValueError: If the grid can't be halved.
    """

    def __init__(self, dim: int, grid_size: int, width: int | None = None) -> None:
        super().__init__()
        # Imported here because diffusers takes seconds to import and `anomalib --help` must not pay for it.
        from diffusers import UNet2DModel

        if grid_size % 2:
            msg = f"grid_size={grid_size} is odd, and denoiser=unet halves the grid; use an even one such as 8 or 16."
            raise ValueError(msg)
        width = width or max(128, -(-dim // _HEAD_WIDTH) * _HEAD_WIDTH)
        self.network: Any = UNet2DModel(
            sample_size=grid_size,
            in_channels=dim,
            out_channels=dim,
            layers_per_block=1,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=_HEAD_WIDTH,
        )
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    @property
    def output(self) -> nn.Conv2d:
        """The last layer."""
        layer: nn.Conv2d = self.network.conv_out
        return layer

    def forward(self, z: Tensor, timesteps: Tensor | int = 0) -> Tensor:
        """Predict the noise in z_t ``(B, D, h, w)`` at timesteps ``(B,)``, which don't matter once one is folded in."""
        noise: Tensor = self.network(z, timesteps).sample
        return noise


@torch.no_grad()
def fold_unet(unet: Any, timestep: int) -> nn.Module:  # diffusers' UNet2DModel, not imported here
    """Fold a timestep into diffusers' UNet2DModel, and have it attend in elementary steps.

    The timestep adds a constant to the first convolution of each residual block, so to its bias. The result shares all
    other weights with the given one; its own argument ``timestep`` does nothing.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    time = unet.time_embedding(unet.time_proj(torch.tensor([timestep], device=unet.device)).to(unet.dtype))
    folded = copy_of_structure(unet)
    attentions: list[Any] = [module for module in folded.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.set_processor(GridAttention())
    blocks: list[Any] = [module for module in folded.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        shift = block.time_emb_proj(functional.silu(time))[0]
        block.conv1.bias = nn.Parameter(block.conv1.bias + shift, requires_grad=False)
        block.time_emb_proj = None
        block.time_embedding_norm = "folded"  # neither of those that diffusers would apply
    return folded


def copy_of_structure(module: nn.Module) -> nn.Module:
    """Copy a module, but not its weights: those are shared."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


class GridAttention:
    """Self-attention of diffusers in its elementary steps on the grid, as an attention processor.

    1 x 1 convolutions instead of linear layers, the scale 1 / sqrt(d) in the queries' weights, and plain products:
    OpenVINO's CPU plugin forgets the precision of diffusers' own steps, as of those in
    :class:`~anomalib_osdirf.denoisers.fold.FoldedAttention`.
    """

    def __call__(self, attention: Any, values: Tensor, temb: Tensor | None = None, **_: Any) -> Tensor:
        """Attend to all positions of ``(B, C, H, W)`` with the module's weights, whatever the timestep."""
        del temb
        normed = attention.group_norm(values)
        query, key, value = (
            _on_grid(layer, normed, factor).flatten(2).unflatten(1, (attention.heads, -1))
            for layer, factor in ((attention.to_q, attention.scale), (attention.to_k, 1), (attention.to_v, 1))
        )
        weights = (query.transpose(2, 3) @ key).softmax(dim=-1)
        attended = (weights @ value.transpose(2, 3)).transpose(2, 3).flatten(1, 2).unflatten(2, values.shape[-2:])
        return values + _on_grid(attention.to_out[0], attended)


def _on_grid(layer: nn.Linear, values: Tensor, factor: float = 1) -> Tensor:
    """Apply a linear layer to each position of a grid, and multiply by a factor."""
    return functional.conv2d(values, factor * layer.weight[:, :, None, None], factor * layer.bias)
