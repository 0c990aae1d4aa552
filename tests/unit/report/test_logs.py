# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Losses out of the logs that Lightning's loggers write."""

import os
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from anomalib_osdirf.report import logs
from anomalib_osdirf.report.logs import read_losses

LOSSES = [(0, 2.0), (50, 1.0), (100, 0.5)]


def _log(logger: Logger, name: str = "train_loss") -> None:
    for step, loss in LOSSES:
        logger.log_metrics({name: loss, "epoch": 0}, step)
    logger.log_metrics({"image_AUROC": 0.9}, 100)
    logger.save()
    logger.finalize("success")


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("name", ["train_loss", "train_loss_step", "loss"])
def test_losses_of_lightnings_loggers(tmp_path: Path, kind: type[CSVLogger | TensorBoardLogger], name: str) -> None:
    _log(kind(tmp_path, name="logs"), name)
    np.testing.assert_allclose(read_losses(tmp_path), LOSSES)


def test_the_last_log_with_losses_counts(tmp_path: Path) -> None:
    for number, text in enumerate(["step,train_loss\n1,9\n", "step,train_loss\n1,3\n", "step,image_AUROC\n1,0.5\n"]):
        file = tmp_path / f"version_{number}" / "metrics.csv"
        file.parent.mkdir()
        file.write_text(text, "utf-8")
        os.utime(file, (number, number))
    np.testing.assert_array_equal(read_losses(tmp_path), [(1, 3)])


def test_what_a_killed_training_leaves(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"epoch,step,train_loss\n0,1,0.5\n0,2,\n\xff\x00,3,0.25\n0,4")
    np.testing.assert_array_equal(read_losses(tmp_path), [(1, 0.5), (3, 0.25)])


def test_without_tensorboard_its_logs_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _log(TensorBoardLogger(tmp_path, name="logs"))
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    assert read_losses(tmp_path).shape == (0, 2)
    assert read_losses(tmp_path / "nothing").shape == (0, 2)
