# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Broken files are found in any of anomalib's data sets, left out, and listed."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from anomalib_osdirf.data import broken_files
from anomalib_osdirf.data.broken_files import datasets_in, report, skip_broken
from small_data import small_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"")
    return tmp_path


def test_prediction_images(images: Path) -> None:
    dataset = PredictDataset(images)
    assert list(skip_broken([dataset, None, object()], visible=False)) == [str(images / "c.png")]
    assert [path.name for path in dataset.image_filenames] == ["a.png", "b.png"]
    assert skip_broken([dataset], visible=False) == {}


def test_samples_with_a_broken_mask(parts: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for mask in (parts / "masks").iterdir():
        (masks / mask.name).write_bytes(mask.read_bytes())
    (masks / "02.png").write_bytes(b"nothing")
    datamodule = small_folder(parts, mask_dir=masks)
    datamodule.setup()
    ((image, error),) = skip_broken([datamodule.test_data], visible=False).items()
    assert image.endswith("test/dent/02.png")
    assert error == f"'{masks / '02.png'}' can't be read as an image, as it is of no image format that Pillow knows"
    assert len(datamodule.test_data) == 7
    assert datamodule.test_data.task == "segmentation"


def test_each_file_is_looked_at_once_until_it_changes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = broken_files.trouble_with

    def counted(path: str) -> str | None:
        seen.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(broken_files, "trouble_with", counted)
    for _ in range(2):
        skip_broken([PredictDataset(images)], visible=False)
    assert sorted(seen) == ["a.png", "b.png", "c.png"]
    (images / "c.png").write_bytes((images / "a.png").read_bytes())
    assert skip_broken([PredictDataset(images)], visible=False) == {}


def test_data_sets_of_dataloaders_alone_and_in_lists(images: Path) -> None:
    data, other = PredictDataset(images), TensorDataset(torch.zeros(1))
    loaders: Any = [DataLoader(data), [DataLoader(other)], "nothing"]
    assert list(datasets_in(DataLoader(data))) == [data]
    assert list(datasets_in(loaders)) == [data, other]


def test_report_names_three_lists_all_and_forgets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "new" / "list.csv"
    report({f"{name}.png": f"{name} is broken" for name in "abcde"}, file)
    assert f"5 images are skipped and listed in {file}: a is broken; b is broken; c is broken; and 2 more." in (
        caplog.text
    )
    assert file.read_text("utf-8").splitlines()[:2] == ["image_path,error", "a.png,a is broken"]
    assert len(file.read_text("utf-8").splitlines()) == 6
    report({}, file)
    assert not file.exists()


def test_report_where_nothing_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        report({"a.png": "a is broken"}, tmp_path / "file" / "list.csv")
    assert "1 image is skipped and not listed, as" in caplog.text
    assert "a is broken." in caplog.text
