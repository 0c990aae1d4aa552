# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is put right, and what is refused, in several processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from anomalib_osdirf.training.distributed import check_predicted_images, refuse_sharding, share_results_folder


def _trainer(own: Path, first: Path, local_rank: int) -> Any:
    strategy = SimpleNamespace(broadcast=lambda _: str(first), barrier=lambda: None)
    return SimpleNamespace(
        default_root_dir=str(own), _default_root_dir=str(own), strategy=strategy, local_rank=local_rank
    )


def test_all_processes_write_into_the_first_ones_folder(tmp_path: Path) -> None:
    """As anomalib leaves it: a folder of each process, the link to the last."""
    first, second = tmp_path / "v0", tmp_path / "v1"
    for folder in (first, second):
        folder.mkdir()
    (tmp_path / "latest").symlink_to(second, target_is_directory=True)
    trainers = [_trainer(own, first, rank) for rank, own in enumerate((first, second))]
    for trainer in reversed(trainers):
        share_results_folder(trainer)
    assert {trainer._default_root_dir for trainer in trainers} == {str(first)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "v0"]
    assert (tmp_path / "latest").resolve() == first.resolve()


def test_a_folder_with_something_in_it_stays(tmp_path: Path) -> None:
    first, second = tmp_path / "v0", tmp_path / "v1"
    for folder in (first, second):
        folder.mkdir()
    (second / "notes.txt").touch()
    share_results_folder(_trainer(second, first, 1))
    assert (second / "notes.txt").exists()


@pytest.mark.parametrize("as_list", [True, False])
def test_fewer_images_to_predict_than_processes(as_list: bool) -> None:
    loader: Any = DataLoader([1, 2])
    source = SimpleNamespace(instance=[loader] if as_list else loader)
    trainer = SimpleNamespace(predict_loop=SimpleNamespace(_data_source=source), world_size=3)
    with pytest.raises(ValueError, match=r"--trainer\.devices 2"):
        check_predicted_images(trainer)
    trainer.world_size = 2
    check_predicted_images(trainer)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_sharding_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=f"strategy={type(strategy).__name__}"):
        refuse_sharding(SimpleNamespace(strategy=strategy))


@pytest.mark.parametrize("strategy", [None, DDPStrategy()])
def test_other_strategies_are_not_refused(strategy: Any) -> None:
    refuse_sharding(SimpleNamespace(strategy=strategy))
