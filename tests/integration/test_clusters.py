# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for a product in two versions: a Gaussian per position and cluster, from training to exported models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from torch import Tensor

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.export.quantisation import replace_constants
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from conftest import TINY, any_denoiser_is_kept, pre_processor
from processor import has_bfloat16, precisions
from small_data import small_folder
from textures import textured_image

CLUSTERED: dict[str, Any] = {**TINY, "seed": 0, "max_steps": 2, "learning_rate": 1e-2, "density": "position"}
MakeEngine = Callable[..., Engine]


TRAINED_ON = 24  # images of each version: of fewer, one Gaussian is likelier


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], MultiCategory]:
    """Return a maker of datamodules over both versions, the second darker and with a chequered pattern."""
    root = tmp_path_factory.mktemp("versions")
    rng = np.random.default_rng(1)
    for version in ("plain", "chequered"):
        for folder, count in (("train/good", TRAINED_ON), ("test/good", 4), ("test/dent", 4)):
            (root / version / folder).mkdir(parents=True)
            for index in range(count):
                image = textured_image(np.random.default_rng(0), 80, 72, defect=folder == "test/dent")
                if version == "chequered":
                    image //= 2
                    image[np.indices(image.shape[:2]).sum(axis=0) // 8 % 2 == 0] = 200
                noisy = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / version / folder / f"{index:02d}.png"), noisy)
    return lambda: MultiCategory(
        {version: small_folder(root / version, mask_dir=None) for version in ("plain", "chequered")},
        train_batch_size=10,
    )


