# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for two kinds of image with a mixture as its density, from training to exported models."""

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

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.export.quantisation import replace_constants
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from conftest import TINY, pre_processor
from processor import has_bfloat16, precisions
from small_data import small_folder
from textures import textured_image

MIXTURE: dict[str, Any] = {**TINY, "seed": 0, "max_steps": 2, "density": "mixture_full", "num_clusters": 2}
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second kind of image, as many as of the first."""
    root = tmp_path_factory.mktemp("plates")
    rng = np.random.default_rng(1)
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/dent", 4)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image = textured_image(rng, 80, 72, defect=folder == "test/dent") // 2
            image[np.indices(image.shape[:2]).sum(axis=0) // 8 % 2 == 0] = 250
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), image)
    return root


@pytest.fixture(scope="module")
def both(parts: Path, plates: Path) -> Callable[[], MultiCategory]:
    """Return a maker of datamodules over both kinds."""
    return lambda: MultiCategory(
        {"parts": small_folder(parts), "plates": small_folder(plates, mask_dir=None)}, train_batch_size=5
    )


@pytest.fixture(scope="module")
def finished(both: Callable[[], MultiCategory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    engine.fit(OSDIRF(**MIXTURE, pre_processor=pre_processor()), datamodule=both())
    return Path(str(engine.best_model_path))


def _images(datamodule: MultiCategory, part: str = "train") -> dict[str, Tensor]:
    """Training or test images of each kind."""
    datamodule.setup()
    return {
        category: ImageBatch.collate([dataset[index] for index in range(len(dataset))]).image
        for category, dataset in getattr(datamodule, f"{part}_data").datasets.items()
    }


@torch.no_grad()
def test_kinds_are_the_categories_and_come_back_with_the_checkpoint(
    finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    loaded = OSDIRF.load_from_checkpoint(finished).eval()
    network = loaded.model.deployed()
    chosen = []
    for images in _images(both()).values():
        kinds = network.density.choose(network.field_of(loaded.model.extract_features(loaded.pre_processor(images))))
        assert len(kinds.unique()) == 1
        chosen.append(int(kinds[0]))
    assert sorted(chosen) == [0, 1]
    assert loaded.model.density.num_images == 24

    metrics = engine().test(OSDIRF(), datamodule=both(), ckpt_path=finished)[0]
    assert dict(metrics) == pytest.approx(engine().test(loaded, datamodule=both())[0], abs=1e-6)
    assert {"parts/image_AUROC", "plates/image_AUROC"} <= set(metrics)


def test_training_without_a_cache_finds_the_same_kinds(
    finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    run = engine()
    run.fit(OSDIRF(**MIXTURE, feature_cache=False, pre_processor=pre_processor()), datamodule=both())
    cached, uncached = (
        OSDIRF.load_from_checkpoint(str(file)).model.density for file in (finished, run.best_model_path)
    )
    order = [density.mean.flatten(1).mean(dim=1).argsort() for density in (cached, uncached)]  # k-means has none
    torch.testing.assert_close(cached.mean[order[0]], uncached.mean[order[1]], rtol=1e-3, atol=1e-4)


def test_thresholds_are_of_images_left_out_of_their_kinds(
    both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    """The threshold is the sixth largest of 24 left-out scores; the finished model's sixth largest is far below."""
    rate = FalseAlarmPostProcessor(0.25, images="training")
    model = OSDIRF(**MIXTURE, post_processor=rate, pre_processor=pre_processor())
    engine().fit(model, datamodule=both())
    assert model.post_processor.calibration["images"] == 24
    with torch.no_grad():
        scores = [model.eval()(images).pred_score for images in _images(both()).values()]
    assert torch.cat(scores).topk(6).values[5] < 0.4  # where nothing is left out it is the threshold, 0.5


def test_exported_scores_are_the_models_also_when_the_density_is_fitted_anew(
    finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine, tmp_path: Path
) -> None:
    import onnxruntime
    import openvino

    loaded = OSDIRF.load_from_checkpoint(finished).eval()
    raw = {"post_processor": False}
    onnx = engine().export(loaded, "onnx", export_root=tmp_path, onnx_kwargs=raw)
    file = engine().export(loaded, "openvino", export_root=tmp_path, onnx_kwargs=raw)
    assert not has_bfloat16() or "bf16" not in precisions(Path(str(file)))
    kinds = list(_images(both()).values())
    images = torch.cat([kinds[0][:2], kinds[1][:3]])
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    network = openvino.Core().read_model(str(file))

    def compare(results: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
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
    # As a quantised network gets its own density.
    deployed = loaded.model.deployed()
    before = {name: value.clone() for name, value in deployed.fitted_buffers().items()}
    with torch.no_grad():
        fields = [deployed.field_of(loaded.model.extract_features(loaded.pre_processor(kind))) for kind in kinds]
    deployed.fit(lambda: [1.1 * field + 0.1 for field in fields])
    replace_constants(network, before, deployed.fitted_buffers())
    compare(from_openvino())


def test_osdirfs_checkpoint_becomes_a_mixture_of_invads(
    finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine
) -> None:
    model = InvAD.load_from_checkpoint(finished, density="mixture_full", num_clusters=2)
    metrics = engine().test(model, datamodule=both())[0]
    assert {"parts/image_AUROC", "plates/image_AUROC"} <= set(metrics)
    assert model.model.score.scale.shape == (2, 2)  # kinds, terms
    assert model.model.density.num_images == 24


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OSDIRF, InvAD])
def test_quantised_network_has_its_own_mixture(
    kind: Any, finished: Path, both: Callable[[], MultiCategory], engine: MakeEngine, tmp_path: Path
) -> None:
    """It has the kinds of the network in floating point, and ranks each kind's images much as that does."""
    import openvino

    model = kind(**{**MIXTURE, "max_steps": 20}, pre_processor=pre_processor())
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
