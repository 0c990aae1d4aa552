# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""The fixed filters: shapes, symmetries, and agreement with filters written out in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from anomalib_osdirf.features.filter_bank import IMAGENET_MEAN, IMAGENET_STD, FilterBank, gabor_kernels


def normalised(rgb: Tensor) -> Tensor:
    """Normalise images ``(B, 3, H, W)`` from 0 to 1 with ImageNet's mean and deviation."""
    return (rgb - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


@pytest.fixture
def images() -> Tensor:
    """Random textured images of shape ``(3, 3, 96, 128)``."""
    generator = torch.Generator().manual_seed(0)
    return normalised(torch.rand(3, 3, 96, 128, generator=generator))


def test_maps_have_the_promised_channels_and_strides(images: Tensor) -> None:
    bank = FilterBank()
    maps = bank(images)
    assert bank.layers == list(FilterBank.LAYERS)
    assert len(maps) == len(bank.layers) == len(bank.channels) == len(bank.strides)
    for features, channels, stride in zip(maps, bank.channels, bank.strides, strict=True):
        assert features.shape == (3, channels, 96 // stride, 128 // stride)
        assert features.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (70, 64)])
def test_every_size_of_at_least_32_pixels_gives_all_maps_one_size(size: tuple[int, int]) -> None:
    expected = (-(-size[0] // 8), -(-size[1] // 8))
    assert {tuple(features.shape[-2:]) for features in FilterBank()(torch.zeros(1, 3, *size))} == {expected}


def test_layers_come_in_the_order_asked_for_and_do_not_depend_on_each_other(images: Tensor) -> None:
    everything = dict(zip(FilterBank.LAYERS, FilterBank()(images), strict=True))
    some = FilterBank(["second", "colour"])
    assert some.channels == [12, 6]
    for name, features in zip(some.layers, some(images), strict=True):
        torch.testing.assert_close(features, everything[name])


@pytest.mark.parametrize("layers", [[], ["fine", "fine"], ["layer2"]])
def test_a_wrong_choice_of_layers_is_told_with_the_right_ones(layers: list[str]) -> None:
    with pytest.raises(ValueError, match=r"layers is .* one of colour, fine"):
        FilterBank(layers)


def test_nothing_is_learnt_random_or_stored(images: Tensor) -> None:
    bank = FilterBank()
    assert not list(bank.parameters())
    assert not bank.state_dict()
    for first, second in zip(bank(images), FilterBank()(images), strict=True):
        assert torch.equal(first, second)


def test_an_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    bank = FilterBank()
    for together, alone in zip(bank(images), bank(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [(8, 0), (0, 16)])
def test_moving_the_image_by_the_stride_moves_the_maps(shift: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    scene = normalised(torch.rand(1, 3, 176, 176, generator=generator))
    bank = FilterBank()
    margin = 6
    here = bank(scene[..., :160, :160])
    moved = bank(scene[..., shift[0] : shift[0] + 160, shift[1] : shift[1] + 160])
    for before, after in zip(here, moved, strict=True):
        rows, columns = shift[0] // 8, shift[1] // 8
        expected = before[..., margin + rows : 20 - margin + rows, margin + columns : 20 - margin + columns]
        torch.testing.assert_close(
            after[..., margin : 20 - margin, margin : 20 - margin], expected, rtol=1e-4, atol=1e-4
        )


def test_exposure_only_adds_a_constant_to_the_mean_and_nothing_to_the_texture() -> None:
    generator = torch.Generator().manual_seed(2)
    rgb = 0.3 + 0.4 * torch.rand(1, 3, 64, 64, generator=generator)
    bank = FilterBank()
    # The logarithm has an offset of 0.03, so this is exposure as it sees it.
    brighter = 1.25 * (rgb + 0.03) - 0.03
    for name, dark, bright in zip(bank.layers, bank(normalised(rgb)), bank(normalised(brighter)), strict=True):
        difference = bright - dark
        if name == "colour":
            torch.testing.assert_close(difference[:, 0], torch.full_like(difference[:, 0], float(np.log(1.25))))
            difference = difference[:, 1:]
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-3)


def test_a_wave_is_seen_by_the_layer_and_direction_it_belongs_to() -> None:
    x = torch.arange(128.0).expand(128, 128)
    for name, wavelength in (("fine", 4.0), ("medium", 8.0), ("coarse", 16.0)):
        wave = 0.5 + 0.2 * torch.sin(2 * torch.pi * x / wavelength)
        bank = FilterBank(["fine", "medium", "coarse"])
        strength = {
            layer: features[0, :, 8, 8]
            for layer, features in zip(bank.layers, bank(normalised(wave.expand(1, 3, 128, 128))), strict=True)
        }
        assert max(strength, key=lambda layer: float(strength[layer].max())) == name
        assert int(strength[name].argmax()) == 0


def test_wave_packets_ignore_a_constant_and_answer_their_own_wave_with_one() -> None:
    kernels = gabor_kernels(4.0, orientations=6, size=9).double().squeeze(1).numpy()
    assert np.abs(kernels.sum(axis=(1, 2))).max() < 1e-6
    y, x = np.mgrid[-4:5, -4:5]
    for index in range(6):
        angle = np.pi * index / 6
        wave = np.exp(2j * np.pi / 4.0 * (x * np.cos(angle) + y * np.sin(angle)))
        assert (kernels[index] * wave.real).sum() == pytest.approx(1.0, abs=1e-5)
        assert (kernels[6 + index] * wave.imag).sum() == pytest.approx(1.0, abs=1e-5)


def test_fine_and_colour_agree_with_numpy(images: Tensor) -> None:
    bank = FilterBank(["colour", "fine"])
    colour, fine = (features[0].double().numpy() for features in bank(images))
    rgb = images[0].double().numpy() * np.reshape(IMAGENET_STD, (3, 1, 1)) + np.reshape(IMAGENET_MEAN, (3, 1, 1))
    logarithm = np.log(rgb + 0.03)
    red, green, blue = logarithm
    planes = np.stack([logarithm.mean(0), (red - green) / np.sqrt(2), (red + green - 2 * blue) / np.sqrt(6)])
    cells = planes.reshape(3, 12, 8, 16, 8)
    expected = np.concatenate([cells.mean((2, 4)), np.log(cells.std((2, 4)) + 0.01)])
    np.testing.assert_allclose(colour, expected, atol=1e-3)

    kernels = gabor_kernels(4.0, orientations=6, size=9).double().squeeze(1).numpy()
    windows = sliding_window_view(np.pad(planes[0], 4, mode="reflect"), (9, 9))[::2, ::2]
    answers = np.einsum("ijkl,nkl->nij", windows, kernels)
    moduli = np.hypot(answers[:6], answers[6:]).reshape(6, 12, 4, 16, 4).mean((2, 4))
    np.testing.assert_allclose(fine, np.log(moduli + 0.01), atol=1e-3)


def test_onnx_runtime_gives_the_same_maps(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    bank = FilterBank().eval()
    path = str(tmp_path / "bank.onnx")
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        bank, (images[:2],), path, opset_version=18, dynamo=True, input_names=["images"], dynamic_shapes=({0: batch},)
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for exported, features in zip(session.run(None, {"images": images.numpy()}), bank(images), strict=True):
        np.testing.assert_allclose(exported, features.numpy(), atol=1e-4)
