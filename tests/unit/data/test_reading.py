# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Reading any file: an image that is what Pillow says, or one sentence that names the file."""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import utils
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_osdirf.data.reading import BrokenFileError, read_carefully, trouble_with
from anomalib_osdirf.inference.reading import ImageError
from anomalib_osdirf.inference.reading import read_image as read_upload
from image_files import broken_files, encode, good_files, make_pipe, write_files

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
# What JPEG does to noise, and CMYK to colours.
LOSSY = {"jpeg named.png": 0.05, "rotated.jpg": 0.05, "cmyk.jpg": 0.05}
GREY = ("grey.png", "palette.png", "sixteen bits.png")


@pytest.fixture(autouse=True)
def careful() -> None:
    read_carefully()


@pytest.mark.parametrize("name", good_files(PIXELS))
def test_good_files_are_read_alike_by_models_and_app(name: str, tmp_path: Path) -> None:
    (file,) = write_files({name: good_files(PIXELS)[name]}, tmp_path)
    expected = (PIXELS[..., :1].repeat(3, 2) if name in GREY else PIXELS) / 255
    image = utils.read_image(file, as_tensor=True)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=LOSSY.get(name, 1e-4))
    np.testing.assert_allclose(read_upload(file, 10**6), image.permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(utils.read_image(file), image.permute(1, 2, 0), atol=1e-6)
    assert trouble_with(file) is None


@pytest.mark.parametrize("name", broken_files(PIXELS))
def test_broken_files_are_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    (file,) = write_files({name: broken_files(PIXELS)[name]}, tmp_path)
    for read in (utils.read_image, utils.read_mask):
        with pytest.raises(BrokenFileError, match=re.escape(f"'{file}' can't be read as an image, as it is")) as caught:
            read(file, as_tensor=True)
        assert "skip_broken_images=true" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=re.escape(name)):
        read_upload(file, 10**6)
    assert str(trouble_with(file)).startswith(f"'{file}' can't be read as an image, as it is")


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (20_000, 20)])
def test_extreme_shapes(size: tuple[int, int], tmp_path: Path) -> None:
    height, width = size
    file = tmp_path / "extreme.png"
    Image.new("L", (width, height), 255).save(file)
    assert utils.read_image(file, as_tensor=True).shape == (3, height, width)
    mask = utils.read_mask(file, as_tensor=True)
    assert mask.shape == (height, width)
    assert type(mask).__name__ == "Mask"
    assert mask.all()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other pipes")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    make_pipe(tmp_path / "pipe.png")
    with pytest.raises(BrokenFileError, match="as it is not a regular file"):
        utils.read_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_upload(tmp_path / "pipe.png", 10**6)
    assert "as it does not exist" in str(trouble_with(tmp_path / "gone.png"))


def test_images_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    bomb = bytearray(encode(Image.new("1", (8, 8)), "png"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert trouble_with(tmp_path / "bomb.png") is not None


def test_worker_processes_hand_on_the_sentence_alone(tmp_path: Path) -> None:
    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> torch.Tensor:
            return utils.read_image(tmp_path / "gone.png", as_tensor=True)

    with pytest.raises(BrokenFileError) as caught:
        list(DataLoader(Files(), num_workers=1))
    assert str(caught.value).startswith(f"'{tmp_path / 'gone.png'}' can't be read")
    assert "\n" not in str(caught.value)


KINDS = [encode(Image.fromarray(PIXELS), kind) for kind in ("png", "jpeg", "webp", "tiff", "bmp", "ppm", "gif")]
KINDS.append(encode(Image.fromarray(PIXELS[..., 0]).convert("P"), "png"))
KINDS.append(encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "png"))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Change bytes of an image file, cut it, put something in, or make something up."""
    content = bytearray(draw(st.one_of(st.sampled_from(KINDS), st.binary(max_size=200))))
    for _ in range(draw(st.integers(0, 5))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(content)))
    return bytes(content[:start] + draw(st.binary(max_size=8)) + content[draw(st.integers(start, len(content))) :])


@settings(max_examples=150, deadline=None)
@given(content=damaged_files())
def test_any_file_is_an_image_or_named(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.png"
        file.write_bytes(content)
        try:
            image = utils.read_image(file, as_tensor=True)
        except BrokenFileError as error:
            assert str(file) in str(error)  # noqa: PT017 - either outcome is right
            assert trouble_with(file) is not None
            with pytest.raises(ImageError, match=r"any\.png"):
                read_upload(file, 10**9)
        else:
            assert image.shape[0] == 3
            assert bool(((image >= 0) & (image <= 1)).all())
            assert trouble_with(file) is None
            np.testing.assert_allclose(read_upload(file, 10**9), image.permute(1, 2, 0), atol=1e-6)
