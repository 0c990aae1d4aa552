# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pages of made-up results: ordinary ones, and all that can be missing or odd."""

import json
import os
import re
import signal
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalib_osdirf.__main__ import main
from anomalib_osdirf.report import page as page_module
from anomalib_osdirf.report import statistics
from anomalib_osdirf.report.page import Run, write_page
from anomalib_osdirf.report.results import FILE_NAME, Results, ResultsWriter
from limits import largest_file, needs_limits
from results_folder import image_result, ordinary_images, write_results


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts' library out, which takes seconds to bundle and is the browser's matter, and resample little."""
    monkeypatch.setattr(page_module, "_charts", str)
    monkeypatch.setattr(statistics, "REPLICATES", 40)


def _make(tmp_path: Path, images: list[Any], **entries: Any) -> tuple[str, dict[str, Any]]:
    html = write_page([write_results(tmp_path / "run", images, **entries)], tmp_path / "report.html").read_text("utf-8")
    return html, _data(html)


def _data(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_page_tells_metrics_kinds_and_pictures(tmp_path: Path) -> None:
    images = ordinary_images()
    html, data = _make(tmp_path, images)
    auroc = roc_auc_score([image.label for image in images], [image.score for image in images])
    assert f"{auroc:.3f}" in html
    assert "pixel AUPRO" in html
    assert all(kind in html for kind in ("dent", "scratch"))
    run = data["runs"][0]
    assert run["threshold"] == 0.5
    assert run["scores"] == pytest.approx([image.score / 20 for image in images], abs=1e-5)
    assert run["names"][1] == "dent/00001.png"
    assert all(shown[0] is not None and shown[1] is not None for shown in run["shown"])
    assert [bool(shown[4]) for shown in run["shown"]] == [image.label == 1 for image in images]
    assert all(re.match(r"data:image/webp;base64,", picture) for picture in data["pictures"])
    assert not re.search(r'(src|href)="(?!#|data:)', html)


@pytest.mark.parametrize(
    ("labels", "remark"),
    [
        ([0, 0, 0], "There are no defective test images"),
        ([1, 1], "There are no normal images"),
        ([0], "no defective test images"),
    ],
)
def test_pages_without_a_class_or_of_one_image(tmp_path: Path, labels: list[int], remark: str) -> None:
    images = [image_result(f"test/x/{number}.png", label, 3.0 * number) for number, label in enumerate(labels)]
    html, data = _make(tmp_path, images)
    assert remark in html
    assert data["runs"][0]["curves"] == {"roc": [], "pr": []}


def test_a_metric_that_takes_defective_images_has_no_value_without_them(tmp_path: Path) -> None:
    images = [image_result(f"test/x/{number}.png", 0, 3.0 * number) for number in range(3)]
    html, _ = _make(tmp_path, images, metrics={"image_AUROC": float("nan"), "image_AP": 0.25})
    assert re.search(r">image AUROC</th><td><span[^>]*>n/a<", html)
    assert re.search(r">image AP</th><td>0.250", html)


def test_page_without_masks_maps_pictures_paths_scores_and_labels(tmp_path: Path) -> None:
    images = ordinary_images(6)
    images[0].path = images[1].path = None
    images[1].mask = images[1].normal_pixels = images[1].anomalous_pixels = images[1].regions = None
    images[2].map = images[2].map_low = images[2].map_high = images[2].picture = None
    images[3].score = None
    images[4].label = None
    html, data = _make(tmp_path, images, post_processing=None, metrics=None)
    assert "1 images have no label" in html
    assert "1 images have no finite score" in html
    assert data["runs"][0]["names"][:2] == ["image 1", "image 2"]
    assert data["runs"][0]["shown"][2] == [None, None, 0, 0, "", ""]


def test_threshold_of_a_model_without_one_is_the_best_on_the_test(tmp_path: Path) -> None:
    images = [image_result(f"t/a/{n}.png", int(n > 2), float(n)) for n in range(6)]
    _, data = _make(tmp_path, images, post_processing=None)
    assert data["runs"][0]["threshold"] == 2.5
    assert "none of its own" in data["runs"][0]["origin"]


def test_predictions_beside_the_page_are_linked(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a run", ordinary_images(4))
    (folder / "predictions.csv").touch()
    html = [write_page([folder], place / "page.html").read_text("utf-8") for place in (tmp_path, tmp_path / "b")]
    assert 'href="a%20run/predictions.csv"' in html[0]
    assert "predictions.csv" not in html[1]


def test_scores_have_the_digits_that_tell_them_from_the_threshold(tmp_path: Path) -> None:
    _, data = _make(tmp_path, [image_result("t/a/1.png", 1, 10.000001)])
    assert data["runs"][0]["scores"][0] > data["runs"][0]["threshold"]


def test_sensitivity_moves_the_threshold(tmp_path: Path) -> None:
    from results_folder import POST_PROCESSING

    _, data = _make(tmp_path, ordinary_images(4), post_processing={**POST_PROCESSING, "image_sensitivity": 0.7})
    assert data["runs"][0]["threshold"] == pytest.approx(0.3)


def test_names_from_users_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    images = [
        image_result(f"test/{evil.replace('/', '|')}/日本語 ключ.png", 1, 12.0),
        image_result("test/good/ü&<b>.png", 0, 2.0),
    ]
    entries = {
        "model": evil,
        "data": {"name": evil, "category": None},
        "training_command": evil,
        "arguments": {evil: evil},
    }
    html, data = _make(tmp_path, images, **entries)
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert html.count("</script>") == 3
    assert "日本語 ключ.png" in data["runs"][0]["names"][0]
    assert evil in data["runs"][0]["label"]


def test_interrupted_test_and_training_give_a_page_that_says_so(tmp_path: Path) -> None:
    html, _ = _make(
        tmp_path,
        ordinary_images(4),
        test={"state": "started", "images": 80},
        training={"state": "started"},
        metrics=None,
    )
    assert "The test was interrupted, or still runs: 4 of 80 images are here." in html
    assert "The training was interrupted" in html
    html, data = _make(tmp_path / "b", [], test=None)
    assert "No test was run yet." in html
    assert len(data["runs"][0]["losses"]) == 5
    ResultsWriter(tmp_path / "b" / "run").add_losses([(step, 0.0) for step in range(5)])
    file = write_page([tmp_path / "b" / "run"], tmp_path / "constant.html")
    assert _data(file.read_text("utf-8"))["runs"][0]["losses"] == []  # PaDiM and its like have none
    writer = ResultsWriter(tmp_path / "run")
    writer.forget_training()
    html = write_page([tmp_path / "run"], tmp_path / "report.html").read_text("utf-8")
    remarks = Run(Results(tmp_path / "run")).remarks
    assert [remark[:8] for remark in remarks] == ["The test"]  # none about a run that was only tested
    assert "not recorded" in html


def test_runs_side_by_side_share_pictures_and_have_a_mean(tmp_path: Path) -> None:
    images = ordinary_images()
    folders = [
        write_results(tmp_path / "a", images),
        write_results(tmp_path / "b", images, model="Padim"),
        write_results(tmp_path / "c", images, data={"name": "parts", "category": "nut"}),
    ]
    html = write_page(folders, tmp_path / "report.html").read_text("utf-8")
    data = _data(html)
    labels = [run["label"] for run in data["runs"]]
    assert labels == ["OSDIRF · parts / bolt", "Padim · parts / bolt", "OSDIRF · parts / nut"]
    assert "OSDIRF, mean" in html
    assert "Padim, mean" not in html
    assert data["runs"][0]["shown"] == data["runs"][1]["shown"]


def test_metrics_of_several_categories_are_means_over_them(tmp_path: Path) -> None:
    """Each category is perfect by itself; together they are not, as good nuts score above bad bolts."""
    images = [
        image_result(f"data/{category}/test/{'good' if label == 0 else 'dent'}/{n}.png", label, score + 5 * label + n)
        for category, score in (("bolt", 1.0), ("nut", 11.0))
        for label in (0, 1)
        for n in range(3)
    ]
    logged = {"mean/image_AUROC": 1.0, "mean/pixel_Recall": 0.625, "bolt/pixel_Recall": 0.125, "image_AUROC": 0.5}
    html, _ = _make(tmp_path, images, metrics=logged)
    metrics = Run(Results(tmp_path / "run")).metrics
    assert metrics["image AUROC"].value == 1
    assert metrics["image false-alarm rate"].value == 0.5
    assert "0.625" in html
    assert "0.125" not in html
    assert "means over the categories" in html


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["./a/test/good/1.png", "./a/test/dent/2.png"], "a/test/"),
        (["/x/good/1.png", "/x/good/2.png"], "/x/"),
        (["/a/1.png", "/b/1.png"], "/"),
        (["1.png", "2.png"], ""),
        (["a/b/1.png", "c/2.png"], ""),
    ],
)
def test_names_leave_out_the_common_folder_but_not_the_kinds(tmp_path: Path, paths: list[str], folder: str) -> None:
    _, data = _make(tmp_path, [image_result(path, 0, 1.0) for path in paths])
    run = data["runs"][0]
    assert run["folder"] == folder
    assert [run["folder"] + name for name in run["names"]] == [path.removeprefix("./") for path in paths]


def test_the_same_folder_twice_is_one_run(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", ordinary_images(4))
    html = write_page([folder, folder / FILE_NAME], tmp_path / "report.html").read_text("utf-8")
    assert len(_data(html)["runs"]) == 1


def test_many_images_keep_the_page_small_and_the_most_telling_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "_PICTURE_BUDGET", 60_000)
    images = ordinary_images(40)
    images += [image_result(f"data/bolt/test/good/{n:06d}.png", 0, 5.0, seed=n % 3) for n in range(300)]
    html, data = _make(tmp_path, images)
    assert sum(map(len, data["pictures"])) < 75_000
    run = data["runs"][0]
    shown = [index for index, pictures in enumerate(run["shown"]) if pictures]
    assert 5 < len(shown)
    wrong = [(0.5 - s) if label else (s - 0.5) for s, label in zip(run["scores"], run["labels"], strict=True)]
    catches = [index for index in np.argsort(wrong) if run["labels"][index] == 1][:6]
    assert set(catches) < set(shown)
    assert min(wrong[index] for index in shown if index not in catches) >= np.sort(wrong)[-len(shown) + 6] - 1e-9
    assert len(html) < 400_000


def test_twenty_thousand_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = write_results(tmp_path / "run", ordinary_images(100))
    plain = image_result("x", 0, 0.0)
    plain.picture = plain.map = plain.normal_pixels = plain.anomalous_pixels = plain.regions = None
    scores = rng.normal(8, 2, 20_000)
    names = (f"data/bolt/test/good/{number:06d}.png" for number in range(1000, 20_900))
    images = [
        replace(plain, path=name, defect_type="good", score=score) for name, score in zip(names, scores, strict=False)
    ]
    ResultsWriter(folder).add_images(images)
    file = write_page([folder], tmp_path / "report.html")
    assert file.stat().st_size < 9_000_000  # and a megabyte of charts
    assert len(_data(file.read_text("utf-8"))["runs"][0]["scores"]) == 20_000


# ---------------------------------------------------------------------- the command


def test_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "run", ordinary_images(4))
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(folder), "-o", str(output)]) == 0
    assert "<h1>OSDIRF on parts / bolt</h1>" in output.read_text("utf-8")
    assert str(output) in capsys.readouterr().out


def test_folder_of_many_runs_is_searched_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("OSDIRF/parts/v0", "Patchcore/parts/v0"):
        write_results(tmp_path / name, ordinary_images(4), model=name.split("/", maxsplit=1)[0])
    (tmp_path / "OSDIRF/parts/latest").symlink_to(tmp_path / "OSDIRF/parts/v0")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "OSDIRF, Patchcore on parts" in html
    assert [f'<option value="{number}">' in html for number in range(3)] == [True, True, False]


@pytest.mark.parametrize(("counts", "differ"), [((4, 4), False), ((4, 6), True)])
def test_runs_with_different_test_images_are_said_to_have_them(
    tmp_path: Path, counts: tuple[int, int], differ: bool
) -> None:
    folders = [write_results(tmp_path / str(index), ordinary_images(count)) for index, count in enumerate(counts)]
    html = write_page(folders, tmp_path / "page.html").read_text("utf-8")
    assert ("were tested on different images" in html) == differ


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "ReportCallback"),
        (lambda folder: write_results(folder, []).joinpath(FILE_NAME).write_bytes(b"junk" * 400), "delete it"),
        (lambda folder: write_results(folder, [], format=99), "format 99"),
        (ResultsWriter, "test again"),
    ],
)
def test_unusable_folders_are_one_clear_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, sentence: str
) -> None:
    folder = tmp_path / "run"
    prepare(folder)
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert re.search(sentence, error)
    assert "Traceback" not in error
    assert str(folder) in error
    assert not (tmp_path / "page.html").exists()


def test_missing_extra_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_results(tmp_path / "run", ordinary_images(4))
    monkeypatch.setitem(page_module._NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match=r"needs no-such-package.*pip install 'anomalib-osdirf\[report\]'"):
        write_page([folder], tmp_path / "page.html")
    with caplog.at_level("WARNING"):
        assert page_module.write_page_or_warn([folder], tmp_path / "page.html") is None
    assert f"python -m anomalib_osdirf report {folder}" in caplog.text


def test_images_of_an_interrupted_writer_stay_readable(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", ordinary_images(4))
    database = sqlite3.connect(folder / FILE_NAME)
    database.execute("DELETE FROM image")  # never committed, as by a process that was killed
    assert len(Results(folder).ids) == 4
    database.close()


def test_an_image_that_a_sampler_repeats_counts_once(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", ordinary_images(4))
    ResultsWriter(folder).add_images(ordinary_images(4)[:1])
    assert len(Results(folder).ids) == 4


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Results(tmp_path / "nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't fork")
def test_results_of_a_killed_test_are_read_and_begun_anew(tmp_path: Path) -> None:
    """SQLite's journal lies beside the file, with what is to be undone."""
    folder = write_results(tmp_path, ordinary_images())
    child = os.fork()
    if not child:
        database = sqlite3.connect(folder / FILE_NAME)
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN")
        database.execute("UPDATE image SET picture = zeroblob(30000)")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    journal = folder / f"{FILE_NAME}-journal"
    assert journal.stat().st_size > 1000
    kept = journal.read_bytes()
    results = Results(folder)
    assert next(iter(results.pictures(results.ids)))["picture"] == ordinary_images()[0].picture
    journal.write_bytes(kept)
    ResultsWriter(folder, fresh=True).put({"model": "new"})
    assert Results(folder).entries["model"] == "new"
    assert not journal.exists()


@needs_limits
def test_page_that_finds_no_room_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_results(tmp_path, ordinary_images())
    (tmp_path / "report.html").write_text("earlier", "utf-8")
    with largest_file(1000):
        assert page_module.write_page_or_warn([folder], tmp_path / "report.html") is None
    assert f"The page {tmp_path / 'report.html'} can't be written (File too large)." in caplog.text
    assert (tmp_path / "report.html").read_text("utf-8") == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", FILE_NAME]


def test_suspicious_training_images_are_listed(tmp_path: Path) -> None:
    html, _ = _make(tmp_path, ordinary_images(), suspicious=[["good/odd<1>.png", 7.5]])
    assert "good/odd&lt;1&gt;.png" in html
    assert "7.500" in html
