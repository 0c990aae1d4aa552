# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The command that compares exports with their checkpoint."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from torchvision.transforms import v2

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.threshold import set_threshold
from anomalib_osdirf.verify import compare, drawn

MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def exported(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verified")
    return Path(OSDIRF.load_from_checkpoint(unclipped).to_openvino(root))


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, without the table's lines."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


def test_an_export_of_ours_is_exact(unclipped: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(unclipped), str(exported)]) == 0
    assert "Every export is within 0.0001" in printed(capsys)


def test_an_export_of_fixed_size_is_compared_on_images_of_that_size(
    unclipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = OSDIRF.load_from_checkpoint(unclipped).to_onnx(tmp_path, input_size=(90, 70))
    assert main(["verify", str(unclipped), str(export)]) == 0
    assert "90 x 70" in printed(capsys)


def test_a_changed_threshold_is_found(unclipped: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = exported.with_name("other.xml")
    for suffix in (".xml", ".bin", ".json"):
        other.with_suffix(suffix).write_bytes(exported.with_suffix(suffix).read_bytes())
    set_threshold(other, 7.0)
    assert main(["verify", str(unclipped), str(exported), str(other)]) == 1
    assert "differs in thresholds" in printed(capsys)


def test_the_resize_of_anomalibs_own_export_is_found(
    folder: MakeFolder, engine: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """anomalib 2.7 exports an antialiased resize without the antialiasing."""
    pre_processor = PreProcessor(v2.Compose([v2.Resize((64, 64), antialias=True)]))
    model = Padim("resnet18", ["layer1"], pre_trained=False, n_features=8, pre_processor=pre_processor)
    trainer = engine()
    trainer.fit(model, datamodule=folder())
    export = Path(str(trainer.export(model, ExportType.ONNX, tmp_path)))
    checkpoint = tmp_path / "model.ckpt"
    trainer.trainer.save_checkpoint(checkpoint)
    assert main(["verify", "--model", "Padim", str(checkpoint), str(export)]) == 1
    assert "differs in the resize" in printed(capsys)


def test_exports_of_another_training_are_refused(
    trained: Any, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = exported.with_suffix(".json")
    text = described.read_text(encoding="utf-8")
    described.write_text(text.replace('"trained": "2', '"trained": "1'), encoding="utf-8")
    try:
        assert main(["verify", str(trained.checkpoint), str(exported)]) == 1
    finally:
        described.write_text(text, encoding="utf-8")
    assert f"EXPORT {str(exported)!r} is of OSDIRF" in printed(capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["{export}", "{export}"], "CHECKPOINT"), (["--images", "{empty}", "{checkpoint}", "{export}"], "--images")],
)
def test_unusable_arguments(
    arguments: list[str],
    named: str,
    unclipped: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"checkpoint": unclipped, "export": exported, "empty": tmp_path}
    assert main(["verify", *(argument.format_map(places) for argument in arguments)]) == 1
    assert named in printed(capsys)


def score(value: float, label: bool, shift: float = 0.0) -> Any:
    return SimpleNamespace(score=value, label=label, map=np.full((2, 2), shift, np.float32))


def test_a_label_counts_unless_the_score_is_at_the_threshold() -> None:
    same = compare([score(0.5, True)], [score(0.5, False)], 1e-4, 0.5)
    other = compare([score(0.6, True)], [score(0.6, False)], 1e-4, 0.5)
    assert (same.labels, same.exact, other.labels, other.exact) == (0, True, 1, False)


def test_the_largest_difference_counts() -> None:
    found = compare([score(0.1, False), score(0.2, False)], [score(0.1, False, 0.3), score(0.25, False)], 0.1, 0.5)
    assert (found.score, found.map, found.exact) == (pytest.approx(0.05), pytest.approx(0.3), False)


def test_drawn_images_are_always_the_same() -> None:
    for one, other in zip(drawn(), drawn(), strict=True):
        assert np.array_equal(one, other)
        assert one.std() > 0.1
