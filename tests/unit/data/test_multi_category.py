# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for many categories: data, metrics per category, configs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from anomalib.data import MPDD, Folder, ImageBatch
from anomalib.data.datasets.image import mpdd, mvtecad, visa
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.data.category_evaluator import CategoryEvaluator
from anomalib_osdirf.training.feature_cache import reason_not_to_cache
from conftest import pre_processor
from small_data import small_folder
from textures import textured_image

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second category: larger images, no masks, and defects that are mostly not to be seen."""
    root = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(1)
    for folder, count in (("train/good", 7), ("test/good", 5), ("test/dent", 5)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image = textured_image(rng, 100, 96, defect=folder == "test/dent" and index == 0)
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), image)
    return root


@pytest.fixture
def both(parts: Path, cells: Path) -> Callable[..., MultiCategory]:
    """Return a maker of datamodules over both categories."""

    def make(**arguments: Any) -> MultiCategory:
        categories = [
            small_folder(parts, name="parts"),
            small_folder(cells, name="cells", mask_dir=None),
        ]
        return MultiCategory(categories, **{"name": "two", "train_batch_size": 5, "eval_batch_size": 3, **arguments})

    return make


@pytest.fixture(scope="module")
def unified(
    parts: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float], list[str]]:
    """Train one tiny model on both: its checkpoint, its metrics, its pictures."""
    from anomalib_osdirf import OSDIRF
    from conftest import TINY

    root = tmp_path_factory.mktemp("unified")
    data = MultiCategory(
        {"parts": small_folder(parts), "cells": small_folder(cells, mask_dir=None)},
        name="two",
        eval_batch_size=3,
    )
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    metrics = engine.train(OSDIRF(**TINY, seed=0, pre_processor=pre_processor()), datamodule=data)[0]
    checkpoint = Path(str(engine.best_model_path))
    pictures = [
        str(path.relative_to(checkpoint.parents[2] / "images")) for path in checkpoint.parents[2].rglob("*.png")
    ]
    return checkpoint, dict(metrics), pictures


def test_training_data_are_those_of_all_categories_and_can_be_cached(both: Callable[..., MultiCategory]) -> None:
    data = both()
    data.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=pre_processor()))
    data.setup("fit")
    loader = data.train_dataloader()
    paths = [path for batch in loader for path in batch.image_path]
    assert len(paths) == len(set(paths)) == 12 + 7
    assert reason_not_to_cache(loader) is None
    assert next(iter(loader)).image.shape == (5, 3, 64, 64)


def test_images_with_and_without_masks_collate_at_their_native_sizes(both: Callable[..., MultiCategory]) -> None:
    data = both()
    data.setup()
    dataset = data.train_data
    mixed = dataset.collate_fn([dataset[0], dataset[len(dataset) - 1]])
    assert mixed.image.shape == (2, 3, 100, 96)
    assert mixed.gt_mask is None
    assert dataset.collate_fn([dataset[0], dataset[1]]).gt_mask is not None


def test_evaluation_batches_are_of_one_category_and_complete(both: Callable[..., MultiCategory]) -> None:
    data = both()
    data.setup()
    batches = list(data.test_dataloader())
    assert [len(batch) for batch in batches] == [3, 3, 2, 3, 3, 3, 1]
    assert len(data.test_dataloader()) == len(batches)
    categories = [{data.category_of(path) for path in batch.image_path} for batch in batches]
    assert categories == [{"parts"}] * 3 + [{"cells"}] * 4
    assert [batch.gt_mask is not None for batch in batches] == [True] * 3 + [False] * 4


def test_one_training_gives_metrics_and_pictures_per_category(
    unified: tuple[Path, dict[str, float], list[str]],
) -> None:
    checkpoint, metrics, pictures = unified
    assert checkpoint.parts[-5:-3] == ("two", "v0")
    image = {"image_AUROC", "image_AP", "image_F1Max"}
    pixel = {"pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO"}
    expected = {f"{name}/{metric}" for name in ("parts", "mean") for metric in image | pixel}
    assert set(metrics) == expected | {f"cells/{metric}" for metric in image}
    for name in image:
        assert metrics[f"mean/{name}"] == pytest.approx((metrics[f"parts/{name}"] + metrics[f"cells/{name}"]) / 2)
    assert metrics["mean/pixel_AUROC"] == metrics["parts/pixel_AUROC"]
    assert len(pictures) == 8 + 10
    assert {Path(picture).parts[0] for picture in pictures} == {"parts", "cells"}


def test_a_category_alone_is_measured_alike(
    unified: tuple[Path, dict[str, float], list[str]],
    parts: Path,
    cells: Path,
    tiny: Callable[..., Any],
    engine: Callable[..., Engine],
) -> None:
    checkpoint, metrics, _ = unified
    for name, data in (("parts", small_folder(parts)), ("cells", small_folder(cells, mask_dir=None))):
        alone = engine().test(tiny(visualizer=False), datamodule=data, ckpt_path=checkpoint, verbose=False)[0]
        assert set(alone) == {key.split("/")[1] for key in metrics if key.startswith(f"{name}/")}
        for metric, value in alone.items():
            assert metrics[f"{name}/{metric}"] == pytest.approx(value, abs=1e-5), metric


def test_anomalib_models_are_measured_per_category_too_and_keep_their_evaluator(
    both: Callable[..., MultiCategory], engine: Callable[..., Engine]
) -> None:
    model = Padim(
        backbone="test_efficientnet",
        layers=["blocks.1"],
        n_features=8,
        pre_trained=False,
        pre_processor=pre_processor(),
        visualizer=False,
    )
    runner, data = engine(), both()
    runner.fit(model, datamodule=data)
    first = runner.test(model, datamodule=data, verbose=False)[0]
    assert model.evaluator in runner.trainer.callbacks
    assert not any(isinstance(callback, CategoryEvaluator) for callback in runner.trainer.callbacks)
    assert runner.test(model, datamodule=data, verbose=False)[0] == first
    assert {key.split("/")[0] for key in first} == {"parts", "cells", "mean"}
    batches = runner.predict(model, datamodule=data, return_predictions=True)
    assert sum(len(batch) for batch in batches) == 18


def _evaluate(scores: dict[str, np.ndarray], labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Run the evaluator, as a test of two batches would, under anomalib's post-processor."""
    everything = np.concatenate(list(scores.values()))
    post_processor = PostProcessor()
    post_processor.image_min.fill_(everything.min())
    post_processor.image_max.fill_(everything.max())
    post_processor._image_threshold.fill_(threshold)
    logged: dict[str, float] = {}
    model = SimpleNamespace(
        post_processor=post_processor, visualizer=None, log_dict=lambda metrics, **_: logged.update(metrics)
    )
    evaluator = CategoryEvaluator([AUROC(fields=["pred_score", "gt_label"], prefix="image_")], lambda path: path[0])
    trainer = SimpleNamespace(world_size=1)
    for category, values in scores.items():
        batch = ImageBatch(
            image=torch.zeros(len(values), 3, 2, 2),
            image_path=[category] * len(values),
            pred_score=torch.tensor(values, dtype=torch.float32),
            gt_label=torch.tensor(labels),
        )
        before = batch.pred_score.clone()
        evaluator.on_test_batch_end(trainer, model, None, batch, 0)  # type: ignore[arg-type]
        assert torch.equal(batch.pred_score, before), "the batch is the post-processor's and others' to use"
    evaluator.on_test_epoch_end(trainer, model)  # type: ignore[arg-type]
    return logged


