# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Norm-guided one-step denoising of DiffusionAD (arXiv 2303.08730).

A sample is noised at a small scale n, which keeps its detail, and at a big scale b, which drowns an anomaly. One
prediction of the noise at each scale, "one step", gives two clean estimates; the one from b, free of the anomaly,
guides the one from n.
"""

from torch import Tensor


def clean_estimate(z_t: Tensor, predicted_noise: Tensor, abar: Tensor) -> Tensor:
    """Estimate the clean sample in one step, x0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), clamped to [-1, 1].

    Args:
        z_t: Noised sample, shape ``(B, ...)``.
        predicted_noise: eps_theta(z_t, t), shape of ``z_t``.
        abar: abar_t in (0, 1], broadcastable to ``z_t``.

    Returns:
        Shape of ``z_t``, in [-1, 1].
    """
    return ((z_t - (1 - abar).sqrt() * predicted_noise) / abar.sqrt()).clamp(-1, 1)


def norm_guided_estimate(
    z_n: Tensor,
    predicted_noise_n: Tensor,
    abar_n: Tensor,
    z_b: Tensor,
    predicted_noise_b: Tensor,
    abar_b: Tensor,
    strength: float,
) -> Tensor:
    """Estimate the clean sample from the small noise scale n, guided by the estimate from the big one b.

        x0_b = clean(z_b, eps_b)                                        the estimate that an anomaly does not survive
        z~_n = sqrt(abar_n) x0_b + sqrt(1 - abar_n) eps_n               the same, brought to the scale n
        eps^ = eps_n - strength * sqrt(1 - abar_n) (z~_n - z_n)         the guided noise
        x0   = clean(z_n, eps^)

    Together: x0 = clean_n + strength (1 - abar_n) (x0_b - clean_n), with clean_n the plain estimate before its clamp.

    Args:
        z_n: Sample noised at the small scale, shape ``(B, ...)``.
        predicted_noise_n: eps_theta(z_n, t_n), shape of ``z_n``.
        abar_n: abar at t_n in (0, 1], broadcastable to ``z_n``.
        z_b: The same sample noised at the big scale by a noise field of its own, shape of ``z_n``.
        predicted_noise_b: eps_theta(z_b, t_b), shape of ``z_n``.
        abar_b: abar at t_b in (0, abar_n), broadcastable to ``z_n``.
        strength: Weight w of the guidance; 0 is the plain clean estimate from ``z_n``.

    Returns:
        The reconstruction, shape of ``z_n``, in [-1, 1].
    """
    clean_b = clean_estimate(z_b, predicted_noise_b, abar_b)
    guide = abar_n.sqrt() * clean_b + (1 - abar_n).sqrt() * predicted_noise_n
    guided_noise = predicted_noise_n - strength * (1 - abar_n).sqrt() * (guide - z_n)
    return clean_estimate(z_n, guided_noise, abar_n)
