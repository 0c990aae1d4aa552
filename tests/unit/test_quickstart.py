# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the quick start prints around its trainings."""

from pathlib import Path

import pytest

from anomalib_osdirf import quickstart
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.report import page
from results_folder import ordinary_images, write_results


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a training is done."""

    def run_category(category: str, root: Path) -> tuple[Path, Path]:
        data = {"name": "SyntheticSurfaces", "category": category}
        folder = write_results(root / category, ordinary_images(), data=data, checkpoint=str(root / "model.ckpt"))
        return folder, folder / "report.html"

    monkeypatch.setattr(quickstart, "run_category", run_category)
    monkeypatch.setattr(page, "_charts", str)


def test_summary_says_what_came_out_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--root", str(tmp_path)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    assert lines["image AUROC"].strip().startswith("0.")
    assert lines["Report"].strip() == str(tmp_path / "weave" / "report.html")
    assert lines["Predict"].split()[-2:] == [str(tmp_path / "model.ckpt"), "<folder>"]
    assert "anomalib_osdirf train" in lines["Your own parts"]
