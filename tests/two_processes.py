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
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.data import MultiCategory
from anomalib_osdirf.report import ReportCallback
from conftest import TINY, Losses, pre_processor
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
    return model_class(**{**TINY, "max_steps": 8, "seed": 0, "pre_processor": pre_processor(), **arguments})


def train(
    model: Any, data: Path, output: Path, devices: int, strategy: Any = "auto", more: bool = False
) -> dict[str, Any]:
    """Train, test and predict, and return what came of it in this process.

    More is a test as InvAD, whose read-out is fitted on the fly, and one by categories.
    """
    keeper = Losses()
    engine = Engine(
        default_root_dir=output,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keeper, ReportCallback(page=False, quiet=True)],
    )
    datamodule: Any = small_folder(data, train_batch_size=WHOLE_BATCH // devices, eval_batch_size=2)
    metrics = engine.train(model, datamodule=datamodule)[0]
    as_relative, by_category = {}, {}
    if more:
        as_relative = dict(engine.test(tiny(InvAD), datamodule=datamodule, ckpt_path=engine.best_model_path)[0])
        both = MultiCategory({"bolts": small_folder(data), "nuts": small_folder(data / "nuts")}, eval_batch_size=2)
        by_category = dict(engine.test(model, datamodule=both)[0])
    batches = engine.predict(model, datamodule=datamodule) or []
    state = model.state_dict()
    return {
        "state": {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()},
        "checkpoint": str(engine.best_model_path),
        "losses": keeper.losses,
        "metrics": dict(metrics),
        "as_relative": as_relative,
        "by_category": by_category,
        "scores": {item.image_path: float(item.pred_score) for batch in batches for item in batch},
    }


def main(data: Path, output: Path) -> None:
    """Train each model in two processes, and save what came of it in each."""
    models = {
        "OSDIRF": tiny(OSDIRF),
        "uncached": tiny(OSDIRF, feature_cache=False),
        "InvAD": tiny(InvAD, density="position_full", shrinkage="auto"),
        "position_full": tiny(OSDIRF, density="position_full"),
        "DiffusionAD": DiffusionAD(**DIFFUSION_AD),
        "sharded": tiny(OSDIRF, gradient_checkpointing=True),
    }
    for name, model in models.items():
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if name == "sharded" else "ddp"
        result = train(model, data, output / name, 2, strategy, more=name == "OSDIRF")
        torch.save(result, output / f"{name}-{model.global_rank}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
