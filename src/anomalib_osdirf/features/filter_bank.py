# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""A feature space without weights: a fixed bank of oriented filters, in the manner of a scattering transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def gabor_kernels(wavelength: float, orientations: int, size: int) -> Tensor:
    """Make pairs of even and odd wave packets, one pair per orientation.

    The even ones have their mean removed, so that a constant image gives exactly nothing, and each pair is scaled to
    answer a wave of its own length and direction, of amplitude 1, with modulus 1.

    Args:
        wavelength (float): Length of the wave in pixels.
        orientations (int): Number of directions over half a turn.
        size (int): Odd side of the kernels.

    Returns:
        Tensor: Kernels of shape ``(2 * orientations, 1, size, size)``, all even ones first.
    """
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    across_width, along_width = 0.42 * wavelength, 0.6 * wavelength
    even, odd = [], []
    for index in range(orientations):
        angle = math.pi * index / orientations
        across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-0.5 * ((across / across_width) ** 2 + (along / along_width) ** 2))
        phase = 2 * math.pi * across / wavelength
        cosine = envelope * (phase.cos() - (envelope * phase.cos()).sum() / envelope.sum())
        sine = envelope * phase.sin()
        even.append(cosine / (cosine * phase.cos()).sum())
        odd.append(sine / (sine * phase.sin()).sum())
    return torch.stack(even + odd).unsqueeze(1).float()


