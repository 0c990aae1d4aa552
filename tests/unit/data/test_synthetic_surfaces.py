# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""The drawn data set: its pictures, its masks, its files, and that no threshold on pixel values solves it."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser
from sklearn.metrics import roc_auc_score

from anomalib_osdirf.data import SyntheticSurfaces, synthetic_surfaces
from anomalib_osdirf.data.surface_drawing import SURFACES, Canvas, LooseParts, draw_surface

KINDS = [(category, defect) for category, surface in SURFACES.items() for defect in surface.defects]
SMALL: dict[str, Any] = {"num_train": 3, "num_test_good": 2, "num_test_per_defect": 2, "image_size": 64}


def contents(directory: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("category", SURFACES)
def test_every_surface_has_at_least_four_kinds_of_defect(category: str) -> None:
    assert len(SURFACES[category].defects) >= 4


@pytest.mark.parametrize(("category", "defect"), KINDS)
def test_a_defect_changes_the_picture_inside_its_mask_and_nowhere_else(category: str, defect: str) -> None:
    for number in range(3):
        normal, nothing = draw_surface(category, None, 128, (5, number))
        defective, mask = draw_surface(category, defect, 128, (5, number))
        assert not nothing.any()
        assert set(np.unique(mask)) == {0, 255}
        difference = np.abs(defective.astype(int) - normal.astype(int)).max(axis=2)
        assert not difference[mask == 0].any()
        assert (difference[mask > 0] > 3).mean() > 0.25
        rows, columns = np.nonzero(mask)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 128 * 4 / 256 <= extent <= 128 * 80 / 256


@pytest.mark.parametrize("category", SURFACES)
def test_the_seed_decides_the_picture(category: str) -> None:
    defect = next(iter(SURFACES[category].defects))
    first, again, other = (draw_surface(category, defect, 64, (seed, 7)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).mean() > 0.5


def test_loose_parts_lie_elsewhere_in_every_picture() -> None:
    scenes = [LooseParts(Canvas(128), np.random.default_rng([8, number])) for number in range(40)]
    covered = []
    for scene in scenes:
        there = np.stack(scene.heights) > 0
        assert there.sum(axis=0).max() == 1
        assert there.any(axis=(1, 2)).all()
        assert 3 <= len(there) <= 6
        assert {part.kind for part in scene.parts} == {"screw", "washer", "nut"}
        covered.append(there.any(axis=0))
    assert np.mean(covered, axis=0).max() < 0.5
    turns, places = [], []
    for scene in scenes:
        screw = next(part for part in scene.parts if part.kind == "screw")
        turns.append(screw.turn)
        places.append(screw.place)
    assert np.bincount((np.array(turns) / (np.pi / 2)).astype(int), minlength=4).min() >= 3
    assert np.std(places, axis=0).min() > 30


def test_files_lie_as_in_mvtec(tmp_path: Path) -> None:
    SyntheticSurfaces(root=tmp_path, category="weave", **SMALL).prepare_data()
    names = set(contents(tmp_path))
    expected = {"weave/synthetic_surfaces.json"}
    expected |= {f"weave/train/good/{number:03d}.png" for number in range(3)}
    expected |= {f"weave/test/good/{number:03d}.png" for number in range(2)}
    for defect in SURFACES["weave"].defects:
        expected |= {f"weave/test/{defect}/{number:03d}.png" for number in range(2)}
        expected |= {f"weave/ground_truth/{defect}/{number:03d}_mask.png" for number in range(2)}
    assert names == expected
    assert cv2.imread(str(tmp_path / "weave/train/good/000.png")).shape == (64, 64, 3)


def test_the_same_arguments_write_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        SyntheticSurfaces(root=tmp_path / folder, category="brushed_metal", seed=seed, **SMALL).prepare_data()
    first, again, other = (contents(tmp_path / folder) for folder in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_no_picture_occurs_twice(tmp_path: Path) -> None:
    SyntheticSurfaces(root=tmp_path, category="printed_parts", **SMALL).prepare_data()
    pictures = [data for name, data in contents(tmp_path).items() if "_mask" not in name]
    assert len(set(pictures)) == len(pictures)


def test_a_set_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SyntheticSurfaces(root=tmp_path, **SMALL).prepare_data()
    monkeypatch.setattr(synthetic_surfaces, "draw_surface", lambda *_: pytest.fail("drawn a second time"))
    SyntheticSurfaces(root=tmp_path, **SMALL).prepare_data()


def test_another_set_gets_its_own_folder_and_each_is_found_again(tmp_path: Path) -> None:
    first = SyntheticSurfaces(root=tmp_path, **SMALL)
    first.prepare_data()
    before = contents(tmp_path / "weave")
    second = SyntheticSurfaces(root=tmp_path, **{**SMALL, "num_train": 4})
    second.prepare_data()
    assert contents(tmp_path / "weave") == before
    assert first.directory == tmp_path / "weave"
    assert second.directory != first.directory
    for datamodule, count in ((first, 3), (second, 4)):
        datamodule.setup()
        assert len(datamodule.train_data) == count
        assert datamodule.category == "weave"


def test_files_of_somebody_else_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "weave").mkdir()
    (tmp_path / "weave" / "notes.txt").write_text("mine")
    datamodule = SyntheticSurfaces(root=tmp_path, **SMALL)
    datamodule.prepare_data()
    assert contents(tmp_path / "weave") == {"notes.txt": b"mine"}
    assert (datamodule.directory / "train" / "good").is_dir()


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0

    def interrupted(category: str, defect: str | None, size: int, seed: tuple[int, ...]) -> tuple:
        nonlocal drawn
        drawn += 1
        if drawn > 4:
            raise KeyboardInterrupt
        return draw_surface(category, defect, size, seed)

    datamodule = SyntheticSurfaces(root=tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic_surfaces, "draw_surface", interrupted)
        with pytest.raises(KeyboardInterrupt):
            datamodule.prepare_data()
    assert not list(tmp_path.iterdir())
    datamodule.prepare_data()
    assert len(list((tmp_path / "weave" / "train" / "good").iterdir())) == 3


def test_what_a_killed_process_left_goes_once_it_is_old(tmp_path: Path) -> None:
    for name in (".weave-old.partial", ".weave-new.partial", ".others-old.partial"):
        (tmp_path / name / "weave").mkdir(parents=True)
    days_ago = time.time() - 3 * 24 * 3600
    for name in (".weave-old.partial", ".others-old.partial"):
        os.utime(tmp_path / name, (days_ago, days_ago))
    SyntheticSurfaces(root=tmp_path, **SMALL).prepare_data()
    assert {path.name for path in tmp_path.iterdir()} == {"weave", ".weave-new.partial", ".others-old.partial"}


def test_processes_that_draw_at_once_agree_on_one_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        arguments = [SMALL, SMALL, {**SMALL, "seed": 3}, {**SMALL, "seed": 3}]
        datamodules = [SyntheticSurfaces(root=tmp_path, **each) for each in arguments]
        list(pool.map(lambda datamodule: datamodule.prepare_data(), datamodules))
    assert len(list(tmp_path.iterdir())) == 2
    for datamodule in datamodules:
        assert json.loads((datamodule.directory / "synthetic_surfaces.json").read_text()) == datamodule.record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "carpet"}, "category is 'carpet'.*weave, brushed_metal, printed_parts, loose_parts"),
        ({"image_size": 16}, "image_size is 16.*at least 32"),
        ({"num_train": 0}, "num_train is 0.*at least 1"),
        ({"num_test_good": -1}, "num_test_good is -1.*at least 1"),
        ({"num_test_per_defect": -3}, "num_test_per_defect is -3.*at least 1"),
        ({"seed": -1}, "seed is -1.*at least 0"),
    ],
)
def test_a_bad_argument_is_told_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SyntheticSurfaces(**arguments)
    assert str(error.value).count("\n") == 0


