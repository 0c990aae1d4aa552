# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is found in a folder of parts, and what is said about one that can't be trained on."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from anomalib.data import Folder

from anomalib_osdirf.data.parts import Parts, find_parts
from anomalib_osdirf.data.reading import allow_any_script

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a maker of folders: numbers of images, or names of files, by folder."""

    def folder(**contents: int | list[str]) -> Path:
        for name, files in contents.items():
            place = tmp_path / "parts" / name.replace("__", "/")
            place.mkdir(parents=True)
            for file in [f"{number:02d}.png" for number in range(files)] if isinstance(files, int) else files:
                if file.endswith(".png"):
                    cv2.imwrite(str(place / file), np.full((8, 8), 255, np.uint8))
                else:
                    (place / file).write_bytes(b"x")
        return tmp_path / "parts"

    return folder


def _datamodule(parts: Parts) -> Folder:
    datamodule = Folder(**parts.folder_arguments(), seed=0)
    datamodule.setup()
    return datamodule


@pytest.mark.parametrize(
    "contents",
    [
        {"good": 10, "scratch": 3, "dent": 2, "mask__scratch": 3, "mask__dent": 2},
        {"train__good": 8, "test__good": 2, "test__dent": 2, "test__scratch": 3, "ground_truth__dent": 2}
        | {"ground_truth__scratch": [f"{number:02d}_mask.png" for number in range(3)]},
        {"Good": 10, "defect": 5, "masks": 5},
    ],
)
def test_images_masks_and_kinds_reach_anomalibs_datamodule(make: Make, contents: dict[str, int]) -> None:
    datamodule = _datamodule(find_parts(make(**contents)))
    assert len(datamodule.train_data) == 8
    tested = datamodule.test_data.samples
    assert (tested.label_index == 1).tolist().count(True) == 5
    assert len(tested) == 7
    assert all(Path(one.image_path).stem in Path(one.mask_path).stem for one in tested.itertuples() if one.label_index)


def test_thresholds_of_good_parts_alone_are_not_from_the_tested_ones(make: Make) -> None:
    datamodule = _datamodule(find_parts(make(good=20)))
    validated, tested = (set(data.samples.image_path) for data in (datamodule.val_data, datamodule.test_data))
    assert (len(validated), len(tested)) == (2, 2)
    assert not validated & tested


def test_files_that_are_no_images_are_ignored_and_named(make: Make) -> None:
    parts = find_parts(make(good=["00.png", "01.png", "clip.mp4", "readme.txt"], defect=1))
    assert len(parts.images[parts.good]) == 2
    assert dict(parts.lines())["Ignored"].startswith("clip.mp4, readme.txt")


def test_the_results_folder_and_hidden_folders_are_no_defects(make: Make) -> None:
    folder = make(good=10, results__OSDIRF=3, **{".cache": 3})
    assert find_parts(folder, folder / "results").defects == ()


def test_names_of_any_script_are_found(make: Make, tmp_path: Path) -> None:
    folder = make(good=10, царапина=2, 打痕=1).rename(tmp_path / "Teile für ☃")
    allow_any_script()
    parts = find_parts(folder)
    assert _datamodule(parts).name == "Teile für ☃"
    assert {one.name for one in parts.defects} == {"царапина", "打痕"}


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({}, ["is not a folder"]),
        ({"defect": 3}, ["'good'", "'train/good'", "'defect'"]),
        ({"good": ["clip.mp4"]}, ["no images", ".png", "clip.mp4"]),
        ({"good": []}, ["no images", ".png"]),
        ({"good": 1, "defect": 3}, ["1 image", "at least 2"]),
        ({"good": 4}, ["4 images", "at least 5"]),
        ({"good": 10, "defect": 2, "mask": ["a.png", "b.png"]}, ["'mask'", "defect/00.png"]),
        ({"good": 10, "defect": 2, "mask": 3}, ["3 masks", "2 defective images"]),
        (
            {"good": 10, "defect": ["1.png", "10.png"], "mask": ["1_mask.png", "10_mask.png"]},
            ["10_mask.png", "1.png"],
        ),
    ],
)
def test_what_can_not_be_trained_on_is_said_in_one_sentence(
    make: Make, tmp_path: Path, contents: dict[str, int | list[str]], words: list[str]
) -> None:
    make(**contents)
    with pytest.raises(ValueError, match=r"good|mask") as raised:
        find_parts(tmp_path / "parts")
    assert all(word in str(raised.value) for word in words)
    assert str(raised.value).count(". ") == 0
