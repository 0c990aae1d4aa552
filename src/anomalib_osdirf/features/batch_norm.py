# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Frozen batch norms as a part of the convolutions before them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-4
_EXAMPLE_SIZE = (256, 256)


@torch.no_grad()
def fold_batch_norms(network: nn.Module, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Fold every batch norm that follows a convolution into it.

    Which convolution a batch norm follows is seen in one forward pass, so that any architecture will do.

    Args:
        network: A network in evaluation mode that maps images ``(B, 3, H, W)`` to a list of feature maps; it is left as
            it is.
        image_size: Height and width of the images that it takes; ``None`` if it takes any.

    Returns:
        A copy with fewer operations and the same output.
    """
    folded = copy.deepcopy(network)
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return folded
    weight = next(network.parameters())
    height, width = image_size or _EXAMPLE_SIZE
    example = torch.arange(3.0 * height * width).sin().view(1, 3, height, width).to(weight)
    made_by: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # outputs stay alive until they are met, so that no id is reused
    pairs: dict[str, tuple[nn.Conv2d, _BatchNorm]] = {}
    names = {module: name for name, module in folded.named_modules()}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (output, module)
        elif id(inputs[0]) in made_by and isinstance(module, _BatchNorm):
            pairs[names[module]] = (made_by.pop(id(inputs[0]))[1], module)

    handles = [
        module.register_forward_hook(look) for module in folded.modules() if isinstance(module, nn.Conv2d | _BatchNorm)
    ]
    folded(example)
    for handle in handles:
        handle.remove()
    for name, (convolution, norm) in pairs.items():
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            continue
        _absorb(convolution, norm)
        # timm's batch norms come with the activation behind them.
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        folded.set_submodule(name, nn.Sequential(*rest))
    expected, actual = network(example), folded(example)
    same = all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(b.abs().amax()))
        for a, b in zip(actual, expected, strict=True)
    )
    # A convolution whose output is also used before the batch norm can't be folded: rather none than a wrong one.
    return folded if same else copy.deepcopy(network)


def _absorb(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    """Give the convolution weights with the batch norm in them, computed in float64."""
    bias, mean, variance = convolution.bias, norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    new_weight, new_bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        None if bias is None else bias.double(),
        mean.double(),
        variance.double(),
        norm.eps,
        norm.weight.double(),
        norm.bias.double(),
    )
    weight = convolution.weight
    convolution.weight = nn.Parameter(new_weight.to(weight), requires_grad=False)
    convolution.bias = nn.Parameter(new_bias.to(weight), requires_grad=False)
