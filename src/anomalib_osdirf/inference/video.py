# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Frames of video files and cameras."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from anomalib_osdirf.inference.reading import ImageError, check_size, regular
from anomalib_osdirf.inference.scoring import Array

_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv", ".y4m")
_TRUNCATED = 0.9  # of the frames that the header promises, which some formats only estimate


def is_video(source: Path) -> bool:
    """Return whether this names a video file or is the number of a camera."""
    return source.suffix.lower() in _SUFFIXES or (str(source).isdecimal() and not source.exists())


class Video:
    """Frames of a video file or a camera, by OpenCV.

    Attributes:
        name: Path of the file, or ``camera 0``.
        count: Number of frames, ``None`` if it is not known.

    Args:
        source: Path of a file, or number of a camera.
        max_pixels: Largest number of pixels of a frame.

    Raises:
        ImageError: If it can't be opened, or its frames are too large.
    """

    def __init__(self, source: Path, max_pixels: int) -> None:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the errors below say what is wrong
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self._is_camera = str(source).isdecimal()
        self.name = f"camera {source}" if self._is_camera else str(source)
        try:
            self._capture = cv2.VideoCapture(int(str(source)) if self._is_camera else str(regular(source)))
        except FileNotFoundError as error:
            raise ImageError(f"{self.name} can't be read as a video, as {error}.") from error
        if not self._capture.isOpened():
            reason = "check its number and cable, and that no other program uses it"
            if not self._is_camera:
                reason = "it is broken, or of a format that OpenCV does not know"
            raise ImageError(f"{self.name} can't be opened; {reason}.")
        width, height = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT
        check_size(self.name, int(self._capture.get(width)), int(self._capture.get(height)), max_pixels)
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 else None

    def frames(self) -> Iterator[tuple[float, Array]]:
        """Yield time, in seconds from the first one, and pixels ``(H, W, 3)``, in 0 to 1, of each frame.

        Raises:
            ImageError: If a file ends early, or a camera gives no more frames.
        """
        start, done = time.monotonic(), 0
        while True:
            found, pixels = self._capture.read()
            if not found:
                break
            live = time.monotonic() - start
            seconds = live if self._is_camera else self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield seconds, np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.float32) / np.float32(255)
            done += 1
        self._capture.release()
        if self._is_camera:
            raise ImageError(f"{self.name} gives no more frames after {done}; check its cable.")
        if done < _TRUNCATED * (self.count or 1):
            raise ImageError(f"{self.name} ends after {done} of {self.count or 1} frames; it is broken or cut off.")
