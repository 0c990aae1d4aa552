# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Small models, fitted without a trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anomalib_osdirf.features import StreamingMoments, coarse
from anomalib_osdirf.models.field_model import FieldModel


@pytest.fixture(scope="session")
def fit() -> Callable[[FieldModel, Tensor], FieldModel]:
    """Return what fits projection and scorer of a model on images, five at a time, and returns the model."""

    @torch.no_grad()
    def fitted(model: FieldModel, images: Tensor) -> FieldModel:
        network: Any = model.network
        moments = StreamingMoments()
        moments.update(coarse(network.extract_features(images)).permute(0, 2, 3, 1).flatten(0, 2))
        network.projection.fit(moments)
        batches = images.split(5), torch.arange(len(images)).split(5)
        model.scorer.fit(lambda: ((*network(some), numbers) for some, numbers in zip(*batches, strict=True)))
        return model.eval()

    return fitted
