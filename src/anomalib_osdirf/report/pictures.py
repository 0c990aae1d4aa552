# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Small pictures: made from a test's tensors, and made ready for a page."""

import io

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_QUALITY = 78
_QUICK = 2  # WebP's effort, 0 to 6
_OUTLINE_SIDE = 255  # outlines are in a square of this side, which the page stretches over the picture
_MOST_LINES = 40


def encode_image(image: Tensor, size: int) -> bytes:
    """Encode an image of one or three channels, ``(C, H, W)`` in 0 to 1, with its longer side at most ``size``."""
    values = image.detach().float()[:3].cpu()
    if values.min() < -1e-3 or values.max() > 1 + 1e-3:  # standardised already: show its range
        values = (values - values.min()) / (values.max() - values.min())
    pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return _webp(_shrink(np.repeat(pixels[..., :1], 3, axis=2) if pixels.shape[2] < 3 else pixels, size))


def encode_map(anomaly_map: Tensor, size: int) -> tuple[bytes, float, float]:
    """Encode a map ``(H, W)`` as a grey picture, and tell which values its black and white stand for."""
    values = _shrink(np.nan_to_num(anomaly_map.detach().float().cpu().numpy()), size)
    low, high = float(values.min()), float(values.max())
    grey = ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    return _webp(grey), low, high


def encode_mask(mask: Tensor, size: int) -> bytes:
    """Encode a mask ``(H, W)``; what is thinner than a pixel of the small picture stays visible."""
    values = (mask.detach().float().cpu().numpy() > 0.5).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((_shrink(values, size) > 0.1).astype(np.uint8) * 255).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def page_picture(picture: bytes | None, side: int) -> bytes | None:
    """Make a picture smaller if its longer side is above ``side``."""
    if picture is None:
        return None
    pixels = _decode(picture)
    return picture if max(pixels.shape[:2]) <= side else _webp(_shrink(pixels, side))


def map_outline(grey: bytes | None, low: float, high: float, threshold: float | None) -> str:
    """Outline where a map, a grey picture from ``low`` (black) to ``high`` (white), is above a threshold.

    Returns:
        SVG path in a square of side 255; empty where nothing is above.
    """
    if grey is None or threshold is None or high <= threshold:
        return ""
    return _outline(grey, 255 * (threshold - low) / (high - low))


def mask_outline(mask: bytes | None) -> str:
    """Outline a mask, as :func:`map_outline` does a map."""
    return "" if mask is None else _outline(mask, 127.5)


def _outline(grey: bytes, level: float) -> str:
    size = (_OUTLINE_SIDE + 1, _OUTLINE_SIDE + 1)
    values = cv2.resize(_decode(grey)[..., 0].astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    found, _ = cv2.findContours((values > level).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    largest = sorted(found, key=cv2.contourArea, reverse=True)[:_MOST_LINES]
    lines = [cv2.approxPolyDP(line, 0.8, closed=True)[:, 0] for line in largest]
    return "".join("M" + "L".join(f"{x} {y}" for x, y in line) + "Z" for line in lines)


def _decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _shrink(pixels: NDArray, size: int) -> NDArray:
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    if scale >= 1:
        return pixels
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)


def _webp(pixels: NDArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", quality=_QUALITY, method=_QUICK)
    return buffer.getvalue()


PIXEL_BINS = 1024


def count_pixels(anomaly_map: Tensor, mask: Tensor, low: float, high: float) -> tuple[NDArray, NDArray, NDArray]:
    """Count the pixels of a map ``(H, W)`` by its value, apart by the ground truth ``mask`` ``(H, W)``.

    Bins reach from ``low`` to ``high`` and become wider upwards, as most pixels have low values.

    Returns:
        Counts of normal and of anomalous pixels, and the sum over connected anomalous regions of the share of each
        region's pixels, ``(PIXEL_BINS,)`` each.
    """
    share = ((anomaly_map.detach().float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num().sqrt()
    bins = (share * (PIXEL_BINS - 1)).round().long().flatten()
    anomalous = (mask > 0.5).flatten().to(bins.device)
    counts = torch.bincount(bins + PIXEL_BINS * anomalous, minlength=2 * PIXEL_BINS).cpu().numpy()
    regions = np.zeros(PIXEL_BINS, np.float32)
    if anomalous.any():
        number, labels = cv2.connectedComponents(anomalous.view(mask.shape).to("cpu", torch.uint8).numpy())
        for region in range(1, number):
            inside = bins.cpu().numpy()[(labels == region).ravel()]
            regions += np.bincount(inside, minlength=PIXEL_BINS) / len(inside)
    return counts[:PIXEL_BINS], counts[PIXEL_BINS:], regions
