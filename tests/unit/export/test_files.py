# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The files of an export: none before all are complete, and none left behind."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from anomalib_osdirf.export.files import move_export, unfinished_export

MODEL = Path("weights/openvino/model.xml")


def _write(folder: Path, content: str) -> None:
    (folder / MODEL).parent.mkdir(parents=True)
    for name in ("model.xml", "model.bin", "model.json"):
        (folder / MODEL).with_name(name).write_text(content, "utf-8")


def _export(destination: Path, content: str) -> None:
    with unfinished_export(destination, "test") as folder:
        _write(folder, content)
        move_export(folder, destination, MODEL)


def _contents(destination: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in destination.rglob("*") if path.is_file()}


def test_all_files_are_moved_and_the_folder_is_gone(tmp_path: Path) -> None:
    for content in ("old", "new"):
        _export(tmp_path, content)
        assert _contents(tmp_path) == dict.fromkeys(("model.xml", "model.bin", "model.json"), content)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_export_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    _export(tmp_path, "old")
    with suppress(ZeroDivisionError), unfinished_export(tmp_path, "test") as folder:
        _write(folder, "new")
        1 / 0  # noqa: B018
    assert set(_contents(tmp_path).values()) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_there_is_no_model_between_two_of_them(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment of the move, weights are never those of another model."""
    _export(tmp_path, "old")
    replace, count = Path.replace, iter(range(10))

    def die(self: Path, target: Path) -> Path:
        if next(count) == moves:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            _export(tmp_path, "new")
    assert "model.xml" not in _contents(tmp_path)
    _export(tmp_path, "new")
    assert set(_contents(tmp_path).values()) == {"new"}


def test_what_a_killed_export_left_is_gone_with_the_next_one(tmp_path: Path) -> None:
    with unfinished_export(tmp_path, "test") as folder:
        name = folder.name
    (tmp_path / name / "temporary").mkdir(parents=True)
    (tmp_path / name / "temporary" / "large").touch()
    _export(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_converters_leave_temporary_files_there_as_well(tmp_path: Path) -> None:
    usual = tempfile.gettempdir()
    with unfinished_export(tmp_path, "test") as folder:
        assert Path(tempfile.mkdtemp()).is_relative_to(folder)
    assert tempfile.gettempdir() == usual
