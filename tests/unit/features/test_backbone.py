# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Backbones: cutting, bringing to one grid, averaging, and the loading of weights from local files."""

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from anomalib_osdirf.features import build_backbone, coarse
from anomalib_osdirf.features.backbone import resized

NAME = "test_efficientnet"


def test_default_layers_are_those_of_stride_4_to_16() -> None:
    backbone = build_backbone(NAME, None, 4)
    info = timm.create_model(NAME, features_only=True).feature_info
    used = [index for index, stride in enumerate(info.reduction()) if stride in {4, 8, 16}]
    assert backbone.out_channels == sum(info.channels()[index] for index in used)
    assert backbone.max_stride == 16


def _local_average(map_: torch.Tensor) -> torch.Tensor:
    """Average each position of a map with its neighbours, of which there are fewer at the border."""
    height, width = map_.shape[-2:]
    result = torch.empty_like(map_)
    for row in range(height):
        for column in range(width):
            part = map_[..., max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            result[..., row, column] = part.mean(dim=(-2, -1))
    return result


def test_features_are_timms_on_one_grid_averaged_with_their_neighbours() -> None:
    """The grid has twice the field's positions a side; one layer is larger than it, one as large."""
    backbone = build_backbone(NAME, ["blocks.1", "blocks.0"], 4)
    full = timm.create_model(NAME, features_only=True).eval()
    full.load_state_dict(backbone.network.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    large, small = full(images)[:2]
    block = large.shape[-1] // 8
    pooled = [torch.nn.functional.avg_pool2d(part, part.shape[-1] // 8) for part in (large, small)]
    assert block > 1
    expected = _local_average(torch.cat(pooled, dim=1))
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


def test_coarse_features_are_means_of_two_by_two_fine_ones() -> None:
    fine = torch.rand(2, 3, 8, 8)
    expected = (fine[..., ::2, ::2] + fine[..., 1::2, ::2] + fine[..., ::2, 1::2] + fine[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(coarse(fine), expected)


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
    with pytest.raises(ValueError, match=r"backbone_weights='nowhere\.pth'"):
        build_backbone(NAME, None, 4).load_pretrained("nowhere.pth")


def test_file_of_another_network(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"backbone_weights=.*other\.safetensors"):
        build_backbone(NAME, None, 4).load_pretrained(tmp_path / "other.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    state = timm.create_model(NAME).state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="backbone_weights="):
        build_backbone(NAME, None, 4).load_pretrained(file)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="backbone_weights="):
        build_backbone(NAME, None, 4).load_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_failing_download_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    backbone = build_backbone(NAME, None, 4)
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"pre_trained=true .*backbone_weights=.*filter_bank"):
        backbone.load_pretrained(None)


def test_image_smaller_than_the_grid_needs() -> None:
    with pytest.raises(ValueError, match="grid_size=8"):
        build_backbone(NAME, None, 8)(torch.zeros(1, 3, 64, 200))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("efficentnet_b4", None, 4), "backbone='efficentnet_b4'"),
        ((NAME, ["blocks.9"], 4), r"layers=\['blocks\.9'\]"),
        ((NAME, ["blocks.1", "blocks.1"], 4), "layers="),
        ((NAME, [], 4), r"layers=\[\]"),
        ((NAME, None, 0), "grid_size=0"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(*arguments)


def test_few_images_at_a_time_are_as_all_at_once() -> None:
    backbone, images = build_backbone(NAME, None, 2), torch.rand(9, 3, 64, 64)
    for few, all_at_once in zip(backbone.maps(images), backbone.network(images), strict=True):
        torch.testing.assert_close(few, all_at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [12, 6, 5])
def test_larger_maps_are_averaged_as_by_torchs_adaptive_pooling(side: int) -> None:
    map_ = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(resized(map_, side), torch.nn.functional.adaptive_avg_pool2d(map_, side))


def test_smaller_maps_are_interpolated() -> None:
    """A plane stays one, and a corner is no mixture."""
    map_ = torch.arange(4.0).view(1, 1, 4, 1) + 10 * torch.arange(4.0)
    result = resized(map_, 8)
    assert result.shape == (1, 1, 8, 8)
    assert result[0, 0, 0, 0] == map_[0, 0, 0, 0]
    inner = result[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inner.diff(dim=0), torch.full((5, 6), 0.5))
    torch.testing.assert_close(inner.diff(dim=1), torch.full((6, 5), 5.0))
