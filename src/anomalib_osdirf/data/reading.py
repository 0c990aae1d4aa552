# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Reading images and masks: 16-bit grey with its full range, and errors that name the file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors

from anomalib_osdirf.inference.reading import deep_grey, reason_unread, regular

_ADVICE = "repair it, remove it, or leave such files out with skip_broken_images=true"


class BrokenFileError(ValueError):
    """A file that can't be read; the message is one sentence that names it."""

    def __init__(self, message: str) -> None:
        # A dataloader's worker process hands an error on with all of its traceback in the message.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_carefully() -> None:
    """Wrap anomalib's readers of images and masks in this process; idempotent.

    anomalib reads with Pillow's ``convert("RGB")``. That clips 16-bit values at 255, most of its errors don't name the
    file, and a mask that is one pixel wide or high loses a dimension. All other files go to anomalib's readers.
    """
    from anomalib.data import utils

    for name, careful in (("read_image", _careful_image_reader), ("read_mask", _careful_mask_reader)):
        original = getattr(utils, name)
        if hasattr(original, "reads_carefully"):
            continue
        reader = careful(original)
        reader.reads_carefully = True  # type: ignore[attr-defined]
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("anomalib.") and vars(module).get(name) is original:
                setattr(module, name, reader)


def allow_any_script() -> None:
    """Make anomalib accept folder names with non-ASCII letters, which it refuses as not printable."""
    from anomalib.data.utils import path as checks

    checks.contains_non_printable_characters = lambda path: not str(path).isprintable()


def trouble_with(path: str | Path) -> str | None:
    """Return why an image or mask can't be read, in one sentence, or ``None`` if it can."""
    try:
        with Image.open(regular(path)) as image:
            image.convert("RGB")
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever a broken file makes them stumble on
        return f"{str(path)!r} can't be read as an image, {reason_unread(path, error)}"
    return None


def _careful_image_reader(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def read_image(path: str | Path, as_tensor: bool = False) -> Any:  # anomalib's own signature
        with _named(path):
            with Image.open(regular(path)) as image:
                rgb = deep_grey(image)
            if rgb is None:
                return original(path, as_tensor=as_tensor)
        return tv_tensors.Image(torch.from_numpy(rgb).permute(2, 0, 1).contiguous()) if as_tensor else rgb

    return read_image


def _careful_mask_reader(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def read_mask(path: str | Path, as_tensor: bool = False) -> Any:  # anomalib's own signature
        with _named(path):
            with Image.open(regular(path)) as image:
                size = (image.height, image.width)
            mask = original(path, as_tensor=as_tensor)
        return mask if mask.shape == size else tv_tensors.wrap(mask.reshape(size), like=mask)

    return read_mask


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Have errors name the file."""
    try:
        yield
    except Exception as error:
        msg = f"{str(path)!r} can't be read as an image, {reason_unread(path, error)}; {_ADVICE}."
        raise BrokenFileError(msg) from error
