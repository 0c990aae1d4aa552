# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One training and test, in its own process: ``python -m anomalib_osdirf.benchmark.run FOLDER``.

The folder has the job as ``job.json``; ``result.json`` is written atomically at the end.
"""

import json
import logging
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything

from anomalib_osdirf.benchmark.entry import Entry, build_data, build_model, local_weights
from anomalib_osdirf.data.category_evaluator import CategoryEvaluator
from anomalib_osdirf.data.multi_category import MultiCategory
from anomalib_osdirf.errors import one_line
from anomalib_osdirf.models.metrics import default_evaluator
from anomalib_osdirf.training.diffusion_training import DiffusionTraining

logger = logging.getLogger(__name__)

JOB, RESULT, CHECKPOINT = "job.json", "result.json", "weights/model.ckpt"


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2), encoding="utf-8")
    partial.replace(file)


def perform(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, test, and measure what ``Run.job`` of the parent process gave.

    Returns:
        Metrics by category, seconds, bytes, and where they were measured.
    """
    entry, size = Entry(**job["entry"]), job["image_size"]
    seed_everything(job["seed"], workers=True)
    model = build_model(entry, job["backbone_weights"], size, job["seed"])
    data = build_data(job["data"])
    _use_all_test_images(data)
    callbacks: list[Callback] = []
    if not isinstance(data, MultiCategory):  # which brings its own
        model.evaluator = None
        callbacks.append(CategoryEvaluator(list(default_evaluator().test_metrics)))  # type: ignore[arg-type]
    engine = Engine(
        callbacks=callbacks,
        default_root_dir=folder / "work",
        accelerator=job["accelerator"],
        devices=1,
        enable_progress_bar=False,
    )
    with local_weights(job["backbone_weights"]):  # some models load their backbone when the training starts
        data.prepare_data()
        start, cpu_start = time.perf_counter(), time.process_time()
        engine.fit(model, datamodule=data)
        fit_seconds, fit_cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        measured = dict(engine.test(model, datamodule=data, verbose=False)[0])
    peak = _peak_memory(model.device)
    checkpoint = folder / CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    Path(str(engine.best_model_path)).replace(checkpoint)
    result = {
        "metrics": by_category(measured, job["label"]),
        "fit_seconds": fit_seconds,
        "fit_cpu_seconds": fit_cpu_seconds,
        "peak_bytes": peak,
        "checkpoint_bytes": checkpoint.stat().st_size,
        "machine": machine(model.device),
    }
    return result | (_openvino_size(engine, model, folder, size) if job["openvino"] else {})


def by_category(measured: dict[str, float], label: str) -> dict[str, dict[str, float]]:
    """Group metrics by category; those of a single data set go under its name, and means are dropped."""
    result: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        category, _, metric = name.rpartition("/")
        if category != "mean":
            result.setdefault(category or label, {})[metric] = float(value)
    return result


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads(), "torch": torch.__version__}


def _use_all_test_images(data: Any) -> None:
    """Test on all test images: the metrics need no threshold, so none are set aside for validation."""
    for one in [data, *getattr(data, "categories", {}).values()]:
        if getattr(one, "val_split_mode", None) == ValSplitMode.FROM_TEST:
            one.val_split_mode = ValSplitMode.SAME_AS_TEST


def _peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process: the GPU's, or the machine's if it used no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows does not tell
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _openvino_size(engine: Engine, model: Any, folder: Path, size: int | None) -> dict[str, Any]:
    """Return the size of the OpenVINO export in bytes, or the error: not every anomalib model has one."""
    fixed = None if isinstance(model, DiffusionTraining) or size is None else (size, size)
    try:
        exported = Path(str(engine.export(model, "openvino", folder / "work" / "export", input_size=fixed)))
    except Exception as error:
        logger.exception("No OpenVINO export.")
        return {"openvino_error": one_line(error)}
    return {"openvino_bytes": sum(file.stat().st_size for file in (exported, exported.with_suffix(".bin")))}


def main(folder: Path) -> int:
    """Perform the job of a folder and write its result, or its error; return the exit status."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    try:
        result = perform(job, folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
        traceback.print_exc()
        write_json(folder / RESULT, {"job": job, "error": one_line(error)})
        return 1
    write_json(folder / RESULT, {"job": job, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
