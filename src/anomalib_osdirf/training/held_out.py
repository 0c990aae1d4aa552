# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The training images held out from the denoiser's training, which select the checkpoint."""

from torch import Tensor

SHARE = 5  # one image in five


def held_out(numbers: Tensor, total: int) -> Tensor:
    """Return which of ``total`` images are held out: every fifth, or one of fewer, unless it is the only one."""
    every = max(2, min(SHARE, total))
    return numbers % every == every - 1
