# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf verify``: compare exports of any anomalib model with the checkpoint that they are of."""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from anomalib_osdirf.errors import last_line
from anomalib_osdirf.progress import say

Array = NDArray[np.float32]

# Height and width of the images that are drawn: square, odd, longish, smaller and larger than most models' input.
_SIZES = ((256, 256), (97, 131), (300, 200), (480, 640), (257, 1023))
_MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Comparison:
    """Largest differences between two models over images."""

    score: float
    map: float
    labels: int  # images whose labels differ, and whose scores are not within the tolerance of the threshold
    exact: bool  # whether all are within the tolerance


def main(arguments: Sequence[str], program: str) -> int:
    """Compare; return 1 if an export differs by more than the tolerance."""
    options = _parser(program).parse_args(arguments)
    from anomalib_osdirf.inference.scoring import CheckpointScorer, ModelError, find_model, load_scorer, resized

    file = find_model(options.checkpoint)
    if file.suffix != ".ckpt":
        msg = f"CHECKPOINT {str(options.checkpoint)!r} is not a .ckpt file; give the checkpoint that was exported."
        raise ModelError(msg)
    images = list(_read(options.images) if options.images else drawn())
    checkpoint = CheckpointScorer(file, options.model)
    expected = [checkpoint.score(image) for image in images]
    table = Table("model", "score", "map", "labels", "ms", title=f"Largest differences on {len(images)} images")
    table.add_row(f"{checkpoint.name}, {checkpoint.runtime}", "", "", "", _milliseconds(expected))
    differences: list[str] = []
    for path in options.exports:
        export = load_scorer(path)
        _check_same_model(checkpoint, export, path)
        name = f"{path.name}, {export.runtime}"
        own, wanted = images, expected
        if export.size is not None:
            own = [resized(image, export.size) for image in images]
            wanted = [checkpoint.score(image) for image in own]
            name += f", {export.size[0]} x {export.size[1]}"
        try:
            found = [export.score(image) for image in own]
        except Exception as error:  # noqa: BLE001 - runtimes have exceptions of their own
            differences.append(f"{name}, fails: {last_line(error)}.")
            continue
        result = compare(wanted, found, options.tolerance, checkpoint.threshold)
        table.add_row(name, f"{result.score:.1e}", f"{result.map:.1e}", str(result.labels), _milliseconds(found))
        if not result.exact:
            differences.append(f"{name}, {_cause(checkpoint, export, own, options.tolerance)}.")
    Console().print(table)
    for sentence in differences or [f"Every export is within {options.tolerance:g} of the checkpoint."]:
        say(sentence)
    return 1 if differences else 0


def _milliseconds(scores: Sequence[Any]) -> str:
    return f"{statistics.median(one.milliseconds for one in scores):.1f}"


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Compare exports of any anomalib model with their checkpoint: scores, maps, labels and time for an "
        "image. The exit status is 0 if all are within the tolerance.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".ckpt file")
    parser.add_argument("exports", type=Path, nargs="+", metavar="EXPORT", help=".xml (OpenVINO) or .onnx file")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images to score; drawn ones unless given")
    parser.add_argument("--tolerance", type=_tolerance, default=1e-4, help="of normalised scores and maps (0.0001)")
    parser.add_argument("--model", help="model class of a checkpoint that does not name it, such as Patchcore")
    return parser


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 0 and below 1")
    return value


def drawn() -> Iterator[Array]:
    """Draw textured images of several sizes, shape ``(H, W, 3)`` in 0 to 1, always the same."""
    rng = np.random.default_rng(0)
    for height, width in _SIZES:
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(columns / rng.uniform(2, 30) + rows / rng.uniform(2, 30)) for _ in range(3)]
        image = 0.5 + 0.2 * np.stack(waves, axis=-1) + rng.normal(0, 0.05, (height, width, 3))
        yield (np.round(image.clip(0, 1) * 255) / 255).astype(np.float32)


def _read(folder: Path) -> Iterator[Array]:
    from anomalib_osdirf.inference.reading import IMAGE_SUFFIXES, read_image

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"--images {str(folder)!r} has no image in it; give a folder of images, or leave it out.")
    for file in files:
        yield read_image(file, _MAX_PIXELS)


def _check_same_model(checkpoint: Any, export: Any, path: Path) -> None:  # scorers
    """Raise an error if the export's metadata are of another model or another training than the checkpoint."""
    name, trained = (export.metadata.get(one) for one in ("model", "trained"))
    own = getattr(checkpoint.module, "_trained", None)
    if (name and name != checkpoint.name) or (trained and own and trained != own):
        raise ValueError(
            f"EXPORT {str(path)!r} is of {name}, trained {trained or 'at an unknown time'}, and CHECKPOINT of "
            f"{checkpoint.name}, trained {own or 'at an unknown time'}; export the checkpoint again."
        )


def compare(expected: Sequence[Any], found: Sequence[Any], tolerance: float, threshold: float) -> Comparison:
    """Return the largest differences between two models' scores, maps and labels of the same images."""
    pairs = list(zip(expected, found, strict=True))
    score = max(abs(one.score - other.score) for one, other in pairs)
    maps = max(_difference(one.map, other.map) for one, other in pairs)
    labels = sum(one.label != other.label and abs(one.score - threshold) > tolerance for one, other in pairs)
    return Comparison(score, maps, labels, max(score, maps) <= tolerance and not labels)


def _difference(one: Array | None, other: Array | None) -> float:
    if one is None or other is None:
        return 0.0
    return float(np.abs(one - other).max()) if one.shape == other.shape else np.inf


def _cause(checkpoint: Any, export: Any, images: Sequence[Array], tolerance: float) -> str:  # scorers
    """Say which stage of an export differs, as far as it can be found out by changing one at a time."""
    from anomalib_osdirf.export.metadata import post_processing_values

    post_processor = checkpoint.module.post_processor
    trained = {} if post_processor is None else post_processing_values(post_processor.state_dict())
    if any(name in export.metadata and not _near(export.metadata[name], trained[name]) for name in trained):
        return "differs in thresholds"

    def is_exact() -> bool:
        own, found = ([model.score(image) for image in images] for model in (checkpoint, export))
        return compare(own, found, tolerance, checkpoint.threshold).exact

    precision = str(export.metadata.get("compression_type", "FP32"))
    with checkpoint.resizing_as_exported():
        if is_exact():
            return "differs in the resize, whose antialiasing is lost in the export"
        if precision == "FP32" and hasattr(export, "in_float32"):
            export = export.in_float32()
            if is_exact():
                return "differs in the resize and by bfloat16 arithmetic"
    if precision != "FP32":
        return f"differs by its precision {precision}"
    return "differs by bfloat16 arithmetic" if is_exact() else "differs in the network"


def _near(one: Any, other: Any) -> bool:  # numbers, lists of them, or None
    if one is None or other is None:
        return one is other
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=1e-5, atol=1e-6))
