# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A data set laid out as train/good, test/<good or defect>, ground_truth/<defect>."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder


def mvtec_folder(root: Path, **arguments: Any) -> Folder:  # noqa: ANN401
    """All test images serve for measuring, as the rules of measurement say; thresholds are not looked at."""
    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    masks = [f"ground_truth/{name}" for name in defects] if (root / "ground_truth").is_dir() else None
    return Folder(
        root.name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{name}" for name in defects],
        mask_dir=masks,
        **{"val_split_mode": "same_as_test", "seed": 0, "num_workers": 0, **arguments},
    )
