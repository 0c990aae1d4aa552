# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The antialiased resize of training, written so that every runtime computes the same numbers."""

from collections.abc import Sequence
from typing import cast

import torch
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_min(0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, which antialiased resizing uses."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_KERNELS = {InterpolationMode.BILINEAR: _triangle, InterpolationMode.BICUBIC: _cubic}


class ExactResize(nn.Module):
    """Antialiased resize as two matrix products, ``weights(H) @ image @ weights(W)^T``.

    ONNX Runtime and OpenVINO either lack an antialiased Resize or ignore the request in silence, and anomalib drops it
    from the exported graph. The weights here are computed in the graph, so the image's size stays dynamic.

    Args:
        size: Height and width of the output.
        interpolation: ``BILINEAR`` or ``BICUBIC``.
    """

    def __init__(self, size: Sequence[int], interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.size = (int(size[0]), int(size[1]))
        self.interpolation = interpolation

    def forward(self, images: Tensor) -> Tensor:
        """Resize images of shape ``(B, C, H, W)`` to ``(B, C, *size)``."""
        # Transposed by broadcasting, not by a transposition: OpenVINO's CPU plugin takes those to bfloat16.
        rows = self._weights(images.shape[-2], self.size[0], (-1, 1), images)
        columns = self._weights(images.shape[-1], self.size[1], (1, -1), images)
        # Columns first: OpenVINO's CPU plugin can't normalise channels behind a product with constants on the right.
        return rows @ (images @ columns)

    def _weights(self, in_size: int, out_size: int, out_shape: tuple[int, int], like: Tensor) -> Tensor:
        """Share of each input pixel in each output pixel, output pixels along the axis where ``out_shape`` is -1."""
        # In units of half a pixel over out_size all is an integer, exact and out of reach of a runtime's precision.
        pixels = torch.arange(in_size, device=like.device)
        centres = (2 * torch.arange(out_size, device=like.device) + 1) * (pixels[-1:] + 1)
        distance = (2 * pixels.view(out_shape[::-1]) + 1) * out_size - centres.view(out_shape)
        width = 2 * (pixels[-1:] + 1).clamp_min(out_size) + torch.zeros_like(centres)
        weights = _KERNELS[self.interpolation](distance.float() / width.view(out_shape).float())
        return (weights / weights.sum(dim=out_shape.index(1), keepdim=True)).to(like.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"size={self.size}, interpolation={self.interpolation.value}"


def exact_export_transform(transform: v2.Transform | None) -> nn.Module | None:
    """Make the exportable version of a pre-processor's transform, with its antialiased resizes kept exact."""
    if transform is None:
        return None
    parts = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
    return nn.Sequential(*(_exportable(part) for part in parts))


def _exportable(part: nn.Module) -> nn.Module:
    if (
        isinstance(part, v2.Resize)
        and part.antialias
        and InterpolationMode(part.interpolation) in _KERNELS  # newer torchvision keeps the mode's name
        and part.size is not None
        and len(part.size) == 2
    ):
        return ExactResize(part.size, InterpolationMode(part.interpolation))
    if isinstance(part, v2.Compose):
        return nn.Sequential(*(_exportable(inner) for inner in part.transforms))
    return cast("nn.Module", get_exportable_transform(part))
