# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf score``: score many images with an exported model."""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_osdirf.arguments import fail, positive
from anomalib_osdirf.inference.scoring import find_model, load_scorer
from anomalib_osdirf.post_processing.drift import DriftWatch
from anomalib_osdirf.progress import box, phase, step, summary

if TYPE_CHECKING:
    from anomalib_osdirf.bulk.rows import Job
    from anomalib_osdirf.bulk.store import Store, Totals

# What a model is made of, by the file that names it.
_FILES = {".xml": (".xml", ".bin", ".json"), ".onnx": (".onnx", ".onnx.data", ".json")}
_INTERRUPTED = 130
_NEEDED = ("ray", "pyarrow")


def main(arguments: Sequence[str], program: str) -> int:
    """Score images; return 0 if the run came to its end and an image has a score, 130 after Ctrl+C, and 1 otherwise."""
    options = _parser(program).parse_args(arguments)
    if any(find_spec(package) is None for package in _NEEDED):
        raise ImportError("The command needs Ray Data; install the extra: pip install 'anomalib-osdirf[ray]'.")
    try:
        totals = _run(options)
    except KeyboardInterrupt:
        return fail(program, "stopped; the same command goes on where it was.", _INTERRUPTED)
    if options.quiet and totals.errors:
        fail(program, f"{totals.errors} of {totals.images} images have an error, see {options.output}.")
    return 0 if totals.scored else 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Score many images with an export of any anomalib model. What is finished is not done "
        "again: an interrupted run goes on where it was with the same command, and new images of a folder are added.",
    )
    parser.add_argument("--model", type=Path, required=True, help=".xml or .onnx file, or a results folder")
    parser.add_argument(
        "--input",
        required=True,
        help="folder with images (with all folders in it), text file with a path in each line, or a pattern",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="scores.parquet, or scores.csv with it",
    )
    parser.add_argument("--maps", type=Path, metavar="DIR", help="also write anomaly maps, as numpy's .npy files")
    parser.add_argument("--workers", type=positive, help="processes that score (as many as there are CPUs for)")
    parser.add_argument("--cpus", type=positive, default=1, help="CPUs of a worker (1)")
    parser.add_argument(
        "--address",
        help="address of a Ray cluster, or auto; all its machines must see model, images and maps by the same paths",
    )
    parser.add_argument("--max-pixels", type=positive, default=50_000_000, help="maximum pixels of an image (50000000)")
    parser.add_argument("--retry-errors", action="store_true", help="score images again that have an error so far")
    parser.add_argument(
        "--save-every", type=_seconds, default=10.0, metavar="SECONDS", help="how often scores are written down (10)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _run(options: argparse.Namespace) -> "Totals":
    from anomalib_osdirf.bulk.listing import list_images
    from anomalib_osdirf.bulk.rows import Job
    from anomalib_osdirf.bulk.store import Store, write_csv
    from anomalib_osdirf.inference.reading import readable

    visible = not options.quiet
    model = find_model(options.model)
    if model.suffix not in _FILES:
        msg = f"--model {str(model)!r} is a checkpoint; export it first, with anomalib export --export_type openvino."
        raise ValueError(msg)
    if options.output.suffix not in {".parquet", ".csv"}:
        msg = f"--output {str(options.output)!r} ends in neither .parquet nor .csv, which say what it becomes."
        raise ValueError(msg)
    scorer = load_scorer(model)  # a worker would say less clearly what is wrong with it
    name = f"{scorer.name}, {scorer.runtime}, {model}"
    watch = DriftWatch(scorer.normal_scores)
    del scorer
    maps = None if options.maps is None else str(options.maps.absolute())
    parquet = options.output.with_suffix(".parquet")  # which the next run goes on from
    if options.output.exists() and not parquet.exists():
        msg = f"--output {str(options.output)!r} exists, and {parquet.name} does not; choose another, or move it away."
        raise ValueError(msg)
    store = Store(parquet.absolute(), {"model": _digest(model), "maps": maps}, options.save_every)
    with step("Listing images", visible):
        images = list_images(options.input)
        finished = store.finished(options.retry_errors)
        pending = [image for image in images if readable(image) not in finished]
    job = Job(str(model.absolute()), options.cpus, options.max_pixels, maps)
    scored = _score(pending, job, store, watch, options) if pending else "nothing, all images were scored before"
    with step(f"Writing {options.output}", visible):
        totals = store.merge()
        if options.output != parquet:
            write_csv(parquet, options.output)
    if visible:
        box("Scoring finished", _lines(name, scored, totals, watch, options))
    return totals


def _score(pending: list[str], job: "Job", store: "Store", watch: DriftWatch, options: argparse.Namespace) -> str:
    """Score images into a store, and report the totals."""
    from anomalib_osdirf.bulk.pipeline import score, started

    visible = not options.quiet
    with started(options.address, visible) as cpus:
        workers = options.workers or max(1, cpus // options.cpus)
        if workers * options.cpus > cpus:
            where = "this machine has" if options.address is None else "the cluster has"
            msg = f"--workers {workers} with --cpus {options.cpus} needs {workers * options.cpus} CPUs; {where} {cpus}."
            raise ValueError(msg)
        start, done = time.perf_counter(), 0
        rows = score([os.fsencode(path) for path in pending], job, workers)
        try:
            for table in phase("Scoring", rows, len(pending), visible, lambda table: table.num_rows):
                store.add(table)
                watch.add(score for score in table["score"].to_pylist() if score is not None)
                done += table.num_rows
        finally:
            store.flush()
        if done < len(pending):
            raise RuntimeError(f"Ray lost {len(pending) - done} images; the same command goes on where it was.")
        speed = summary(len(pending), time.perf_counter() - start)
    return f"{speed}, {workers} {'worker' if workers == 1 else 'workers'}"


def _lines(
    name: str, scored: str, totals: "Totals", watch: DriftWatch, options: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    yield "Model", name
    yield "Scored now", scored
    yield (
        "All scores",
        f"{totals.images} images, {totals.anomalous} anomalous, {totals.scored - totals.anomalous} normal",
    )
    if watch.windows:
        yield "Drift", f"{watch.sentence()} {watch.warnings} of {watch.windows} windows drift."
    if totals.errors:
        yield "Errors", f"{totals.errors}, see the column error; the first: {totals.first_error}"
    yield "Scores", str(options.output)
    if options.maps is not None:
        yield "Maps", str(options.maps)
    read = f"pandas.read_{options.output.suffix[1:]}({str(options.output)!r})"
    code = f"import pandas; print({read}.nlargest(10, 'score'))"
    yield "Look", f'python -c "{code}"'


def _digest(model: Path) -> str:
    """Return a digest of a model's files, settings included."""
    described = hashlib.sha256()
    for suffix in _FILES[model.suffix]:
        file = model.with_suffix(suffix)
        if file.is_file():
            described.update(f"{suffix} {file.stat().st_size} ".encode())
            described.update(file.read_bytes())
    return described.hexdigest()[:16]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