def test_the_datamodule_serves_training_validation_and_test_data_with_masks(tmp_path: Path) -> None:
    datamodule = SyntheticSurfaces(root=tmp_path, category="printed_parts", eval_batch_size=64, **SMALL)
    datamodule.prepare_data()
    datamodule.setup()
    train = next(iter(datamodule.train_dataloader()))
    assert train.image.shape == (3, 3, 64, 64)
    assert not train.gt_label.any()
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        batch = next(iter(loader))
        assert batch.image.shape == (12, 3, 64, 64)
        assert batch.gt_mask.shape == (12, 64, 64)
        assert (batch.gt_mask.flatten(1).any(dim=1) == batch.gt_label.bool()).all()
        assert int(batch.gt_label.sum()) == 10


def test_the_command_line_finds_it_by_its_public_name(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    arguments = ["--data", "anomalib_osdirf.data.SyntheticSurfaces", "--data.category", "brushed_metal"]
    arguments += ["--data.root", str(tmp_path), "--data.num_train", "7", "--data.val_split_mode", "from_test"]
    datamodule = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(datamodule, SyntheticSurfaces)
    assert (datamodule.category, datamodule.num_train) == ("brushed_metal", 7)
    assert datamodule.val_split_mode.value == "from_test"


@pytest.mark.parametrize("category", SURFACES)
def test_no_threshold_on_pixel_values_finds_the_defects(category: str) -> None:
    size, good = 128, 25
    train = np.stack([draw_surface(category, None, size, (0, 1, number))[0] for number in range(20)])
    tests = [draw_surface(category, None, size, (0, 2, number)) for number in range(good)]
    for defect in SURFACES[category].defects:
        tests += [draw_surface(category, defect, size, (0, 3, number)) for number in range(7)]
    values = np.stack([picture for picture, _ in tests]).astype(np.float32).mean(axis=3)
    masks = np.stack([mask for _, mask in tests]) > 0
    labels = np.arange(len(tests)) >= good
    deviations = np.abs(values - train.astype(np.float32).mean(axis=(0, 3)))

    def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
        """AUROC in the better of the two directions."""
        either_way = float(roc_auc_score(truth.ravel(), scores.ravel()))
        return max(either_way, 1 - either_way)

    for detector in (values, deviations):
        for statistic in (np.max, np.min, np.mean, np.std):
            assert auroc(labels, statistic(detector, axis=(1, 2))) < 0.8
        assert auroc(masks[:, ::2, ::2], detector[:, ::2, ::2]) < 0.75
