# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: whole or not there, plain data or refused."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from anomalib_osdirf.training.checkpoint_files import (
    CheckpointError,
    CheckpointFiles,
    remove_partial_files,
    use_checkpoint_files,
)
from limits import largest_file, needs_limits

STATE = {"state_dict": {"weight": torch.zeros(100_000)}}


class Malice:
    """Pickles to a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    files = CheckpointFiles()
    files.save_checkpoint({"a": 1, **STATE}, tmp_path / "new" / "model.ckpt")
    files.save_checkpoint({"a": 2, **STATE}, tmp_path / "new" / "model.ckpt")
    assert files.load_checkpoint(tmp_path / "new" / "model.ckpt")["a"] == 2
    assert _names(tmp_path / "new") == ["model.ckpt"]


@needs_limits
def test_full_disk_leaves_the_earlier_checkpoint_and_tells_where_to_go_on(tmp_path: Path) -> None:
    files = CheckpointFiles()
    files.save_checkpoint({"a": 1}, tmp_path / "model.ckpt")
    with largest_file(50_000), pytest.raises(CheckpointError, match=r"model\.ckpt'"):
        files.save_checkpoint(STATE, tmp_path / "model.ckpt")
    assert files.load_checkpoint(tmp_path / "model.ckpt") == {"a": 1}
    assert _names(tmp_path) == ["model.ckpt"]
    files.save_checkpoint({"a": 1}, tmp_path / "resume.ckpt")
    with largest_file(50_000), pytest.raises(CheckpointError, match=r"--ckpt_path \S+resume\.ckpt\.$"):
        files.save_checkpoint(STATE, tmp_path / "model.ckpt")


@needs_limits
def test_full_disk_is_no_end_of_the_training_for_a_checkpoint_to_resume_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = CheckpointFiles()
    files.save_checkpoint({"a": 1}, tmp_path / "resume.ckpt")
    with largest_file(50_000):
        files.save_checkpoint(STATE, tmp_path / "resume.ckpt")
    assert "resume.ckpt' can't be written" in caplog.text
    assert files.load_checkpoint(tmp_path / "resume.ckpt") == {"a": 1}
    assert _names(tmp_path) == ["resume.ckpt"]


def test_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written"):
        CheckpointFiles().save_checkpoint(STATE, tmp_path / "file" / "model.ckpt")


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        CheckpointFiles().save_checkpoint({"a": lambda: None}, tmp_path / "model.ckpt")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))])
def test_malicious_file_is_refused_and_runs_nothing(save: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    save({"state_dict": {}, "callbacks": Malice(trace)}, tmp_path / "model.ckpt")
    for weights_only in (True, False, None):
        with pytest.raises(CheckpointError, match=r"model\.ckpt' is refused") as caught:
            CheckpointFiles().load_checkpoint(tmp_path / "model.ckpt", weights_only=weights_only)
        assert "weights_only" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0, 10, 1000, 350_000])
def test_truncated_file_is_named(length: int, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt").write_bytes((tmp_path / "model.ckpt").read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.ckpt'"):
        CheckpointFiles().load_checkpoint(tmp_path / "model.ckpt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
        CheckpointFiles().load_checkpoint(tmp_path / "gone.ckpt")


def test_leftovers_go_unless_somebody_still_writes(tmp_path: Path) -> None:
    for name in (".old.ckpt.partial", ".new.ckpt.partial", "model.ckpt", "notes.partial"):
        (tmp_path / name).touch()
    hour_ago = time.time() - 3600
    os.utime(tmp_path / ".old.ckpt.partial", (hour_ago, hour_ago))
    remove_partial_files(tmp_path, idle=60)
    assert _names(tmp_path) == [".new.ckpt.partial", "model.ckpt", "notes.partial"]
    remove_partial_files(tmp_path)
    assert _names(tmp_path) == ["model.ckpt", "notes.partial"]


def test_users_own_way_of_writing_checkpoints_is_left_alone() -> None:
    class Strategy:
        checkpoint_io: Any = None

    strategy = Strategy()
    use_checkpoint_files(strategy)
    assert strategy.checkpoint_io is None
    strategy.checkpoint_io = TorchCheckpointIO()
    use_checkpoint_files(strategy)
    assert isinstance(strategy.checkpoint_io, CheckpointFiles)
