# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The callback that collects what a report shows, of any anomalib model."""

import logging
import math
import platform
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.path import create_versioned_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from anomalib_osdirf.export import metadata
from anomalib_osdirf.report import pictures
from anomalib_osdirf.report.page import PAGE_NAME, Run, write_page_or_warn
from anomalib_osdirf.report.results import (
    FILE_NAME,
    ImageResult,
    Results,
    ResultsWriter,
    name_groups,
    pack,
)
from anomalib_osdirf.report.summary import print_summary, write_predictions
from anomalib_osdirf.runs import is_run
from anomalib_osdirf.terminal import is_quiet

logger = logging.getLogger(__name__)

_LOSSES_AT_ONCE = 50
_PICTURE_SIDE, _MAP_SIDE = 256, 128  # pixels
_PACKAGES = ("anomalib-osdirf", "anomalib", "lightning", "torch", "torchvision", "timm", "openvino", "nncf", "onnx")


class ReportCallback(Callback):
    """Collects the results of a training and a test of any anomalib model, and makes a page of them.

    It writes ``report.sqlite``, ``report.html`` and ``predictions.csv`` into the run folder, and says at the end of a
    test what was found and what can be done next. A test that does not follow a training gets a new folder beside the
    runs, ``tests/v0``; anomalib would put it into that of the latest run.

    Args:
        folder (Path | str | None): Folder to write to; the run folder when ``None``.
            Defaults to ``None``.
        page (bool): Whether to make the page after a test; ``python -m anomalib_osdirf report`` makes it otherwise.
            Defaults to ``True``.
        quiet (bool): Whether to leave out the summary in the terminal.
            Defaults to ``False``.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_osdirf.report import ReportCallback
        >>> engine = Engine(callbacks=[ReportCallback()])
    """

    def __init__(self, folder: Path | str | None = None, page: bool = True, quiet: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.page = page
        self.quiet = quiet
        self._writer: ResultsWriter | None = None
        self._trained = False  # in this process: the run folder is ours
        self._start = 0.0
        self._losses: list[tuple[int, Tensor]] = []
        self._images: Tensor | None = None

    @contextmanager
    def _writing(self, trainer: Trainer) -> Iterator[None]:
        """Stop collecting where it can't be written, on a full disk above all: a report is not worth the training."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            self._writer = None
            file = self._folder(trainer) / FILE_NAME
            logger.warning("The report will lack what follows, because %s can't be written (%s).", file, error)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Give a test that does not follow a training a folder of its own."""
        root = Path(trainer.default_root_dir)
        if stage == "fit":
            self._trained = True
        elif stage == "test" and self.folder is None and not self._trained and (is_run(root) or root.name == "latest"):
            own = create_versioned_dir(root.parent / "tests") if trainer.is_global_zero else None
            trainer._default_root_dir = trainer.strategy.broadcast(str(own))  # noqa: SLF001 - Lightning has no other way

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new results file."""
        self._start = time.perf_counter()
        self._losses = []
        if trainer.is_global_zero:
            with self._writing(trainer):
                self._writer = ResultsWriter(self._folder(trainer), fresh=True)
                self._writer.put({**_description(trainer, pl_module), "training": {"state": "started"}})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss."""
        # Several processes have a loss each; ours tell that of the whole batch, too.
        loss = outputs.get("train_loss", outputs.get("loss")) if isinstance(outputs, dict) else outputs
        if self._writer is None or not isinstance(loss, Tensor):
            return
        # Losses stay on the device until there are some, as each transfer waits for it.
        self._losses.append((trainer.global_step, loss.detach()))
        if len(self._losses) >= _LOSSES_AT_ONCE:
            self._write_losses(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is of a training that is interrupted."""
        self._write_losses(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long the training took."""
        if self._writer is None:
            return
        self._write_losses(trainer)
        training = {
            "state": "finished",
            "seconds": time.perf_counter() - self._start,
            "steps": trainer.global_step,
            "images": _length(getattr(getattr(trainer, "datamodule", None), "train_data", None)),
        }
        with self._writing(trainer):
            if self._writer is not None:
                self._writer.put({"training": training})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the most suspicious training images; a model without a training is fitted after `on_fit_end`."""
        suspicious = list(getattr(pl_module, "suspicious_images", ()))
        if stage == "fit" and self._writer is not None and suspicious:
            with self._writing(trainer):
                self._writer.put({"suspicious": suspicious})

    def _write_losses(self, trainer: Trainer) -> None:
        if self._writer is None or not self._losses:
            return
        with self._writing(trainer):
            self._writer.add_losses([(step, float(loss)) for step, loss in self._losses])
        self._losses = []

    # ------------------------------------------------------------------ test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for a test's results; those of a training stay if the tested checkpoint lies in its folder."""
        if is_quiet():
            trainer.test_loop.verbose = False  # no second table of metrics
        self._start = time.perf_counter()
        folder = trainer.strategy.broadcast(self._folder(trainer))
        with self._writing(trainer):
            if trainer.is_global_zero:
                self._writer = self._start_test(trainer, pl_module, ResultsWriter(folder))
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            with self._writing(trainer):
                self._writer = ResultsWriter(folder)

    def _start_test(self, trainer: Trainer, pl_module: LightningModule, writer: ResultsWriter) -> ResultsWriter:
        # None, where a model is tested right after its training.
        saved = trainer.ckpt_path or getattr(trainer.checkpoint_callback, "best_model_path", None)
        checkpoint = Path(str(saved)).resolve() if saved else None
        if self._writer is None and not (checkpoint and checkpoint.is_relative_to(self._folder(trainer).resolve())):
            writer.forget_training()
        writer.forget_test()
        writer.put(
            {
                **_description(trainer, pl_module),
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "test": {"state": "started", "images": _number_of_images(trainer)},
                "post_processing": _post_processing(pl_module),
            }
        )
        return writer

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the images as they are before the model's pre-processing."""
        image = getattr(batch, "image", None)
        self._images = image.detach().clone() if isinstance(image, Tensor) and image.ndim == 4 else None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch's results, before the model's post-processing normalises and clips them."""
        if self._writer is None:
            return
        datamodule = getattr(trainer, "datamodule", None)
        span = _pixel_span(pl_module)
        images, whole = self._images, True
        seen = getattr(outputs, "image", None)
        if images is not None and isinstance(seen, Tensor) and seen.shape[-2:] != images.shape[-2:]:
            images, whole = _geometry(pl_module, images, seen), False
        images = _darker_outside(pl_module, images)
        results = [
            self._result(outputs, index, None if images is None else images[index], whole, datamodule, span)
            for index in range(_batch_length(outputs))
        ]
        with self._writing(trainer):
            self._writer.add_images(results)
        self._images = None

    def _result(
        self,
        batch: Any,
        index: int,
        image: Tensor | None,
        whole: bool,
        datamodule: Any,
        span: tuple[float, float] | None,
    ) -> ImageResult:
        paths = getattr(batch, "image_path", None)
        path = str(paths[index]) if paths else None
        label = _item(getattr(batch, "gt_label", None), index)
        group, defect_type = name_groups(path, None if label is None else int(label), _category(datamodule, path))
        score = _item(getattr(batch, "pred_score", None), index)
        anomaly_map = _plane(getattr(batch, "anomaly_map", None), index)
        if score is None and anomaly_map is not None:
            score = anomaly_map.amax().item()
        mask = _plane(getattr(batch, "gt_mask", None), index)
        width, height = _size(path if whole else None, image)
        result = ImageResult(
            path=path,
            label=None if label is None else int(label),
            category=group,
            defect_type=defect_type,
            score=score if score is not None and math.isfinite(score) else None,
            width=width,
            height=height,
            picture=None if image is None else pictures.encode_image(image, _PICTURE_SIDE),
            map=None,
            map_low=None,
            map_high=None,
            mask=pictures.encode_mask(mask, _PICTURE_SIDE) if mask is not None and mask.any() else None,
            normal_pixels=None,
            anomalous_pixels=None,
            regions=None,
        )
        if anomaly_map is not None:
            result.map, result.map_low, result.map_high = pictures.encode_map(anomaly_map, _MAP_SIDE)
            if mask is not None and span is not None and mask.shape == anomaly_map.shape:
                counts = pictures.count_pixels(anomaly_map, mask, *span)
                result.normal_pixels, result.anomalous_pixels, result.regions = map(pack, counts)
        return result

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note thresholds, metrics and duration, make the page and say what there is."""
        trainer.strategy.barrier()
        if self._writer is None or not trainer.is_global_zero:
            return
        test = {
            "state": "finished",
            "images": _number_of_images(trainer),
            "seconds": time.perf_counter() - self._start,
        }
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with self._writing(trainer):
            self._writer.put({"test": test, "metrics": logged, "post_processing": _post_processing(pl_module)})
        if self._writer is None:
            return
        folder = self._folder(trainer)
        with self._writing(trainer):
            write_predictions(Run(Results(folder)))
        written = None
        if self.page:
            written = write_page_or_warn([folder], folder / PAGE_NAME)
        if not self.quiet:
            print_summary(folder, written)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) if self.folder is None else self.folder


def _description(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What was trained or tested, on what, and how."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    config = Path(trainer.default_root_dir) / "config.yaml"  # Lightning's, of this process
    phase = "training" if trainer.training else "test"
    return {
        "model": type(module).__name__,
        "arguments": {name: repr(value) for name, value in dict(module.hparams).items()},
        "data": {
            "name": getattr(datamodule, "name", None),
            "category": getattr(datamodule, "category", None),
            "root": None if getattr(datamodule, "root", None) is None else str(datamodule.root),
        },
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        f"{phase}_command": _command(),
        f"{phase}_config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "versions": _versions(),
        "device": _device(module),
        "date": metadata.now(),
    }


def _command() -> str:
    """Return this process's command as it is typed."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    start = [program.name] if program.suffix != ".py" else ["python", str(program)]
    return shlex.join([*start, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    return found | {name: installed[name] for name in _PACKAGES if name in installed}


def _device(module: LightningModule) -> str:
    if module.device.type == "cuda":
        return torch.cuda.get_device_name(module.device)
    threads = torch.get_num_threads()
    return f"{module.device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _post_processing(module: LightningModule) -> dict[str, Any] | None:
    """Return raw thresholds, minima, maxima and sensitivities, where the post-processor is like anomalib's."""
    post_processor = getattr(module, "post_processor", None)
    if post_processor is None or not hasattr(post_processor, "image_threshold"):
        return None
    values = metadata.post_processing_values(post_processor.state_dict())
    matched = float(post_processor.image_threshold)  # falls back on the pixels' threshold
    values["image_threshold"] = None if math.isnan(matched) else matched
    switches = ("enable_normalization", "enable_thresholding")
    enabled = {name: bool(getattr(post_processor, name, True)) for name in switches}
    return {**values, **metadata.description(post_processor), **enabled}


def _category(datamodule: Any, path: str | None) -> str | None:
    """Return the category that an image is of, for data of several as ``MultiCategory``'s."""
    if path is not None and hasattr(datamodule, "category_of"):
        return str(datamodule.category_of(path))
    return getattr(datamodule, "category", None)


def _pixel_span(module: LightningModule) -> tuple[float, float] | None:
    values = _post_processing(module) or {}
    low, high = values.get("pixel_min"), values.get("pixel_max")
    return None if low is None or high is None else (low, high)


def _number_of_images(trainer: Trainer) -> int | None:
    loaders = trainer.test_dataloaders
    lengths = [_length(loader.dataset) for loader in (loaders if isinstance(loaders, list) else [loaders]) if loader]
    known = [length for length in lengths if length is not None]
    return sum(known) if known else None


def _geometry(module: LightningModule, images: Tensor, seen: Tensor) -> Tensor:
    """Crop and resize images as the pre-processor did, so that maps and masks lie on them."""
    transform = getattr(getattr(module, "pre_processor", None), "transform", None)
    parts: list[Any] = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    if all(isinstance(part, v2.Transform) for part in parts):
        for part in parts:
            images = images if isinstance(part, v2.Normalize) else part(images)
    return images if images.shape[-2:] == seen.shape[-2:] else seen


def _darker_outside(module: Any, images: Tensor | None) -> Tensor | None:
    """Show a region of interest in images of its size."""
    roi = getattr(getattr(getattr(module, "model", None), "network", None), "roi", None)
    if images is None or roi is None or images.shape[-2:] != roi.mask.shape:
        return images
    return torch.where(roi.mask, images, images / 2)


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _batch_length(batch: Any) -> int:
    for name in ("pred_score", "anomaly_map", "image"):
        value = getattr(batch, name, None)
        if isinstance(value, Tensor):
            return len(value)
    return 0


def _item(values: Any, index: int) -> float | None:
    return values[index].float().mean().item() if isinstance(values, Tensor) else None


def _plane(values: Any, index: int) -> Tensor | None:
    """Return one of a batch's maps or masks as ``(H, W)``."""
    if not isinstance(values, Tensor):
        return None
    plane = values[index].squeeze()
    return plane if plane.ndim == 2 else None


def _size(path: str | None, image: Tensor | None) -> tuple[int, int]:
    """Return width and height of the file, or else of what the model was given."""
    if path is not None:
        try:
            with Image.open(path) as file:  # reads the header only
                return file.size
        except OSError:
            pass
    return (0, 0) if image is None else (image.shape[-1], image.shape[-2])
