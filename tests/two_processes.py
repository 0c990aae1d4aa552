# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Trainings that are the same in one process and in two.

``python two_processes.py <data> <output>`` makes them in two; Lightning starts the second by running this again.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.models import field_network
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.report import ReportCallback
from conftest import TINY, Losses, any_denoiser_is_kept, pre_processor
from small_data import small_folder

WHOLE_BATCH = 4  # nine images: the second process has four of them, and none in an epoch's last batch
DIFFUSION_AD: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_levels": 1,
    "segmentation_channels": 8,
    "max_steps": 4,
    "seed": 0,
    "pre_processor": DiffusionAD.configure_pre_processor((64, 64)),
}


def tiny(model_class: Any, **arguments: Any) -> Any:
    """Make a small model on frozen features, of the same weights wherever it is made."""
    arguments = {"learning_rate": 1e-2, **arguments}
    return model_class(**{**TINY, "max_steps": 8, "seed": 0, "pre_processor": pre_processor(), **arguments})


def train(model: Any, data: Path, output: Path, devices: int, more: bool = False) -> dict[str, Any]:
    """Train, test and predict, and return what came of it in this process; more is a test by categories."""
    keeper = Losses()
    engine = Engine(
        default_root_dir=output,
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keeper, ReportCallback(page=False, quiet=True)],
    )
    datamodule: Any = small_folder(data, train_batch_size=WHOLE_BATCH // devices, eval_batch_size=2)
    with any_denoiser_is_kept():
        metrics = engine.train(model, datamodule=datamodule)[0]
    by_category = {}
    if more:
        both = MultiCategory({"bolts": small_folder(data), "nuts": small_folder(data / "nuts")}, eval_batch_size=2)
        by_category = dict(engine.test(model, datamodule=both)[0])
    batches = engine.predict(model, datamodule=datamodule) or []
    return {
        "state": model.state_dict(),
        "checkpoint": str(engine.best_model_path),
        "losses": keeper.losses,
        "metrics": dict(metrics),
        "by_category": by_category,
        "scores": {item.image_path: float(item.pred_score) for batch in batches for item in batch},
    }


def state_in_float64(data: Path, output: Path, devices: int) -> dict[str, Any]:
    """Train a mixture in float64, in which rounding is too small to matter, and return its state."""
    model, strategy = tiny(OSDIRF, density="mixture"), "auto" if devices == 1 else "ddp"
    arguments: dict[str, Any] = {"enable_progress_bar": False, "logger": False, "precision": "64-true"}
    engine = Engine(default_root_dir=output, accelerator="cpu", devices=devices, strategy=strategy, **arguments)
    with any_denoiser_is_kept():
        engine.fit(model, datamodule=small_folder(data, train_batch_size=WHOLE_BATCH // devices, eval_batch_size=2))
    state: dict[str, Any] = model.state_dict()
    return state


def main(data: Path, output: Path) -> None:
    """Train each model in two processes, and save what came of it in each."""
    field_network._has_bfloat16 = lambda: False  # which rounds differences up
    for name, model in models().items():
        result = train(model, data, output / name, 2, more=name == "OSDIRF")
        torch.save(result, output / f"{name}-{model.global_rank}.pt")
    torch.save(state_in_float64(data, output / "float64", 2), output / f"float64-{model.global_rank}.pt")


def models() -> dict[str, Any]:
    """Make the models that are trained."""
    return {
        "OSDIRF": tiny(OSDIRF),
        "InvAD": tiny(InvAD, feature_cache=False),
        "mixture": tiny(OSDIRF, density="mixture"),
        "calibrated": tiny(OSDIRF, post_processor=FalseAlarmPostProcessor(0.2, images="training")),
        "DiffusionAD": DiffusionAD(**DIFFUSION_AD),
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
