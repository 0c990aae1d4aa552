# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""Images with enough texture to show a wrong resize."""

import numpy as np


def textured_image(rng: np.random.Generator, height: int, width: int, defect: bool = False) -> np.ndarray:
    """Draw stripes and noise, with a bright square where there is a defect.

    An antialiased resize to one size makes images of all sizes alike: the stripes grow with the image, and so does the
    noise, which averaging takes down again. A resize without it leaves the noise in.
    """
    rows, columns = np.mgrid[:height, :width]
    noise = 8 * max(1.0, (height * width / (80 * 72)) ** 0.5)
    image = (
        120
        + 40 * np.sin(columns * 72 / width / 3 + rng.uniform(0, 6))
        + 20 * np.cos(rows * 80 / height / 5)
        + rng.normal(0, noise, (height, width))
    )
    if defect:
        image[height // 4 : height // 2, width // 4 : width // 2] += 70
    return np.clip(image, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)
