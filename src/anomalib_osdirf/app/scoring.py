# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Scoring images with an exported OpenVINO or ONNX model, or a checkpoint, of any anomalib model."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.colours import Span, colour_map

Array = NDArray[np.float32]


class ModelError(ValueError):
    """A model that can't be used; its message says why and what to do."""


@dataclass(frozen=True)
class Score:
    """What a model says about an image."""

    score: float  # 0 to 1, as anomalib normalises it, where it does
    map: Array | None  # (h, w), normalised alike
    p_value: float | None  # of models that have one: how often a normal image has such a score
    milliseconds: float


class Scorer(ABC):
    """A model that scores images.

    Attributes:
        name: Name of the model.
        kind: What runs it.
        threshold: Scores above it are anomalous.

    Args:
        path: Model file.
        metadata: What an export says about itself.
    """

    kind: str

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.name = str(metadata.get("model", path.stem))
        self.metadata = metadata
        self.threshold = 1 - float(metadata.get("image_sensitivity", 0.5))

    def score(self, image: Array) -> Score:
        """Score an image ``(H, W, 3)``, in 0 to 1."""
        start = time.perf_counter()
        outputs = self._run(np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32))
        milliseconds = 1000 * (time.perf_counter() - start)
        anomaly_map = outputs.get("anomaly_map")
        score = outputs["pred_score"] if "pred_score" in outputs else np.max(outputs["anomaly_map"])
        return Score(
            score=float(self._normalise(np.float64(np.squeeze(score)), "image")),
            map=None if anomaly_map is None else self._normalise(np.squeeze(anomaly_map), "pixel"),
            p_value=float(np.squeeze(outputs["p_value"])) if "p_value" in outputs else None,
            milliseconds=milliseconds,
        )

    @abstractmethod
    def _run(self, batch: Array) -> dict[str, Array]:
        """Return the model's outputs for a batch ``(1, 3, H, W)``; several threads call this at once."""

    def _normalise(self, values: Any, level: str) -> Any:  # noqa: ANN401 - a number or an array
        """Normalise what a model that was exported without its post-processing returns, as anomalib does."""
        low, high, threshold = (self.metadata.get(f"{level}_{name}") for name in ("min", "max", "threshold"))
        if self.metadata.get("post_processor", True) or low is None or high is None or threshold is None or high == low:
            return values
        return np.clip((values - threshold) / (high - low) + 0.5, 0, 1)


class OpenVINOScorer(Scorer):
    """An OpenVINO model on the processor."""

    kind = "OpenVINO"

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        import openvino

        super().__init__(path, metadata)
        try:
            self._model = openvino.compile_model(path, "CPU")
        except RuntimeError as error:
            msg = f"model {str(path)!r} can't be loaded by OpenVINO ({_first_line(error)}); export it again."
            raise ModelError(msg) from error
        shape = self._model.input(0).partial_shape
        self._size = _fixed_size([part.get_length() if part.is_static else None for part in shape])

    def _run(self, batch: Array) -> dict[str, Array]:
        results = self._model.create_infer_request().infer({0: _resize(batch, self._size)})
        return {name: np.array(value) for output, value in results.items() for name in output.names}


class ONNXScorer(Scorer):
    """An ONNX model on the processor."""

    kind = "ONNX Runtime"

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        import onnxruntime

        super().__init__(path, metadata)
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions have no common class
            msg = f"model {str(path)!r} can't be loaded by ONNX Runtime ({_first_line(error)}); export it again."
            raise ModelError(msg) from error
        self._input = self._session.get_inputs()[0]
        self._names = [output.name for output in self._session.get_outputs()]
        self._size = _fixed_size(self._input.shape)

    def _run(self, batch: Array) -> dict[str, Array]:
        outputs = self._session.run(None, {self._input.name: _resize(batch, self._size)})
        return dict(zip(self._names, outputs, strict=True))


class CheckpointScorer(Scorer):
    """A Lightning checkpoint, on a GPU where there is one.

    Args:
        path: Checkpoint.
        model: Name of the model's class; that which the checkpoint says where it is ``None``.
    """

    kind = "PyTorch"

    def __init__(self, path: Path, model: str | None = None) -> None:
        import torch

        module_class = _model_class(path, model)
        super().__init__(path, {"model": module_class.__name__})
        module = module_class.load_from_checkpoint(path, map_location="cpu")
        self.threshold = 1 - float(getattr(module.post_processor, "image_sensitivity", 0.5))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = module.eval().to(self._device)

    def _run(self, batch: Array) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            outputs = self._module(torch.from_numpy(batch).to(self._device))._asdict()
        return {name: value.float().cpu().numpy() for name, value in outputs.items() if value is not None}