def test_scales_of_categories_neither_mix_nor_are_cut_off() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    scores = {"a": rng.normal(labels, 1.0), "b": 500 + rng.normal(labels, 1.0), "c": 1000 + rng.normal(labels, 1.0)}
    measured = _evaluate(scores, labels, threshold=1.0)
    singles = {name: roc_auc_score(labels, values) for name, values in scores.items()}
    for name, expected in singles.items():
        assert measured[f"{name}/image_AUROC"] == pytest.approx(expected, abs=3e-3)  # float32 at 1000
    assert measured["mean/image_AUROC"] == pytest.approx(np.mean(list(singles.values())), abs=3e-3)
    assert set(measured) == {f"{name}/image_AUROC" for name in ("a", "b", "c", "mean")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: [], "categories is empty"),
        (lambda root: [small_folder(root), small_folder(root)], "'parts' twice"),
        (lambda root: {"mean": small_folder(root)}, "'mean'"),
        (lambda root: {"a/b": small_folder(root)}, "'a/b'"),
        (lambda _: {"a": {"class_path": "Folder"}}, "'a', which is a dict and no datamodule"),
    ],
)
def test_bad_categories_are_refused(make: Callable[[Path], Any], words: str, parts: Path) -> None:
    with pytest.raises(ValueError, match=words):
        MultiCategory(make(parts))


def test_an_image_in_two_categories_is_refused(parts: Path) -> None:
    data = MultiCategory({"one": small_folder(parts), "two": small_folder(parts)})
    with pytest.raises(ValueError, match="'one' and 'two' share the image"):
        data.setup()


CATEGORIES = {"mvtec": mvtecad.CATEGORIES, "visa": visa.CATEGORIES, "mpdd": mpdd.CATEGORIES}


def test_config_of_the_papers_setting_builds_without_the_data() -> None:
    """The smallest; the others differ from it in their categories only, see below."""
    overrides = {"model.init_args.backbone": "test_efficientnet", "model.init_args.pre_trained": False}
    _, model, data = Engine.from_config(CONFIGS / "mpdd.yaml", **overrides)
    assert type(model).__name__ == "OSDIRF"
    assert isinstance(data, MultiCategory)
    assert data.category_names == mpdd.CATEGORIES
    assert {type(datamodule) for datamodule in data.categories.values()} == {MPDD}


@pytest.mark.parametrize(("config", "class_name"), [("mvtec", "MVTecAD"), ("visa", "Visa"), ("mpdd", "MPDD")])
def test_configs_have_all_categories(config: str, class_name: str) -> None:
    read = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) for name in (config, "mpdd")}
    categories = read[config]["data"]["init_args"].pop("categories")
    assert categories == [
        {"class_path": f"anomalib.data.{class_name}", "init_args": {"category": name}} for name in CATEGORIES[config]
    ]
    assert read[config]["data"]["init_args"].pop("name") == class_name
    for part in ("categories", "name"):
        read["mpdd"]["data"]["init_args"].pop(part, None)
    assert read[config] == read["mpdd"]


def test_folder_stays_itself(parts: Path) -> None:
    """A category's datamodule can still be used alone."""
    alone = small_folder(parts)
    MultiCategory([alone]).setup()
    assert isinstance(alone, Folder)
    assert len(next(iter(alone.test_dataloader()))) == 4
