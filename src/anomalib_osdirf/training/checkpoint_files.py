# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: written whole or not at all, and never run as code."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from anomalib_osdirf.disk import why_unwritable

logger = logging.getLogger(__name__)

RESUME_NAME = "resume"
_PARTIAL = ".partial"
# What torch's errors say of files that hold more than plain data.
_CODE = re.compile("GLOBAL|allowlisted|call reduce")


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written; its message is one sentence."""


class CheckpointFiles(AnomalibCheckpointIO):
    """Writes a checkpoint to a temporary file in its folder, syncs it, and renames it.

    Lightning writes to the system's temporary folder. A move to another disk can be interrupted, and a killed process
    leaves the file behind.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; failing to write one to resume from is a warning, not an error."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(f".{target.name}{_PARTIAL}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except (OSError, RuntimeError) as error:
            reason = why_unwritable(error)
            if reason is None:
                raise
            resume = target.with_name(f"{RESUME_NAME}.ckpt")
            msg = f"The checkpoint {str(target)!r} can't be written ({reason}): make room, or use another folder"
            if target == resume:
                logger.warning("%s; until then, an interrupted training restarts from an earlier one, if any.", msg)
                return
            if resume.is_file():
                msg += f", and go on with --ckpt_path {resume}"
            raise CheckpointError(f"{msg}.") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint as plain data, whatever ``weights_only`` is."""
        del weights_only
        with plain_data_only(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=True)


def use_checkpoint_files(strategy: Any) -> None:  # any of Lightning's
    """Have a trainer's strategy read and write through :class:`CheckpointFiles`, unless the user chose otherwise."""
    present = strategy.checkpoint_io
    if isinstance(present, TorchCheckpointIO) and not isinstance(present, CheckpointFiles):
        strategy.checkpoint_io = CheckpointFiles(getattr(present, "extra_safe_globals", None))


def remove_partial_files(folder: Path, idle: float = 0) -> None:
    """Remove partial checkpoints of killed processes in a folder, which nobody has written to for so long."""
    for partial in folder.glob(f".*.ckpt{_PARTIAL}"):
        with suppress(OSError):  # gone already, or on a disk that is read-only now
            if time.time() - partial.stat().st_mtime >= idle:
                partial.unlink()


@contextmanager
def plain_data_only(path: Any) -> Iterator[None]:
    """Turn torch's errors on reading a file with ``weights_only=True`` into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if _CODE.search(str(error)):
            # Not torch's own message, which goes on to say how to run the code.
            msg = (
                f"checkpoint {str(path)!r} is refused: reading it would run code, which none of this package's needs; "
                "get it from somebody whom you trust, or train again."
            )
        else:
            msg = (
                f"checkpoint {str(path)!r} can't be read (truncated, or of another format?); use another one, or "
                "train again."
            )
        raise CheckpointError(msg) from error
