# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Videos and cameras: each frame is scored, and one sentence says why there are no more."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from anomalib_osdirf.__main__ import main
from anomalib_osdirf.inference.reading import ImageError
from anomalib_osdirf.inference.video import Video
from brightness import brightness_model
from image_files import write_video


class _Camera:
    """A camera that shows four frames, blue first, and then nothing more, or has the user interrupt it."""

    def __init__(self, number: int) -> None:
        self.left = 4
        self.number = number

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self.number < 2

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        self.left -= 1
        if self.left < 0 and self.number == 1:
            raise KeyboardInterrupt
        return (True, np.full((8, 8, 3), (255, 0, 0), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        """Do nothing."""


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have OpenCV find cameras 0 and 1."""
    monkeypatch.setattr(cv2, "VideoCapture", _Camera)


def test_predict_scores_each_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, film = brightness_model(tmp_path), write_video(tmp_path / "film.y4m", [80, 200, 90])
    output, overlays = tmp_path / "scores.csv", tmp_path / "overlays"
    arguments = ["predict", str(model), str(film), "--output", str(output), "--overlays", str(overlays)]
    assert main(arguments) == 0
    rows = pd.read_csv(output)
    assert rows.frame.tolist() == [0, 1, 2]
    np.testing.assert_allclose(rows.seconds, [0, 0.1, 0.2], atol=1e-3)
    np.testing.assert_allclose(rows.score, (np.array([80, 200, 90]) - 16) / 219, atol=0.02)  # black is 16, white 235
    assert rows.label.tolist() == [False, True, False]
    assert rows.box.tolist()[1] == "0 0 40 30"
    assert sorted(path.name for path in (overlays / "film.y4m").iterdir()) == [f"00000{n}.png" for n in range(3)]
    assert "1 of 3" in capsys.readouterr().out


def test_label_is_drawn(tmp_path: Path) -> None:
    model, film = brightness_model(tmp_path), write_video(tmp_path / "film.y4m", [61])
    main(["predict", str(model), str(film), "--overlays", str(tmp_path / "overlays")])
    picture = cv2.imread(str(tmp_path / "overlays/film.y4m/000000.png"))
    assert picture is not None
    assert picture[:20].max() > 200
    assert picture[40:].max() < 80


def test_video_that_is_cut_off_is_scored_up_to_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    rng = np.random.default_rng(0)
    for _ in range(20):
        writer.write(rng.integers(0, 255, (120, 160, 3), np.uint8))
    writer.release()
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    assert main(["predict", str(brightness_model(tmp_path)), str(film), "--output", str(tmp_path / "scores.csv")]) == 0
    rows = pd.read_csv(tmp_path / "scores.csv")
    assert 5 < rows.score.notna().sum() < 15
    assert "of 20 frames" in rows.error.iloc[-1]
    assert "film.avi" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"no film"])
def test_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(ImageError, match=r"film\.mp4"):
        Video(tmp_path / "film.mp4", 10**6)


def test_frames_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"film\.y4m .*--max-pixels"):
        Video(write_video(tmp_path / "film.y4m"), 1000)


@pytest.mark.usefixtures("camera")
def test_camera_gives_frames_in_rgb_until_it_stalls() -> None:
    frames = Video(Path("0"), 100).frames()
    for _ in range(4):
        np.testing.assert_array_equal(next(frames)[1][0, 0], [0, 0, 1])
    with pytest.raises(ImageError, match="camera 0"):
        next(frames)


@pytest.mark.usefixtures("camera")
def test_what_was_scored_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    assert main(["predict", str(brightness_model(tmp_path)), "1", "--output", str(output)]) == 0
    assert pd.read_csv(output).error.isna().tolist() == [True] * 4


@pytest.mark.usefixtures("camera")
def test_camera_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(brightness_model(tmp_path)), "2"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "camera 2" in sentence
