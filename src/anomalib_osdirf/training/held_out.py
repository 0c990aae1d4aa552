# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The training images held out from the denoiser's training, which select the checkpoint."""

from torch import Tensor

SHARE = 5  # one image in five


def held_out(numbers: Tensor, total: int) -> Tensor:
    """Return which images are held out: every fifth, or one of fewer than five, unless it is the only one.

    Args:
        numbers: Numbers of images, any shape.
        total: Number of all images.

    Returns:
        Shape of ``numbers``, bool.
    """
    every = max(2, min(SHARE, total))
    return numbers % every == every - 1
