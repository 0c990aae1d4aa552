# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Images of all kinds are read; what is none is refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_osdirf.inference.reading import ImageError, read_image


def test_images_of_16_bits_and_with_transparency_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 32768, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_image(tmp_path / "deep.png", 100), 0.5, atol=1e-4)
    Image.fromarray(np.full((4, 5, 4), 51, np.uint8)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 100).shape == (4, 5, 3)
    np.testing.assert_allclose(read_image(tmp_path / "clear.png", 100), 0.2)


def test_broken_and_too_large_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((100, 100), np.uint8))
    image.save(tmp_path / "large.png")
    with pytest.raises(ImageError, match=r"large.png .*--max-pixels"):
        read_image(tmp_path / "large.png", 5000)
    (tmp_path / "short.png").write_bytes((tmp_path / "large.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("no image", "utf-8")
    for name in ("short.png", "text.jpg"):
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name, 10**6)
