# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf predict``: score a folder of images with a checkpoint or an exported model."""

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomalib_osdirf.arguments import positive
from anomalib_osdirf.progress import phase, say

_SUFFIXES = (".csv", ".parquet")
_MOST_ROWS = 50


def main(arguments: Sequence[str], program: str) -> int:
    """Score images; return 1 if none could be scored."""
    options = _parser(program).parse_args(arguments)
    from anomalib_osdirf.inference.scoring import load_scorer

    files = _files(options.folder)
    _check_output(options.output)
    scorer = load_scorer(options.model_file, options.model)
    rows = list(phase("Scoring", _rows(scorer, files, options), len(files), visible=True))
    if options.output is not None:
        _write(rows, options.output)
    _print(rows, options)
    return 0 if any(row["error"] is None for row in rows) else 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Score a folder of images with any anomalib model: scores, labels and boxes of the "
        "largest anomalous region. `score` is for very many images, `anomalib predict` for what else anomalib can do.",
    )
    parser.add_argument(
        "model_file", type=Path, metavar="MODEL", help=".ckpt, .xml or .onnx file, or a run folder with one"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images, searched recursively")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write them to a .csv or .parquet file")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also write images with maps and boxes over them")
    parser.add_argument("--model", help="model class of a checkpoint that does not name it, such as Patchcore")
    parser.add_argument("--max-pixels", type=positive, default=50_000_000, help="maximum pixels of an image (50000000)")
    return parser


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        msg = f"FOLDER {str(folder)!r} {'is empty' if folder.is_dir() else 'does not exist'}; give a folder of images."
        raise ValueError(msg)
    return files


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in _SUFFIXES:
        msg = f"--output {str(output)!r} ends in neither of {' and '.join(_SUFFIXES)}, which say what it becomes."
        raise ValueError(msg)
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            f"--output {str(output)!r} needs pyarrow, which is not installed; take a .csv file, or pip install pyarrow."
        )


def _rows(scorer: Any, files: Sequence[Path], options: argparse.Namespace) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """Yield one row per file, with the error if it could not be scored."""
    from anomalib_osdirf.app.overlay import overlay
    from anomalib_osdirf.inference.reading import ImageError, read_image, readable
    from anomalib_osdirf.inference.scoring import ModelError, largest_region

    for file in files:
        row: dict[str, Any] = {"path": readable(str(file)), "score": None, "label": None, "box": None, "error": None}
        try:
            image = read_image(file, options.max_pixels)
            found = scorer.score(image)
        except (ImageError, ModelError) as error:
            yield row | {"error": readable(str(error))}
            continue
        height, width = image.shape[:2]
        box = None if found.mask is None else largest_region(found.mask, width, height)
        row |= {"score": found.score, "label": found.label, "box": box and " ".join(map(str, box))}
        if options.overlays is not None:
            picture = overlay(image, found.map, threshold=scorer.pixel_threshold)
            _write_overlay(picture, box, picture.shape[1] / width, options.overlays / _below(file, options.folder))
        yield row


def _below(file: Path, folder: Path) -> Path:
    relative = Path(file.name) if file == folder else file.relative_to(folder)
    return relative.with_name(f"{relative.name}.png")


def _write_overlay(pixels: Any, box: list[int] | None, scale: float, file: Path) -> None:  # noqa: ANN401
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels)
    if box is not None:
        ImageDraw.Draw(picture).rectangle([round(side * scale) for side in box], outline="red", width=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def _write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    import pandas as pd

    table = pd.DataFrame(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    write = table.to_csv if output.suffix == ".csv" else table.to_parquet
    try:
        write(partial, index=False)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _print(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a table, the highest scores first."""
    scored = sorted((row for row in rows if row["error"] is None), key=lambda row: -row["score"])
    anomalous = sum(row["label"] for row in scored)
    table = Table("image", "score", "label", "box", title=f"{anomalous} of {len(scored)} images are anomalous")
    for row in scored[:_MOST_ROWS]:
        name = Path(row["path"]).relative_to(options.folder) if options.folder.is_dir() else row["path"]
        table.add_row(str(name), f"{row['score']:.3f}", "anomalous" if row["label"] else "normal", row["box"])
    Console().print(table)
    if len(scored) > _MOST_ROWS:
        say(f"... and {len(scored) - _MOST_ROWS} with lower scores; --output scores.csv has them all.")
    failed = [row["error"] for row in rows if row["error"] is not None]
    for error in failed[:_MOST_ROWS]:
        say(f"Not scored: {error}")
    if len(failed) > _MOST_ROWS:
        say(f"... and {len(failed) - _MOST_ROWS} files more.")
    for name, place in (("Scores", options.output), ("Overlays", options.overlays)):
        if place is not None:
            say(f"{name}: {place}")
