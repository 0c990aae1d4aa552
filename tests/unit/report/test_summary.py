# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is said at the end of a test."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from anomalib_osdirf.report.page import Run
from anomalib_osdirf.report.results import Results
from anomalib_osdirf.report.summary import print_summary, write_predictions
from results_folder import ordinary_images, write_results


def _summary(folder: Path, terminal: bool) -> str:
    file = io.StringIO()
    print_summary(folder, folder / "report.html", Console(file=file, force_terminal=terminal, width=80, no_color=True))
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training = {"state": "finished", "seconds": 61.2, "steps": 300, "epochs": 3, "images": 150}
    return write_results(tmp_path / "run", ordinary_images(), training=training, checkpoint="/a b/model.ckpt")


def test_lines_in_a_log_file_are_plain_and_whole(folder: Path) -> None:
    text = _summary(folder, terminal=False)
    lines = dict(line.split(":", 1) for line in text.splitlines())
    assert lines["Trained"].strip() == "300 steps on 150 images in 61 s"
    assert lines["Tested"].strip().startswith("6 normal and 6 anomalous images, 6.0 images/s")
    assert lines["Threshold"].strip().startswith("0.500 (the model's own): ")
    assert lines["Report"].strip() == str(folder / "report.html")
    assert lines["Export"].strip().endswith("--ckpt_path '/a b/model.ckpt'")
    assert text.isascii()


def test_terminals_get_a_box_that_fits(folder: Path) -> None:
    text = _summary(folder, terminal=True)
    assert "Test finished" in text
    assert "╰" in text


def test_a_test_without_defective_images_says_so(tmp_path: Path) -> None:
    images = [image for image in ordinary_images() if image.label == 0]
    text = _summary(write_results(tmp_path, images, metrics={"image_AUROC": float("nan")}), terminal=False)
    lines = dict(line.split(":", 1) for line in text.splitlines())
    assert lines["image AUROC"].strip() == "no defective test images"


def test_run_without_anything_but_images_is_summed_up(tmp_path: Path) -> None:
    folder = write_results(tmp_path, ordinary_images(2), post_processing=None, test=None)
    assert "Threshold:" in _summary(folder, terminal=False)


def test_predictions_have_truth_score_and_label(folder: Path) -> None:
    write_predictions(Run(Results(folder)))
    rows = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 12
    assert [row["truth"] for row in rows] == ["False", "True"] * 6
    assert [row["label"] for row in rows] == [str(float(row["score"]) > 0.5) for row in rows]
    assert rows[1]["path"] == "data/bolt/test/dent/00001.png"
