# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""No image's score depends on other images, and no checkpoint on anything but normal training images."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from torch import Tensor, nn

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.models.diffusionad import DiffusionADModel
from conftest import TINY, any_denoiser_is_kept, pre_processor
from small_data import small_folder
from textures import textured_image

MODELS = (OSDIRF, InvAD)


def _train(model_class: Any, parts: Path, root: Path, **arguments: Any) -> Path:
    engine = Engine(
        default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False, logger=False, **arguments
    )
    model = model_class(**{**TINY, "max_steps": 2, "seed": 0, "pre_processor": pre_processor()})
    with any_denoiser_is_kept():
        engine.fit(model, datamodule=small_folder(parts))
    return Path(str(engine.best_model_path))


def _scoring(name: str, trained: Any, parts: Path, root: Path) -> nn.Module:
    if name == "OSDIRF":
        return OSDIRF.load_from_checkpoint(trained.checkpoint).model.eval()
    if name == "InvAD":
        return InvAD.load_from_checkpoint(_train(InvAD, parts, root)).model.eval()
    torch.manual_seed(0)
    diffusion = DiffusionADModel(
        base_channels=8, channel_multipliers=(1, 2), residual_blocks=2, attention_levels=1, segmentation_channels=8
    )
    diffusion.num_steps += 1
    return diffusion.eval()


@pytest.mark.parametrize("name", ["OSDIRF", "InvAD", "DiffusionAD"])
def test_an_image_scores_alike_alone_in_a_batch_in_any_order_and_beside_any_others(
    name: str, trained: Any, parts: Path, tmp_path: Path
) -> None:
    score = _scoring(name, trained, parts, tmp_path)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _compare(score, images)


def _compare(score: nn.Module, images: Tensor) -> None:
    together = score(images)
    order = torch.tensor([2, 0, 3, 1])
    others = torch.cat((images[:1], 100 * torch.randn(3, 3, 64, 64), torch.zeros(2, 3, 64, 64), images[1:]))
    alone = [score(image[None]) for image in images]
    for same in (
        tuple(torch.cat([getattr(one, part) for one in alone]) for part in ("pred_score", "anomaly_map")),
        tuple(part[order.argsort()] for part in _parts(score(images[order]))),
        tuple(part[[0, 6, 7, 8]] for part in _parts(score(others))),
    ):
        for value, expected in zip(same, _parts(together), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert together.pred_score.unique().numel() == 4


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.pred_score, batch.anomaly_map


@pytest.fixture(scope="module")
def changed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data set with other test images and masks."""
    root = tmp_path_factory.mktemp("changed") / "parts"
    shutil.copytree(parts, root)
    rng = np.random.default_rng(7)
    for file in (root / "test").rglob("*.png"):
        cv2.imwrite(str(file), 255 - textured_image(rng, 80, 72, defect=True))
    for file in (root / "masks").rglob("*.png"):
        cv2.imwrite(str(file), np.full((80, 72), 255, np.uint8))
    return root


@pytest.mark.parametrize("model_class", MODELS)
def test_test_images_do_not_touch_the_checkpoint(model_class: Any, parts: Path, changed: Path, tmp_path: Path) -> None:
    files = [
        _train(model_class, data, tmp_path / name, limit_val_batches=0)
        for name, data in (("original", parts), ("changed", changed))
    ]
    assert len(_differences(*files)) == 0


def test_validation_images_touch_nothing_but_the_post_processor(parts: Path, changed: Path, tmp_path: Path) -> None:
    files = [_train(OSDIRF, data, tmp_path / name) for name, data in (("original", parts), ("changed", changed))]
    differences = _differences(*files)
    assert "state_dict.post_processor._image_threshold" in differences
    allowed = ("state_dict.post_processor.", "callbacks.FalseAlarmPostProcessor.")
    assert not [name for name in differences if not name.startswith(allowed)]


def test_training_images_do_touch_the_checkpoint(parts: Path, changed: Path, tmp_path: Path) -> None:
    """Or the comparison could not fail."""
    image = changed / "train" / "good" / "00.png"
    before = image.read_bytes()
    original = _train(OSDIRF, parts, tmp_path / "original", limit_val_batches=0)
    try:
        cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
        differences = _differences(original, _train(OSDIRF, changed, tmp_path / "changed", limit_val_batches=0))
    finally:
        image.write_bytes(before)
    for part in (
        "network.projection.weight",
        "network.kept.",
        "scorer.density.",
        "scorer.units.",
        "scorer.image_score.",
    ):
        assert [name for name in differences if name.startswith(f"state_dict.model.{part}")], part


def _differences(first: Path, second: Path) -> set[str]:
    """Names of the tensors that are not equal bit for bit in two checkpoints."""
    contents = [_tensors("", torch.load(file, weights_only=False)) for file in (first, second)]
    assert len(contents[0]) > 50
    both = contents[0].keys() & contents[1].keys()
    only_one = contents[0].keys() ^ contents[1].keys()
    return only_one | {name for name in both if not _same_bits(contents[0][name], contents[1][name])}


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes()


def _tensors(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value.detach().contiguous()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, Tensor] = {}
    for key, entry in items:
        found.update(_tensors(f"{name}.{key}".lstrip("."), entry))
    return found
