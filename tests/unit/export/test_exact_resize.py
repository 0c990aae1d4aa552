# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The exact resize against torchvision's antialiased one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from anomalib_osdirf.export.exact_resize import ExactResize, exact_export_transform

# For results one pixel wide, torch itself skips the resize of the rows.
sizes = st.integers(2, 150)
out_sizes = st.integers(2, 90)


@settings(deadline=None, max_examples=40)
@given(height=sizes, width=sizes, out=st.tuples(out_sizes, out_sizes), cubic=st.booleans())
def test_matches_torchvision(height: int, width: int, out: tuple[int, int], cubic: bool) -> None:
    interpolation = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    expected = v2.Resize(out, interpolation=interpolation, antialias=True)(images)
    torch.testing.assert_close(ExactResize(out, interpolation)(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(900, 700), (300, 1200), (64, 64), (256, 256), (3000, 40)])
def test_matches_torchvision_at_real_sizes(shape: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *shape)
    torch.testing.assert_close(
        ExactResize((256, 256))(images), v2.Resize((256, 256), antialias=True)(images), rtol=0, atol=5e-6
    )


def test_whole_transforms() -> None:
    images = torch.rand(1, 3, 90, 130)
    normalise = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    for transform in (
        v2.Compose([v2.Resize((48, 64), antialias=True), normalise]),
        v2.Compose([v2.Compose([v2.Resize((80, 80), antialias=True)]), v2.CenterCrop(64), normalise]),
        v2.Resize((40, 40), antialias=True),
    ):
        exact = exact_export_transform(transform)
        assert exact is not None
        torch.testing.assert_close(exact(images), transform(images), rtol=0, atol=1e-5)
    assert exact_export_transform(None) is None


def test_resize_without_antialias_stays_as_it_is() -> None:
    images = torch.rand(1, 3, 90, 130)
    transform = v2.Resize((40, 40), antialias=False)
    exact = exact_export_transform(transform)
    assert exact is not None
    torch.testing.assert_close(exact(images), transform(images))
