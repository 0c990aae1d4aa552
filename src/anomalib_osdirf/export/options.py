# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a user can ask of an export: checked before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from anomalib.deploy.export import CompressionType

CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
_PRECISIONS = ("f32", "any")


@dataclass(frozen=True)
class ExportOptions:
    """Options that travel through ``onnx_kwargs``, besides those of ``torch.onnx.export``.

    Args:
        post_processor: ``False`` exports raw score and raw map, without thresholds and normalisation.
        inference_precision: ``f32`` makes an OpenVINO model compute in float32 wherever it runs, ``any`` leaves it to
            the device, which is faster and less exact where it computes in bfloat16 or float16.
        calibration_images: How many training images INT8_PTQ and INT8_ACQ look at; ``None`` takes up to 300.

    Raises:
        ValueError: If an option is unknown.
    """

    post_processor: bool = True
    inference_precision: str = "f32"
    calibration_images: int | None = None

    def __post_init__(self) -> None:
        if self.inference_precision not in _PRECISIONS:
            raise ValueError(
                f"inference_precision={self.inference_precision!r} is unknown; use f32 to compute in float32 wherever "
                "the model runs, or any to leave it to the device."
            )
        if self.post_processor not in {True, False}:
            raise ValueError(f"post_processor={self.post_processor!r} is neither true nor false; use one of them.")

    @classmethod
    def split(cls, kwargs: Mapping[str, Any]) -> "tuple[ExportOptions, dict[str, Any]]":
        """Take the options out of keyword arguments; return them and the other arguments."""
        own = {name: value for name, value in kwargs.items() if name in cls.__dataclass_fields__}
        return cls(**own), {name: value for name, value in kwargs.items() if name not in own}


def check_input_size(input_size: tuple[int, int] | None) -> None:
    """Raise an error if the size of images is no height and width."""
    sides = input_size if isinstance(input_size, Sequence) else [input_size]
    if input_size is not None and [isinstance(side, int) and side > 0 for side in sides] != [True, True]:
        raise ValueError(
            f"input_size={input_size!r} is not a height and a width in pixels; use [512, 640] for images of 512 rows "
            "and 640 columns."
        )


def check_max_drop(max_drop: float) -> None:
    """Raise an error if the largest loss of a metric is not a share."""
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop={max_drop} is out of range; use 0 to 1, 0.01 for one point of the metric.")


def compression_of(value: CompressionType | str | None) -> CompressionType | None:
    """Read a compression type, which anomalib's command gives as one and a script may give as text."""
    if value is None:
        return None
    try:
        return CompressionType(value.lower())
    except ValueError:
        names = ", ".join(one.name for one in CompressionType)
        msg = f"compression_type={value!r} is unknown; use one of {names}, or leave it out for float32."
        raise ValueError(msg) from None


def need(*packages: str) -> None:
    """Raise an error if packages of the extra ``openvino`` are missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = f"This export needs {' and '.join(missing)}; install the extra: pip install 'anomalib-osdirf[openvino]'."
        raise ModuleNotFoundError(msg)
