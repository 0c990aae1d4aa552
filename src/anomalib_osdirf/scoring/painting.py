# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies painted on normal training images, by which densities are compared."""

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor
from torch.nn import functional

from anomalib_osdirf.data.synthetic_anomalies import shuffle_patches

_BLEND_FACTOR = (0.2, 0.8)
_PATCHES_PER_SIDE = 8
# Share of a position's pixels from which on it counts as covered.
_COVERED = 0.5


def paint(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Blend patches of an image into it, shuffled and changed in brightness and colour, under a mask of Perlin noise.

    The image keeps a share of 0.2 to 0.8 of itself there, as in DiffusionAD's training. Mask and patches depend on the
    image's number ``(B,)`` alone. Images are pre-processed, ``(B, 3, H, W)``; masks are 0 or 1, ``(B, 1, H, W)``.
    """
    painted, masks = [], []
    low, high = _BLEND_FACTOR
    for image, number in zip(images.float().cpu(), numbers.tolist(), strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            generator = PerlinAnomalyGenerator(probability=1.0)
            _, mask = generator.generate_perturbation(image.shape[-2], image.shape[-1], image.device)
            mask = mask.permute(2, 0, 1)
            darkest, brightest = image.amin(), image.amax()
            changed = generator.augmenters((image - darkest) / (brightest - darkest).clamp_min(1e-6))
            shuffled = shuffle_patches(changed * (brightest - darkest) + darkest, _PATCHES_PER_SIDE)
            filling = torch.lerp(image, shuffled, low + (high - low) * torch.rand(1))
            painted.append(torch.where(mask > 0, filling, image))
            masks.append(mask)
    return torch.stack(painted).to(images), torch.stack(masks).to(images)


def covered_positions(masks: Tensor, grid_size: int) -> Tensor:
    """Tell which positions of a grid masks ``(B, 1, H, W)`` cover, shape ``(B, grid_size, grid_size)``."""
    return functional.adaptive_avg_pool2d(masks, grid_size).squeeze(1) > _COVERED
