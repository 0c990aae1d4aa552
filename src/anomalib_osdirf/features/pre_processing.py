# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-processing for a backbone: the normalisation that it was trained with, and a multiple of its patch size."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn
from torchvision.transforms import v2

from anomalib_osdirf.features.filter_bank import IMAGENET_MEAN, IMAGENET_STD


def normalisation_of(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the normalisation's mean and standard deviation of a timm model; ImageNet's for other names."""
    config = get_pretrained_cfg(backbone)
    return (IMAGENET_MEAN, IMAGENET_STD) if config is None else (tuple(config.mean), tuple(config.std))


def normalised_for(backbone: str, transform: nn.Module) -> nn.Module:
    """Return a transform with its normalisation replaced by the backbone's."""
    mean, std = normalisation_of(backbone)
    return _changed(transform, lambda part: v2.Normalize(mean, std) if isinstance(part, v2.Normalize) else part)


def disagreement(backbone: str, transform: nn.Module | None) -> str | None:
    """Describe how a transform's normalisation differs from the backbone's, ``None`` if it does not."""
    mean, std = normalisation_of(backbone)
    normalised = [part for part in parts_of(transform) if isinstance(part, v2.Normalize)]
    if not normalised:
        return f"does not normalise, while {backbone} was trained with mean={mean} and std={std}"
    own = normalised[-1]
    if tuple(own.mean) == mean and tuple(own.std) == std:
        return None
    return (
        f"normalises with mean={tuple(own.mean)} and std={tuple(own.std)}, while {backbone} was trained with "
        f"mean={mean} and std={std}"
    )


def rounded_to(patch: Sequence[int], transform: nn.Module) -> tuple[nn.Module, tuple[list[int], list[int]] | None]:
    """Round the size that a transform gives images to multiples of a backbone's patches.

    Args:
        patch: Height and width of a patch.
        transform: The transform.

    Returns:
        The transform, and the sizes before and after where they differ.

    Raises:
        ValueError: If the size is below a patch.
    """
    sized = [part for part in parts_of(transform) if isinstance(part, v2.Resize | v2.CenterCrop)]
    before = list(sized[-1].size or []) if sized else []
    if len(before) != 2:  # it leaves the size to the image
        return transform, None
    if before[0] < patch[0] or before[1] < patch[1]:
        raise ValueError(
            f"The pre-processor's size of {before[0]} x {before[1]} pixels is below the backbone's patch of {patch[0]} "
            f"x {patch[1]}; use a larger Resize."
        )
    after = [round(side / step) * step for side, step in zip(before, patch, strict=True)]
    if after == before:
        return transform, None

    def change(part: nn.Module) -> nn.Module:
        if part is not sized[-1]:
            return part
        if isinstance(part, v2.CenterCrop):
            return v2.CenterCrop(after)
        return v2.Resize(after, interpolation=part.interpolation, antialias=part.antialias)

    return _changed(transform, change), (before, after)


def parts_of(transform: nn.Module | None) -> list[Any]:
    """Return a transform's parts in their order."""
    if isinstance(transform, v2.Compose):
        return [part for one in transform.transforms for part in parts_of(one)]
    return [] if transform is None else [transform]


def _changed(transform: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if isinstance(transform, v2.Compose):
        return v2.Compose([_changed(part, change) for part in transform.transforms])
    return change(transform)
