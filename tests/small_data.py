# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The datamodule over the small data set that conftest draws."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder

DEFAULTS: dict[str, Any] = {
    "name": "parts",
    "normal_dir": "train/good",
    "normal_test_dir": "test/good",
    "abnormal_dir": "test/dent",
    "mask_dir": "masks",
    "val_split_mode": "same_as_test",
    "train_batch_size": 5,
    "eval_batch_size": 4,
    "num_workers": 0,
    "seed": 0,
}


def small_folder(parts: Path, **arguments: Any) -> Folder:
    """Make the datamodule, with other arguments where they are given."""
    return Folder(**{**DEFAULTS, "root": parts, **arguments})
