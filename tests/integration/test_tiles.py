# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles, by anomalib's own callback: training, prediction, export, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils.tiler import Tiler
from anomalib.deploy import CompressionType, TorchInferencer

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.inference.reading import read_image
from small_data import small_folder
from static_graphs import check_static, outputs_of

CONFIG = Path(__file__).parents[2] / "configs" / "tiles.yaml"
GOOD, DEFECTIVE = 12, 2
TILES = 6
TRAINED_ON = 10  # good images; anomalib's Folder sets the others aside for the test
PLACE = (slice(70, 86), slice(140, 158))  # of the defect
SMALL = {"backbone": "filter_bank", "feature_dim": 8, "grid_size": 4, "max_steps": 10}


@pytest.fixture(scope="module")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two by three tiles, 128 x 192 pixels, some with a defect that is a small part of one."""
    root = tmp_path_factory.mktemp("sheets")
    rng = np.random.default_rng(0)
    for kind, count in (("good", GOOD), ("defect", DEFECTIVE)):
        (root / kind).mkdir()
        for index in range(count):
            image = cv2.GaussianBlur(rng.normal(120, 30, (128, 192, 3)), (5, 5), 0)
            if kind == "defect":
                image[PLACE] += 90
            cv2.imwrite(str(root / kind / f"{index}.png"), image)
    return root


@pytest.fixture(scope="module")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration, with smaller numbers in the places of its own."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"]["init_args"] |= SMALL
    resize = config["model"]["init_args"]["pre_processor"]["init_args"]["transform"]["init_args"]["transforms"][0]
    resize["init_args"]["size"] = [128, 192]
    config["data"]["init_args"]["num_workers"] = 0
    config["trainer"]["callbacks"][0]["init_args"] |= {"tile_size": 64, "stride": 64}
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    file = tmp_path_factory.mktemp("config") / "tiles.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained_on_tiles(small_config: Path, sheets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training by the command in the documentation."""
    results = tmp_path_factory.mktemp("results")
    command = ["train", "--config", str(small_config), "--data.init_args.root", str(sheets)]
    assert main([*command, "--default_root_dir", str(results)]) == 0
    (checkpoint,) = results.rglob("model.ckpt")
    return checkpoint


@pytest.fixture
def on_sheets(sheets: Path) -> Callable[..., Folder]:
    """Return a maker of datamodules."""
    arguments = {"normal_dir": "good", "abnormal_dir": "defect", "normal_test_dir": None, "mask_dir": None}
    return lambda **more: small_folder(sheets, **{**arguments, **more})


def _model(**arguments: Any) -> OSDIRF:
    size = OSDIRF.configure_pre_processor((128, 192))
    return OSDIRF(**{**SMALL, "pre_trained": False, "pre_processor": size, **arguments})


def test_a_small_defect_is_found_in_its_place(trained_on_tiles: Path, sheets: Path, engine: Any) -> None:
    """A prediction needs the checkpoint alone."""
    model = OSDIRF()
    defective, good = (
        engine().predict(model, dataset=PredictDataset(sheets / kind), ckpt_path=trained_on_tiles)
        for kind in ("defect", "good")
    )
    assert min(float(batch.pred_score) for batch in defective) > max(float(batch.pred_score) for batch in good)
    for file in (sheets / "defect").iterdir():
        with torch.no_grad():
            raw_map = model.model(model.pre_processor(_read(file))).anomaly_map
        assert raw_map.shape == (1, 1, 128, 192)
        row, column = np.unravel_index(int(raw_map.argmax()), (128, 192))
        assert PLACE[0].start - 8 <= row < PLACE[0].stop + 8
        assert PLACE[1].start - 8 <= column < PLACE[1].stop + 8


def _read(file: Path) -> torch.Tensor:
    return torch.from_numpy(read_image(file, 10**6)).permute(2, 0, 1)[None]


def test_density_and_features_are_those_of_all_tiles(trained_on_tiles: Path) -> None:
    model = OSDIRF.load_from_checkpoint(trained_on_tiles)
    assert model.model.scorer.num_images == TRAINED_ON * TILES
    assert model.model.tiler.tile_size_h == model.model.tiler.stride_w == 64