@pytest.fixture(scope="module")
def finished(both: Callable[[], MultiCategory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clusters")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    with any_denoiser_is_kept():
        engine.fit(OSDIRF(**CLUSTERED, pre_processor=pre_processor()), datamodule=both())
    return Path(str(engine.best_model_path))


def _images(datamodule: MultiCategory, part: str = "train") -> dict[str, Tensor]:
    """Training or test images of each version."""
    datamodule.setup()
    return {
        category: ImageBatch.collate([dataset[index] for index in range(len(dataset))]).image
        for category, dataset in getattr(datamodule, f"{part}_data").datasets.items()
    }


@torch.no_grad()
def test_clusters_are_the_categories_and_come_back_with_the_checkpoint(
    finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    loaded = OSDIRF.load_from_checkpoint(finished).eval()
    chosen = []
    for images in _images(both()).values():
        _, fine = loaded.model.network(loaded.pre_processor(images))
        clusters = loaded.model.scorer.clusters(fine)
        assert len(clusters.unique()) == 1
        chosen.append(int(clusters[0]))
    assert sorted(chosen) == [0, 1]
    assert loaded.model.scorer.clusters.count == 2
    assert loaded.model.scorer.num_images == 2 * TRAINED_ON

    metrics = engine().test(OSDIRF(), datamodule=both(), ckpt_path=finished)[0]
    assert dict(metrics) == pytest.approx(engine().test(loaded, datamodule=both())[0], abs=1e-6)
    assert metrics["plain/image_AUROC"] > 0.9
    assert metrics["chequered/image_AUROC"] > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("keep_denoiser", "float32_training")
def test_training_without_a_cache_finds_the_same_clusters(
    both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    means = []
    for cached in (True, False):
        model = OSDIRF(**CLUSTERED, feature_cache=cached, pre_processor=pre_processor())
        engine(limit_val_batches=0).fit(model, datamodule=both())
        means.append(model.model.scorer.density.mean)
    order = [mean.flatten(1).mean(dim=1).argsort() for mean in means]  # k-means has none
    torch.testing.assert_close(means[0][order[0]], means[1][order[1]], rtol=1e-3, atol=1e-4)


def test_thresholds_are_of_held_out_images(both: Callable[[], MultiCategory], engine: MakeEngine) -> None:
    """The threshold is the twelfth largest of 48 held-out scores; the finished model's twelfth largest is far below."""
    rate = FalseAlarmPostProcessor(0.25, images="training")
    model = OSDIRF(**CLUSTERED, post_processor=rate, pre_processor=pre_processor())
    engine().fit(model, datamodule=both())
    assert model.post_processor.calibration["image"]["images"] == 2 * TRAINED_ON
    with torch.no_grad():
        scores = [model.eval()(images).pred_score for images in _images(both()).values()]
    assert torch.cat(scores).topk(12).values[11] < 0.4  # where nothing is held out it is the threshold, 0.5


@pytest.mark.parametrize("density", ["position", pytest.param("mixture", marks=pytest.mark.slow)])
@torch.no_grad()
def test_exported_scores_are_the_models_also_when_the_scorer_is_fitted_anew(
    density: str, finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine, tmp_path: Path
) -> None:
    import onnxruntime
    import openvino

    loaded = OSDIRF.load_from_checkpoint(finished).eval()
    versions = list(_images(both()).values())
    fields = [loaded.model.network(loaded.pre_processor(images)) for images in versions]
    numbers = torch.arange(2 * TRAINED_ON).split(TRAINED_ON)
    if density == "mixture":
        loaded.model.scorer.wanted = "mixture"
        loaded.model.scorer.fit(lambda: [(*one, own) for one, own in zip(fields, numbers, strict=True)])
    raw = {"post_processor": False}
    onnx = engine().export(loaded, "onnx", export_root=tmp_path, onnx_kwargs=raw)
    file = engine().export(loaded, "openvino", export_root=tmp_path, onnx_kwargs=raw)
    assert not has_bfloat16() or "bf16" not in precisions(Path(str(file)))
    images = torch.cat([versions[0][:2], versions[1][:3]])
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    network = openvino.Core().read_model(str(file))

    def compare(results: dict[str, np.ndarray]) -> None:
        expected = loaded.model(loaded.pre_processor(images))
        for name in ("pred_score", "anomaly_map"):
            value = torch.from_numpy(results[name]).reshape(getattr(expected, name).shape)
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-3)

    names = ["pred_score", "anomaly_map"]
    compare(dict(zip(names, session.run(names, {"input": images.numpy()}), strict=True)))

    def from_openvino() -> dict[str, np.ndarray]:
        compiled = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled(images.numpy())
        return {name: result[name].copy() for name in names}

    compare(from_openvino())
    # As a quantised network gets a scorer of its own.
    scorer = loaded.model.scorer
    before = {name: value.clone() for name, value in scorer.buffers_in_use()}
    changed = [(1.1 * field + 0.1, fine, own) for (field, fine), own in zip(fields, numbers, strict=True)]
    scorer.refit(lambda: changed)
    replace_constants(network, before, dict(scorer.buffers_in_use()))
    assert not torch.equal(before["density.mean" if density == "position" else "density.weight"], _first(scorer))
    compare(from_openvino())


def _first(scorer: Any) -> Tensor:
    """Return the first buffer of a scorer's density."""
    return next(iter(scorer.density.buffers()))


@pytest.mark.slow
def test_quantised_network_has_its_own_clusters(
    both: Callable[[], MultiCategory], engine: MakeEngine, tmp_path: Path
) -> None:
    """It has the clusters of the network in floating point, and ranks each version's images much as that does."""
    import openvino

    model = OSDIRF(**{**CLUSTERED, "max_steps": 20}, pre_processor=pre_processor())
    with any_denoiser_is_kept():
        engine().fit(model, datamodule=both())
    raw = {"post_processor": False}
    file = engine().export(
        model, "openvino", export_root=tmp_path, compression_type="INT8_PTQ", datamodule=both(), onnx_kwargs=raw
    )
    compiled = openvino.compile_model(str(file), "CPU")
    for images in _images(both(), "test").values():
        with torch.no_grad():
            expected = model.eval().model(model.pre_processor(images))
        scores = np.array([compiled(image[None].numpy())["pred_score"].item() for image in images])
        assert np.corrcoef(scores, expected.pred_score.numpy())[0, 1] > 0.8
