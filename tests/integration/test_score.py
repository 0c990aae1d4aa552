# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Bulk scoring, killed and resumed: each image once, its score the one that anomalib's inferencer gives."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from anomalib.deploy import OpenVINOInferencer

from exactness import export, textured_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are killed as Linux does it")
COUNT = 500
# Ends every process of Ray's that looks at a file of that name.
DEADLY = """
import os, signal
look = os.stat
def stat(path, *arguments, **more):
    if str(path) == "/deadly.png" and b"ray" in open("/proc/self/cmdline", "rb").read():
        os.kill(os.getpid(), signal.SIGKILL)
    return look(path, *arguments, **more)
os.stat = stat
"""
BROKEN = ("short.png", "text.png", "gone.png")


@pytest.fixture(scope="module")
def model(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("openvino", tmp_path_factory.mktemp("export"), unclipped)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to a few textured images, and broken files among them."""
    root = tmp_path_factory.mktemp("scored")
    originals = sorted(textured_files(root / "originals").iterdir())
    for name, content in zip(BROKEN, (originals[0].read_bytes()[:200], b"no image"), strict=False):
        (root / name).write_bytes(content)
    folder = root / "images"
    folder.mkdir()
    for number, original in zip(range(COUNT), itertools.cycle(originals), strict=False):
        (folder / f"{number:04d}.png").symlink_to(original)
    for name in BROKEN:
        (folder / f"0100 {name}").symlink_to(root / name)
    return folder


@contextmanager
def _running(*arguments: object, errors: int = subprocess.STDOUT) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "anomalib_osdirf", "score", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        yield process
        process.kill()


def _score(*arguments: object) -> tuple[str, str]:
    """Score in a process of its own, which Ray's threads end with, and return what it says."""
    with _running(*arguments, errors=subprocess.PIPE) as process:
        said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    return said, errors


def _wait(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def _check(output: Path, images: Path, model: Path) -> None:
    """Hold a file of scores to the inferencer's, and to the folder."""
    rows = pq.read_table(output).to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(map(str, images.iterdir()))
    inferencer = OpenVINOInferencer(model)
    originals = {path: inferencer.predict(path) for path in (images.parent / "originals").iterdir()}
    for row in rows:
        if row["path"].endswith(BROKEN):
            assert row["score"] is None
            assert row["error"]
            continue
        expected = originals[Path(row["path"]).resolve()]
        assert row["error"] is None
        assert row["score"] == pytest.approx(float(expected.pred_score.item()), abs=1e-6)
        assert row["label"] == bool(expected.pred_label.item())


def test_a_killed_run_goes_on_and_scores_each_image_once(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib keeps a model cache in the working directory
    # Too long for Ray's sockets.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output, maps = tmp_path / "scores.parquet", tmp_path / "maps"
    arguments = ["--model", model, "--input", images, "--output", output, "--maps", maps, "--save-every", 0]
    parts = output.with_name("scores.parquet.parts")
    with _running(*arguments, "--workers", 1) as process:
        _wait(lambda: parts.is_dir() and len(list(parts.glob("*.parquet"))) >= 3, process)
        process.send_signal(signal.SIGKILL)
    before = pq.read_table(list(parts.glob("*.parquet"))).num_rows
    assert 0 < before < COUNT
    assert not output.exists()
    said, errors = _score(*arguments)
    assert errors == ""
    assert "\r" not in said
    assert f"Scoring: {COUNT + len(BROKEN) - before} images in " in said
    names = [line.split(":")[0] for line in said.splitlines()]
    assert names[-8:] == ["Model", "Scored now", "All scores", "Drift", "Errors", "Scores", "Maps", "Look"]
    _check(output, images, model)
    assert not parts.exists()
    row = pq.read_table(output).slice(0, 1).to_pylist()[0]
    expected = OpenVINOInferencer(model).predict(Path(row["path"])).anomaly_map.squeeze()
    np.testing.assert_allclose(np.load(row["map"]), expected, atol=1e-5)

    said, errors = _score(*arguments, "--quiet")
    assert said == ""
    assert errors.endswith(f" score: 3 of {COUNT + 3} images have an error, see {output}.\n")


@pytest.mark.slow
def test_an_image_that_ends_the_process_that_reads_it_is_an_error_and_the_others_are_scored(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(DEADLY, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    names = sorted(images.iterdir())[:60]
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*names[:30], "/deadly.png", *names[30:]])), "utf-8")
    output = tmp_path / "scores.parquet"
    with _running("--model", model, "--input", tmp_path / "list.txt", "--output", output) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "raylet" not in said
    rows = {row["path"]: row for row in pq.read_table(output).to_pylist()}
    assert rows.pop("/deadly.png")["error"] == "deadly.png ended the process that scored it, 2 times."
    assert sorted(rows) == [str(name) for name in names]
    assert [path for path, row in rows.items() if row["error"]] == []
