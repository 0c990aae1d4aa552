# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Reading image files that may be broken, too large, or no images at all."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Those of anomalib's folders.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FULL_SCALE_16_BIT = 65535


class ImageError(ValueError):
    """An unreadable image file; the message is one sentence."""


def read_image(path: Path, max_pixels: int) -> NDArray[np.float32]:
    """Read a file as anomalib reads it, and 16-bit grey images as what they are: ``(H, W, 3)``, in 0 to 1.

    Raises:
        ImageError: If the file is not an image, is broken or, which is seen before it is decoded, too large.
    """
    name = readable(path.name)
    try:
        with Image.open(regular(path)) as image:
            check_size(name, *image.size, max_pixels)
            grey = deep_grey(image)
            return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255) if grey is None else grey
    except Image.DecompressionBombError as error:
        msg = f"{name} has far more pixels than the {max_pixels / 1e6:g} million that are allowed (--max-pixels)."
        raise ImageError(msg) from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble on
        reason = reason_unread(path, error)
        raise ImageError(readable(f"{name} can't be read as an image, {reason}.")) from error


def regular(path: str | Path) -> Path:
    """Return the path of a regular file; reading a pipe would block forever."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("it does not exist" if not path.exists() else "it is not a regular file")
    return path


def deep_grey(image: Image.Image) -> NDArray[np.float32] | None:
    """Return a 16-bit grey image as RGB ``(H, W, 3)`` in 0 to 1, ``None`` for any other image."""
    if not image.mode.startswith("I"):
        return None
    grey = np.clip(np.asarray(image, dtype=np.float32) / _FULL_SCALE_16_BIT, 0, 1, dtype=np.float32)
    return np.repeat(grey[..., None], 3, axis=2)


def reason_unread(path: str | Path, error: Exception) -> str:
    """Return the clause that says why a file can't be read, such as ``as it is empty``."""
    if isinstance(error, FileNotFoundError):
        return f"as {error.args[-1]}"
    if isinstance(error, PermissionError):
        return "as this user may not read it"
    if not Path(path).stat().st_size:
        return "as it is empty"
    if isinstance(error, UnidentifiedImageError):
        return "as it is of no image format that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"as Pillow takes it for an attack ({error})"
    return f"as it is broken ({(str(error).splitlines() or [''])[0] or type(error).__name__})"


def readable(text: str) -> str:
    """Return valid UTF-8 text, with escapes for bytes of file names that can't be decoded."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of too many pixels."""
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels / 1e6:g} million that are allowed "
            "(--max-pixels)."
        )
