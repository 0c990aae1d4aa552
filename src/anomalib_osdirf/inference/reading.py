# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Reading image files that may be broken, too large, or no images at all."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Those of anomalib's folders.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FULL_SCALE_16_BIT = 65535


class ImageError(ValueError):
    """A file that is no image to score; its message is one sentence."""


def read_image(path: Path, max_pixels: int) -> NDArray[np.float32]:
    """Read a file as anomalib reads it, and 16-bit grey images as what they are.

    Args:
        path: Image file.
        max_pixels: Images with more pixels are refused before they are decoded.

    Returns:
        The image ``(H, W, 3)``, in 0 to 1.

    Raises:
        ImageError: If the file is no image, broken or too large.
    """
    if not path.is_file():  # a pipe would be waited for
        msg = f"{path.name} is no file." if path.exists() else f"{path.name} does not exist."
        raise ImageError(msg)
    try:
        _check_file(path)
        with Image.open(path) as image:
            _check_size(path, image, max_pixels)
            if image.mode.startswith("I"):
                grey = np.clip(np.asarray(image, dtype=np.float32) / _FULL_SCALE_16_BIT, 0, 1, dtype=np.float32)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)
    except Image.DecompressionBombError as error:
        msg = f"{path.name} has far more pixels than the {max_pixels / 1e6:g} million that are allowed (--max-pixels)."
        raise ImageError(msg) from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble on
        msg = f"{path.name} can't be read as an image; it may be broken, or of a kind that Pillow doesn't know."
        raise ImageError(msg) from error


def readable(text: str) -> str:
    """Return a text that every program can read, where a file's name is of no known encoding."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _check_file(path: Path) -> None:
    if not path.is_file():  # reading a pipe would wait for ever
        msg = f"{path.name} is no file."
        raise ImageError(msg)


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        msg = (
            f"{path.name} has {width} x {height} pixels, more than the {max_pixels / 1e6:g} million that are allowed "
            "(--max-pixels)."
        )
        raise ImageError(msg)
