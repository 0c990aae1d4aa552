# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A data set laid out as train/good, test/<good or defect>, ground_truth/<defect>."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder


def folder_arguments(root: Path) -> dict[str, Any]:
    """All test images serve for measuring, as the rules of measurement say; thresholds are not looked at."""
    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    return {
        "name": root.name,
        "root": str(root),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{name}" for name in defects],
        "mask_dir": [f"ground_truth/{name}" for name in defects] if (root / "ground_truth").is_dir() else None,
        "val_split_mode": "same_as_test",
        "seed": 0,
        "num_workers": 0,
    }


def mvtec_folder(root: Path, **arguments: Any) -> Folder:
    """Open such a data set; arguments go before those of :func:`folder_arguments`."""
    return Folder(**{**folder_arguments(root), **arguments})
