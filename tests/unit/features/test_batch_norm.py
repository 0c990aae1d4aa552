# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from timm.models.densenet import DenseNet
from torch import nn

from anomalib_osdirf.features import build_backbone
from anomalib_osdirf.features.batch_norm import fold_batch_norms


def _norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


DENSENET = pytest.param(
    "densenet121",
    marks=pytest.mark.skipif(not hasattr(DenseNet, "forward_intermediates"), reason="this timm's has no feature maps"),
)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "test_efficientnet", "resnet10t", DENSENET])
def test_folding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, None, 4)
    for norm in _norms(backbone):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    images = torch.randn(2, 3, 96, 128)
    folded = backbone.folded()
    torch.testing.assert_close(folded(images), backbone(images), rtol=1e-4, atol=1e-4)
    assert len(_norms(folded)) <= len(_norms(backbone)) // 2 + 1
    if name != "densenet121":  # its batch norms come before its convolutions
        assert not _norms(folded)


def test_a_convolution_that_is_used_elsewhere_is_left_alone() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(2)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            features = self.convolution(images)
            return [features, self.norm(features)]

    network = Network().eval().requires_grad_(requires_grad=False)
    images = torch.rand(1, 3, 16, 16)
    for before, after in zip(network(images), fold_batch_norms(network)(images), strict=True):
        torch.testing.assert_close(after, before)
