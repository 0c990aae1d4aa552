# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf predict``: score images, a video or a camera with a checkpoint or an exported model."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomalib_osdirf.arguments import positive
from anomalib_osdirf.progress import phase, say

# First columns of a row, name within the folder or video, and pixels or the error that says why there are none.
Item = tuple[dict[str, Any], Path, Any]

_SUFFIXES = (".csv", ".parquet")
_MOST_ROWS = 50


def main(arguments: Sequence[str], program: str) -> int:
    """Score images; return 1 if none could be scored."""
    options = _parser(program).parse_args(arguments)
    from anomalib_osdirf.inference.scoring import load_scorer
    from anomalib_osdirf.inference.video import Video, is_video

    items: Iterator[Item]
    if is_video(options.images):
        video = Video(options.images, options.max_pixels)
        items, count = _frames(video), video.count
    else:
        files = _files(options.images)
        items, count = _read(files, options), len(files)
    if options.output is not None:
        _check_output(options.output)
    scorer = load_scorer(options.model_file, options.model)
    scored = _rows(scorer, items, options.overlays)
    if is_video(options.images):
        scored = _until_interrupted(scored)
    rows = list(phase("Scoring", scored, count, visible=True))
    if options.output is not None:
        _write(rows, options.output)
    _print(rows, options)
    return 0 if any(row["error"] is None for row in rows) else 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Score images, a video or a camera's frames with any anomalib model: scores, labels and boxes of "
        "the largest anomalous region. `score` is for very many images, `anomalib predict` for what else anomalib can "
        "do.",
    )
    parser.add_argument(
        "model_file", type=Path, metavar="MODEL", help=".ckpt, .xml or .onnx file, or a run folder with one"
    )
    parser.add_argument(
        "images",
        type=Path,
        metavar="IMAGES",
        help="folder of images, searched recursively; an image; a video; or a camera's number, until Ctrl+C",
    )
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
        problem = "is empty" if folder.is_dir() else "does not exist"
        msg = f"IMAGES {str(folder)!r} {problem}; give a folder of images, an image, a video or a camera's number."
        raise ValueError(msg)
    return files


def _check_output(output: Path) -> None:
    if output.suffix not in _SUFFIXES:
        msg = f"--output {str(output)!r} ends in neither of {' and '.join(_SUFFIXES)}, which say what it becomes."
        raise ValueError(msg)
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            f"--output {str(output)!r} needs pyarrow, which is not installed; take a .csv file, or pip install pyarrow."
        )


def _read(files: Sequence[Path], options: argparse.Namespace) -> Iterator[Item]:
    from anomalib_osdirf.inference.reading import ImageError, read_image, readable

    for file in files:
        about = {"path": readable(str(file))}
        name = Path(file.name) if file == options.images else file.relative_to(options.images)
        try:
            yield about, name, read_image(file, options.max_pixels)
        except ImageError as error:
            yield about, name, error


def _frames(video: Any) -> Iterator[Item]:
    from anomalib_osdirf.inference.reading import ImageError, readable

    path, folder = readable(video.name), Path(video.name).name
    try:
        for number, (seconds, pixels) in enumerate(video.frames()):
            yield {"path": path, "frame": number, "seconds": seconds}, Path(folder, f"{number:06d}"), pixels
    except ImageError as error:
        yield {"path": path, "frame": None, "seconds": None}, Path(folder), error


def _rows(scorer: Any, items: Iterator[Item], overlays: Path | None) -> Iterator[dict[str, Any]]:
    """Yield one row per image, with the error if it could not be scored."""
    from anomalib_osdirf.app.overlay import overlay
    from anomalib_osdirf.inference.reading import ImageError, readable
    from anomalib_osdirf.inference.scoring import ModelError

    for about, name, image in items:
        row: dict[str, Any] = {**about, "score": None, "label": None, "box": None, "error": None}
        try:
            if isinstance(image, ImageError):
                raise image
            found = scorer.score(image)
        except ImageError as error:
            yield row | {"error": str(error)}
            continue
        except ModelError as error:
            yield row | {"error": readable(f"{name} has no score: {error}")}
            continue
        box = found.box(*image.shape[:2])
        row |= {"score": found.score, "label": found.label, "box": box and " ".join(map(str, box))}
        if overlays is not None:
            picture = overlay(image, found.map, threshold=scorer.pixel_threshold)
            title = f"{_label(row)} {found.score:.3f}"
            file = overlays / name.with_name(f"{name.name}.png")
            _write_overlay(picture, box, picture.shape[1] / image.shape[1], title, file)
        yield row


def _until_interrupted(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with suppress(KeyboardInterrupt):
        yield from rows


def _label(row: dict[str, Any]) -> str:
    return "anomalous" if row["label"] else "normal"


def _write_overlay(pixels: Any, box: list[int] | None, scale: float, title: str, file: Path) -> None:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    if box is not None:
        draw.rectangle([round(side * scale) for side in box], outline="red", width=2)
    draw.rectangle(draw.textbbox((4, 4), title), fill="black")
    draw.text((4, 4), title, fill="white")
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
        if "frame" in row:
            name = f"frame {row['frame']}, {row['seconds']:.2f} s"
        else:
            name = str(Path(row["path"]).relative_to(options.images) if options.images.is_dir() else row["path"])
        table.add_row(name, f"{row['score']:.3f}", _label(row), row["box"])
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
