# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""How much of the noise a denoiser explains beyond the best linear one."""

from torch import Tensor


def linear_denoiser_loss(abar: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error of the best linear position-wise denoiser of uncorrelated features.

    For a channel of variance lambda the best predictor of eps from z_t = sqrt(abar) z + sqrt(1 - abar) eps is
    Cov(eps, z_t) / Var(z_t) z_t = sqrt(1 - abar) / (abar lambda + 1 - abar) z_t, with the error

        1 - Cov(eps, z_t)^2 / Var(z_t) = abar lambda / (abar lambda + 1 - abar),

    which is abar for white features.

    Args:
        abar: abar_t of any timesteps, in (0, 1), any shape.
        variance: Variance lambda of each channel, shape ``(D,)``.

    Returns:
        The error, averaged over the channels, shape of ``abar``.

    Example:
        >>> import torch
        >>> linear_denoiser_loss(torch.tensor([0.5, 0.25]), torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.2500])
    """
    signal = abar[..., None] * variance
    return (signal / (signal + 1 - abar[..., None])).mean(-1)


def explained_share(losses: Tensor, baseline: Tensor) -> Tensor:
    """Share of a baseline's loss that a denoiser removes: 1 - sum(losses) / sum(baseline).

    Args:
        losses: Mean squared errors of the denoiser, any shape.
        baseline: Those of the baseline at the same timesteps, such as :func:`linear_denoiser_loss`, same shape.

    Returns:
        The share, shape ``()``: 1 for a perfect denoiser, 0 for one like the baseline, negative for a worse one.

    Example:
        >>> import torch
        >>> explained_share(torch.tensor([0.4, 0.2]), torch.tensor([0.5, 0.25]))
        tensor(0.2000)
    """
    return 1 - losses.sum() / baseline.sum()
