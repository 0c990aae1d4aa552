# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Progress of a run, reported to the process that waits for it."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_osdirf.progress import images_in

HEARTBEAT = "heartbeat.txt"
_SECONDS = 1.0


class Heartbeat(Callback):
    """Writes the phase and its images per second into a file, about once a second."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._phase = ""
        self._images = 0
        self._start = self._written = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Count a training batch."""
        self._count("training", args[1])

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Count a validation batch."""
        self._count("validation", args[1])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Count a test batch."""
        self._count("test", args[1])

    def _count(self, phase: str, batch: object) -> None:
        now = time.perf_counter()
        if phase != self._phase:  # its first batch starts the clock
            self._phase, self._images, self._start = phase, 0, now
            return
        self._images += images_in(batch)
        if now - self._written >= _SECONDS:
            self._written = now
            rate = self._images / max(now - self._start, 1e-9)
            self.file.write_text(f"{phase}, {rate:.1f} images/s", encoding="utf-8")
