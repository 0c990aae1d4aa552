# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Throughput and remaining time of a whole training, which Lightning's progress bar lacks."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console

from anomalib_osdirf.progress import duration, has_bars, images_in, of_processes, say, summary

_SECONDS_BETWEEN_LINES = 15.0
_MOST_LINES = 3  # of a training whose end is known


class TrainingProgress(Callback):
    """Adds images per second and seconds left to the bar of a training, and replaces bars by lines in a log file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch Lightning's bar off where it can't be drawn: it would fill a log file."""
        bar = trainer.progress_bar_callback
        self.visible = bar is not None and trainer.is_global_zero
        self.plain = not has_bars(Console())
        if self.plain and isinstance(bar, TQDMProgressBar | RichProgressBar):
            bar.disable()
        name = {"fit": "Training", "test": "Test", "predict": "Prediction"}.get(stage, stage)
        self.name = of_processes(name, trainer.world_size)

    def _begin(self) -> None:
        self.start = self.last_line = time.perf_counter()
        self.images = 0

    def _end(self) -> None:
        if self.visible and self.plain:
            say(f"{self.name}: {summary(self.images, time.perf_counter() - self.start)}.")

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin()
        self.first_step = trainer.global_step
        self.steps = trainer.estimated_stepping_batches
        if self.visible and self.plain:
            say(f"{self.name}: {self._steps_left(trainer)} steps.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Show throughput and remaining time."""
        outputs, batch = args[:2]
        del outputs, kwargs
        self.images += images_in(batch)
        if not self.visible:
            return
        now = time.perf_counter()
        speed = self.images / (now - self.start)
        left = (now - self.start) / max(1, trainer.global_step - self.first_step) * self._steps_left(trainer)
        if not self.plain:
            figures = {"images/s": speed} | ({"seconds_left": left} if math.isfinite(left) else {})
            pl_module.log_dict(figures, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        elif now - self.last_line > self._seconds_between_lines(now, left):
            self.last_line = now
            rest = f", {duration(left)} left" if math.isfinite(left) else ""
            say(f"{self.name}: step {trainer.global_step}, {speed:.1f} images/s{rest}.")

    def _seconds_between_lines(self, now: float, left: float) -> float:
        if not math.isfinite(left):
            return _SECONDS_BETWEEN_LINES
        return max(_SECONDS_BETWEEN_LINES, (now - self.start + left) / _MOST_LINES)

    def _steps_left(self, trainer: Trainer) -> float:
        return self.steps - trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the duration."""
        self._end()

    # ------------------------------------------------------------------ test, prediction

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count images."""
        del kwargs
        self.images += images_in(args[1])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the duration."""
        self._end()

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_epoch_end = on_test_epoch_end
