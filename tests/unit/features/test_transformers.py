# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Transformers as backbones: which blocks, which tokens, on which grid, and what OpenVINO makes of them."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_osdirf.export.openvino_precision import keep_float32, through_file
from anomalib_osdirf.features import Backbone, build_backbone

# Image size by name: the smallest of each family, on few patches.
FAMILIES = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "vit_base_patch32_clip_224": 128,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "convnext_atto": 64,
}
# Of another one's code.
ALIKE = {"vit_small_patch14_dinov2", "vit_base_patch32_clip_224", "swin_tiny_patch4_window7_224"}
LARGE = {"vit_small_patch14_reg4_dinov2": 252, "vit_small_patch16_dinov3": 256}


def _backbone(name: str, grid_size: int = 4) -> Backbone:
    """Build a backbone whose biases, scales and positions are no zeros and ones, as in a trained one."""
    torch.manual_seed(0)
    backbone = build_backbone(name, None, grid_size)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if parameter.ndim < 2 or key.endswith("pos_embed"):
                parameter.add_(0.2 * torch.randn_like(parameter) + (0.5 if "gamma" in key else 0))
    return backbone


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("vit")])
def test_maps_are_timms_normalised_patch_tokens(name: str) -> None:
    size = FAMILIES[name]
    backbone, images = _backbone(name, 2), torch.randn(2, 3, size, size)
    maps = backbone.maps(images)
    reference = timm.create_model(name, img_size=size).eval()
    state = {key: value for key, value in backbone.network.model.state_dict().items() if not key.startswith("head")}
    reference.load_state_dict(state, strict=False)
    seen: list[torch.Tensor] = []
    for index in (3, 6, 9, 11):
        reference.blocks[index].register_forward_hook(lambda _, __, output: seen.append(output))
    reference.forward_features(images)
    side = size // backbone.patch[0]
    for ours, output in zip(maps, seen, strict=True):
        tokens = reference.norm(output)[:, reference.num_prefix_tokens :]
        torch.testing.assert_close(ours, tokens.transpose(1, 2).unflatten(2, (side, side)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks"), [("vit_tiny_patch16_224", [3, 6, 9, 11]), ("vit_small_patch16_36x1_224", [9, 18, 27, 33])]
)
def test_default_blocks_spread_over_the_depth(name: str, blocks: list[int]) -> None:
    backbone = build_backbone(name, None, 2)
    assert list(backbone.network.out_indices) == blocks
    assert len(backbone.network.model.blocks) == blocks[-1] + 1


def test_layers_name_blocks() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", ["blocks.7", "blocks.2"], 2)
    assert list(backbone.network.out_indices) == [2, 7]
    assert backbone.out_channels == 2 * 192


def test_a_block_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers=.*blocks\.0 to blocks\.11"):
        build_backbone("vit_tiny_patch16_224", ["blocks.12"], 2)


def _exact(name: str, size: int, file: Path) -> None:
    """Hold OpenVINO at default settings, in two batch sizes, to torch in float64."""
    backbone, images = _backbone(name), torch.rand(3, 3, size, size)
    with torch.no_grad():
        backbone(images)  # fixes the size
        frozen = backbone.folded()
        torch.onnx.export(
            frozen,
            (images[:2],),
            file,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        expected = frozen.double()(images.double()).numpy()
    model = openvino.convert_model(file)
    # Positions are constants of the grid. What is interpolated is maps.
    assert sum(node.get_type_name() == "Interpolate" for node in model.get_ops()) <= len(backbone.network.out_indices)
    keep_float32(model)
    compiled = openvino.Core().compile_model(through_file(model), "CPU")
    for batch in (1, 3):
        result = compiled([images[:batch].numpy()])[0]
        assert np.abs(result - expected[:batch]).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in FAMILIES]
)
def test_openvino_is_exact(name: str, tmp_path: Path) -> None:
    _exact(name, FAMILIES[name], tmp_path / "backbone.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_openvino_is_exact_at_real_size(name: str, tmp_path: Path) -> None:
    _exact(name, LARGE[name], tmp_path / "backbone.onnx")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"])
def test_a_state_brings_its_image_size(name: str) -> None:
    backbone, images = _backbone(name), torch.rand(1, 3, 64, 64)
    expected = backbone(images)
    other = build_backbone(name, None, 4)
    other.load_state_dict(backbone.state_dict())
    assert other.image_size == (64, 64)
    torch.testing.assert_close(other(images), expected)


def test_weights_can_be_loaded_again_when_the_size_is_fixed(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name).state_dict(), tmp_path / "weights.safetensors")
    backbone, images = build_backbone(name, None, 4), torch.rand(1, 3, 64, 64)
    backbone.load_pretrained(tmp_path / "weights.safetensors")
    expected = backbone(images)
    backbone.load_pretrained(tmp_path / "weights.safetensors")
    torch.testing.assert_close(backbone(images), expected)


def test_images_of_another_size_than_the_first_are_refused() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", None, 2)
    backbone(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="64 x 64"):
        backbone(torch.rand(1, 3, 96, 96))


def test_images_that_patches_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 16 x 16"):
        build_backbone("vit_tiny_patch16_224", None, 2)(torch.rand(1, 3, 70, 70))


def test_a_size_that_the_network_can_not_take_is_refused_with_its_own() -> None:
    backbone = build_backbone("cait_xxs24_224", ["blocks.0"], 2)
    with pytest.raises(ValueError, match=r"backbone='cait_xxs24_224' .* Resize to 224 x 224"):
        backbone(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(("name", "patch"), [("xcit_nano_12_p16_224", (16, 16)), ("pvt_v2_b0", (1, 1))])
def test_only_patches_that_do_not_overlap_bind_the_image_size(name: str, patch: tuple[int, int]) -> None:
    assert build_backbone(name, None, 2).patch == patch


def test_weights_without_registers_are_refused_by_a_network_with_them(tmp_path: Path) -> None:
    save_file(timm.create_model("vit_small_patch14_dinov2").state_dict(), tmp_path / "dinov2.safetensors")
    with pytest.raises(ValueError, match=r"backbone_weights=.*reg_token"):
        build_backbone("vit_small_patch14_reg4_dinov2", None, 4).load_pretrained(tmp_path / "dinov2.safetensors")


def test_a_network_without_intermediate_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Identity())
    with pytest.raises(ValueError, match="backbone='resnet18'"):
        build_backbone("resnet18", None, 4)


# 3 x 3 patches, interpolated to 4 x 4, and layers of several strides.
@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 48), ("convnext_atto", 64)])
def test_projection_at_the_resolution_of_the_layers_is_exact(name: str, size: int) -> None:
    backbone, images = _backbone(name, grid_size=2).double(), torch.rand(2, 3, size, size, dtype=torch.float64)
    projection = torch.nn.Conv2d(backbone.out_channels, 5, 1, dtype=torch.float64)
    with torch.no_grad():
        expected = projection(backbone(images))
        torch.testing.assert_close(backbone(images, projection), expected, rtol=1e-9, atol=1e-9)
