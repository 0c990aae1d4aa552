# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""`train` and `predict`, typed by somebody with a folder of images and nothing else."""

import csv
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from anomalib_osdirf import train
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.report.results import Results
from textures import textured_image

SMALL = ["--backbone", "filter_bank", "--image-size", "64"]


def _command(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anomalib_osdirf", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def _lines(output: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in output.splitlines())}


def _draw(folder: Path, count: int, defect: bool = False) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:02d}.png"), textured_image(rng, 80, 72, defect=defect))


@pytest.fixture(scope="session")
def trained_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A working directory with good parts, defects and other files in ``parts``, after a training."""
    folder = tmp_path_factory.mktemp("work")
    _draw(folder / "parts/good", 20)
    _draw(folder / "parts/dent", 4, defect=True)
    (folder / "parts/good/readme.txt").touch()
    (folder / "parts/good/cut.png").write_bytes((folder / "parts/good/00.png").read_bytes()[:300])
    return folder, _command("train", "parts", *SMALL, folder=folder)


def test_training_ends_with_everything_in_one_folder(
    trained_parts: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, process = trained_parts
    assert process.returncode == 0, process.stderr[-3000:]
    run = folder / "results/OSDIRF/parts/v0"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert files >= {
        "report.html",
        "predictions.csv",
        "config.yaml",
        "images/dent/00.png",
        "weights/lightning/model.ckpt",
        "weights/openvino/model.xml",
    }
    assert {path.name for path in folder.iterdir()} == {"parts", "results"}
    rows = list(csv.DictReader((run / "predictions.csv").open(encoding="utf-8")))
    assert sorted(row["truth"] for row in rows) == ["False"] * 4 + ["True"] * 4


def test_training_says_what_was_found_and_what_is_next(
    trained_parts: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, process = trained_parts
    lines = _lines(process.stdout)
    assert lines["Good parts"] == "21 in good, of which 4 are held out for testing"
    assert lines["Defects"].startswith("4 in dent")
    assert lines["Ignored"].startswith("readme.txt")
    assert "(95 % interval" in lines["image AUROC"]
    assert "scores above it are anomalous" in lines["Threshold"]
    assert lines["Folder"] == str(Path("results/OSDIRF/parts/v0"))
    assert process.stdout.splitlines()[-1] == f"Predict:     {lines['Predict']}"


def test_command_of_the_summary_scores_a_folder_with_other_files_in_it(
    trained_parts: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, process = trained_parts
    shutil.copytree(folder / "parts/dent", tmp_path / "new")
    (tmp_path / "new/Thumbs.db").write_bytes(b"x")
    words = _lines(process.stdout)["Predict"].split()[3:-1]
    output, overlays = tmp_path / "scores.csv", tmp_path / "overlays"
    found = _command(*words, tmp_path / "new", "--output", output, "--overlays", overlays, folder=folder)
    assert found.returncode == 0, found.stderr
    assert "Not scored: Thumbs.db" in found.stdout
    rows = pd.read_csv(output)
    assert rows.columns.tolist() == ["path", "score", "label", "box", "error"]
    assert rows.score.notna().sum() == 4
    assert sorted(path.name for path in overlays.iterdir()) == [f"{number:02d}.png.png" for number in range(4)]


def test_run_folder_and_checkpoint_score_alike(
    trained_parts: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = trained_parts[0] / "results/OSDIRF/parts/v0"
    tables = []
    for number, model in enumerate((run, run / "weights/lightning/model.ckpt")):
        output = tmp_path / f"{number}.parquet"
        assert main(["predict", str(model), str(run.parents[3] / "parts"), "--output", str(output)]) == 0
        tables.append(pd.read_parquet(output))
    assert tables[0].error.notna().sum() == 2
    np.testing.assert_allclose(tables[0].score, tables[1].score, atol=0.02)


def test_anomalibs_train_does_the_same_by_the_runs_configuration(
    trained_parts: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_parts[0] / "results/OSDIRF/parts/v0"
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={run / 'config.yaml'}"]) == 0
    again = tmp_path / "results/OSDIRF/parts/v0"
    np.testing.assert_allclose(Results(again).scores, Results(run).scores, rtol=0.02, atol=0.05)
    assert Results(again).paths == Results(run).paths
    assert (again / "predictions.csv").is_file()


def test_good_parts_alone_and_a_rate(tmp_path: Path) -> None:
    _draw(tmp_path / "parts/good", 20)
    process = _command("train", "parts", *SMALL, "--false-alarm-rate", "0.1", folder=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = _lines(process.stdout)
    assert lines["Defects"].startswith("none")
    assert lines["image AUROC"].strip() == "no defective test images"


def test_wrong_folder_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    _draw(tmp_path / "parts/defect", 2, defect=True)
    process = _command("train", "parts", folder=tmp_path)
    assert process.returncode == 1
    (sentence,) = process.stderr.splitlines()
    assert "'parts' has no good parts" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize("model", ["OSDIRF", "Patchcore"])
def test_weights_that_can_not_be_had_are_one_sentence_and_leave_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    _draw(tmp_path / "parts/good", 10)
    assert main(["train", "parts", "--model", model, "--backbone", "mobilenetv2_100"]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert all(word in sentence for word in ("mobilenetv2_100", "--backbone-weights", "--backbone filter_bank"))
    assert not list(tmp_path.rglob("v*"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--model", "Patchcor"], "--model"),
        (["--model", "Stfpm"], "--model"),
        (["--model", "DiffusionAD", "--backbone", "resnet18"], "--backbone"),
        (["--backbone-weights", "gone.pth"], "--backbone-weights"),
        (["--roi", "gone.png"], "--roi"),
        (["--model", "DiffusionAD", "--roi", "gone.png"], "--roi"),
    ],
)
def test_options_that_can_not_be_met_are_one_sentence(
    options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    _draw(tmp_path / "parts/good", 10)
    assert main(["train", "parts", *options]) == 1
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_training_that_fails_leaves_the_latest_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _draw(tmp_path / "parts/good", 10)
    runs = tmp_path / "results/OSDIRF/parts"
    (runs / "v0").mkdir(parents=True)
    (runs / "latest").symlink_to(runs / "v0")

    def power_cut(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("anomalib_osdirf.OSDIRF.training_step", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["train", "parts", *SMALL])
    assert sorted(path.name for path in runs.iterdir()) == ["latest", "v0"]
    assert (runs / "latest").resolve() == runs / "v0"


def test_image_size_keeps_the_models_own_pre_processing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(tmp_path / "parts/good", 10)
    seen: list[str] = []
    monkeypatch.setattr(train, "run", lambda arguments, weights: seen.extend(arguments) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "parts"), "--image-size", "384", "--output", str(tmp_path)])
    model = yaml.safe_load(seen[0].partition("=")[2])["init_args"]
    transforms = model["pre_processor"]["init_args"]["transform"]["init_args"]["transforms"]
    assert model["grid_size"] == 24
    assert transforms[0]["init_args"]["size"] == [384, 384]
    assert [one["class_path"].rpartition(".")[2] for one in transforms] == ["Resize", "Normalize"]
