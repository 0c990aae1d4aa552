# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exported models against what ``Engine.predict`` says, on textured image files of several sizes and shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF
from textures import textured_image

# Of normalised scores and maps, as the README promises them.
TOLERANCES = {
    "torch": (1e-5, 1e-4),
    "onnx": (1e-5, 1e-4),
    "openvino": (1e-5, 1e-4),
    "FP16": (2e-3, 2e-2),
    "INT8": (1e-2, 1e-1),
}
_CONVERTED: dict[Any, dict[str, bytes]] = {}


def textured_files(folder: Path) -> Path:
    """Draw images of other sizes and shapes than the model's; flat ones would hide a wrong resize."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for height, width in ((900, 700), (300, 1200), (64, 64), (50, 41)):
        cv2.imwrite(str(folder / f"{height}.png"), textured_image(rng, height, width))
    cv2.imwrite(str(folder / "grey.png"), textured_image(rng, 90, 130)[..., 0])
    return folder


def predict(model: Any, folder: Path, root: Path, checkpoint: Path | None = None) -> list[Any]:
    """Predict through the engine, one batch for each image."""
    engine = Engine(default_root_dir=root / "results", accelerator="cpu", devices=1, enable_progress_bar=False)
    batches = engine.predict(model, data_path=folder, ckpt_path=checkpoint)
    assert batches is not None
    return list(batches)


def export(
    kind: str, root: Path, checkpoint: Path, compression: str | None = None, model: Any = None, **arguments: Any
) -> Path:
    """Export a checkpoint through the engine, of OSDIRF unless another model is given.

    Its conversion to ONNX takes longest. It is done once for all exports to OpenVINO that start from the same graph.
    """
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1)
    convert, calibrated = torch.onnx.export, compression in {"INT8_PTQ", "INT8_ACQ"}

    def convert_once(model: Any, args: Any, f: Any, **options: Any) -> None:
        file = Path(f)
        if calibrated and file.name != "model.onnx":  # thresholds, which are those of the quantised network
            convert(model, args, file, **options)
            return
        asked = repr(arguments.get("onnx_kwargs")) if kind == "onnx" else ""  # an OpenVINO model is finished later
        key = (checkpoint, kind, calibrated, asked, arguments.get("input_size"), file.name)
        if key not in _CONVERTED:
            convert(model, args, file, **options)
            _CONVERTED[key] = {part.name: part.read_bytes() for part in file.parent.glob(f"{file.name}*")}
        for name, content in _CONVERTED[key].items():  # a large one keeps its weights beside it
            (file.parent / name).write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", convert_once)
        path = engine.export(
            model or OSDIRF(), kind, export_root=root, ckpt_path=checkpoint, compression_type=compression, **arguments
        )
    return Path(str(path))


def compare(predicted: list[Any], file: Path, score_tolerance: float, map_tolerance: float) -> None:
    """Hold an exported file to what the engine predicted: scores, maps, and what lies clear of the threshold."""
    run = runtime(file)
    for batch in predicted:
        score, anomaly_map, label, mask = run(batch.image_path[0])
        expected_score, expected_map = float(batch.pred_score), batch.anomaly_map.squeeze().numpy()
        assert float(score) == pytest.approx(expected_score, abs=score_tolerance)
        np.testing.assert_allclose(anomaly_map, expected_map, atol=map_tolerance)
        if abs(expected_score - 0.5) > score_tolerance:
            assert bool(label) == bool(batch.pred_label)
        clear = np.abs(expected_map - 0.5) > map_tolerance
        np.testing.assert_array_equal(mask[clear] > 0, batch.pred_mask.squeeze().numpy()[clear])


def runtime(file: Path) -> Callable[[str], tuple[np.ndarray, ...]]:
    """Predict from an image file as a user would: anomalib's inferencers as they are, or ONNX Runtime."""
    names = ("pred_score", "anomaly_map", "pred_label", "pred_mask")
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def run(path: str) -> tuple[np.ndarray, ...]:
            image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB).transpose(2, 0, 1)[None].astype(np.float32) / 255
            return tuple(output.squeeze() for output in session.run(names, {"input": image}))

        return run
    inferencer = TorchInferencer(file, device="cpu") if file.suffix == ".pt" else OpenVINOInferencer(file)
    return lambda path: tuple(np.asarray(getattr(inferencer.predict(path), name)).squeeze() for name in names)


def unclip(file: Path, model_class: Any, root: Path) -> Path:
    """Write a checkpoint whose range of scores is moved to the textured images': a clipped score would hide a drift."""
    checkpoint = torch.load(file, weights_only=False)
    raw = predict(model_class.load_from_checkpoint(file, post_processor=False), textured_files(root / "images"), root)
    # Lightning restores the post-processor twice, as a part of the model and as a callback.
    states = {"post_processor.": checkpoint["state_dict"], "": checkpoint["callbacks"]["FalseAlarmPostProcessor"]}
    for name, values in (
        ("image", torch.stack([batch.pred_score.squeeze() for batch in raw])),
        ("pixel", torch.cat([batch.anomaly_map.flatten() for batch in raw])),
    ):
        for prefix, state in states.items():
            low, high = state[f"{prefix}{name}_min"], state[f"{prefix}{name}_max"]
            middle, half = (values.min() + values.max()) / 2, max(high - low, 1.2 * (values.max() - values.min())) / 2
            assert f"{prefix}_{name}_threshold" in state
            state[f"{prefix}_{name}_threshold"] = middle
            state[f"{prefix}{name}_min"], state[f"{prefix}{name}_max"] = middle - half, middle + half
    torch.save(checkpoint, root / "model.ckpt")
    return root / "model.ckpt"
