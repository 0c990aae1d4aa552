# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Models of every kind give the same scores; what can't be used is refused in a sentence."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from anomalib_osdirf.export import metadata
from anomalib_osdirf.inference.reading import read_image
from anomalib_osdirf.inference.scoring import ModelError, load_scorer
from brightness import brightness_model

IMAGE = np.random.default_rng(0).random((40, 40, 3)).astype(np.float32)
BRIGHTNESS = IMAGE.mean(axis=2)


def _as_openvino(model: Path) -> Path:
    openvino.save_model(openvino.convert_model(model), model.with_suffix(".xml"), compress_to_fp16=False)
    return model.with_suffix(".xml")


@pytest.mark.parametrize("convert", [lambda model: model, _as_openvino], ids=["onnx", "openvino"])
def test_scores_and_maps_are_the_models(tmp_path: Path, convert: Any) -> None:
    result = load_scorer(convert(brightness_model(tmp_path))).score(IMAGE)
    assert result.score == pytest.approx(BRIGHTNESS.max(), abs=1e-5)
    assert result.map is not None
    np.testing.assert_allclose(result.map, BRIGHTNESS, atol=1e-5)
    assert result.p_value is None
    assert result.milliseconds > 0


@pytest.mark.parametrize("convert", [lambda model: model, _as_openvino], ids=["onnx", "openvino"])
def test_models_of_a_fixed_size_take_any_image(tmp_path: Path, convert: Any) -> None:
    result = load_scorer(convert(brightness_model(tmp_path, size=20))).score(IMAGE)
    assert result.map is not None
    np.testing.assert_allclose(result.map, BRIGHTNESS.reshape(20, 2, 20, 2).mean(axis=(1, 3)), atol=1e-5)


@pytest.mark.parametrize("convert", [lambda model: model, _as_openvino], ids=["onnx", "openvino"])
def test_models_of_a_fixed_batch_take_single_images(tmp_path: Path, convert: Any) -> None:
    result = load_scorer(convert(brightness_model(tmp_path, size=40, batch=2))).score(IMAGE)
    assert result.score == pytest.approx(BRIGHTNESS.max(), abs=1e-5)
    assert result.map is not None
    np.testing.assert_allclose(result.map, BRIGHTNESS, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are looked at in Linux's way")
@pytest.mark.parametrize("convert", [lambda model: model, _as_openvino], ids=["onnx", "openvino"])
def test_threads_of_a_limited_number_may_run_on_any_processor(tmp_path: Path, convert: Any) -> None:
    """Else several processes, each with one thread, would all be on the first one, and the others idle."""
    scorer = load_scorer(convert(brightness_model(tmp_path)), threads=1)
    large = np.tile(IMAGE, (25, 25, 1))
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    found = set()
    with ThreadPoolExecutor(1) as pool:
        for scores in [pool.submit(scorer.score, large) for _ in range(10)]:
            while not scores.done():
                tasks = {task.name for task in Path("/proc/self/task").iterdir()} - before
                found |= {frozenset(os.sched_getaffinity(int(task))) for task in tasks}
    assert found == {frozenset(os.sched_getaffinity(0))}


def test_raw_scores_are_normalised_by_the_metadata(tmp_path: Path) -> None:
    levels = {f"image_{name}": value for name, value in (("min", 0.0), ("max", 2.0), ("threshold", 1.0))}
    metadata = {**levels, "post_processor": False, "model": "OSDIRF", "image_sensitivity": 0.4}
    scorer = load_scorer(brightness_model(tmp_path, **metadata))
    result = scorer.score(IMAGE)
    assert scorer.name == "OSDIRF"
    assert scorer.threshold == pytest.approx(0.6)
    assert result.score == pytest.approx((BRIGHTNESS.max() - 1) / 2 + 0.5, abs=1e-5)
    assert result.p_value is None


@pytest.mark.parametrize("included", [True, False])
def test_scores_have_the_p_values_of_the_metadatas_rate(tmp_path: Path, included: bool) -> None:
    """Raw scores are normalised by knots; half a step above the threshold of brightness 0.5 the exponent is 9/8."""
    knots = [0.05 * number for number in range(5, 15)]
    calibration = {"image": {"false_alarm_rate": 0.01}}
    metadata = {"post_processor": included, "calibration": calibration, "image_knots": knots, "pixel_knots": knots}
    result = load_scorer(brightness_model(tmp_path, **metadata)).score(np.full((9, 9, 3), 0.525, np.float32))
    expected = 0.525 / 0.475 if included else 9 / 8
    assert result.p_value == pytest.approx(0.01**expected, rel=1e-4)
    assert result.score == pytest.approx(expected / (1 + expected), abs=1e-5)


@pytest.mark.parametrize("convert", [lambda model: model, _as_openvino], ids=["onnx", "openvino"])
def test_several_threads_at_once_get_their_own_scores(tmp_path: Path, convert: Any) -> None:
    scorer = load_scorer(convert(brightness_model(tmp_path)))
    levels = np.linspace(0, 1, 200)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda level: scorer.score(np.full((64, 64, 3), level, np.float32)).score, levels))
    np.testing.assert_allclose(scores, levels, atol=1e-6)


