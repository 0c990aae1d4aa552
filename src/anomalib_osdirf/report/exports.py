# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes and latencies of the models in a results folder."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_osdirf.export.metadata import read_json
from anomalib_osdirf.telemetry import send_nothing

_FORMATS = {".xml": "OpenVINO", ".onnx": "ONNX", ".pt": "torch", ".ckpt": "checkpoint"}
_WARM_UP, _RUNS = 3, 20
_DEFAULT_SIZE = [256, 256]


@dataclass
class Export:
    """A model file."""

    path: Path
    format: str
    size: int  # bytes, with what belongs to the file
    compression: str | None
    latency: dict[str, Any] | None  # of `measure`


def find_exports(folder: Path, latencies: dict[str, Any] | None = None) -> list[Export]:
    """List the models below a results folder, checkpoints last, with the latencies that :func:`measure` found."""
    exports = []
    for file in sorted((folder / "weights").rglob("*")):
        form = _FORMATS.get(file.suffix)
        if form is None or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        size = file.stat().st_size
        companions = (file.with_suffix(".bin"), file.with_suffix(".onnx.data"), file.with_name(f"{file.name}.data"))
        if form in {"OpenVINO", "ONNX"}:
            size += sum(other.stat().st_size for other in set(companions) if other.is_file())
        name = file.relative_to(folder).as_posix()
        exports.append(Export(file, form, size, read_json(file).get("compression_type"), (latencies or {}).get(name)))
    return sorted(exports, key=lambda export: (list(_FORMATS.values()).index(export.format), str(export.path)))


def measure(folder: Path) -> dict[str, Any]:
    """Time the OpenVINO and ONNX models below a results folder on this processor, one image at a time.

    Returns:
        Median and 95 % quantile in milliseconds, image size and processor, by the path below the folder.
    """
    from anomalib_osdirf.export.instructions import avoid_broken_instructions, make_room_for_signals

    avoid_broken_instructions()
    runners = {"OpenVINO": ("openvino", _openvino), "ONNX": ("onnxruntime", _onnx)}
    latencies = {}
    for export in find_exports(folder):
        package, load = runners.get(export.format, ("", _openvino))
        if not package or find_spec(package) is None:
            continue
        height, width = read_json(export.path).get("image_size") or _DEFAULT_SIZE
        image = np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)
        run = load(export.path)
        make_room_for_signals()
        seconds = []
        for _ in range(_WARM_UP + _RUNS):
            start = time.perf_counter()
            run(image)
            seconds.append(time.perf_counter() - start)
        timed = 1000 * np.array(seconds[_WARM_UP:])
        latencies[export.path.relative_to(folder).as_posix()] = {
            "median_ms": float(np.median(timed)),
            "p95_ms": float(np.quantile(timed, 0.95)),
            "image_size": [height, width],
            "processor": _processor(),
        }
    return latencies


def _openvino(path: Path) -> Callable[[Any], Any]:
    send_nothing()
    import openvino

    return openvino.compile_model(path, "CPU")


def _onnx(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or platform.machine()