def test_torch_exports_score_as_the_checkpoint(
    trained_on_tiles: Path, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = OSDIRF.load_from_checkpoint(trained_on_tiles)
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    for file in (sheets / "defect" / "0.png", sheets / "good" / "0.png"):
        with torch.no_grad():
            expected, found = model(_read(file)), inferencer.predict(file)
        torch.testing.assert_close(found.pred_score, expected.pred_score, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map.squeeze(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("export", ["to_onnx", "to_openvino"])
def test_a_graph_for_one_image_size_scores_as_the_checkpoint(
    export: str, trained_on_tiles: Path, sheets: Path, tmp_path: Path
) -> None:
    """Of overlapping tiles, whose maps are averaged."""
    model = OSDIRF.load_from_checkpoint(trained_on_tiles).eval()
    model.model.tiler = Tiler(tile_size=64, stride=32)
    image = _read(sheets / "defect" / "0.png")
    file = getattr(model, export)(tmp_path, input_size=tuple(image.shape[-2:]))
    check_static(file)
    # The plugin takes some of the filter bank's operations to bfloat16, whatever their marks.
    outputs = outputs_of(file, image.numpy(), {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model(image)
    np.testing.assert_allclose(outputs["pred_score"], expected.pred_score.numpy(), atol=1e-4)
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-4)


def test_a_graph_for_any_image_size_is_refused(trained_on_tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_size is missing; give --input_size"):
        OSDIRF.load_from_checkpoint(trained_on_tiles).to_onnx(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tiles_are_not_calibrated_on(trained_on_tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compression_type=INT8_PTQ .* tiles"):
        OSDIRF.load_from_checkpoint(trained_on_tiles).to_openvino(
            tmp_path, input_size=(128, 192), compression_type=CompressionType.INT8_PTQ
        )


def test_other_tiles_than_the_checkpoints_are_refused(
    trained_on_tiles: Path, on_sheets: Callable[..., Folder], engine: Any
) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path .*64 x 64.*TilerConfigurationCallback"):
        engine().train(OSDIRF(), datamodule=on_sheets(), ckpt_path=trained_on_tiles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_cache": False}, r"can't train on tiles without the feature cache \(feature_cache=false\)"),
        ({"pre_processor": False}, "can't train on tiles of images of unknown size; give the pre-processor a Resize"),
        (
            {"pre_processor": OSDIRF.configure_pre_processor((128, 160))},
            "Images of 128 x 160 pixels can't be cut into tiles of 64 x 64 .* a Resize to 128 x 192",
        ),
    ],
)
def test_what_tiles_can_not_be_trained_on_is_refused(
    arguments: dict[str, Any], message: str, on_sheets: Callable[..., Folder], engine: Any
) -> None:
    callback = TilerConfigurationCallback(enable=True, tile_size=64, stride=64)
    with pytest.raises(ValueError, match=message):
        engine(callbacks=[callback]).train(_model(**arguments), datamodule=on_sheets())


def _transformer() -> OSDIRF:
    return _model(backbone="vit_tiny_patch16_224", max_steps=2, density="mixture")


def test_a_transformer_scores_tiles(on_sheets: Callable[..., Folder], sheets: Path, engine: Any) -> None:
    """Its positions are for a tile; the map is of the whole image, and its score that of the worst tile."""
    callback = TilerConfigurationCallback(enable=True, tile_size=64, stride=64)
    run = engine(callbacks=[callback])
    run.fit(_transformer(), datamodule=on_sheets())
    model = OSDIRF.load_from_checkpoint(run.best_model_path)
    assert model.model.network.backbone.image_size == (64, 64)
    images = model.pre_processor(_read(sheets / "defect" / "0.png"))
    with torch.no_grad():
        whole = model.model(images)
        tiles = torch.cat([part for row in images.split(64, 2) for part in row.split(64, 3)])
        model.model.tiler = None
        alone = model.model(tiles)
    torch.testing.assert_close(whole.pred_score, alone.pred_score.amax()[None])
    torch.testing.assert_close(whole.anomaly_map[..., 64:, 64:128], alone.anomaly_map[4:5])


@pytest.mark.parametrize(("tile_size", "stride"), [(60, 60), (64, 40)])
def test_tiles_that_patches_do_not_fill_are_refused(
    tile_size: int, stride: int, on_sheets: Callable[..., Folder], engine: Any
) -> None:
    callback = TilerConfigurationCallback(enable=True, tile_size=tile_size, stride=stride)
    with pytest.raises(ValueError, match=f"{'stride' if stride == 40 else 'tile_size'}=.*patch of 16 x 16"):
        engine(callbacks=[callback]).train(_transformer(), datamodule=on_sheets())
