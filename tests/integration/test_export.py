# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exported models predict in their own runtimes, with any batch and image size."""

import copy
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

SHAPES = [(1, 64, 64), (2, 90, 70), (7, 40, 120)]


def _images(batch: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(batch)
    return (
        np.stack([textured_image(rng, height, width).transpose(2, 0, 1) for _ in range(batch)]).astype(np.float32) / 255
    )


@pytest.fixture(scope="module")
def exported(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1)
    return {
        kind: Path(str(engine.export(OSDIRF(), kind, export_root=root, ckpt_path=trained.checkpoint)))
        for kind in ("torch", "onnx", "openvino")
    }


@pytest.fixture(scope="module")
def reference(trained: Any) -> OSDIRF:
    return OSDIRF.load_from_checkpoint(trained.checkpoint).eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onnx_runtime(exported: dict[str, Path], reference: OSDIRF, shape: tuple[int, int, int]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported["onnx"], providers=["CPUExecutionProvider"])
    images = _images(*shape)
    outputs = dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"input": images}), strict=True)
    )
    _check(outputs, reference, images)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_openvino(exported: dict[str, Path], reference: OSDIRF, shape: tuple[int, int, int]) -> None:
    import openvino

    compiled = openvino.Core().compile_model(exported["openvino"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = _images(*shape)
    outputs = {name: value for output, value in compiled(images).items() for name in output.get_names()}
    _check(outputs, reference, images)


def _check(outputs: dict[str, np.ndarray], reference: OSDIRF, images: np.ndarray) -> None:
    """Against the model's own forward pass, whose pre-processing is the export's."""
    with torch.no_grad():
        expected = reference(torch.from_numpy(images))
    np.testing.assert_allclose(outputs["pred_score"].ravel(), expected.pred_score.numpy(), atol=1e-4)
    np.testing.assert_allclose(
        outputs["anomaly_map"].reshape(expected.anomaly_map.shape), expected.anomaly_map.numpy(), atol=1e-3
    )


def test_anomalibs_inferencers(exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)  # anomalib keeps a model cache in the working directory
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), textured_image(np.random.default_rng(0), 90, 70))
    from_torch = TorchInferencer(exported["torch"], device="cpu").predict(file)
    # Where a processor has bfloat16 units OpenVINO computes in bfloat16 unless told otherwise.
    openvino = OpenVINOInferencer(exported["openvino"], device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    from_openvino = openvino.predict(file)
    assert float(from_openvino.pred_score.item()) == pytest.approx(float(from_torch.pred_score.item()), abs=1e-4)


def test_what_is_deployed_follows_the_weights(reference: OSDIRF) -> None:
    model = copy.deepcopy(reference.model)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images).pred_score
        field = model.field(model.extract_features(images))
        folded = model.deployed().denoiser(model.abar**0.5 * model.whitening(model.extract_features(images)))
        torch.testing.assert_close(folded, field, rtol=1e-4, atol=1e-5)

        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        state["model.ema.module.output.weight"] = 1.1 * state["model.ema.module.output.weight"]
        torch.nn.ModuleDict({"model": model}).load_state_dict(state)
        assert not torch.allclose(model(images).pred_score, before)
    assert not any("deployed" in key for key in model.state_dict())
    assert model.double().deployed().denoiser.output.weight.dtype == torch.float64


def test_exports_hold_no_training_weights(exported: dict[str, Path], reference: OSDIRF) -> None:
    loaded = torch.load(exported["torch"], weights_only=False)["model"]
    exported_size = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert exported_size < sum(parameter.numel() for parameter in reference.model.denoiser.parameters())
    assert type(reference.model).__name__ == "OSDIRFModel"


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_exports_say_what_engine_predict_says(
    kind: str, exported: dict[str, Path], trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On textured PNG files of other sizes and shapes than the model's, normalised scores and maps."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(1)
    for height, width in ((900, 700), (300, 1200), (64, 64), (50, 41)):
        cv2.imwrite(str(tmp_path / "images" / f"{height}.png"), textured_image(rng, height, width))
    grey = textured_image(rng, 90, 130)[..., 0]
    cv2.imwrite(str(tmp_path / "images" / "grey.png"), grey)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
    batches = engine.predict(OSDIRF(), data_path=tmp_path / "images", ckpt_path=trained.checkpoint)
    predict = _runtime(kind, exported[kind])
    assert batches is not None
    assert len(batches) == 5
    for batch in batches:
        file = batch.image_path[0]
        image = cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB).transpose(2, 0, 1)[None].astype(np.float32) / 255
        score, anomaly_map = predict(image)
        assert float(score) == pytest.approx(float(batch.pred_score), abs=1e-5)
        np.testing.assert_allclose(anomaly_map.squeeze(), batch.anomaly_map.squeeze().numpy(), atol=1e-4)


def _runtime(kind: str, file: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    if kind == "torch":
        model = TorchInferencer(file, device="cpu").model

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            with torch.no_grad():
                result = model(torch.from_numpy(image))
            return result.pred_score.numpy().squeeze(), result.anomaly_map.numpy()

    elif kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            score, anomaly_map = session.run(["pred_score", "anomaly_map"], {"input": image})
            return score.squeeze(), anomaly_map

    else:
        import openvino

        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            result = compiled(image)
            return result["pred_score"].squeeze(), result["anomaly_map"]

    return predict
