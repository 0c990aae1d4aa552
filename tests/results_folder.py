# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Results folders with made-up results, for tests of report pages."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_osdirf.report import pictures
from anomalib_osdirf.report.results import ImageResult, ResultsWriter, name_groups, pack

POST_PROCESSING = {
    "image_threshold": 10.0,
    "image_min": 0.0,
    "image_max": 20.0,
    "pixel_min": 0.0,
    "pixel_max": 1.0,
    "pixel_threshold": 0.5,
    "image_sensitivity": 0.5,
    "enable_normalization": True,
    "enable_thresholding": True,
}


def image_result(
    path: str | None, label: int | None, score: float | None, seed: int = 0, side: int = 24
) -> ImageResult:
    """Make one image's result, with pictures of noise; masks lie in the upper left quarter."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((3, side, side), generator=generator)
    mask = torch.zeros(side, side)
    mask[: side // 2, : side // 2] = float(label == 1)
    anomaly_map = (noise[0] + mask) / 2
    grey, low, high = pictures.encode_map(anomaly_map, side)
    counts = [pack(part) for part in pictures.count_pixels(anomaly_map, mask, 0, 1)]
    category, defect_type = name_groups(path, label, None)
    return ImageResult(
        path=path,
        label=label,
        category=category,
        defect_type=defect_type,
        score=score,
        width=side,
        height=side,
        picture=pictures.encode_image(noise, side),
        map=grey,
        map_low=low,
        map_high=high,
        mask=pictures.encode_mask(mask, side) if label == 1 else None,
        normal_pixels=counts[0],
        anomalous_pixels=counts[1],
        regions=counts[2],
    )


def write_results(folder: Path, images: list[ImageResult], **entries: Any) -> Path:
    """Write a results file as a finished test does."""
    writer = ResultsWriter(folder)
    defaults = {
        "model": "OSDIRF",
        "data": {"name": "parts", "category": "bolt"},
        "test": {"state": "finished", "images": len(images), "seconds": 2.0},
        "post_processing": POST_PROCESSING,
        "metrics": {"image_AUROC": 0.5, "pixel_AUPRO": 0.25},
    }
    writer.put({**defaults, **entries})
    writer.add_images(images)
    writer.add_losses([(step, 1 / (step + 1)) for step in range(5)])
    return folder


def ordinary_images(count: int = 12) -> list[ImageResult]:
    """Make images of two defect types and good ones; scores 0 to 20, threshold 10, some on the wrong side."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        label = number % 2
        defect_type = ("good", ("dent", "scratch")[number // 2 % 2])[label]
        score = float(np.clip(7 + 6 * label + rng.normal() * 4, 0.5, 19.5))
        images.append(image_result(f"data/bolt/test/{defect_type}/{number:05d}.png", label, score, seed=number))
    return images
