# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The examples run where there is neither torch nor anomalib nor this package."""

import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF
from environments import ENVIRONMENT
from textures import textured_image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with openvino, numpy and pillow alone, linked from this one: no index is needed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    python = folder / "bin" / "python"
    printed = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = Path(printed.stdout.strip())
    for name in ("openvino", "openvino-telemetry", "numpy", "pillow"):
        installed = distribution(name)
        for part in {file.parts[0] for file in installed.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            (packages / part).symlink_to(Path(str(installed.locate_file(part))))
    for package in ("torch", "anomalib", "anomalib_osdirf"):
        command = [python, "-c", f"import {package}"]
        assert subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True).returncode != 0
    return python


@pytest.mark.skipif(sys.platform == "win32", reason="the paths are those of a POSIX virtual environment")
def test_examples_give_the_scores_of_predict(bare_python: Path, trained: Any, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(3)
    for index, (height, width) in enumerate(((90, 70), (64, 64), (200, 120))):
        cv2.imwrite(str(images / f"{index}.png"), textured_image(rng, height, width))
    (images / "folder").mkdir()
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", devices=1, enable_progress_bar=False)
    model = engine.export(OSDIRF(), "openvino", export_root=tmp_path / "export", ckpt_path=trained.checkpoint)
    batches = engine.predict(OSDIRF(), data_path=images, ckpt_path=trained.checkpoint)
    assert batches is not None
    expected = {Path(batch.image_path[0]).name: batch for batch in batches}
    for name in ("readme.txt", "Thumbs.db"):
        (images / name).write_bytes(b"no image")
    for script in ("score_folder.py", "score_folder_async.py"):
        done = subprocess.run(
            [bare_python, EXAMPLES / script, str(model), images],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        assert {line[0] for line in lines} == set(expected)
        for name, score, *label in lines:
            assert float(score) == pytest.approx(float(expected[name].pred_score), abs=1e-5)
            if label:
                assert label == ["defect" if expected[name].pred_label else "good"]
