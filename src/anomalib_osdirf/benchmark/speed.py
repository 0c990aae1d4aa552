# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Throughput of trained models, in turns: ``python -m anomalib_osdirf.benchmark.speed FOLDER``.

Clock rates and other load on the machine change over time. Measured in turns, all models meet the same conditions.
"""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anomalib_osdirf.benchmark.entry import Entry, local_weights, model_class
from anomalib_osdirf.benchmark.run import JOB, RESULT, machine, write_json
from anomalib_osdirf.errors import one_line

BATCH_SIZES = (1, 32)
_WARM_UP = 2
_IMAGES_PER_TURN = 8  # or a single image would be over too soon to time


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load all models and time their torch forward on pre-processed images.

    Args:
        job: ``models`` (name: ``entry``, ``checkpoint``, ``backbone_weights``, ``image_size``), ``rounds`` and
            ``accelerator``.

    Returns:
        Median images per second by model and batch size, or an error by model; and where they were measured.
    """
    cuda = job["accelerator"] in {"cuda", "gpu", "auto"} and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    turns: dict[tuple[str, int], Callable[[], float]] = {}
    errors: dict[str, str] = {}
    for name, one in job["models"].items():
        own, error = _turns(one, device)
        turns |= {(name, batch_size): turn for batch_size, turn in own.items()}
        if error:
            errors[name] = error
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in turns}
    for _ in range(job["rounds"]):
        for key, turn in turns.items():
            rates[key].append(turn())
    medians: dict[str, dict[str, float]] = {}
    for (name, batch_size), values in rates.items():
        medians.setdefault(name, {})[str(batch_size)] = statistics.median(values)
    return {"images_per_second": medians, "errors": errors, "machine": machine(device)}


def _turns(one: dict[str, Any], device: torch.device) -> tuple[dict[int, Callable[[], float]], str | None]:
    """Load a model and return its warmed-up timers by batch size, or the error."""
    try:
        prepared = _prepare(one, device)
        turns = {batch_size: _turn(prepared, batch_size) for batch_size in BATCH_SIZES}
        for turn in turns.values():
            for _ in range(_WARM_UP):
                turn()
    except Exception as error:  # noqa: BLE001 - such as too little memory; the others are measured all the same
        traceback.print_exc()
        return {}, one_line(error)
    return turns, None


def _prepare(one: dict[str, Any], device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """Load a model, and draw an image of the size that its pre-processor leaves."""
    with local_weights(one["backbone_weights"]):
        lightning = model_class(Entry(**one["entry"])).load_from_checkpoint(one["checkpoint"], map_location=device)
    size = one["image_size"] or 256
    image = torch.rand(1, 3, size, size)
    if lightning.pre_processor is not None and lightning.pre_processor.transform is not None:
        image = lightning.pre_processor.transform(image)
    return lightning.model.eval().to(device), image.to(device)


def _turn(prepared: tuple[torch.nn.Module, torch.Tensor], batch_size: int) -> Callable[[], float]:
    model, image = prepared
    images, passes = image.repeat(batch_size, 1, 1, 1), max(1, _IMAGES_PER_TURN // batch_size)

    def turn() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(passes):
                model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return passes * batch_size / (time.perf_counter() - start)

    return turn


def main(folder: Path) -> int:
    """Do the measurement of a folder's job, and write the result; return the exit status."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    write_json(folder / RESULT, {"job": job, **measure(job)})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
