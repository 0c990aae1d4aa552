# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Files as folders of images have them: of every kind that can be read, and of every kind that can't."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def good_files(pixels: Pixels) -> dict[str, bytes]:
    """Encode an image ``(H, W, 3)`` in every way that leaves it what it is, by the name of a file."""
    image = Image.fromarray(pixels)
    grey = Image.fromarray(pixels[..., 0])
    orientation = Image.Exif()
    orientation[0x0112] = 6  # lying on its side, which is not looked at
    return {
        "plain.png": encode(image, "png"),
        "jpeg named.png": encode(image, "jpeg", quality=100, subsampling=0),
        "bitmap.BMP": encode(image, "bmp"),
        "lossless.webp": encode(image, "webp", lossless=True),
        "tiled.tif": encode(image, "tiff", compression="tiff_lzw"),
        "portable.ppm": encode(image, "ppm"),
        "rotated.jpg": encode(image, "jpeg", quality=100, subsampling=0, exif=orientation),
        "cmyk.jpg": encode(image.convert("CMYK"), "jpeg", quality=100, subsampling=0),
        "alpha.png": encode(Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 7, np.uint8)])), "png"),
        "animated.png": encode(image, "png", save_all=True, append_images=[Image.new("RGB", image.size)]),
        "animated.webp": encode(
            image, "webp", lossless=True, save_all=True, append_images=[Image.new("RGB", image.size)]
        ),
        "pages.tiff": encode(image, "tiff", save_all=True, append_images=[Image.new("RGB", (3, 3))]),
        "grey.png": encode(grey, "png"),
        "palette.png": encode(grey.convert("P"), "png"),
        "sixteen bits.png": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "png"),
        "деталь 部品 ü.png": encode(image, "png"),
        f"{'n' * 246}.png": encode(image, "png"),
    }


def broken_files(pixels: Pixels) -> dict[str, bytes]:
    """Return files with the name of an image that are none, by their names."""
    whole = {kind: encode(Image.fromarray(pixels), kind) for kind in ("png", "jpeg", "webp", "tiff", "bmp")}
    cut = {f"cut.{kind}": content[: len(content) // 2] for kind, content in whole.items()}
    header = {"header only.png": whole["png"][:33]}
    return {**cut, **header, "empty.png": b"", "text.jpg": b"no image\n", "деталь.png": b"\x89PNG\r\n\x1a\n"}


def write_files(files: dict[str, bytes], folder: Path) -> list[Path]:
    """Write files, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def encode(image: Image.Image, kind: str, **arguments: object) -> bytes:
    """Encode an image."""
    stream = io.BytesIO()
    image.save(stream, kind, **arguments)
    return stream.getvalue()


def make_pipe(path: Path) -> None:
    """Make a pipe, which nobody writes to."""
    os.mkfifo(path)


def write_video(file: Path, lights: Sequence[int] = (204,)) -> Path:
    """Write a film of grey frames, each with a brighter part of the given brightness at the upper left."""
    width, height = 160, 120
    colour = bytes([128]) * (width * height // 2)
    data = f"YUV4MPEG2 W{width} H{height} F10:1 C420jpeg\n".encode()
    for light in lights:
        grey = np.full((height, width), 60, np.uint8)
        grey[: height // 4, : width // 4] = light
        data += b"FRAME\n" + grey.tobytes() + colour
    file.write_bytes(data)
    return file
