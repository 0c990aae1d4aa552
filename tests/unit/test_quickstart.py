# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the quick start prints around its trainings."""

from pathlib import Path
from typing import Any

import pytest

from anomalib_osdirf import quickstart
from anomalib_osdirf.__main__ import main


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pretend that trainings are done."""

    def run_category(category: str, root: Path, quiet: bool) -> dict[str, Any]:
        print(f"training noise of {category}")
        names = ("results", "checkpoint", "exported", "report")
        return {"image_AUROC": 0.75, **{name: root / category / name for name in names}}

    monkeypatch.setattr(quickstart, "run_category", run_category)


def test_summary_says_what_came_out_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--root", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "0.750" in output
    assert f"Report:     {tmp_path / 'weave' / 'report'}" in output
    assert f"--ckpt_path {tmp_path / 'weave' / 'checkpoint'}" in output


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--quiet", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
