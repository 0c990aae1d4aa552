# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf threshold``: set a model's image threshold, without training or data."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_osdirf.progress import say

_PREFIX = "post_processor."


def main(arguments: Sequence[str], program: str) -> int:
    """Set a threshold."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Set a model's image threshold, without training or data. Scores are normalised anew, such that "
        "it lies at 0.5; maps and masks stay. The report page shows the score to give for a threshold.",
    )
    parser.add_argument("path", type=Path, metavar="MODEL", help=".ckpt or OpenVINO .xml file, or a run folder")
    parser.add_argument("value", type=float, metavar="VALUE", help="the model's own score, above which is anomalous")
    options = parser.parse_args(arguments)
    from anomalib_osdirf.inference.scoring import find_model

    file = find_model(options.path)
    set_threshold(file, options.value)
    say(f"Image threshold {options.value:g} set in {file}.")
    return 0


def set_threshold(file: Path, value: float) -> None:
    """Set the image threshold in a ``.ckpt`` file of any anomalib model, or an OpenVINO export of ours."""
    if not math.isfinite(value):
        raise ValueError(f"VALUE {value} is no finite number; give a score.")
    if file.suffix == ".ckpt":
        _set_in_checkpoint(file, value)
    elif file.suffix == ".xml":
        _set_in_openvino(file, value)
    else:
        msg = f"MODEL {str(file)!r} can't be changed; set the threshold in its checkpoint, and export that again."
        raise ValueError(msg)


def _move(post_processor: Any, value: float) -> None:  # anomalib's or ours
    post_processor.image_sensitivity = 0.5
    if hasattr(post_processor, "move_image_threshold"):
        post_processor.move_image_threshold(value)
    else:
        post_processor._image_threshold.fill_(value)  # noqa: SLF001 - anomalib has no other way


def _post_processor(ours: bool) -> Any:
    from anomalib.post_processing import PostProcessor

    from anomalib_osdirf.post_processing import FalseAlarmPostProcessor

    return FalseAlarmPostProcessor() if ours else PostProcessor()


def _set_in_checkpoint(file: Path, value: float) -> None:
    import torch
    from anomalib.utils.serialization import anomalib_safe_globals

    from anomalib_osdirf.training.checkpoint_files import CheckpointFiles, plain_data_only

    with anomalib_safe_globals(), plain_data_only(file):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    state, config = checkpoint["state_dict"], checkpoint.get("anomalib_post_processor_config") or {}
    saved = {name.removeprefix(_PREFIX): one for name, one in state.items() if name.startswith(_PREFIX)}
    if "_image_threshold" not in saved:
        msg = f"MODEL {str(file)!r} has no thresholds, as it was trained without a post-processor; train with one."
        raise ValueError(msg)
    post_processor = _post_processor("false_alarm_rate" in config)
    post_processor.load_state_dict(saved, strict=False)
    post_processor.load_checkpoint_config(config)
    _move(post_processor, value)
    state.update({_PREFIX + name: one for name, one in post_processor.state_dict().items() if name in saved})
    checkpoint["anomalib_post_processor_config"] = post_processor.checkpoint_config()
    CheckpointFiles().save_checkpoint(checkpoint, file)


def _set_in_openvino(file: Path, value: float) -> None:
    import openvino
    import torch

    from anomalib_osdirf.export import metadata
    from anomalib_osdirf.export.files import move_export, unfinished_export
    from anomalib_osdirf.export.post_processing import append_post_processor, without_post_processor

    values = metadata.read_json(file)
    network = openvino.Core().read_model(file.read_bytes(), file.with_suffix(".bin").read_bytes())
    bare = without_post_processor(network) if values.get("post_processor") else network
    if bare is None or values.get("image_threshold") is None:
        raise ValueError(
            f"MODEL {str(file)!r} was not exported by this package with its thresholds; set the threshold in its "
            "checkpoint, and export that again."
        )
    post_processor = _post_processor("calibration" in values)
    saved = metadata.post_processing_state(values)
    post_processor.load_state_dict({name: torch.tensor(one) for name, one in saved.items()}, strict=False)
    for name in metadata.description(post_processor):
        setattr(post_processor, name, values.get(name, getattr(post_processor, name)))
    _move(post_processor, value)
    values |= metadata.post_processing_values(post_processor.state_dict()) | metadata.description(post_processor)
    if bare is not network:
        network = append_post_processor(bare, post_processor)
    metadata.write_openvino(values, network)
    with unfinished_export(file.parent, f"threshold-{file.stem}") as folder:
        openvino.save_model(network, folder / file.name, compress_to_fp16=False)
        metadata.write_json(values, folder / file.name)
        move_export(folder, file.parent, Path(file.name))
