# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exported models predict in their own runtimes, with any batch and image size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from sklearn.metrics import f1_score
from torchvision.transforms import v2

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.denoisers import registry
from anomalib_osdirf.export import options, quantisation
from anomalib_osdirf.features import coarse
from exactness import TOLERANCES, compare, export, predict, textured_files
from processor import has_bfloat16, precisions
from small_data import small_folder
from static_graphs import check_static, outputs_of
from textures import textured_image

SHAPES = [(1, 64, 64), (2, 90, 70), (7, 40, 120)]


def _images(batch: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(batch)
    return (
        np.stack([textured_image(rng, height, width).transpose(2, 0, 1) for _ in range(batch)]).astype(np.float32) / 255
    )


@pytest.fixture(scope="module")
def exported(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    files = {kind: export(kind, root, unclipped) for kind in ("torch", "onnx", "openvino")}
    for compression in ("FP16", "INT8"):
        files[compression] = export("openvino", root / compression, unclipped, compression)
    return files


@pytest.fixture(scope="module")
def reference(unclipped: Path) -> OSDIRF:
    return OSDIRF.load_from_checkpoint(unclipped).eval()


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runtimes(exported: dict[str, Path], reference: OSDIRF, shape: tuple[int, int, int], kind: str) -> None:
    images = _images(*shape)
    _check(outputs_of(exported[kind], images), reference, images)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_an_input_size_makes_graphs_static(kind: str, unclipped: Path, reference: OSDIRF, tmp_path: Path) -> None:
    file = export(kind, tmp_path, unclipped, input_size=(90, 70))
    check_static(file)
    images = _images(1, 90, 70)
    with torch.no_grad():
        expected = reference(torch.from_numpy(images))
    outputs = outputs_of(file, images)
    assert set(outputs) == {"pred_score", "pred_label", "anomaly_map", "pred_mask"}  # or anomalib's inferencer stops
    np.testing.assert_allclose(outputs["pred_score"], expected.pred_score.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-5)


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
    from_openvino = OpenVINOInferencer(exported["openvino"]).predict(file)
    assert float(from_openvino.pred_score.item()) == pytest.approx(float(from_torch.pred_score.item()), abs=1e-5)
    np.testing.assert_allclose(from_openvino.anomaly_map.squeeze(), from_torch.anomaly_map.squeeze(), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_inferencer_takes_any_batch(
    exported: dict[str, Path], reference: OSDIRF, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    images = _images(*shape)
    batch = TorchInferencer(exported["torch"], device="cpu").predict(torch.from_numpy(images))
    _check({"pred_score": batch.pred_score.numpy(), "anomaly_map": batch.anomaly_map.numpy()}, reference, images)


@torch.no_grad()
def test_frozen_model_scores_as_the_model(reference: OSDIRF) -> None:
    model = reference.model
    images = torch.rand(2, 3, 64, 64)
    network, frozen = model.network, model.freeze()
    z = coarse(network.projection(network.extract_features(images)))
    abar = network.schedule.abar(200)
    expected = network.kept(abar**0.5 * z, torch.full((2,), 200))
    torch.testing.assert_close(frozen.network(images)[0], expected, rtol=1e-4, atol=1e-4)
    # A denoiser that was trained: another field than that of the untrained one.
    assert (expected - (1 - abar) ** 0.5 * abar**0.5 * z).abs().max() > 0.01
    for name, value in frozen(images)._asdict().items():
        if value is not None:
            torch.testing.assert_close(value, getattr(model(images), name), rtol=1e-5, atol=1e-4)
    assert frozen.is_frozen
    assert not model.is_frozen


def test_exports_hold_no_training_weights(exported: dict[str, Path], reference: OSDIRF) -> None:
    loaded = torch.load(exported["torch"], weights_only=False)["model"]
    exported_size = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert exported_size < sum(parameter.numel() for parameter in reference.model.network.denoiser.parameters())
    assert type(reference.model).__name__ == "OSDIRFModel"


@pytest.fixture(scope="module")
def predicted(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("predicted")
    batches = predict(OSDIRF(), textured_files(root / "images"), root, unclipped)
    for batch in batches:
        assert 0 < float(batch.pred_score) < 1
        assert 0 < float(batch.anomaly_map.min()) < float(batch.anomaly_map.max()) < 1
    return batches


@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_exports_say_what_engine_predict_says(
    kind: str,
    exported: dict[str, Path],
    predicted: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    assert len(predicted) == 5
    compare(predicted, exported[kind], *TOLERANCES[kind])


def test_exports_with_a_pre_processor_of_the_users(
    tiny: Callable[..., OSDIRF],
    folder: Callable[..., Any],
    engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    transform = v2.Compose(
        [
            v2.Resize((96, 80), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop((64, 72)),
            v2.Normalize(mean=[0.4, 0.5, 0.6], std=[0.3, 0.2, 0.25]),
        ]
    )
    model = tiny(pre_processor=PreProcessor(transform))
    engine().fit(model, datamodule=folder())
    predicted = predict(model, textured_files(tmp_path / "images"), tmp_path)
    for kind in ("torch", "onnx", "openvino"):
        path = engine().export(model, kind, export_root=tmp_path / kind)
        compare(predicted, Path(str(path)), 1e-5, 1e-4)


@pytest.mark.skipif(not has_bfloat16(), reason="OpenVINO does not compute in bfloat16 on this processor")
def test_openvino_model_carries_float32(exported: dict[str, Path]) -> None:
    assert "bf16" not in precisions(exported["openvino"])


def test_openvino_models_whole_numbers_carry_no_mark(exported: dict[str, Path]) -> None:
    layers = ET.parse(exported["openvino"]).findall("./layers/layer")
    marked = [
        layer for layer in layers if layer.find("./rt_info/attribute[@name='DisablePrecisionConversion']") is not None
    ]
    assert marked
    assert {layer.find("./output/port").get("precision") for layer in marked} == {"FP32"}


@pytest.mark.skipif(not has_bfloat16(), reason="OpenVINO does not compute in bfloat16 on this processor")
def test_openvino_model_of_a_transformer_carries_float32(
    tiny: Callable[..., OSDIRF],
    folder: Callable[..., Any],
    engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry._TRANSFORMERS, "dit_s", (48, 2, 6))  # all blocks are alike
    model = tiny(denoiser="dit_s", max_steps=1)
    engine().fit(model, datamodule=folder())
    exact = engine().export(model, "openvino", export_root=tmp_path / "f32")
    assert "bf16" not in precisions(Path(str(exact)))


@pytest.mark.skipif(not has_bfloat16(), reason="OpenVINO does not compute in bfloat16 on this processor")
def test_precision_can_be_left_to_the_device(trained: Any, tmp_path: Path) -> None:
    wanted = {"inference_precision": "any"}
    assert "bf16" in precisions(export("openvino", tmp_path, trained.checkpoint, onnx_kwargs=wanted))


def test_metadata_is_in_every_file(exported: dict[str, Path], reference: OSDIRF) -> None:
    import onnx
    import openvino

    beside = json.loads(exported["openvino"].with_suffix(".json").read_text())
    assert len(beside.pop("model_sha256")) == 64
    post_processor = reference.post_processor
    assert beside["image_threshold"] == pytest.approx(float(post_processor.image_threshold))
    assert beside["pixel_max"] == pytest.approx(float(post_processor.pixel_max))
    assert beside["image_sensitivity"] == 0.5
    assert beside["normal_scores"] == post_processor.normal_scores != {}
    assert beside["arguments"]["timestep"] == 200
    assert beside["image_size"] == [64, 64]
    assert beside["trained"] is not None
    assert beside["versions"]["anomalib"]
    assert beside["arguments"]["backbone_weights"] == "random"  # where they came from; a path would tell of a machine
    model = openvino.Core().read_model(exported["openvino"])
    inside = {name: json.loads(model.get_rt_info(["model_info", name]).astype(str)) for name in beside}
    assert inside == beside
    properties = {entry.key: json.loads(entry.value) for entry in onnx.load(exported["onnx"]).metadata_props}
    assert properties["image_threshold"] == beside["image_threshold"]
    assert json.loads(exported["torch"].with_suffix(".json").read_text())["model"] == "OSDIRF"


def test_a_raw_export_and_its_metadata_give_the_normalised_scores(
    unclipped: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    import openvino

    image = _images(2, 90, 70)
    expected = openvino.Core().compile_model(exported["openvino"], "CPU")(image)
    for kind in ("onnx", "openvino"):
        file = export(kind, tmp_path, unclipped, onnx_kwargs={"post_processor": False})
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert {name for output in compiled.outputs for name in output.get_names()} == {"pred_score", "anomaly_map"}
        values = json.loads(file.with_suffix(".json").read_text())
        assert values["post_processor"] is False
        for raw, name in (("pred_score", "image"), ("anomaly_map", "pixel")):
            span = values[f"{name}_max"] - values[f"{name}_min"]
            normalised = np.clip((compiled(image)[raw] - values[f"{name}_threshold"]) / span + 0.5, 0, 1)
            np.testing.assert_allclose(normalised.squeeze(), expected[raw].squeeze(), atol=1e-4)


def test_thresholds_survive_a_post_processor_that_is_switched_off(trained: Any, tmp_path: Path) -> None:
    model = OSDIRF.load_from_checkpoint(trained.checkpoint, post_processor=False)
    values = json.loads(model.to_torch(tmp_path).with_suffix(".json").read_text())
    assert values["image_threshold"] is not None
    assert values["post_processor"] is False


class TestQuantised:
    """INT8_PTQ and INT8_ACQ of the small model."""

    @pytest.fixture(scope="class")
    def datamodule(self, parts: Path) -> Folder:
        # Eight images to validate on in batches of seven: the last batch has one.
        return small_folder(parts, eval_batch_size=7)

    @pytest.fixture(scope="class")
    def files(self, trained: Any, datamodule: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("quantised")
        # A class below the mixin's: the test images are none of the quantisation's business.
        datamodule.test_dataloader = None  # type: ignore[assignment,method-assign]
        return {
            name: export("openvino", root / name, trained.checkpoint, name, datamodule=datamodule, max_drop=1.0)
            for name in ("INT8_PTQ", "INT8_ACQ")
        }

    @pytest.mark.parametrize("name", ["INT8_PTQ", "INT8_ACQ"])
    def test_only_the_network_is_quantised(self, files: dict[str, Path], name: str) -> None:
        import openvino

        model = openvino.Core().read_model(files[name])
        assert quantisation.is_quantised(model)
        quantised: dict[str, list[bool]] = {}
        for node in model.get_ops():
            sources = {node.input_value(index).get_node().get_type_name() for index in range(node.get_input_size())}
            quantised.setdefault(node.get_type_name(), []).append("FakeQuantize" in sources)
        # Those of resize and densities.
        assert quantised["MatMul"]
        assert not any(quantised["MatMul"])
        # All but the backbone's first one and the PCA; three are in the denoiser's blocks.
        assert quantised["Convolution"].count(False) == 2
        assert len(quantised["Convolution"]) > 10
        assert all(quantised["GroupConvolution"])

    @pytest.mark.parametrize("name", ["INT8_PTQ", "INT8_ACQ"])
    def test_thresholds_are_those_of_the_quantised_network(
        self, files: dict[str, Path], name: str, datamodule: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        import openvino

        predict = openvino.Core().compile_model(files[name], "CPU")
        scores = [predict(datamodule.val_data[index].image[None].numpy())["pred_score"].item() for index in range(8)]
        values = json.loads(files[name].with_suffix(".json").read_text())
        for score, raw in ((min(scores), values["image_min"]), (max(scores), values["image_max"])):
            span = values["image_max"] - values["image_min"]
            assert score == pytest.approx(np.clip((raw - values["image_threshold"]) / span + 0.5, 0, 1), abs=1e-4)
        assert values["compression_type"] == name
        monkeypatch.chdir(tmp_path)
        result = OpenVINOInferencer(files[name]).predict(textured_image(np.random.default_rng(0), 90, 70))
        assert np.isfinite(result.anomaly_map).all()

    def test_calibration_looks_at_training_images_with_anomalies(self, datamodule: Folder, reference: OSDIRF) -> None:
        images = quantisation.CalibrationImages(datamodule, reference.pre_processor)
        assert len(images) == 12
        first, again = list(images), list(images)
        for index, (image, same) in enumerate(zip(first, again, strict=True)):
            np.testing.assert_array_equal(image, same)
            original = datamodule.train_data[index].image.numpy()[None]
            assert np.array_equal(image, original) is (index % 2 == 0)
            assert image.shape == (1, 3, 64, 64)

    def test_float32_is_not_returned_in_silence(
        self, trained: Any, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import nncf

        monkeypatch.setattr(nncf, "quantize_with_accuracy_control", lambda model, *_, **__: model)
        with pytest.raises(RuntimeError, match=r"max_drop=0\.01"):
            export("openvino", tmp_path, trained.checkpoint, "INT8_ACQ", datamodule=small_folder(parts))
        assert not list(tmp_path.rglob("*.xml"))

    def test_the_accuracy_bound_is_passed_on_and_measured_with_own_thresholds(
        self, trained: Any, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import nncf
        import openvino

        reference = OSDIRF.load_from_checkpoint(trained.checkpoint).eval()
        seen: dict[str, Any] = {}

        def control(model: Any, calibration: Any, validation: Any, measure: Any, **arguments: Any) -> Any:
            compiled = openvino.compile_model(model, "CPU")
            seen["metric"], _ = measure(compiled, range(8))
            seen.update(arguments)
            return nncf.quantize(model, calibration, ignored_scope=arguments["ignored_scope"])

        monkeypatch.setattr(nncf, "quantize_with_accuracy_control", control)
        export("openvino", tmp_path, trained.checkpoint, "INT8_ACQ", datamodule=small_folder(parts), max_drop=0.03)
        assert seen["max_drop"] == 0.03
        # What was measured is the network in float32: with its own threshold, the score behind that of a training.
        validation = small_folder(parts)
        quantisation.set_up(validation, reference.pre_processor)
        threshold = float(reference.post_processor.image_threshold)
        items = [validation.val_data[index] for index in range(8)]
        with torch.no_grad():
            raw = [reference.model(reference.pre_processor(item.image[None])).pred_score for item in items]
        labels = [bool(item.gt_label) for item in items]
        assert seen["metric"] == pytest.approx(f1_score(labels, [float(score) > threshold for score in raw]))


def _refused(match: str, error: type[Exception], trained: Any, root: Path, *arguments: Any, **more: Any) -> None:
    with pytest.raises(error, match=match):
        export("openvino", root, trained.checkpoint, *arguments, **more)
    assert not root.is_dir() or not [path for path in root.rglob("*") if "openvino" in str(path)]


class TestBadInput:
    def test_unknown_compression(self, trained: Any, tmp_path: Path) -> None:
        _refused("compression_type='int4'", ValueError, trained, tmp_path, "int4")

    @pytest.mark.parametrize("compression", ["INT8_PTQ", "INT8_ACQ"])
    def test_no_datamodule(self, trained: Any, tmp_path: Path, compression: str) -> None:
        _refused(f"compression_type={compression} needs images", ValueError, trained, tmp_path, compression)

    def test_too_few_images(self, trained: Any, tmp_path: Path, parts: Path) -> None:
        _refused(
            "calibration_images=300",
            ValueError,
            trained,
            tmp_path,
            "INT8_PTQ",
            datamodule=small_folder(parts),
            onnx_kwargs={"calibration_images": 300},
        )

    def test_max_drop(self, trained: Any, tmp_path: Path, parts: Path) -> None:
        datamodule = small_folder(parts)
        _refused("max_drop=3", ValueError, trained, tmp_path, "INT8_ACQ", datamodule=datamodule, max_drop=3)

    @pytest.mark.parametrize(
        ("option", "match"),
        [
            ({"inference_precision": "f8"}, "inference_precision='f8'"),
            ({"post_processor": "no"}, "post_processor='no'"),
        ],
    )
    def test_options(self, trained: Any, tmp_path: Path, option: dict[str, str], match: str) -> None:
        _refused(match, ValueError, trained, tmp_path, onnx_kwargs=option)

    @pytest.mark.parametrize("size", [(0, 64), (64,), (64, 64, 3)])
    def test_input_size(self, trained: Any, tmp_path: Path, size: Any) -> None:
        _refused(r"input_size=\(.*a height and a width", ValueError, trained, tmp_path, input_size=size)

    def test_input_size_of_other_images_than_those_to_calibrate_on(
        self, trained: Any, tmp_path: Path, parts: Path
    ) -> None:
        datamodule = small_folder(parts)
        _refused(
            r"input_size=\(90, 70\)",
            ValueError,
            trained,
            tmp_path,
            "INT8_PTQ",
            datamodule=datamodule,
            input_size=(90, 70),
        )

    def test_folder_that_can_not_be_written(self, trained: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(OSError, match=r"export_root='.*file/model'"):
            export("onnx", tmp_path / "file" / "model", trained.checkpoint)

    @pytest.mark.parametrize("kind", ["onnx", "openvino"])
    def test_missing_extra(self, trained: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(options, "find_spec", lambda _: None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'anomalib-osdirf\[openvino\]'"):
            export(kind, tmp_path, trained.checkpoint)
