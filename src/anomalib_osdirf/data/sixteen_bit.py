# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""Reading 16-bit grey images, which anomalib 2.7 turns into plain white."""

import sys
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

_FULL_SCALE = 65535


def read_16_bit_grey() -> None:
    """Replace anomalib's image reader, in this process, by one that scales 16-bit grey images.

    anomalib reads with Pillow's ``convert("RGB")``, which clips 16-bit values at 255. Every other image is left to
    anomalib's reader. Doing it twice changes nothing.
    """
    from anomalib.data import utils

    original = utils.read_image
    if hasattr(original, "reads_16_bit_grey"):
        return

    @wraps(original)
    def read_image(path: str | Path, as_tensor: bool = False) -> Any:  # noqa: ANN401 - anomalib's own signature
        with Image.open(path) as image:
            if not image.mode.startswith("I"):
                return original(path, as_tensor=as_tensor)
            grey = np.clip(np.asarray(image, dtype=np.float32) / _FULL_SCALE, 0, 1)
        rgb = np.repeat(grey[..., None], 3, axis=2)
        return tv_tensors.Image(torch.from_numpy(rgb).permute(2, 0, 1).contiguous()) if as_tensor else rgb

    read_image.reads_16_bit_grey = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("anomalib.") and vars(module).get("read_image") is original:
            module.read_image = read_image  # type: ignore[attr-defined]
