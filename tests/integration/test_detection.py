# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Defects on drawn surfaces are found, and no worse than by the densities alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import SyntheticSurfaces

CASES = [
    # Surface; training images; normal test images and those of each of five defects; side; grid; steps; least AUROC of
    # images and of pixels. With 40 test images of loose parts instead of 120, two hundredths are less than the noise.
    pytest.param("weave", 40, 20, 4, 96, 12, 100, 0.9, 0.95, id="weave"),
    pytest.param("loose_parts", 100, 60, 12, 256, 16, 150, 0.75, 0.9, id="loose_parts", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("category", "trained_on", "normal", "of_each_defect", "side", "grid_size", "steps", "image", "pixel"), CASES
)
def test_defects_rank_above_normal_images(
    category: str,
    trained_on: int,
    normal: int,
    of_each_defect: int,
    side: int,
    grid_size: int,
    steps: int,
    image: float,
    pixel: float,
    engine: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    """Defaults but for size and steps; the reference is the same without a denoiser."""
    surface = SyntheticSurfaces(
        tmp_path / "surfaces",
        category,
        num_train=trained_on,
        num_test_good=normal,
        num_test_per_defect=of_each_defect,
        image_size=side,
    )

    def metrics(**arguments: Any) -> dict[str, float]:
        size = OSDIRF.configure_pre_processor((side, side))
        model = OSDIRF(
            backbone="filter_bank", grid_size=grid_size, seed=0, max_steps=steps, pre_processor=size, **arguments
        )
        return dict(engine(logger=False).train(model, datamodule=surface)[0])

    own, alone = metrics(), metrics(denoiser="none")
    for name, least in (("image_AUROC", image), ("pixel_AUROC", pixel)):
        assert own[name] > least
        assert own[name] >= alone[name] - 0.02
