# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Scoring images with an exported OpenVINO or ONNX model, or a checkpoint, of any anomalib model."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_osdirf.errors import one_line
from anomalib_osdirf.export.instructions import avoid_broken_instructions, make_room_for_signals
from anomalib_osdirf.export.metadata import read_json
from anomalib_osdirf.inference.reading import read_image, readable
from anomalib_osdirf.post_processing.p_values import normalise, p_value
from anomalib_osdirf.registration import subclasses
from anomalib_osdirf.telemetry import send_nothing

Array = NDArray[np.float32]


class ModelError(ValueError):
    """A model that can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Score:
    """A model's prediction for an image."""

    score: float  # 0 to 1, as anomalib normalises it, where it does
    label: bool  # whether it is anomalous: the model's own word where it has one
    map: Array | None  # (h, w), normalised alike
    mask: NDArray[np.bool_] | None  # (h, w), where it is anomalous
    p_value: float | None  # share of normal images with such a score or a higher one, if the model has a rate
    milliseconds: float

    def box(self, height: int, width: int) -> list[int] | None:
        """Return the box of the largest connected anomalous region, in pixels of an image of that size.

        Returns:
            First column, first row, column after the last and row after the last; ``None`` if nothing is anomalous.
        """
        if self.mask is None or not self.mask.any():
            return None
        _, _, statistics, _ = cv2.connectedComponentsWithStats(self.mask.astype(np.uint8), connectivity=8)
        left, top, columns, rows = max(statistics[1:].tolist(), key=lambda found: found[cv2.CC_STAT_AREA])[:4]
        across, down = self.mask.shape[1], self.mask.shape[0]
        last = -(-(left + columns) * width // across), -(-(top + rows) * height // down)  # rounded up
        return [left * width // across, top * height // down, *last]


class Scorer(ABC):
    """A model that scores images.

    Attributes:
        name: Name of the model.
        runtime: Runtime, such as OpenVINO.
        batch_size: Number of images that an export of fixed batch takes, copies of the same, and 1 of any other.
        size: Height and width that images are resized to, of an export of fixed size.
        threshold: Scores above it are anomalous.
        pixel_threshold: Values of the map above it are anomalous.
    """

    runtime: str
    batch_size = 1
    size: tuple[int, int] | None = None

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.name = str(metadata.get("model", path.stem))
        self.metadata = metadata
        self.threshold = 1 - float(metadata.get("image_sensitivity", 0.5))
        self.pixel_threshold = 1 - float(metadata.get("pixel_sensitivity", 0.5))

    def score_file(self, file: Path, max_pixels: int) -> tuple[Array, Score]:
        """Read and score an image.

        Raises:
            ImageError: If the file can't be read.
            ModelError: If the model has no score for it.
        """
        image = read_image(file, max_pixels)
        try:
            return image, self.score(image)
        except ModelError as error:
            raise ModelError(f"{readable(file.name)} has no score: {error}") from error

    def score(self, image: Array) -> Score:
        """Score an image ``(H, W, 3)``, in 0 to 1."""
        if self.size is not None and image.shape[:2] != self.size:
            image = resized(image, self.size)
        batch = np.repeat(image.transpose(2, 0, 1)[None], self.batch_size, axis=0).astype(np.float32)
        start = time.perf_counter()
        outputs = {name: values[:1] for name, values in self._run(batch).items()}
        milliseconds = 1000 * (time.perf_counter() - start)
        raw_score = outputs["pred_score"] if "pred_score" in outputs else np.max(outputs["anomaly_map"])
        if not all(np.isfinite(values).all() for values in (raw_score, outputs.get("anomaly_map", 0.0))):
            msg = f"{self.name} returned values that are not numbers for this image; its weights may be damaged."
            raise ModelError(msg)
        score = float(self._normalise(np.float64(np.squeeze(raw_score)), "image"))
        anomaly_map = self._normalise(_plane(outputs["anomaly_map"]), "pixel") if "anomaly_map" in outputs else None
        label = np.squeeze(outputs["pred_label"]) if "pred_label" in outputs else score > self.threshold
        mask = None if anomaly_map is None else anomaly_map > self.pixel_threshold
        if "pred_mask" in outputs:
            mask = _plane(outputs["pred_mask"]) > 0
        rate = self.metadata.get("calibration", {}).get("image", {}).get("false_alarm_rate")
        return Score(
            score=score,
            label=bool(label),
            map=anomaly_map,
            mask=mask,
            p_value=None if rate is None else float(p_value(np.float64(score), rate)),
            milliseconds=milliseconds,
        )

    @abstractmethod
    def _run(self, batch: Array) -> dict[str, Array]:
        """Return the model's outputs for a batch ``(batch_size, 3, H, W)``; several threads call this at once."""

    @property
    def normal_scores(self) -> Array:
        """Scores of held-out normal images, or their quantiles ``(n,)``; none where the model does not have them."""
        raw = np.array(self.metadata.get("normal_scores", {}).get("quantiles", []), np.float64)
        return np.asarray(self._scaled(raw, "image"), np.float32)

    def _normalise(self, values: Any, level: str) -> Any:  # a number or an array
        """Normalise raw values of a model that was exported without its post-processing."""
        return values if self.metadata.get("post_processor", True) else self._scaled(values, level)

    def _scaled(self, values: Any, level: str) -> Any:
        knots = self.metadata.get(f"{level}_knots")
        if knots is not None:
            return normalise(values, knots)
        low, high, threshold = (self.metadata.get(f"{level}_{name}") for name in ("min", "max", "threshold"))
        if low is None or high is None or threshold is None or high == low:
            return values
        return np.clip((values - threshold) / (high - low) + 0.5, 0, 1)


class OpenVINOScorer(Scorer):
    """An OpenVINO model on the processor."""

    runtime = "OpenVINO"

    def __init__(self, path: Path, metadata: Mapping[str, Any], threads: int | None = None) -> None:
        avoid_broken_instructions()
        send_nothing()
        import openvino

        super().__init__(path, metadata)
        self._path = path
        try:
            # Pinned, as is the default, the threads of several processes would share the first processors.
            limits = {} if threads is None else {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
            self._model = openvino.compile_model(path, "CPU", limits)
        except RuntimeError as error:
            msg = f"model {str(path)!r} can't be loaded by OpenVINO ({one_line(error, 200)}); export it again."
            raise ModelError(msg) from error
        make_room_for_signals()
        shape = [part.get_length() if part.is_static else None for part in self._model.input(0).partial_shape]
        self.batch_size, self.size = shape[0] or 1, _fixed_size(shape)

    def in_float32(self) -> "OpenVINOScorer":
        """Return the same model with bfloat16 arithmetic, which OpenVINO uses where the processor has it, forbidden."""
        import openvino

        other = copy(self)
        other._model = openvino.compile_model(self._path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # noqa: SLF001 - our own
        return other

    def _run(self, batch: Array) -> dict[str, Array]:
        results = self._model.create_infer_request().infer({0: batch})
        return {name: np.array(value) for output, value in results.items() for name in output.names}


class ONNXScorer(Scorer):
    """An ONNX model on the processor."""

    runtime = "ONNX Runtime"

    def __init__(self, path: Path, metadata: Mapping[str, Any], threads: int | None = None) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its wheels send events to their maker
        import onnxruntime

        super().__init__(path, metadata)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads or 0  # 0: one for each core
        try:
            self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions have no common class
            msg = f"model {str(path)!r} can't be loaded by ONNX Runtime ({one_line(error, 200)}); export it again."
            raise ModelError(msg) from error
        self._input = self._session.get_inputs()[0]
        self._names = [output.name for output in self._session.get_outputs()]
        first = self._input.shape[0]
        self.batch_size, self.size = first if isinstance(first, int) else 1, _fixed_size(self._input.shape)

    def _run(self, batch: Array) -> dict[str, Array]:
        outputs = self._session.run(None, {self._input.name: batch})
        return dict(zip(self._names, outputs, strict=True))


class CheckpointScorer(Scorer):
    """A Lightning checkpoint, on a GPU where there is one; it says itself which model it is, or ``model`` does."""

    runtime = "PyTorch"

    def __init__(self, path: Path, model: str | None = None) -> None:
        import torch

        from anomalib_osdirf.export import metadata
        from anomalib_osdirf.post_processing import FalseAlarmPostProcessor

        checkpoint = _plain(path)
        module_class = _model_class(path, checkpoint, model)
        more: dict[str, Any] = {}
        if not hasattr(module_class, "check_fitted"):  # anomalib's own
            if "pre_trained" in signature(module_class).parameters:
                more["pre_trained"] = False  # or it downloads weights that the checkpoint has
            if "false_alarm_rate" in (checkpoint.get("anomalib_post_processor_config") or {}):
                more["post_processor"] = FalseAlarmPostProcessor()
        module = module_class.load_from_checkpoint(path, map_location="cpu", **more)
        values = metadata.description(module.post_processor)
        if module.post_processor is not None:
            values |= metadata.post_processing_values(module.post_processor.state_dict())
        super().__init__(path, {"model": module_class.__name__, **values})
        self.threshold, self.pixel_threshold = (
            1 - float(getattr(module.post_processor, f"{level}_sensitivity", 0.5)) for level in ("image", "pixel")
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.eval().to(self._device)
        self._transform_by(module.pre_processor.transform if module.pre_processor else None)

    def _transform_by(self, transform: Any) -> None:  # torch.nn.Module or None
        if self.module.pre_processor:
            # What anomalib applies when a module is called; `Engine.predict` applies `transform`.
            self.module.pre_processor.export_transform = transform

    @contextmanager
    def resizing_as_exported(self) -> Iterator[None]:
        """Score without antialiasing where anomalib's exports lose it."""
        kept = self.module.pre_processor.export_transform if self.module.pre_processor else None
        from anomalib.pre_processing.utils.transform import get_exportable_transform

        self._transform_by(get_exportable_transform(kept))
        try:
            yield
        finally:
            self._transform_by(kept)

    def _run(self, batch: Array) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            outputs = self.module(torch.from_numpy(batch).to(self._device))._asdict()
        return {name: value.float().cpu().numpy() for name, value in outputs.items() if value is not None}


def load_scorer(path: Path, model: str | None = None, threads: int | None = None) -> Scorer:
    """Load a model: an ``.xml`` (OpenVINO), ``.onnx`` or ``.ckpt`` file, or the newest in a results folder.

    Args:
        path: The file or folder.
        model: Name of a checkpoint's model class, for models that are not of this package.
        threads: Threads that an exported model computes with; as many as the processor has where it is ``None``.

    Raises:
        ModelError: If there is no such model, or it can't be used.
    """
    file = find_model(path)
    if file.suffix == ".ckpt":
        return CheckpointScorer(file, model)
    package, scorer = {".xml": ("openvino", OpenVINOScorer), ".onnx": ("onnxruntime", ONNXScorer)}[file.suffix]
    if find_spec(package) is None:
        raise ModelError(
            f"model {str(file)!r} needs {package}, which is not installed; install the extra: pip install "
            "'anomalib-osdirf[openvino]'."
        )
    loaded: Scorer = scorer(file, read_json(file), threads)
    return loaded


def find_model(path: Path) -> Path:
    """Find a model file: the path itself, or, in a folder, the newest one of the first format found.

    Raises:
        ModelError: If there is no .xml, .onnx or .ckpt file.
    """
    suffixes = (".xml", ".onnx", ".ckpt")
    if path.is_dir():
        for suffix in suffixes:
            # Not below hidden folders: a killed export leaves unfinished models there.
            files = (file for file in path.rglob(f"*{suffix}") if not _is_hidden(file.relative_to(path)))
            found = sorted(files, key=lambda file: file.stat().st_mtime)
            if found:
                return found[-1]
        msg = f"folder {str(path)!r} has no .xml, .onnx or .ckpt file in it; give a model or a results folder."
        raise ModelError(msg)
    if not path.is_file():
        msg = f"model {str(path)!r} does not exist; give an exported .xml or .onnx model, or a .ckpt checkpoint."
        raise ModelError(msg)
    if path.suffix not in suffixes:
        msg = f"model {str(path)!r} is not an .xml (OpenVINO), .onnx or .ckpt file; export it to one of the former."
        raise ModelError(msg)
    return path


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain(path: Path) -> dict[str, Any]:
    """Read a checkpoint, plain data only."""
    import torch
    from anomalib.utils.serialization import anomalib_safe_globals

    from anomalib_osdirf.training.checkpoint_files import CheckpointError, plain_data_only

    try:
        with anomalib_safe_globals(), plain_data_only(path):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _model_class(path: Path, checkpoint: Mapping[str, Any], name: str | None) -> Any:  # of AnomalibModule
    from anomalib.models.components import AnomalibModule

    import anomalib_osdirf.models  # noqa: F401 - makes them known
    from anomalib_osdirf.training.diffusion_training import MODEL_KEY

    name = name or checkpoint.get(MODEL_KEY)
    classes = {known.lower(): found for known, found in subclasses(AnomalibModule).items()}
    if name is None or name.lower() not in classes:
        known = ", ".join(sorted(found.__name__ for found in classes.values()))
        reason = "does not say which model it is of" if name is None else f"is of {name}, which is not known"
        raise ModelError(f"checkpoint {str(path)!r} {reason}; give --model, one of {known}.")
    return classes[name.lower()]


def _plane(values: Array) -> Array:
    """Return the one map ``(h, w)`` of an output ``(1, 1, h, w)`` or ``(1, h, w)``, however small."""
    return values.reshape(values.shape[-2:])


def _fixed_size(shape: list[Any]) -> tuple[int, int] | None:
    height, width = shape[-2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def resized(image: Array, size: tuple[int, int]) -> Array:
    """Resize an image ``(H, W, 3)`` to the height and width of an export of fixed size."""
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
