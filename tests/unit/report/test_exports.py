# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes and latencies of a run's models."""

from pathlib import Path

import openvino
import pytest

from anomalib_osdirf.__main__ import main
from anomalib_osdirf.report import page, statistics
from anomalib_osdirf.report.exports import find_exports
from brightness import brightness_model
from results_folder import ordinary_images, write_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with an ONNX model, an OpenVINO model, a checkpoint and an unfinished export."""
    folder = write_results(tmp_path / "run", ordinary_images(4))
    onnx_model = brightness_model(folder / "weights" / "onnx", image_size=[32, 48], compression_type="FP16")
    (folder / "weights" / "openvino").mkdir()
    openvino.save_model(openvino.convert_model(onnx_model), folder / "weights" / "openvino" / "model.xml")
    with (folder / "weights" / "openvino" / "model.bin").open("ab") as file:
        file.truncate(2_500_000)  # the sizes of real ones
    for name in ("lightning/model.ckpt", ".export-1/model.onnx"):
        (folder / "weights" / name).parent.mkdir()
        (folder / "weights" / name).write_bytes(b"0" * 1000)
    return folder


def test_sizes_are_those_of_all_of_a_models_files(folder: Path) -> None:
    openvino_model, onnx_model, checkpoint = find_exports(folder)
    assert (openvino_model.format, onnx_model.format, checkpoint.format) == ("OpenVINO", "ONNX", "checkpoint")
    assert openvino_model.size == openvino_model.path.stat().st_size + 2_500_000
    assert onnx_model.compression == "FP16"
    assert checkpoint.size == 1000


def test_command_measures_latencies_and_shows_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_charts", str)
    monkeypatch.setattr(statistics, "REPLICATES", 40)
    output = folder / "page.html"
    assert main(["report", "--latency", str(folder), "-o", str(output)]) == 0
    html = output.read_text("utf-8")
    assert html.count("95 % below") == 2
    assert "48 x 32 pixels" in html
    assert "2.5 MB" in html
    assert main(["report", str(folder), "-o", str(output)]) == 0
    assert output.read_text("utf-8").count("95 % below") == 2
