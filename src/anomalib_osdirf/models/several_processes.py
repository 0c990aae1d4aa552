# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What anomalib does once in each of several processes, put right."""

from contextlib import suppress
from pathlib import Path
from typing import Any

_SUBSETS = ("train_data", "val_data", "test_data")


def share_results_folder(trainer: Any) -> None:  # noqa: ANN401
    """Have all processes write into the first one's results folder.

    anomalib makes a new one in each process and lets ``latest`` point to the last.
    """
    own = Path(trainer.default_root_dir)
    first = Path(trainer.strategy.broadcast(str(own)))
    if own != first:
        trainer._default_root_dir = str(first)  # noqa: SLF001 - Lightning has no other way
        with suppress(OSError):  # there is something in it
            own.rmdir()
    trainer.strategy.barrier()
    latest = first.parent / "latest"
    if trainer.local_rank == 0 and latest.is_symlink() and not latest.exists():
        latest.unlink()
        latest.symlink_to(first, target_is_directory=True)


def images_of_splits(datamodule: Any) -> dict[str, list[str]]:  # noqa: ANN401
    """Return the image paths of a datamodule's training, validation and test images, as far as it has such."""
    samples = {name: getattr(getattr(datamodule, name, None), "samples", None) for name in _SUBSETS}
    return {name: list(map(str, table.image_path)) for name, table in samples.items() if table is not None}