def test_exported_models_are_scored_without_torch(tmp_path: Path) -> None:
    model = _as_openvino(brightness_model(tmp_path))
    code = (
        "import sys; from pathlib import Path; import numpy as np; "
        "from anomalib_osdirf.inference.scoring import load_scorer; "
        f"load_scorer(Path({str(model)!r})).score(np.zeros((9, 9, 3), np.float32)); "
        "sys.exit('torch' in sys.modules or 'anomalib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it keeps its events in other places")
def test_onnx_runtime_keeps_and_sends_no_events(tmp_path: Path) -> None:
    model = brightness_model(tmp_path / "model")
    code = (
        "from pathlib import Path; from anomalib_osdirf.inference.scoring import load_scorer; "
        f"load_scorer(Path({str(model)!r}))"
    )
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "HOME": str(home)})
    assert list(home.rglob("*onnxruntime*")) == []


def test_checkpoints_score_as_predict_does(trained: Any, parts: Path, engine: Any) -> None:
    from anomalib_osdirf import OSDIRF

    file = parts / "test" / "dent" / "00.png"
    scorer = load_scorer(trained.results)
    assert (scorer.name, scorer.runtime) == ("OSDIRF", "PyTorch")
    result = scorer.score(read_image(file, 10**6))
    (prediction,) = engine().predict(OSDIRF(), data_path=file, ckpt_path=trained.checkpoint)
    assert result.score == pytest.approx(float(prediction.pred_score), abs=1e-5)
    assert result.map is not None
    np.testing.assert_allclose(result.map, prediction.anomaly_map.squeeze().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.onnx", None, "does not exist; give an exported"),
        ("model.txt", b"x", "model.txt"),
        ("model.onnx", b"junk", "can't be loaded by ONNX Runtime"),
        ("model.xml", b"<junk/>", "can't be loaded by OpenVINO"),
        ("model.ckpt", b"junk", "can't be read"),
        ("", None, "has no .xml, .onnx or .ckpt file in it"),
    ],
)
def test_unusable_models_are_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=sentence):
        load_scorer(tmp_path / name)


def test_checkpoints_of_unknown_models_ask_for_the_name(tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"--model, one of .*Patchcore"):
        load_scorer(tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match="GAN"):
        load_scorer(tmp_path / "model.ckpt", "GAN")


def test_metadata_of_another_model_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after an export of anomalib's own into the folder of one of ours."""
    model = brightness_model(tmp_path, size=20)
    metadata.write_json({"model": "OSDIRF", "image_sensitivity": 0.4}, model)
    assert load_scorer(model).name == "OSDIRF"
    assert caplog.text == ""
    scorer = load_scorer(brightness_model(tmp_path, size=40))
    assert (scorer.name, scorer.threshold) == ("model", 0.5)
    assert "model.json is ignored" in caplog.text
