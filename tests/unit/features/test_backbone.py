# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Backbones: cutting, pooling, and the loading of weights from local files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_osdirf.features import build_backbone
from anomalib_osdirf.features.backbone import averaged

NAME = "test_efficientnet"


def test_default_layers_are_those_of_stride_2_to_16() -> None:
    backbone = build_backbone(NAME, None, 4)
    info = timm.create_model(NAME, features_only=True).feature_info
    used = [index for index, stride in enumerate(info.reduction()) if 2 <= stride <= 16]
    assert backbone.out_channels == sum(info.channels()[index] for index in used)
    assert backbone.max_stride == 16


def test_features_match_timm_and_average_pooling() -> None:
    backbone = build_backbone(NAME, ["blocks.1", "blocks.0"], 4)
    full = timm.create_model(NAME, features_only=True).eval()
    full.load_state_dict(backbone.network.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    maps = full(images)[:2]
    expected = torch.cat([torch.nn.functional.avg_pool2d(part, part.shape[-1] // 4) for part in maps], dim=1)
    torch.testing.assert_close(backbone.pool(backbone(images)), expected, rtol=1e-4, atol=1e-5)


def test_blocks_behind_the_last_layer_are_cut() -> None:
    def size(layers: list[str]) -> int:
        return sum(parameter.numel() for parameter in build_backbone(NAME, layers, 4).parameters())

    assert size(["blocks.0"]) < size(["blocks.0", "blocks.1"]) < size(["blocks.2"])


def test_backbone_stays_frozen_and_in_evaluation_mode() -> None:
    backbone = build_backbone(NAME, None, 4).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model(NAME)
    file = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    backbone = build_backbone(NAME, None, 4)
    backbone.load_pretrained(file)
    for key, value in backbone.network.model.state_dict().items():
        torch.testing.assert_close(value, state[key])


def test_missing_file() -> None:
    with pytest.raises(ValueError, match=r"backbone_weights='nowhere.pth' does not exist; give the path of"):
        build_backbone(NAME, None, 4).load_pretrained("nowhere.pth")


def test_file_of_another_network(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other.safetensors' is not a weights file of {NAME}: of its \d+ tensors"):
        build_backbone(NAME, None, 4).load_pretrained(tmp_path / "other.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    state = timm.create_model(NAME).state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"can't be read as a \.safetensors or \.pth weights file"):
        build_backbone(NAME, None, 4).load_pretrained(file)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="can't be read"):
        build_backbone(NAME, None, 4).load_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_failing_download_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    backbone = build_backbone(NAME, None, 4)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        RuntimeError, match=r"pre_trained=true .*no route to host.*backbone_weights=.*pre_trained=false"
    ):
        backbone.load_pretrained(None)


def test_image_smaller_than_the_grid_needs() -> None:
    with pytest.raises(ValueError, match="grid_size=8 with a layer of stride 16 needs images of at least 128 x 128"):
        build_backbone(NAME, None, 8)(torch.zeros(1, 3, 64, 200))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("efficentnet_b4", None, 4), "backbone='efficentnet_b4' is not a timm model; did you mean efficientnet_b4"),
        ((NAME, ["blocks.9"], 4), r"layers=\['blocks.9'\] must be distinct layers of test_efficientnet; choose among"),
        ((NAME, ["blocks.1", "blocks.1"], 4), "must be distinct layers"),
        ((NAME, [], 4), "must be distinct layers"),
        ((NAME, None, 0), "grid_size=0 is not a positive number"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(*arguments)


def test_few_images_at_a_time_are_as_all_at_once() -> None:
    backbone, images = build_backbone(NAME, None, 2), torch.rand(9, 3, 64, 64)
    for few, all_at_once in zip(backbone.maps(images), backbone.network(images), strict=True):
        torch.testing.assert_close(few, all_at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [12, 6, 5])
def test_maps_are_averaged_as_by_torchs_adaptive_pooling(size: int) -> None:
    map_ = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(averaged(map_, (size, size)), torch.nn.functional.adaptive_avg_pool2d(map_, size))


def test_finer_grid_averages_large_maps_and_interpolates_small_ones() -> None:
    backbone = build_backbone("test_efficientnet", None, 2)
    maps = backbone.maps(torch.rand(1, 3, 64, 64))
    sizes = [map_.shape[-1] for map_ in maps]
    fine = backbone.fine(maps, 8).split([map_.shape[1] for map_ in maps], dim=1)
    assert max(sizes) > 8 > min(sizes)
    for map_, part in zip(maps, fine, strict=True):
        assert part.shape[-2:] == (8, 8)
        if map_.shape[-1] >= 8:
            block = map_.shape[-1] // 8
            torch.testing.assert_close(
                part[..., 1, 2], map_[..., block : 2 * block, 2 * block : 3 * block].mean((-2, -1))
            )
        else:
            torch.testing.assert_close(part[..., 0, 0], map_[..., 0, 0])  # a corner is no mixture
