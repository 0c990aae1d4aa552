# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Every file has its row, whatever is wrong with it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomalib_osdirf.bulk import rows
from anomalib_osdirf.bulk.rows import Job, Witness, Worker
from anomalib_osdirf.inference.scoring import ModelError, Score
from brightness import brightness_model

SIZE = (60, 80)  # rows, columns


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return brightness_model(tmp_path / "model")


@pytest.fixture
def spot(tmp_path: Path) -> Path:
    """A dark image with a bright spot and a smaller, brighter one."""
    pixels = np.full(SIZE, 60, np.uint8)
    pixels[20:30, 10:25] = 200
    pixels[50:53, 70:74] = 220
    Image.fromarray(pixels).save(tmp_path / "spot.png")
    return tmp_path / "spot.png"


def _worker(model: Path, tmp_path: Path, **changes: Any) -> Worker:
    job = {"model": str(model), "threads": 1, "max_pixels": 10_000, "maps": None, **changes}
    return Worker(Job(**job), tmp_path / "witness.json")


def _rows(worker: Worker, *paths: Path) -> list[dict[str, Any]]:
    table = worker.rows([os.fsencode(path) for path in paths])
    assert table.schema == rows.SCHEMA
    return table.to_pylist()


def test_a_row_has_score_label_and_the_box_of_the_largest_region(model: Path, spot: Path, tmp_path: Path) -> None:
    dark = tmp_path / "dark.png"
    Image.fromarray(np.full(SIZE, 51, np.uint8)).save(dark)
    first, second = _rows(_worker(model, tmp_path), spot, dark)
    assert first["path"] == str(spot)
    assert first["score"] == pytest.approx(220 / 255)
    assert (first["label"], first["box"], first["map"], first["error"]) == (True, [10, 20, 25, 30], None, None)
    assert first["seconds"] > 0
    assert second["score"] == pytest.approx(0.2)
    assert (second["label"], second["box"]) == (False, None)


def test_boxes_are_in_the_images_pixels() -> None:
    def box(mask: NDArray[np.bool_], width: int, height: int) -> list[int] | None:
        return Score(0.5, label=True, map=None, mask=mask, p_value=None, milliseconds=1.0).box(height, width)

    mask = np.zeros((10, 10), bool)
    mask[2:4, 3:5] = True
    mask[4, 5] = True  # joined at a corner
    mask[8, 0:4] = True
    assert box(mask, width=10, height=10) == [3, 2, 6, 5]
    assert box(mask, width=1000, height=25) == [300, 5, 600, 13]
    assert box(~np.zeros((3, 7), bool), width=100, height=41) == [0, 0, 100, 41]
    assert box(np.zeros((3, 7), bool), width=100, height=41) is None


def test_broken_files_have_their_error_and_the_others_their_scores(model: Path, spot: Path, tmp_path: Path) -> None:
    files = {"gone.png": "does not exist", "folder.png": "not a regular file", "large.png": "--max-pixels"}
    Image.fromarray(np.zeros((200, 200), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "folder.png").mkdir()
    for name, content in (("short.png", spot.read_bytes()[:100]), ("empty.png", b""), ("text.jpg", b"no image")):
        (tmp_path / name).write_bytes(content)
        files[name] = "can't be read as an image"
    if hasattr(os, "mkfifo"):  # which a reader would wait for forever
        os.mkfifo(tmp_path / "pipe.png")
        files["pipe.png"] = "not a regular file"
    paths = [spot, *(tmp_path / name for name in files), spot]
    first, *broken, last = _rows(_worker(model, tmp_path), *paths)
    assert first["score"] == last["score"] == pytest.approx(220 / 255)
    for row, (name, reason) in zip(broken, files.items(), strict=True):
        assert row["error"].startswith(f"{name} ")
        assert reason in row["error"]
        assert [row[key] for key in ("score", "label", "box", "map")] == [None] * 4


def test_a_score_that_is_no_number_is_an_error(
    model: Path, spot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = _worker(model, tmp_path)
    monkeypatch.setattr(worker._scorer, "_run", lambda batch: {"pred_score": np.array([np.nan], np.float32)})
    (row,) = _rows(worker, spot)
    assert (row["score"], row["label"]) == (None, None)
    assert row["error"].startswith("spot.png has no score: ")


def test_an_image_that_a_model_fails_on_is_an_error(
    model: Path, spot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("shapes\ndo not match")

    worker = _worker(model, tmp_path)
    monkeypatch.setattr(worker._scorer, "_run", fail)
    (row,) = _rows(worker, spot)
    assert row["error"] == "spot.png could not be scored (RuntimeError: shapes do not match)."


def test_maps_are_files_that_the_rows_name(model: Path, spot: Path, tmp_path: Path) -> None:
    (row,) = _rows(_worker(model, tmp_path, maps=str(tmp_path / "maps")), spot)
    assert Path(row["map"]).is_relative_to(tmp_path / "maps")
    np.testing.assert_allclose(np.load(row["map"]), np.asarray(Image.open(spot), np.float32) / 255, atol=1e-6)
    assert [file.name for file in (tmp_path / "maps").rglob("*") if file.is_file()] == ["spot.png.npy"]


def test_a_map_that_can_not_be_written_leaves_the_score(model: Path, spot: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("in the way", "utf-8")
    (row,) = _rows(_worker(model, tmp_path, maps=str(tmp_path / "maps")), spot)
    assert row["score"] == pytest.approx(220 / 255)
    assert "NotADirectoryError" in row["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on other systems")
def test_names_of_no_encoding_are_scored(model: Path, spot: Path, tmp_path: Path) -> None:
    renamed = spot.rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    good, broken = _rows(_worker(model, tmp_path), renamed, tmp_path / os.fsdecode(b"\xff.png"))
    assert good["path"].endswith("caf\\xe9.png")
    assert good["error"] is None
    assert broken["error"].startswith("\\xff.png ")


def test_an_image_that_ends_its_process_is_tried_twice_and_no_more(model: Path, spot: Path, tmp_path: Path) -> None:
    file = tmp_path / "witness.json"
    Witness(file).watch(str(spot))  # and then the process is gone
    first = _worker(model, tmp_path)
    (row,) = _rows(first, spot)
    assert row["error"] is None
    assert not file.exists()
    first._witness.watch(str(spot))
    (row,) = _rows(_worker(model, tmp_path), spot)
    assert row["error"] == "spot.png ended the process that scored it, 2 times."
    assert row["score"] is None


def test_a_model_that_ends_its_process_is_not_loaded_for_ever(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        Witness(tmp_path / "witness.json").watch(str(model))  # and then the process is gone
    with pytest.raises(ModelError, match="ended the process that loaded it, 2 times"):
        _worker(model, tmp_path)


def test_workers_do_without_torch(model: Path, spot: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from anomalib_osdirf.bulk.rows import Job, Worker; "
        f"worker = Worker(Job({str(model)!r}, 1, 10**6, None), Path({str(tmp_path / 'witness')!r})); "
        f"assert worker.rows([{os.fsencode(spot)!r}])['error'].null_count; "
        "import anomalib_osdirf.bulk.command, anomalib_osdirf.bulk.store; "
        "sys.exit('torch' in sys.modules or 'anomalib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
