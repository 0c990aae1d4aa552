# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the callback collects in trainings and tests of several models."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms import v2

import small_data
from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.report import ReportCallback, page
from anomalib_osdirf.report.page import Run
from anomalib_osdirf.report.results import FILE_NAME, Results
from limits import largest_file, needs_limits
from results_folder import ordinary_images, write_results


@pytest.fixture(scope="module")
def tested(trained: Any, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, float], str]:
    """Test the trained model with the callback."""
    root = tmp_path_factory.mktemp("tested")
    write_results(root / "here", ordinary_images(4), training={"state": "finished"}, latencies={"x": 1})
    callback = ReportCallback(folder=root / "here")
    engine = Engine(callbacks=[callback], default_root_dir=root, accelerator="cpu", enable_progress_bar=False)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(page, "_charts", str)
    with monkeypatch.context():
        metrics = engine.test(OSDIRF(), datamodule=small_data.small_folder(parts), ckpt_path=trained.checkpoint)[0]
    monkeypatch.undo()
    html = (root / "here" / page.PAGE_NAME).read_text("utf-8")
    return Run(Results(root / "here")), dict(metrics), html


def test_scores_are_predictions_before_clipping(
    tested: tuple[Run, dict[str, float], str], trained: Any, parts: Path, engine: Callable[..., Engine]
) -> None:
    run, metrics, _ = tested
    predictions: Any = engine().predict(OSDIRF(), data_path=parts / "test", ckpt_path=trained.checkpoint)
    expected = {
        path: score for batch in predictions for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }
    assert len(run.results.paths) == 8
    for path, score in zip(run.results.paths, run.scores, strict=True):
        assert np.clip(score, 0, 1) == pytest.approx(float(expected[str(path)]), abs=1e-5)
    assert run.metrics["image AUROC"].value == pytest.approx(metrics["image_AUROC"], abs=1e-6)
    assert run.metrics["image AP"].value == pytest.approx(metrics["image_AP"], abs=1e-6)
    assert run.metrics["pixel AUROC"].value == pytest.approx(metrics["pixel_AUROC"], abs=2e-3)
    assert run.entries["metrics"]["pixel_AUPRO"] == pytest.approx(metrics["pixel_AUPRO"])
    assert run.threshold == (0.5, "the model's own")


def test_kinds_sizes_and_the_run_are_noted(tested: tuple[Run, dict[str, float], str], trained: Any) -> None:
    run, _, html = tested
    assert sorted(set(run.results.defect_types)) == ["dent", "good"]
    assert run.results.sizes.tolist() == [[72, 80]] * 8
    assert run.entries["checkpoint"] == str(trained.checkpoint.resolve())
    assert run.entries["test"]["state"] == "finished"
    assert run.entries["versions"]["anomalib"]
    assert "OSDIRF on parts" in html


def test_pictures_show_what_the_files_show(tested: tuple[Run, dict[str, float], str]) -> None:
    run, _, _ = tested
    index = run.results.labels.tolist().index(1)
    stored = next(iter(run.results.pictures([run.results.ids[index]])))
    shown = np.asarray(Image.open(io.BytesIO(stored["picture"] or b"")).convert("RGB"), dtype=float)
    original = Image.open(str(run.results.paths[index])).convert("RGB").resize(shown.shape[1::-1])
    assert np.abs(shown - np.asarray(original, dtype=float)).mean() < 12
    mask = np.asarray(Image.open(io.BytesIO(stored["mask"] or b"")).resize((72, 80)))
    assert mask[30, 27] > 0
    assert mask[60, 60] == 0


