# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections of what anomalib does once per process, and checks of what several processes don't support."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

_SUBSETS = ("train_data", "val_data", "test_data")


def share_results_folder(trainer: Any) -> None:
    """Make all processes write into the first one's results folder.

    anomalib creates one per process, and ``latest`` points to the last.
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


def images_of_splits(datamodule: Any) -> dict[str, list[str]]:
    """Return the paths of a datamodule's training, validation and test images, as far as it has any."""
    samples = {name: getattr(getattr(datamodule, name, None), "samples", None) for name in _SUBSETS}
    return {name: list(map(str, table.image_path)) for name, table in samples.items() if table is not None}


def check_predicted_images(trainer: Any) -> None:
    """Refuse more processes than images to predict, on which Lightning fails without a clear error."""
    loaders = trainer.predict_loop._data_source.instance  # noqa: SLF001 - there is no other way before it fails
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        images = len(loader.dataset) if hasattr(loader, "dataset") else trainer.world_size
        if images < trainer.world_size:
            msg = f"{trainer.world_size} processes can't share {images} images; use --trainer.devices {images} at most."
            raise ValueError(msg)


def refuse_sharding(trainer: Any) -> None:
    """Refuse strategies that shard weights over processes."""
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        msg = f"strategy={type(trainer.strategy).__name__} is not supported; use ddp."
        raise ValueError(msg)  # noqa: TRY004 - whoever wrote the command reads it
