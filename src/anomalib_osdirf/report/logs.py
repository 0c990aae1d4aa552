# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training losses out of the logs that Lightning's CSV and TensorBoard loggers leave in a results folder."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_CSV, _EVENTS = "metrics.csv", "events.out.tfevents.*"
# As Lightning names what is logged at each step, at each epoch's end, or both.
_NAMES = ("train_loss_step", "train_loss", "loss_step", "loss", "train_loss_epoch", "loss_epoch")


def find_logs(folder: Path) -> list[Path]:
    """List logs in CSV and TensorBoard's format below a folder, the newest first."""
    logs = [path for pattern in (_CSV, _EVENTS) for path in folder.rglob(pattern) if path.is_file()]
    return sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)


def read_losses(folder: Path) -> NDArray[np.float64]:
    """Read the losses of the last training that was logged below a folder.

    Args:
        folder: Results folder. Logs in TensorBoard's format are left out where tensorboard is not installed.

    Returns:
        Steps and losses, ``(N, 2)``; none where no log that can be read has any.
    """
    for log in find_logs(folder):
        found = _from_csv(log) if log.name == _CSV else _from_events(log)
        if len(found):
            return found
    return np.zeros((0, 2))


def _from_csv(log: Path) -> NDArray[np.float64]:
    try:
        table = pd.read_csv(log, dtype=str, encoding_errors="replace", on_bad_lines="skip")
    except pd.errors.EmptyDataError:
        return np.zeros((0, 2))
    name = _loss_name(table.columns)
    if name is None or "step" not in table:
        return np.zeros((0, 2))
    # Rows of other metrics have no loss, a killed training's last row may be cut off.
    numbers = table[["step", name]].apply(pd.to_numeric, errors="coerce").dropna()
    found: NDArray[np.float64] = numbers.to_numpy(np.float64)
    return found


def _from_events(log: Path) -> NDArray[np.float64]:
    if find_spec("tensorboard") is None:
        return np.zeros((0, 2))
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(log), size_guidance={SCALARS: 0}).Reload()
    name = _loss_name(events.Tags()[SCALARS])
    scalars = events.Scalars(name) if name else []
    return np.array([(event.step, event.value) for event in scalars], dtype=np.float64).reshape(-1, 2)


def _loss_name(names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in _NAMES if name in there), None)
