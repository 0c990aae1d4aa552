# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What is a user's mistake and what is a bug, and what is left out of the terminal."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.logging import RichHandler

from anomalib_osdirf.data.reading import BrokenFileError
from anomalib_osdirf.features import coarse
from anomalib_osdirf.features.backbone import build_backbone
from anomalib_osdirf.terminal import mistake, quiet


def _raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError


def test_an_error_that_this_package_raises_is_a_mistake() -> None:
    sentence = mistake(_raised(lambda: build_backbone("resnet", None, 4)))
    assert sentence is not None
    assert "backbone='resnet'" in sentence


def test_an_error_of_a_dataloader_s_worker_is_one_too() -> None:
    assert mistake(BrokenFileError("Original Traceback\n  BrokenFileError: 'a.png' is empty.")) == "'a.png' is empty."


@pytest.mark.parametrize(
    "call",
    [
        lambda: coarse(torch.zeros(0)),  # torch's error, in a function of this package
        lambda: build_backbone(None, None, 4),  # type: ignore[arg-type]
        lambda: int("no number"),
    ],
)
def test_a_bug_is_none(call: Callable[[], object]) -> None:
    assert mistake(_raised(call)) is None


@pytest.fixture
def console() -> Iterator[None]:
    """Have messages printed twice, as anomalib does."""
    root = logging.getLogger()
    handlers, level = [logging.StreamHandler(sys.stderr), RichHandler()], root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    yield
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def test_quiet_prints_our_messages_and_others_warnings_once(console: None, capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        for name in ("anomalib_osdirf.scorer", "anomalib.engine", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).info("info of %s", name)
        logging.getLogger("anomalib.data").warning("a warning")
        for category in (DeprecationWarning, UserWarning):
            warnings.warn(f"python's {category.__name__}", category, stacklevel=1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "info of anomalib_osdirf.scorer",
        "Warning: a warning",
        "Warning: python's UserWarning",
    ]


def test_quiet_leaves_everything_as_it_was(console: None) -> None:
    loggers = [logging.getLogger(name) for name in ("", "lightning.pytorch", "torch.onnx", "nncf", "anomalib_osdirf")]

    def state() -> list[object]:
        return [(list(one.handlers), list(one.filters), one.level, one.propagate) for one in loggers]

    before, shown = state(), warnings.showwarning
    with quiet():
        assert state() != before
    assert state() == before
    assert warnings.showwarning is shown
