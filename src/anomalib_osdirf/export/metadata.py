# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What an exported model says about itself."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomalib_osdirf.post_processing.p_values import EXPONENTS

logger = logging.getLogger(__name__)

_PACKAGES = ("anomalib-osdirf", "anomalib", "torch", "openvino")
_STATISTICS = {
    "image_threshold": "_image_threshold",
    "pixel_threshold": "_pixel_threshold",
    "image_min": "image_min",
    "image_max": "image_max",
    "pixel_min": "pixel_min",
    "pixel_max": "pixel_max",
}
# Of FalseAlarmPostProcessor: scores by which normalised ones have p-values.
_KNOTS = {"image_knots": "image_scale.knots", "pixel_knots": "pixel_scale.knots"}
_DESCRIPTION = ("image_sensitivity", "pixel_sensitivity", "calibration", "normal_scores")
# The section of an OpenVINO model's runtime info where Intel's own tools look.
_SECTION = "model_info"


def post_processing_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """Collect, from a post-processor's state dict, what turns raw scores and maps into normalised ones and labels.

    Returns:
        Raw thresholds, minima and maxima, ``None`` where one was never fitted; and knots of p-values, if there are any.
    """
    values = {name: float(state[key]) for name, key in _STATISTICS.items() if key in state}
    knots = {name: state[key].tolist() for name, key in _KNOTS.items() if key in state}
    fitted = {name: value for name, value in knots.items() if not any(map(math.isnan, value))}
    return {
        **{name: None if math.isnan(value) else value for name, value in values.items()},
        **({**fitted, "knot_exponents": EXPONENTS} if fitted else {}),
    }


def post_processing_state(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reverse :func:`post_processing_values`: numbers and lists by their keys in the post-processor's state dict."""
    known = {key: values[name] for name, key in (_STATISTICS | _KNOTS).items() if values.get(name) is not None}
    return {**dict.fromkeys(_STATISTICS.values(), math.nan), **known}


def description(post_processor: Any) -> dict[str, Any]:  # any module may be a post-processor
    """Collect a post-processor's sensitivities and, of ours, the levels' false-alarm rates and normal scores."""
    return {name: getattr(post_processor, name) for name in _DESCRIPTION if hasattr(post_processor, name)}


def versions() -> dict[str, str]:
    """Collect the versions of the packages that made a model."""
    return {name: version(name) for name in _PACKAGES}


def now() -> str:
    """Date and time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_json(metadata: Mapping[str, Any], model: Path) -> None:
    """Write metadata to a JSON file beside a model file, with the digest of the latter."""
    values = {**metadata, "model_sha256": _sha256(model)}
    model.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(model: Path) -> dict[str, Any]:
    """Read the JSON file beside a model file; empty where there is none, or one of another model."""
    file = model.with_suffix(".json")
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    if "model_sha256" in values and values["model_sha256"] != _sha256(model):
        logger.warning("%s is ignored, because it belongs to another model than %s; delete it.", file, model.name)
        return {}
    return values


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_onnx(metadata: Mapping[str, Any], file: Path) -> None:
    """Add metadata to an ONNX file, as JSON values of its ``metadata_props``."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, file)


def write_openvino(metadata: Mapping[str, Any], model: Any) -> None:  # openvino.Model
    """Add metadata to an ``openvino.Model``, as JSON values of its runtime info's section ``model_info``."""
    for name, value in metadata.items():
        model.set_rt_info(json.dumps(value), [_SECTION, name])
