# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Folders with files of every kind: through training, test, prediction and app, the good ones as if alone."""

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.data.reading import BrokenFileError
from anomalib_osdirf.inference.scoring import load_scorer
from brightness import brightness_model
from image_files import broken_files, good_files, write_files
from states import assert_same_state

MakeFolder = Callable[..., Folder]
MakeModel = Callable[..., OSDIRF]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def pixels(parts: Path) -> np.ndarray:
    image = cv2.imread(str(parts / "test/good/00.png"))
    assert image is not None
    return image


@pytest.fixture
def damaged(parts: Path, tmp_path: Path) -> Path:
    """The small data set, with a broken file in each folder."""
    root = tmp_path / "damaged"
    shutil.copytree(parts, root)
    for folder in ("train/good", "test/good"):
        (root / folder / "broken.png").write_bytes(b"")
    content = (root / "masks/03.png").read_bytes()
    (root / "masks/03.png").write_bytes(content[: len(content) // 2])
    return root


def _scores(batches: Any) -> dict[str, float]:
    return {Path(item.image_path).name: float(item.pred_score) for batch in batches or [] for item in batch}


def _listed(engine: Engine, stage: str) -> dict[str, str]:
    file = Path(engine.trainer.default_root_dir) / f"broken_images_{stage}.csv"
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as stream:
        return {Path(row["image_path"]).name: row["error"] for row in csv.DictReader(stream)}


# ---------------------------------------------------------------------- prediction


def test_prediction_scores_good_files_as_if_alone_and_lists_the_others(
    trained: Any, engine: MakeEngine, pixels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken = good_files(pixels), broken_files(pixels)
    write_files(good, tmp_path / "alone")
    write_files(good | broken, tmp_path / "mixed")
    first, second = engine(), engine()
    alone = _scores(first.predict(OSDIRF(), data_path=tmp_path / "alone", ckpt_path=trained.checkpoint))
    mixed = _scores(second.predict(OSDIRF(), data_path=tmp_path / "mixed", ckpt_path=trained.checkpoint))
    assert alone.keys() == good.keys()
    assert mixed == alone
    assert all(math.isfinite(score) for score in mixed.values())
    for name in ("bitmap.BMP", "lossless.webp", "tiled.tif", "animated.png", "alpha.png", "деталь 部品 ü.png"):
        assert alone[name] == alone["plain.png"]
    listed = _listed(second, "predict")
    assert listed.keys() == broken.keys()
    assert all(f"{name}' can't be read as an image, as it is" in error for name, error in listed.items())
    assert f"{len(broken)} images are skipped and listed in" in caplog.text
    # The list is that of the latest prediction.
    third = engine()
    third.predict(OSDIRF(), data_path=tmp_path / "alone", ckpt_path=trained.checkpoint)
    assert third.trainer.default_root_dir == second.trainer.default_root_dir
    assert not _listed(third, "predict")


def test_prediction_of_broken_files_only(trained: Any, engine: MakeEngine, tmp_path: Path) -> None:
    write_files({"empty.png": b""}, tmp_path / "images")
    run = engine()
    assert not run.predict(OSDIRF(), data_path=tmp_path / "images", ckpt_path=trained.checkpoint)
    assert list(_listed(run, "predict")) == ["empty.png"]


def test_prediction_of_a_datamodule(trained: Any, damaged: Path, folder: MakeFolder, engine: MakeEngine) -> None:
    expected = _scores(engine().predict(OSDIRF(), datamodule=folder(), ckpt_path=trained.checkpoint))
    run = engine()
    batches = run.predict(OSDIRF(), datamodule=folder(root=damaged), ckpt_path=trained.checkpoint)
    assert batches is not None
    assert [len(batch) for batch in batches] == [4, 3]
    assert _scores(batches).items() <= expected.items()
    assert _listed(run, "predict").keys() == {"broken.png", "03.png"}


def test_empty_folders_are_named(trained: Any, folder: MakeFolder, engine: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"Found 0 images in {tmp_path / 'empty'}"):
        engine().predict(OSDIRF(), data_path=tmp_path / "empty", ckpt_path=trained.checkpoint)
    with pytest.raises(RuntimeError, match=f"Found 0 .+ images in {tmp_path / 'empty'}"):
        engine().fit(OSDIRF(backbone="filter_bank"), datamodule=folder(normal_dir=tmp_path / "empty"))


# ---------------------------------------------------------------------- training and test


def test_training_stops_at_a_broken_file(
    damaged: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    with pytest.raises(BrokenFileError, match=r"train/good/broken\.png'"):
        engine().train(tiny(), datamodule=folder(root=damaged))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_training_leaves_broken_files_out_if_told(
    damaged: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    sound = tiny(seed=0)
    engine().fit(sound, datamodule=folder())
    model, run = tiny(seed=0, skip_broken_images=True), engine()
    run.train(model, datamodule=folder(root=damaged))
    assert_same_state(model.model.state_dict(), sound.model.state_dict(), rtol=0, atol=1e-6)
    assert _listed(run, "fit").keys() == {"broken.png", "03.png"}
    assert "as it is empty" in _listed(run, "fit")["broken.png"]
    assert "masks/03.png' can't be read as an image, as it is broken" in _listed(run, "fit")["03.png"]
    assert "3 images are skipped and listed in" in caplog.text
    # Nothing needs repeating for the checkpoint's test.
    tested = engine().test(OSDIRF(), datamodule=folder(root=damaged), ckpt_path=run.best_model_path)[0]
    assert np.isfinite(list(tested.values())).all()
    with pytest.raises(BrokenFileError, match=r"\.png'"):
        engine().test(sound, datamodule=folder(root=damaged))


def test_one_model_for_many_categories_leaves_broken_files_out(
    damaged: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine
) -> None:
    data = MultiCategory({"sound": folder(), "damaged": folder(root=damaged)})
    model, run = tiny(skip_broken_images=True), engine()
    metrics = run.train(model, datamodule=data)[0]
    assert model.model.scorer.num_images == 24
    assert np.isfinite(list(metrics.values())).all()
    assert _listed(run, "test").keys() <= {"broken.png", "03.png"}


def test_leaving_out_what_is_no_option(
    parts: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    write_files({"a.png": b"", "b.png": b""}, tmp_path / "all")
    with pytest.raises(ValueError, match=r"skip_broken_images=true.*a\.png'"):
        engine().fit(tiny(skip_broken_images=True), datamodule=folder(normal_dir=tmp_path / "all"))
    datamodule = folder()
    datamodule.setup()
    with pytest.raises(ValueError, match="skip_broken_images=true"):
        engine().fit(tiny(skip_broken_images=True), train_dataloaders=datamodule.train_dataloader())


def test_quantisation_leaves_broken_files_out_as_the_training_did(
    damaged: Path, folder: MakeFolder, tiny: MakeModel, tmp_path: Path
) -> None:
    data = folder(root=damaged)
    tiny(skip_broken_images=True)._prepare_images(data, tmp_path)
    assert (len(data.train_data), len(data.val_data)) == (12, 7)
    assert (tmp_path / "broken_images_export.csv").is_file()
    data = folder(root=damaged)
    data.setup()
    tiny()._prepare_images(data, tmp_path)
    with pytest.raises(BrokenFileError, match=r"train/good/broken\.png'"):
        [data.train_data[index] for index in range(len(data.train_data))]


def test_masks_of_any_size_and_range_measure_alike(
    trained: Any, parts: Path, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    mask = np.array(Image.open(parts / "masks/00.png"))
    kinds = {
        "00.png": Image.fromarray(mask // 255),
        "01.png": Image.fromarray(mask.astype(np.uint16) * 257),
        "02.png": Image.fromarray(np.dstack([mask, mask, mask, mask])),
        "03.png": Image.fromarray(mask.repeat(3, 0).repeat(3, 1)).convert("1"),
    }
    (tmp_path / "masks").mkdir()
    for name, image in kinds.items():
        image.save(tmp_path / "masks" / name)
    metrics = engine().test(OSDIRF(), datamodule=folder(mask_dir=tmp_path / "masks"), ckpt_path=trained.checkpoint)
    assert dict(metrics[0]) == pytest.approx(trained.metrics, abs=2e-3)


def test_scores_that_are_no_numbers_name_the_image(trained: Any, folder: MakeFolder, engine: MakeEngine) -> None:
    model = OSDIRF.load_from_checkpoint(trained.checkpoint)
    model.model.scorer.units.scale.fill_(float("nan"))
    for action in (engine().test, engine().predict):
        with pytest.raises(RuntimeError, match=r"test/dent/00\.png"):
            action(model, datamodule=folder())


# ---------------------------------------------------------------------- app


def test_app_gives_every_file_a_row(pixels: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from anomalib_osdirf.app.interface import App

    good, broken = good_files(pixels), broken_files(pixels)
    app = App(load_scorer(brightness_model(tmp_path / "model")), max_pixels=10**6)
    rows = {row.name: row for row in app.score([str(file) for file in write_files(good | broken, tmp_path / "images")])}
    app.close()
    assert rows.keys() == good.keys() | broken.keys()
    for name, row in rows.items():
        if name in broken:
            assert row.score is None
            assert row.note.startswith(name)
        else:
            assert row.note == ""
            assert row.score is not None
            assert math.isfinite(row.score)
