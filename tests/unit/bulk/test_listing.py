# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Folders, lists and patterns become images, each once; what has none is refused in a sentence."""

import os
import sys
from pathlib import Path

import pytest

from anomalib_osdirf.bulk.listing import list_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.PNG", "b/10.png", "a/c/1.jpg", "a/notes.txt", "3.tiff", "model.xml"):
        (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(b"")
    return tmp_path / "parts"


def test_a_folder_is_searched_in_order_with_all_folders_in_it(folder: Path) -> None:
    names = ("3.tiff", "a/c/1.jpg", "b/10.png", "b/2.PNG")
    assert list_images(str(folder)) == [str(folder / name) for name in names]


def test_a_list_keeps_its_order_and_what_does_not_exist_and_names_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = f"\ufeffz.png\r\n\r\nsub/../a b.dat\n{tmp_path}/z.png\ngrün.png"
    (tmp_path / "list.txt").write_bytes(content.encode())
    assert list_images("list.txt") == [str(tmp_path / name) for name in ("z.png", "a b.dat", "grün.png")]


def test_patterns_match_folders_images_and_lists(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("/elsewhere/x.png\n", "utf-8")
    assert list_images(f"{folder}/*/*.png") == [str(folder / "b/10.png")]
    assert list_images(f"{tmp_path}/*") == ["/elsewhere/x.png", *list_images(str(folder))]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on other systems")
def test_names_of_no_encoding_are_kept_from_folders_and_lists(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    (tmp_path / "list.txt").write_bytes(os.fsencode(tmp_path) + b"/" + name)
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    for wanted in (tmp_path, tmp_path / "list.txt"):
        assert [os.fsencode(Path(path).name) for path in list_images(str(wanted))] == [name]


def test_what_has_no_images_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.dat").write_bytes(b"a\0b")
    for wanted, sentence in (
        (tmp_path / "gone", "does not exist; give a folder"),
        (tmp_path / "empty", r"has no images; known are files that end in \.bmp"),
        (tmp_path / "binary.dat", "is neither a folder nor an image nor a text file"),
    ):
        with pytest.raises(ValueError, match=f"^--input '{wanted}' {sentence}"):
            list_images(str(wanted))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_can_not_be_listed_is_not_passed_over(folder: Path) -> None:
    (folder / "b").chmod(0)
    try:
        with pytest.raises(ValueError, match="can't be listed"):
            list_images(str(folder))
    finally:
        (folder / "b").chmod(0o755)
