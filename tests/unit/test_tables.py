# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of README, model card and documentation are those of the measurements."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["comparison", "evidence", "measurements", "contamination"])
def test_tables_are_those_of_the_measurements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    monkeypatch.delitem(sys.modules, "tables")
    page, table = tables.tables()[name]
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, name, table) == text, "run python benchmarks/tables.py"
    assert "| PaDiM |" in table
