# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-processing that suits a backbone."""

import logging

import pytest
import timm
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from torchvision.transforms import v2

from anomalib_osdirf import OSDIRF, InvAD
from anomalib_osdirf.features.pre_processing import disagreement, normalised_for, rounded_to

VIT = {"backbone": "vit_tiny_patch16_224", "pre_trained": False, "grid_size": 2, "feature_dim": 8}


@pytest.mark.parametrize("model", [OSDIRF, InvAD])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv2_100"])
def test_images_are_normalised_as_by_timms_own_transform(model: type, name: str) -> None:
    config = timm.data.resolve_data_config({}, model=timm.create_model(name))
    theirs = timm.data.create_transform(**config).transforms[-1]
    image = torch.rand(1, 3, 64, 64)
    default = model(backbone=name, pre_trained=False, grid_size=4).pre_processor
    (ours,) = extract_transforms_by_type(default.transform, v2.Normalize)
    torch.testing.assert_close(ours(image), theirs(image))
    image = torch.rand(1, 3, 256, 256)
    torch.testing.assert_close(default.export_transform(image), theirs(image), rtol=1e-5, atol=1e-5)


def test_the_size_is_rounded_to_the_patch_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "anomalib_osdirf"):
        model = OSDIRF(**VIT, pre_processor=OSDIRF.configure_pre_processor((70, 60)))
    assert model.pre_processor.transform(torch.rand(1, 3, 90, 90)).shape[-2:] == (64, 64)
    assert [record.message for record in caplog.records if "64 x 64" in record.message and "70 x 60" in record.message]


def test_a_size_that_fits_is_left() -> None:
    transform = v2.Compose([v2.Resize((80, 80)), v2.CenterCrop((64, 64))])
    assert rounded_to((16, 16), transform) == (transform, None)


def test_a_crop_is_rounded_behind_a_resize() -> None:
    transform, _ = rounded_to((14, 14), v2.Compose([v2.Resize((80, 80)), v2.CenterCrop((64, 64))]))
    assert transform(torch.rand(1, 3, 90, 90)).shape[-2:] == (70, 70)


def test_a_size_below_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="12 x 12"):
        OSDIRF(**VIT, pre_processor=OSDIRF.configure_pre_processor((12, 12)))


def test_the_users_normalisation_is_kept() -> None:
    given = OSDIRF.configure_pre_processor((64, 64))
    model = OSDIRF(backbone="tf_efficientnet_lite0", pre_trained=False, grid_size=4, pre_processor=given)
    assert list(extract_transforms_by_type(model.pre_processor.transform, v2.Normalize)[0].mean) == [
        0.485,
        0.456,
        0.406,
    ]


@pytest.mark.parametrize(
    ("transform", "agrees"),
    [
        (v2.Normalize([0.5] * 3, [0.5] * 3), True),
        (normalised_for("tf_efficientnet_lite0", OSDIRF.configure_pre_processor().transform), True),
        (OSDIRF.configure_pre_processor().transform, False),
        (v2.Resize((64, 64)), False),
        (None, False),
    ],
)
def test_a_disagreement_is_noticed(transform: torch.nn.Module | None, agrees: bool) -> None:
    assert (disagreement("tf_efficientnet_lite0", transform) is None) == agrees
