# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a prediction says of an image that has no score."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anomalib_osdirf.inference import scoring
from anomalib_osdirf.predict import main


class _Overflowing:
    pixel_threshold = 0.5

    def score(self, image: Any) -> Any:
        if image.max() > 0.5:
            raise scoring.ModelError("its score is not a number")
        return scoring.Score(0.2, False, None, None, None, 1.0)


def test_an_image_without_a_score_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "load_scorer", lambda *_: _Overflowing())
    for name, grey in (("dark", 20), ("bright", 200)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{name}.png")
    assert main(["model.ckpt", str(tmp_path)], "predict") == 0
    printed = capsys.readouterr().out
    assert "Not scored: bright.png has no score: its score is not a number" in printed
