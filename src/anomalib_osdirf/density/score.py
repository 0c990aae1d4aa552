# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Image scores from the map of negative log densities."""

from torch import Tensor

IMAGE_SCORES = ("max", "top_k", "mean")

# Between the largest positions, best for small defects, and all of them, best for large ones (model card, ablation).
_TOP_SHARE = 1 / 3


def image_score(nll: Tensor, method: str) -> Tensor:
    """Reduce the map of one image to its score, looking at no other image.

    Args:
        nll: Negative log densities, shape ``(B, h, w)``, nats.
        method: ``max``; ``top_k``, the mean of the largest third of the positions (at least one); or ``mean``, the
            density of the whole field by position.

    Returns:
        Scores, shape ``(B,)``, nats.

    Raises:
        ValueError: If ``method`` is unknown.
    """
    values = nll.flatten(1)
    if method == "max":
        return values.amax(dim=1)
    if method == "mean":
        return values.mean(dim=1)
    if method == "top_k":
        k = max(1, round(_TOP_SHARE * values.shape[1]))
        return values.topk(k, dim=1).values.mean(dim=1)
    msg = f"image_score={method!r} is unknown; use one of {', '.join(IMAGE_SCORES)}."
    raise ValueError(msg)
