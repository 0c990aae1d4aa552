# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf train``: from a folder of parts to a tested, exported model in one run folder."""

import argparse
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib_osdirf.arguments import hint, positive
from anomalib_osdirf.data.parts import Parts, find_parts
from anomalib_osdirf.errors import last_line
from anomalib_osdirf.progress import box
from anomalib_osdirf.terminal import quiet

logger = logging.getLogger(__name__)

_STRIDE = 16  # pixels of an image for a position of the grid
_WORKERS = 4  # that read images


def main(arguments: Sequence[str], program: str) -> int:
    """Train on a folder of parts."""
    options = _parser(program).parse_args(arguments)
    parts = find_parts(options.folder, options.output)
    box(f"Found in {options.folder}", parts.lines())
    with quiet():
        folder, page = run(*_arguments(options, parts))
    from anomalib_osdirf.report.summary import print_summary

    print_summary(folder, page, title="Training finished")
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train a model on a folder of parts, test it, export it to OpenVINO and report, all into one run "
        "folder. The folder has good parts in 'good', and defective ones and masks beside it if there are any; or it "
        "is laid out as MVTec AD. For everything else there is `anomalib train --config <run folder>/config.yaml`.",
    )
    parser.add_argument("folder", type=Path, help="folder of parts")
    parser.add_argument("--backbone", help="timm model, or filter_bank, which needs no weights")
    parser.add_argument(
        "--backbone-weights", type=Path, metavar="FILE", help=".safetensors or .pth file, instead of a download"
    )
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="side that images are resized to (256)")
    parser.add_argument("--roi", type=Path, metavar="MASK", help="image that is white where to look (the whole image)")
    parser.add_argument(
        "--false-alarm-rate", type=_share, metavar="RATE", help="share of good parts that may be called defective"
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for run folders (results)")
    parser.add_argument("--model", default="OSDIRF", help="another anomalib model, such as Patchcore")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and training (0)")
    return parser


def run(arguments: Sequence[str], weights: Mapping[str, str] | None = None) -> tuple[Path, Path | None]:
    """Train, test, export to OpenVINO and report by the arguments of ``anomalib train``.

    Files in ``weights``, by backbone name, are for models that have no argument for them.

    Returns:
        The run folder and its page, ``None`` where that could not be made.

    Raises:
        ValueError: If the weights are not available.
        ModuleNotFoundError: If packages of the extra ``openvino`` are missing.
    """
    from anomalib.cli import AnomalibCLI

    import anomalib_osdirf.models  # noqa: F401 - the arguments name ours, and there may be no import hook
    from anomalib_osdirf.benchmark.entry import has_an_end, local_weights
    from anomalib_osdirf.data.reading import allow_any_script
    from anomalib_osdirf.export.options import need
    from anomalib_osdirf.report import ReportCallback
    from anomalib_osdirf.report.command import measure_latencies
    from anomalib_osdirf.report.page import PAGE_NAME, write_page_or_warn

    need("openvino", "onnx", "onnxscript")
    allow_any_script()
    with local_weights(weights or {}):
        cli = AnomalibCLI(["train", *arguments], run=False)
        model, engine = cli.model, cli.engine
        if not has_an_end(model):
            raise ValueError(f"--model {model.name} has no training length; use anomalib train --trainer.max_epochs.")
        _load_weights(model)
        callbacks = cli.config_init.train.trainer.callbacks
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if isinstance(callback, ReportCallback):  # page and summary are made when the exported model is there
                callback.page, callback.quiet = False, True
        try:
            engine.train(model, datamodule=cli.datamodule)
        except BaseException:
            _remove_failed(engine)
            raise
        folder = Path(engine.trainer.default_root_dir)
        try:
            engine.export(model, "openvino", export_root=folder, ckpt_path=engine.best_model_path or None)
        except Exception as error:  # noqa: BLE001 - whatever an export fails of, the training is not lost
            logger.warning(
                "%s is not exported to OpenVINO (%s); its checkpoint is complete.", model.name, last_line(error)
            )
        else:
            measure_latencies(folder)
    return folder, write_page_or_warn([folder], folder / PAGE_NAME)


def _arguments(options: argparse.Namespace, parts: Parts) -> tuple[list[str], dict[str, str]]:
    """Return the options as arguments of ``anomalib train``, and weights files by backbone name."""
    from anomalib_osdirf.training.diffusion_training import constructor_parameters

    found = _model_class(options.model)
    takes = constructor_parameters(*found.__mro__)
    model: dict[str, Any] = {}
    if options.image_size is not None:
        model["pre_processor"] = _pre_processor(found, options)
        if "grid_size" in takes:
            model["grid_size"] = options.image_size // _STRIDE
    if options.roi is not None:
        if "roi" not in takes:
            raise ValueError(f"--roi is not for {options.model}; leave it out, or use OSDIRF or InvAD.")
        if not options.roi.is_file():
            raise ValueError(f"--roi {str(options.roi)!r} does not exist; give an image that is white where to look.")
        model["roi"] = str(options.roi.resolve())
    rate = {"false_alarm_rate": options.false_alarm_rate}
    if options.false_alarm_rate is not None and "false_alarm_rate" in takes:
        model |= rate
    elif options.false_alarm_rate is not None:
        path = "anomalib_osdirf.post_processing.FalseAlarmPostProcessor"
        model["post_processor"] = {"class_path": path, "init_args": rate}
    always = {"seed": options.seed, "skip_broken_images": True}
    model |= {name: value for name, value in always.items() if name in takes}
    backbone, weights = _backbone(options, takes)
    data = {**parts.folder_arguments(), "seed": options.seed, "num_workers": min(_WORKERS, os.cpu_count() or 1)}
    values: dict[str, Any] = {
        "model": {"class_path": options.model, "init_args": model | backbone},
        "data": {"class_path": "anomalib.data.Folder", "init_args": data},
        "trainer.callbacks": [{"class_path": "anomalib_osdirf.report.ReportCallback"}],
    }
    arguments = [f"--{name}={json.dumps(value)}" for name, value in values.items()]
    return [*arguments, f"--default_root_dir={options.output}"], weights


def _model_class(name: str) -> Any:
    from anomalib.models.components import AnomalibModule

    import anomalib_osdirf.models  # noqa: F401 - makes ours known

    known = {one.__name__: one for one in AnomalibModule.__subclasses__()}
    if name not in known:
        raise ValueError(f"--model {name} is not an anomalib model; {hint(name, known)}")
    return known[name]


def _backbone(options: argparse.Namespace, takes: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the model's arguments, and weights files by backbone name if the model takes no file."""
    import timm

    given = {name: getattr(options, name) for name in ("backbone", "backbone_weights")}
    for name, value in given.items():
        if value is not None and "backbone" not in takes:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is not for {options.model}, which has no choice of it; leave it out.")
    arguments = {} if options.backbone is None else {"backbone": str(options.backbone)}
    if "backbone" not in takes:
        return arguments, {}
    backbone = options.backbone or takes["backbone"].default
    if options.backbone_weights is not None:
        if not options.backbone_weights.is_file():
            raise ValueError(
                f"--backbone-weights {str(options.backbone_weights)!r} does not exist; give a weights file."
            )
        file = str(options.backbone_weights.resolve())
        if "backbone_weights" in takes:
            return arguments | {"backbone_weights": file}, {}
        return arguments, {backbone: file}
    if "backbone_weights" not in takes:
        try:  # as its constructor will, out of whose error jsonargparse would make something unreadable
            timm.create_model(backbone, pretrained=True)
        except Exception as error:
            raise ValueError(_no_weights(backbone)) from error
    return arguments, {}


def _pre_processor(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return a model's own pre-processing with another image size, as configuration."""
    from torchvision.transforms import v2

    size = (options.image_size, options.image_size)
    configured: list[dict[str, Any]] = []
    for part in model.configure_pre_processor(size).transform.transforms:
        match part:
            case v2.Resize():
                values: dict[str, Any] = {"size": list(size), "antialias": True}
            case v2.Normalize():
                values = {"mean": list(part.mean), "std": list(part.std)}
            case _:
                raise ValueError(
                    f"--image-size {options.image_size} is not for {options.model}, which crops images; omit it."
                )
        configured.append({"class_path": f"torchvision.transforms.v2.{type(part).__name__}", "init_args": values})
    compose = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": configured}}
    return {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": compose}}


def _load_weights(model: Any) -> None:  # any of anomalib's
    """Check that a backbone's weights are available, before anything is written."""
    backbone = getattr(getattr(getattr(model, "model", None), "network", None), "backbone", None)
    if backbone is None or not model.hparams.get("pre_trained"):
        return
    try:
        backbone.load_pretrained(model.hparams["backbone_weights"])
    except RuntimeError as error:
        raise ValueError(_no_weights(backbone.name)) from error


def _no_weights(backbone: str) -> str:
    return (
        f"The weights of {backbone} can't be downloaded; give their file with --backbone-weights, or use "
        "--model OSDIRF --backbone filter_bank, which needs none."
    )


def _remove_failed(engine: Any) -> None:
    """Remove the files of a training that failed before its first checkpoint, and reset ``latest`` to the last run."""
    if engine._trainer is None:  # noqa: SLF001 - its property would raise
        return
    folder = Path(engine.trainer.default_root_dir)
    if any(folder.rglob("*.ckpt")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    latest = folder.parent / "latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
        before = [one for one in folder.parent.glob("v*") if one.name[1:].isdecimal()]
        if before:
            latest.symlink_to(max(before, key=lambda one: int(one.name[1:])), target_is_directory=True)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, such as 0.01")
    return share
