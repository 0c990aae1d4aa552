# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Painted anomalies: where, how many, of what, and that they follow the seed."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_osdirf.data.reading import BrokenFileError
from anomalib_osdirf.data.synthetic_anomalies import SyntheticAnomalies, automatic_foreground, shuffle_patches


def _images(count: int = 6, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Plain white pictures in a subfolder."""
    folder = tmp_path / "textures" / "white"
    folder.mkdir(parents=True)
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((50, 70, 3), 255, np.uint8))
    return folder.parent


@pytest.mark.parametrize("count", [2, 6, 7])
def test_half_of_the_images_change_and_only_under_their_masks(count: int) -> None:
    images = _images(count)
    anomalies = SyntheticAnomalies()
    for seed in range(5):
        painted, masks = anomalies(images, None, seed)
        assert painted.shape == images.shape
        assert masks.shape == (count, 1, 64, 64)
        assert set(masks.unique().tolist()) == {0.0, 1.0}
        assert int(masks.flatten(1).any(dim=1).sum()) in {count // 2, (count + 1) // 2}
        outside = masks.expand_as(images) == 0
        assert torch.equal(painted[outside], images[outside])
        assert not torch.equal(painted, images)
        assert 0 <= painted.min()
        assert painted.max() <= 1


def test_single_images_are_painted_half_of_the_time() -> None:
    anomalies = SyntheticAnomalies()
    painted = sum(bool(anomalies(_images(1), None, seed)[1].any()) for seed in range(60))
    assert 15 <= painted <= 45


def test_anomalies_follow_the_seed_and_leave_torchs_random_numbers_alone() -> None:
    images = _images()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = SyntheticAnomalies()(images, None, 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    same, other = (SyntheticAnomalies()(images, None, seed) for seed in (5, 6))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one[0], other[0])


def test_textures_keep_a_share_of_the_image(textures: Path) -> None:
    """Colours are changed before blending, so only the share is certain: between 0.2 and 0.8 of the black image."""
    images = torch.full((8, 3, 64, 64), 0.5)
    painted, masks = SyntheticAnomalies(textures)(images, None, 0)
    changed = painted[masks.expand_as(images) > 0]
    assert changed.min() >= 0.5 * 0.2
    assert changed.max() <= 1 - 0.5 * 0.2
    assert not torch.allclose(changed, torch.tensor(0.5))


def test_drawn_textures_are_smooth_and_coloured() -> None:
    images = torch.full((8, 3, 64, 64), 0.5)
    painted, masks = SyntheticAnomalies(drawn_textures=True)(images, None, 0)
    inside = masks[:, :, :, 1:] * masks[:, :, :, :-1]
    steps = (painted.diff(dim=-1) * inside).abs()
    assert 0 < steps.max() < 0.3
    colours = painted.std(dim=1, keepdim=True)[masks > 0]
    assert colours.mean() > 0.05


def test_shuffled_patches_beside_textures(textures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(image: torch.Tensor, per_side: int) -> torch.Tensor:
        calls.append(per_side)
        return shuffle_patches(image, per_side)

    monkeypatch.setattr("anomalib_osdirf.data.synthetic_anomalies.shuffle_patches", count)
    images = _images(40)
    for arguments, least, most in (
        ({}, 20, 400),
        ({"anomaly_source_path": textures}, 0, 0),
        ({"anomaly_source_path": textures, "shuffled_patches": True}, 4, 36),
        ({"drawn_textures": True}, 0, 0),
        ({"drawn_textures": True, "shuffled_patches": True}, 4, 36),
    ):
        calls.clear()
        SyntheticAnomalies(**arguments)(images, None, 3)
        assert least <= len(calls) <= most


@settings(deadline=None)
@given(height=st.integers(8, 40), width=st.integers(8, 40), per_side=st.integers(1, 8), seed=st.integers(0, 99))
def test_shuffling_keeps_every_pixel_and_every_patch_whole(height: int, width: int, per_side: int, seed: int) -> None:
    image = torch.arange(float(3 * height * width)).view(3, height, width)
    torch.manual_seed(seed)
    shuffled = shuffle_patches(image, per_side)
    torch.testing.assert_close(shuffled.flatten(1).sort(dim=1).values, image.flatten(1))
    rows, columns = height // per_side, width // per_side
    first = image[:, :rows, :columns]
    places = [
        (row, column)
        for row in range(0, per_side * rows, rows)
        for column in range(0, per_side * columns, columns)
        if torch.equal(shuffled[:, row : row + rows, column : column + columns], first)
    ]
    assert len(places) == 1


def _disc(size: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 4) ** 2


def test_automatic_foreground_finds_the_object() -> None:
    disc = torch.from_numpy(_disc())
    noise = 0.02 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = (torch.where(disc, 0.7, 0.2) + noise).clamp(0, 1)
    foreground = automatic_foreground(image)[0].bool()
    assert (foreground & disc).sum() / (foreground | disc).sum() > 0.95


def test_automatic_foreground_of_a_plain_image_is_everything() -> None:
    assert automatic_foreground(torch.full((3, 32, 32), 0.4)).all()


def test_anomalies_stay_on_the_foreground(tmp_path: Path) -> None:
    disc = _disc()
    (tmp_path / "masks").mkdir()
    for index in range(8):
        cv2.imwrite(str(tmp_path / "masks" / f"{index:02d}.png"), np.kron(disc, np.ones((2, 2))).astype(np.uint8) * 255)
    inside = torch.from_numpy(disc)
    images = torch.where(inside, 0.7, 0.2).expand(8, 3, 64, 64).contiguous()
    paths = [f"somewhere/{index:02d}.jpg" for index in range(8)]
    for arguments in ({"foreground": "auto"}, {"foreground_masks": tmp_path / "masks"}):
        painted, masks = SyntheticAnomalies(**arguments)(images, paths, 0)
        assert int(masks.flatten(1).any(dim=1).sum()) >= 3
        assert not masks[..., ~inside].any()
        assert torch.equal(painted[..., ~inside], images[..., ~inside])


def test_foreground_that_is_empty_leaves_the_image_normal(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((64, 64), np.uint8))
    images = _images(2)
    painted, masks = SyntheticAnomalies(foreground_masks=tmp_path)(images, ["0.png", "0.png"], 0)
    assert torch.equal(painted, images)
    assert not masks.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"anomaly_source_path": "gone"},
            "anomaly_source_path='gone'",
        ),
        ({"foreground_masks": "gone"}, "foreground_masks='gone'"),
        ({"foreground": "object"}, "foreground='object'"),
        ({"foreground": "auto", "foreground_masks": "masks"}, "exclude each other; leave one out"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticAnomalies(**arguments)


@pytest.mark.parametrize("name", ["anomaly_source_path", "foreground_masks"])
def test_empty_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"{name}="):
        SyntheticAnomalies(**{name: tmp_path})


def test_missing_mask(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "00.png"), np.ones((4, 4), np.uint8))
    anomalies = SyntheticAnomalies(foreground_masks=tmp_path)
    anomalies.check_masks(["a/00.bmp"])
    with pytest.raises(ValueError, match=r"foreground_masks .*a/01.png"):
        anomalies.check_masks(["a/00.png", "a/01.png"])
    with pytest.raises(ValueError, match="needs the images' file names"):
        anomalies(_images(2), None, 0)


def test_broken_texture_is_named(textures: Path) -> None:
    (textures / "white" / "1.png").write_bytes(b"")
    anomalies = SyntheticAnomalies(textures)
    with pytest.raises(BrokenFileError, match=r"'\S+1\.png'"):
        anomalies(_images(24), None, 0)


@pytest.mark.parametrize(("content", "reason"), [(b"", "as it is empty"), (b"BM", "as it is of no image format")])
def test_broken_foreground_mask_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    anomalies = SyntheticAnomalies(foreground_masks=tmp_path)
    with pytest.raises(BrokenFileError, match=rf"'\S+a\.png' .*{reason}"):
        anomalies(_images(2), ["a.png", "a.png"], 1)