def load_scorer(path: Path, model: str | None = None) -> Scorer:
    """Load a model.

    Args:
        path: ``.xml`` (OpenVINO), ``.onnx`` or ``.ckpt`` file, or a results folder with one of these below ``weights``.
        model: Name of a checkpoint's model class, for models that are not of this package.

    Returns:
        The model, ready to score.

    Raises:
        ModelError: If there is no such model, or it can't be used.
    """
    file = _find_model(path)
    if file.suffix == ".ckpt":
        return CheckpointScorer(file, model)
    package, scorer = {".xml": ("openvino", OpenVINOScorer), ".onnx": ("onnxruntime", ONNXScorer)}[file.suffix]
    if find_spec(package) is None:
        msg = (
            f"model {str(file)!r} needs {package}, which is not installed; install the extra: pip install "
            "'anomalib-osdirf[openvino]'."
        )
        raise ModelError(msg)
    loaded: Scorer = scorer(file, _metadata(file))
    return loaded


def overlay(image: Array, anomaly_map: Array | None, side: int = 640) -> NDArray[np.uint8]:
    """Lay a normalised map over an image.

    Args:
        image: Image ``(H, W, 3)``, in 0 to 1.
        anomaly_map: Map ``(h, w)``, ``None`` for none.
        side: Longest side of the result.

    Returns:
        The picture.
    """
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA) * 255
    if anomaly_map is not None:
        values = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        colours = colour_map(values, Span(0, 1, 0.5)).astype(np.float32)
        opacity = colours[..., 3:] / 255
        picture = picture * (1 - opacity) + colours[..., :3] * opacity
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


def _find_model(path: Path) -> Path:
    suffixes = (".xml", ".onnx", ".ckpt")
    if path.is_dir():
        for suffix in suffixes:
            found = sorted(path.rglob(f"*{suffix}"), key=lambda file: file.stat().st_mtime)
            if found:
                return found[-1]
        msg = f"folder {str(path)!r} has no .xml, .onnx or .ckpt file in it; give a model or a results folder."
        raise ModelError(msg)
    if not path.is_file():
        msg = f"model {str(path)!r} does not exist; give an exported .xml or .onnx model, or a .ckpt checkpoint."
        raise ModelError(msg)
    if path.suffix not in suffixes:
        msg = f"model {str(path)!r} is no .xml (OpenVINO), .onnx or .ckpt file; export it to one of the former."
        raise ModelError(msg)
    return path


def _metadata(path: Path) -> dict[str, Any]:
    """Read what anomalib-osdirf's exports have beside them; other exports have nothing."""
    try:
        return dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _model_class(path: Path, name: str | None) -> Any:  # noqa: ANN401 - a subclass of AnomalibModule
    import torch
    from anomalib.models.components import AnomalibModule
    from anomalib.utils.serialization import anomalib_safe_globals

    import anomalib_osdirf.models  # noqa: F401 - makes them known
    from anomalib_osdirf.models.diffusion_training import MODEL_KEY

    if name is None:
        try:
            with anomalib_safe_globals():
                name = torch.load(path, map_location="cpu", weights_only=True).get(MODEL_KEY)
        except Exception as error:  # torch raises what its unpickler does
            msg = f"model {str(path)!r} can't be read as a checkpoint ({_first_line(error)})."
            raise ModelError(msg) from error
    classes = {found.__name__.lower(): found for found in _subclasses(AnomalibModule)}
    if name is None or name.lower() not in classes:
        known = ", ".join(sorted(found.__name__ for found in classes.values()))
        reason = "does not say which model it is of" if name is None else f"is of {name}, which is not known"
        msg = f"checkpoint {str(path)!r} {reason}; give --model, one of {known}."
        raise ModelError(msg)
    return classes[name.lower()]


def _subclasses(parent: type) -> list[type]:
    children: list[type] = parent.__subclasses__()
    return children + [found for child in children for found in _subclasses(child)]


def _fixed_size(shape: list[Any]) -> tuple[int, int] | None:
    height, width = shape[-2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _resize(batch: Array, size: tuple[int, int] | None) -> Array:
    """Resize a batch to the one size that a model takes, if it does not take all."""
    if size is None or batch.shape[-2:] == size:
        return batch
    pixels = cv2.resize(batch[0].transpose(1, 2, 0), size[::-1], interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
