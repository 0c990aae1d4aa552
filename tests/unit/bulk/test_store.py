# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""However a run ends, its scores go on where they were, with one row for each image in the end."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anomalib_osdirf.bulk.rows import SCHEMA
from anomalib_osdirf.bulk.store import Store, write_csv

SETTINGS = {"model": "abc", "maps": None}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "scores.parquet"


def _rows(*names: str, error: str | None = None) -> Any:
    good = error is None
    row = {"score": 0.75 if good else None, "label": True if good else None, "box": [1, 2, 3, 4], "error": error}
    return pa.Table.from_pylist([{"path": name, **row} for name in names], SCHEMA)


def _store(output: Path, seconds: float = 0, **settings: Any) -> Store:
    return Store(output, {**SETTINGS, **settings}, seconds)


def test_rows_become_one_file(output: Path) -> None:
    store = _store(output)
    store.add(_rows("a", "b"))
    store.add(_rows("c", error="c is broken."))
    totals = store.merge()
    assert pq.read_table(output).to_pylist() == [
        *_rows("a", "b").to_pylist(),
        *_rows("c", error="c is broken.").to_pylist(),
    ]
    assert [file.name for file in output.parent.iterdir()] == ["scores.parquet"]
    assert (totals.images, totals.anomalous, totals.scored, totals.errors) == (3, 2, 2, 1)
    assert totals.first_error == "c is broken."


def test_scores_become_csv(output: Path) -> None:
    store = _store(output)
    store.add(_rows("a, b"))
    store.add(_rows("c", error="c is broken."))
    store.merge()
    write_csv(output, output.with_suffix(".csv"))
    rows = list(csv.DictReader(output.with_suffix(".csv").open(encoding="utf-8")))
    assert [(row["path"], row["label"]) for row in rows] == [("a, b", "true"), ("c", "")]
    assert rows[0]["box"] == "1 2 3 4"
    assert {file.name for file in output.parent.iterdir()} == {"scores.csv", "scores.parquet"}


def test_rows_are_written_down_in_time(output: Path) -> None:
    store = _store(output, seconds=1000)
    store.add(_rows("a"))
    assert not _store(output).finished(False)
    store.flush()
    assert _store(output).finished(False) == {"a"}


def test_a_run_goes_on_where_another_was_killed(output: Path) -> None:
    _store(output).add(_rows("a", "b"))
    second = _store(output)
    assert second.finished(False) == {"a", "b"}
    second.add(_rows("c"))
    second.merge()
    third = _store(output)
    assert third.finished(False) == {"a", "b", "c"}
    third.add(_rows("d"))
    assert third.merge().images == 4
    assert _paths(output) == ["a", "b", "c", "d"]


def test_a_finished_file_is_left_alone(output: Path) -> None:
    store = _store(output)
    store.add(_rows("a"))
    store.merge()
    before = output.stat()
    assert _store(output).merge().images == 1
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_halves_of_parts_are_not_picked_up(output: Path) -> None:
    store = _store(output)
    store.add(_rows("a"))
    (part,) = store.folder.iterdir()
    (store.folder / "9.parquet.1.partial").write_bytes(part.read_bytes()[:100])
    (store.folder / "9.parquet").write_bytes(part.read_bytes()[:100])  # after a power failure
    again = _store(output)
    assert again.finished(False) == {"a"}
    again.add(_rows("b"))
    again.merge()
    assert _paths(output) == ["a", "b"]
    assert _store(output).finished(False) == {"a", "b"}


def test_a_run_killed_between_writing_the_file_and_removing_its_parts(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(output)
    store.add(_rows("a", "b"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.merge()
    assert output.exists()
    assert len(list(store.folder.iterdir())) == 1
    again = _store(output)
    assert again.finished(False) == {"a", "b"}
    assert again.merge().images == 2
    assert _paths(output) == ["a", "b"]


def test_errors_are_retried_on_demand_and_give_way_to_scores(output: Path) -> None:
    store = _store(output)
    store.add(_rows("a", error="a is broken."))
    store.add(_rows("b", error="b is broken."))
    store.merge()
    again = _store(output)
    assert again.finished(retry_errors=False) == {"a", "b"}
    assert again.finished(retry_errors=True) == set()
    again.add(_rows("a"))
    again.add(_rows("b", error="b is broken."))
    again.merge()
    errors = {row["path"]: row["error"] for row in pq.read_table(output).to_pylist()}
    assert errors == {"a": None, "b": "b is broken."}


@pytest.mark.parametrize("merged", [True, False])
def test_scores_of_another_model_are_not_joined(output: Path, merged: bool) -> None:
    store = _store(output)
    store.add(_rows("a"))
    if merged:
        store.merge()
    with pytest.raises(ValueError, match=r"scores.parquet'.* model \(abc, now xyz\)"):
        _store(output, model="xyz")
    with pytest.raises(ValueError, match=r"maps \(None, now /m\)"):
        _store(output, maps="/m")


def test_files_of_others_are_not_overwritten(output: Path) -> None:
    output.parent.mkdir()
    output.write_text("precious", "utf-8")
    with pytest.raises(ValueError, match="exists"):
        _store(output)
    pq.write_table(pa.table({"x": [1]}), output)
    with pytest.raises(ValueError, match="exists"):
        _store(output)


def _paths(output: Path) -> list[str]:
    return sorted(pq.read_table(output)["path"].to_pylist())
