# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a full disk looks like, and what does not."""

import errno
import os
from pathlib import Path

import pytest

from anomalib_osdirf import __main__ as command_line
from anomalib_osdirf.disk import why_unwritable


def _chained(first: Exception, second: Exception) -> Exception:
    try:
        try:
            raise first
        except type(first):
            raise second  # noqa: B904
    except type(second) as error:
        return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (_chained(OSError(errno.ENOSPC, "No space left"), RuntimeError("unexpected pos 704 vs 598")), "No space left"),
        (RuntimeError("basic_ios::clear: iostream error"), "the disk is full, or files may not grow so large"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (None, None),
    ],
)
def test_reasons(error: Exception | None, reason: str | None) -> None:
    assert why_unwritable(error) == reason


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_command_ends_with_one_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "results/model.ckpt")

    monkeypatch.setattr(command_line, "_run_anomalib", fail)
    assert command_line.main(["test"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"python -m anomalib_osdirf test: {os.strerror(number)}: 'results/model.ckpt'; ")


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.yaml")

    monkeypatch.setattr(command_line, "_run_anomalib", fail)
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        command_line.main(["test"])


def test_quickstart_whose_results_can_not_be_written_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert command_line.main(["quickstart", f"--root={tmp_path / 'file'}"]) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("python -m anomalib_osdirf quickstart: ")
    assert f"{tmp_path / 'file'}" in sentence
    assert sentence.endswith("make room there, or write to another folder.")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
