# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong is said in a sentence, before anything is scored."""

import re
import shutil
from pathlib import Path

import pytest

from anomalib_osdirf.__main__ import main
from anomalib_osdirf.bulk import command
from brightness import brightness_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return brightness_model(tmp_path / "model", image_sensitivity=0.5)


def _said(capsys: pytest.CaptureFixture[str], **options: object) -> tuple[int, str]:
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    status = main(["score", *arguments])
    return status, capsys.readouterr().err


def test_ray_is_asked_for_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, said = _said(capsys, model="m.xml", input=tmp_path, output="s.parquet")
    assert status == 1
    assert "pip install 'anomalib-osdirf[ray]'" in said


def test_what_can_not_be_done_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"")
    for name in ("s.parquet", "t.csv"):
        (tmp_path / name).write_bytes(b"precious")
    for options, sentence in (
        ({"model": tmp_path / "gone.xml"}, "does not exist; give an exported"),
        ({"model": checkpoint}, "is a checkpoint; export it first"),
        ({"input": tmp_path / "gone"}, "--input '.*gone' does not exist"),
        ({"output": tmp_path / "s.xlsx"}, "--output '.*s.xlsx' ends in neither .parquet nor .csv"),
        ({"output": tmp_path / "t.csv"}, "exists, and t.parquet does not"),
        ({"output": tmp_path / "s.parquet"}, "exists and is not of this command"),
    ):
        complete = {"model": model, "input": tmp_path, "output": tmp_path / "new.parquet", **options}
        status, said = _said(capsys, **complete)
        assert status == 1
        assert len(said.splitlines()) == 1
        assert re.search(sentence, said)
    assert not (tmp_path / "new.parquet").exists()


def test_numbers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("workers", 0), ("cpus", -1), ("save-every", "nan"), ("max-pixels", "many")):
        with pytest.raises(SystemExit, match="2"):
            _said(capsys, model="m.xml", input="i", output="s.parquet", **{option: value})
        assert f"--{option}: '{value}' is no" in capsys.readouterr().err


def test_a_model_is_known_by_its_weights_and_settings(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model.parent, tmp_path / "copy")) / model.name
    digest = command._digest(model)
    assert command._digest(copied) == digest
    copied.with_suffix(".json").write_text('{"image_sensitivity": 0.6}', "utf-8")
    changed = command._digest(copied)
    copied.write_bytes(copied.read_bytes() + b" ")
    assert len({digest, changed, command._digest(copied)}) == 3