def test_training_and_test_of_another_model_on_crops(
    parts: Path,
    folder: Callable[..., Any],
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """anomalib's own PaDiM, whose pre-processor crops: pictures and maps must have the crop's shape."""
    monkeypatch.setattr(page, "_charts", str)
    transform = v2.Compose([v2.Resize((64, 64)), v2.CenterCrop((48, 40)), v2.Normalize([0.5] * 3, [0.2] * 3)])
    model = Padim(
        backbone="resnet18", layers=["layer1"], n_features=8, pre_trained=False, pre_processor=PreProcessor(transform)
    )
    runner = engine(callbacks=[ReportCallback(quiet=True)])
    runner.train(model, datamodule=folder())
    file = next(tmp_path.rglob(FILE_NAME))
    results = Results(file.parent)
    assert results.entries["model"] == "Padim"
    assert results.entries["training"]["images"] == 12
    stored = next(iter(results.pictures(results.ids[:1])))
    pictures = [Image.open(io.BytesIO(data)) for data in (stored["picture"], stored["map"]) if data]
    assert [picture.size for picture in pictures] == [(40, 48), (40, 48)]
    assert (file.parent / page.PAGE_NAME).is_file()


def test_a_test_of_another_checkpoint_forgets_what_was_there(tested: tuple[Run, dict[str, float], str]) -> None:
    run, _, _ = tested
    assert len(run.results.losses) == 0
    assert len(run.results.ids) == 8
    assert not {"training", "latencies"} & set(run.entries)


def test_each_image_is_of_the_category_that_the_data_say(
    trained: Any, parts: Path, engine: Callable[..., Engine], tmp_path: Path
) -> None:
    data = MultiCategory({"bolts": small_data.small_folder(parts)}, num_workers=0)
    callback = ReportCallback(folder=tmp_path, page=False, quiet=True)
    engine(callbacks=[callback]).test(OSDIRF(), datamodule=data, ckpt_path=trained.checkpoint)
    results = Results(tmp_path)
    assert set(results.categories) == {"bolts"}
    assert len(results.ids) == 8


def test_losses_of_a_training_that_is_interrupted_are_kept(
    tiny: Callable[..., OSDIRF], folder: Callable[..., Any], engine: Callable[..., Engine], tmp_path: Path
) -> None:
    class Interrupted(OSDIRF):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.trainer.global_step == 4:
                raise RuntimeError("power cut")
            return super().training_step(*args, **kwargs)

    model = tiny()
    model.__class__ = Interrupted
    with pytest.raises(RuntimeError, match="power cut"):
        engine(callbacks=[ReportCallback()]).train(model, datamodule=folder())
    results = Results(next(tmp_path.rglob(FILE_NAME)).parent)
    assert results.losses[:, 0].tolist() == [1, 2, 3, 4]
    assert results.entries["training"] == {"state": "started"}


@needs_limits
def test_full_disk_costs_the_report_and_not_the_test(
    trained: Any, parts: Path, engine: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_data.small_folder(parts)
    with largest_file(15_000):
        run = engine(callbacks=[ReportCallback(folder=tmp_path / "report")])
        metrics = run.test(OSDIRF(visualizer=False), datamodule=data, ckpt_path=trained.checkpoint)[0]
    assert dict(metrics) == pytest.approx(trained.metrics, abs=1e-6)
    assert caplog.text.count("The report will lack what follows, because") == 1


def test_later_test_of_a_checkpoint_writes_over_no_report(
    trained: Any, parts: Path, engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anomalib gives such a test the folder of the latest run, which may be another one."""
    monkeypatch.setattr(page, "_charts", str)
    runs = tmp_path / "results/OSDIRF/parts"
    write_results(runs / "v1", ordinary_images(4))
    (runs / "latest").symlink_to(runs / "v1")
    for number in range(2):
        run = engine(callbacks=[ReportCallback(page=number == 0)])
        run.test(OSDIRF(), datamodule=small_data.small_folder(parts), ckpt_path=trained.checkpoint)
        folder = runs / f"tests/v{number}"
        assert len(Results(folder).ids) == 8
        assert {"predictions.csv", "images"} <= {path.name for path in folder.iterdir()}
    assert (runs / "tests/v0" / page.PAGE_NAME).is_file()
    assert [path.name for path in (runs / "v1").iterdir()] == [FILE_NAME]
    assert len(Results(runs / "v1").ids) == 4