class FilterBank(nn.Module):
    """Texture and colour maps from fixed filters: nothing is learnt, loaded or random.

    The image's logarithm is split into lightness and two opponent colours, so that exposure only adds a constant.
    A pyramid of them is filtered with oriented wave packets; the moduli, averaged over the stride, say how much of each
    wavelength and direction there is. Every layer has the same stride:

    - ``colour``: mean and spread of lightness, red against green and yellow against blue;
    - ``fine``, ``medium``, ``coarse``: lightness in waves of 4, 8 and 16 pixels, in six directions;
    - ``tint``, ``wide_tint``: the two opponent colours in waves of 16 and 32 pixels, in four directions;
    - ``second``: the waves in the maps of ``fine`` and ``medium`` themselves, which tell how a texture is arranged.

    Args:
        layers (Sequence[str] | None): Names out of ``LAYERS``, in the order wanted; all of them when ``None``.

    Raises:
        ValueError: If no layer, an unknown layer or a layer twice is asked for.

    Attributes:
        layers (list[str]): Names of the maps that ``forward`` returns.
        channels (list[int]): Number of channels of each.
        strides (list[int]): Pixels of the image per step of each.

    Example:
        >>> import torch
        >>> bank = FilterBank(["colour", "fine"])
        >>> [tuple(features.shape) for features in bank(torch.zeros(1, 3, 64, 64))]
        [(1, 6, 8, 8), (1, 6, 8, 8)]
    """

    CHANNELS: ClassVar[dict[str, int]] = {
        "colour": 6,
        "fine": 6,
        "medium": 6,
        "coarse": 6,
        "tint": 8,
        "wide_tint": 8,
        "second": 12,
    }
    LAYERS: ClassVar[tuple[str, ...]] = tuple(CHANNELS)
    STRIDE: ClassVar[int] = 8

    mean: Tensor
    std: Tensor
    opponents: Tensor
    blur: Tensor
    waves: Tensor
    few_waves: Tensor

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        names = list(self.LAYERS if layers is None else layers)
        unknown = [name for name in names if name not in self.CHANNELS]
        if unknown or not names or len(set(names)) < len(names):
            msg = f"layers is {names}, but each must be one of {', '.join(self.LAYERS)}, at least one and none twice."
            raise ValueError(msg)
        self.layers: list[str] = names
        self.channels: list[int] = [self.CHANNELS[name] for name in names]
        self.strides: list[int] = [self.STRIDE] * len(names)

        # The constants are rebuilt with the module, so a checkpoint need not carry them.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        opponents = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
        opponents = opponents / torch.tensor([[3.0], [math.sqrt(2)], [math.sqrt(6)]])
        self.register_buffer("opponents", opponents.view(3, 3, 1, 1), persistent=False)
        binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        blur = torch.outer(binomial, binomial).expand(3, 1, 5, 5).contiguous()
        self.register_buffer("blur", blur, persistent=False)
        self.register_buffer("waves", gabor_kernels(4.0, orientations=6, size=9), persistent=False)
        self.register_buffer("few_waves", gabor_kernels(4.0, orientations=4, size=7), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps.

        Args:
            images (Tensor): ImageNet-normalised images of shape ``(B, 3, H, W)``, at least 32 pixels a side. A side
                that is no multiple of the stride is extended by repeating its last pixels.

        Returns:
            list[Tensor]: One map per name in ``layers``, of shape ``(B, C_i, ceil(H / stride), ceil(W / stride))``.
        """
        height, width = images.shape[-2:]
        if height % self.STRIDE or width % self.STRIDE:
            images = functional.pad(images, (0, -width % self.STRIDE, 0, -height % self.STRIDE), mode="replicate")
        rgb = images * self.std + self.mean
        pixels = functional.conv2d((rgb.clamp(min=0) + 0.03).log(), self.opponents)
        half = self.halved(pixels)
        quarter = self.halved(half)
        fine = self.moduli(pixels[:, :1], self.waves, stride=2)
        medium = self.moduli(half[:, :1], self.waves, stride=2)

        maps: dict[str, Tensor] = {}
        for name in self.layers:
            if name == "colour":
                maps[name] = self.mean_and_spread(pixels)
            elif name == "fine":
                maps[name] = compressed(functional.avg_pool2d(fine, 4))
            elif name == "medium":
                maps[name] = compressed(functional.avg_pool2d(medium, 2))
            elif name == "coarse":
                maps[name] = compressed(functional.avg_pool2d(self.moduli(quarter[:, :1], self.waves), 2))
            elif name == "tint":
                maps[name] = compressed(functional.avg_pool2d(self.moduli(quarter[:, 1:], self.few_waves), 2))
            elif name == "wide_tint":
                maps[name] = compressed(self.moduli(self.halved(quarter)[:, 1:], self.few_waves))
            else:
                first = torch.cat([functional.avg_pool2d(fine, 2), medium], dim=1)
                second = functional.avg_pool2d(self.moduli(compressed(first), self.few_waves), 2)
                by_direction = second.reshape(second.shape[0], -1, 4, *second.shape[-2:])
                maps[name] = compressed(by_direction.mean(dim=2))
        return [maps[name] for name in self.layers]

    def halved(self, planes: Tensor) -> Tensor:
        """Smooth three planes and keep every other pixel: ``(B, 3, H, W)`` to ``(B, 3, H / 2, W / 2)``."""
        return functional.conv2d(functional.pad(planes, (2, 2, 2, 2), mode="reflect"), self.blur, stride=2, groups=3)

    def mean_and_spread(self, planes: Tensor) -> Tensor:
        """Return mean and logarithmic standard deviation of each cell: ``(B, C, H, W)`` to ``(B, 2 C, h, w)``."""
        mean = functional.avg_pool2d(planes, self.STRIDE)
        variance = functional.avg_pool2d(planes.square(), self.STRIDE) - mean.square()
        return torch.cat([mean, compressed(variance.clamp(min=0).sqrt())], dim=1)

    @staticmethod
    def moduli(planes: Tensor, waves: Tensor, stride: int = 1) -> Tensor:
        """Filter each plane with each pair of wave packets and return the pairs' moduli.

        Args:
            planes (Tensor): Planes of shape ``(B, C, H, W)``.
            waves (Tensor): Even and then odd kernels of shape ``(2 N, 1, k, k)``.
            stride (int): Pixels per step of the result.

        Returns:
            Tensor: Moduli of shape ``(B, C * N, H / stride, W / stride)``, the directions of a plane side by side.
        """
        margin = waves.shape[-1] // 2
        padded = functional.pad(planes, (margin, margin, margin, margin), mode="reflect")
        # Planes become a batch of their own: a grouped convolution is many times slower on a processor.
        answers = functional.conv2d(padded.reshape(-1, 1, *padded.shape[-2:]), waves, stride=stride)
        even, odd = answers.chunk(2, dim=1)
        moduli = (even.square() + odd.square()).sqrt()
        return moduli.reshape(planes.shape[0], -1, moduli.shape[-2], moduli.shape[-1])


def compressed(moduli: Tensor) -> Tensor:
    """Return a logarithm that is flat below the camera's noise, in the shape of ``moduli``."""
    return (moduli + 0.01).log()
