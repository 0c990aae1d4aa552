# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Terminal output: hides other libraries' messages, and reports a user's mistake without a traceback."""

import linecache
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.logging import RichHandler

from anomalib_osdirf.disk import why_unwritable
from anomalib_osdirf.progress import counted

VERBOSE = "ANOMALIB_OSDIRF_VERBOSE"
_PACKAGE = "anomalib_osdirf"
_MISTAKES = (ValueError, RuntimeError, OSError, ImportError)
# Where an error that is raised on purpose is about a user's arguments or files.
_CHECKS = (_PACKAGE, "anomalib.data", "lightning.fabric.plugins.io")
# Those with a handler of their own; the copies of lightning's packages share a logger.
_LOGGERS = ("", "lightning", "lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")
_LEVELS = {_PACKAGE: logging.INFO, "torch.onnx": logging.ERROR, "torch.utils.cpp_extension": logging.ERROR}
# Warnings that ask for nothing, by how they begin.
_NOISE = re.compile("This DataLoader will create|# The axis name: |The ``compute`` method of metric")
_UNION = re.compile(r"\n\s*Errors:\n(.*?)\n\s*Given value type:", re.DOTALL)
_UNKNOWN_MODEL = re.compile(r'Parser key "model".*Expected a dot import path string: (\w+)\n', re.DOTALL)
_state = {"quiet": False}
_rest_of_process = ExitStack()


def verbose() -> bool:
    """Return whether all messages are shown (``--verbose`` or ``ANOMALIB_OSDIRF_VERBOSE=1``)."""
    return os.environ.get(VERBOSE, "") not in {"", "0"}


def is_quiet() -> bool:
    """Return whether :func:`quiet` is active."""
    return _state["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Print this package's messages, and only relevant warnings of other packages; all where :func:`verbose`."""
    import lightning.pytorch  # noqa: F401 - with it come the handlers of its loggers

    if verbose() or is_quiet():
        logging.basicConfig(level=logging.INFO)
        yield
        return
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(_Plain())
    handler.addFilter(_matters)
    root, nncf = logging.getLogger(), logging.getLogger("nncf")
    with ExitStack() as stack, without_noise():
        for name in _LOGGERS:
            stack.callback(_silence(logging.getLogger(name)))
        for name, least in _LEVELS.items():
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(least)
        nncf.addFilter(_matters)  # it sets its level when it is imported
        stack.callback(nncf.removeFilter, _matters)
        root.addHandler(handler)
        stack.callback(root.removeHandler, handler)
        stack.callback(_state.update, quiet=False)
        _state["quiet"] = True
        yield


@contextmanager
def without_noise() -> Iterator[None]:
    """Print each warning in one line; skip those for developers and those that need no action."""
    with warnings.catch_warnings():
        if not verbose():
            warnings.showwarning = _show_warning
        yield


class _Plain(logging.Formatter):
    """Formats a record as its message, with the prefix ``Warning:`` for warnings."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {text}"


def _matters(record: logging.LogRecord) -> bool:
    return record.name.startswith(_PACKAGE) or record.levelno >= logging.WARNING


def _silence(logger: logging.Logger) -> Any:  # a function that undoes it
    """Replace a logger's terminal handlers by propagation to the root logger."""
    kept, propagate = list(logger.handlers), logger.propagate
    logger.handlers[:] = [handler for handler in kept if type(handler) not in {logging.StreamHandler, RichHandler}]
    logger.propagate = True

    def restore() -> None:
        logger.handlers[:], logger.propagate = kept, propagate

    return restore


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    for_developers = issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
    if not for_developers and not _NOISE.match(str(message)) and category.__name__ != "PossibleUserWarning":
        print(f"Warning: {message}", file=sys.stderr)  # noqa: T201


# ------------------------------------------------------------------ errors


def mistake(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix, or ``None`` for a bug.

    These are errors raised by this package or by anomalib's and Lightning's readers of folders and checkpoints,
    jsonargparse's errors about a model of this package, and failures to write a file.
    """
    if not isinstance(error, _MISTAKES):
        return None
    of_parser = _about_our_model(str(error))
    if of_parser is not None:
        return of_parser
    frame, line = [(sys._getframe(), 0), *traceback.walk_tb(error.__traceback__)][-1]  # noqa: SLF001
    module = str(frame.f_globals.get("__name__"))
    if type(error).__module__.startswith(_PACKAGE) or (module.startswith(_CHECKS) and _is_raise(frame, line)):
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        sentence = " ".join(re.sub(r"DirType\.(\w+)", lambda found: found[1].lower(), text).split())
        if module.startswith("anomalib.data") and not isinstance(error, ValueError):
            sentence += "; check --data.root and the folders in it, such as --data.normal_dir."
        return sentence
    if frame.f_code.co_name in {"_create_test_split", "_create_val_split"}:
        return (
            f"{counted(len(frame.f_locals['self'].train_data), 'normal image')} can't be split into training, "
            "validation and test; add normal images (five are enough), or use --data.test_split_mode none "
            "--data.val_split_mode none."
        )
    reason = why_unwritable(error)
    if reason is None or not isinstance(error, OSError):
        return None
    where = f": {str(error.filename)!r}" if error.filename else ""
    return f"{reason}{where}; make room there, or write to another folder."


def _is_raise(frame: Any, line: int) -> bool:
    """Return whether a line is a ``raise`` statement."""
    return linecache.getline(frame.f_code.co_filename, line, frame.f_globals).lstrip().startswith("raise ")


def _about_our_model(message: str) -> str | None:
    """Extract the sentence about one of our models from jsonargparse's message, which lists all arguments."""
    found = _UNION.search(message)
    if found is None or f"{_PACKAGE}." not in message:
        return None
    return " ".join(re.split(r"\n\s*- ", f"\n{found[1]}")[-1].split())


def _nearest_model(message: str) -> str | None:
    """Suggest one of our models for a misspelt name."""
    found = _UNKNOWN_MODEL.search(message)
    if found is None:
        return None
    from anomalib.models.components import AnomalibModule

    models = {model.__name__.lower(): model for model in AnomalibModule.__subclasses__()}
    close = get_close_matches(found[1].lower(), models, n=1)
    if not close or not models[close[0]].__module__.startswith(_PACKAGE):
        return None
    return f"--model {found[1]} is unknown; did you mean {models[close[0]].__name__}?"


# ------------------------------------------------------------------ anomalib's command line


def is_command_line() -> bool:
    """Return whether this process is ``anomalib`` or ``python -m anomalib_osdirf`` with a single model."""
    program = Path(sys.argv[0] if sys.argv else "")
    started = program.stem == "anomalib" or (program.name == "__main__.py" and program.parent.name == _PACKAGE)
    return started and sys.argv[1:2] != ["benchmark"] and not verbose()


def quiet_command_line() -> None:
    """Reduce the output and the errors of anomalib's command line, once one of our models is created."""
    if is_command_line() and not is_quiet():
        _rest_of_process.enter_context(quiet())
        sys.excepthook = partial(_show_error, sys.excepthook)


def _show_error(
    other: Any,  # the hook that was there
    category: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    sentence = mistake(error)
    if sentence is None:
        other(category, error, trace)
    else:
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201


def shorten_parser_errors() -> None:
    """Shorten jsonargparse's errors about our models to one sentence in anomalib's command line."""
    if not is_command_line():
        return
    from jsonargparse import ArgumentParser

    original = ArgumentParser.error

    def error(parser: Any, message: str, *args: Any, **kwargs: Any) -> None:
        sentence = _nearest_model(message) or _about_our_model(message)
        if sentence is None:
            original(parser, message, *args, **kwargs)
        else:
            print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
            parser.exit(2)

    ArgumentParser.error = error  # type: ignore[method-assign,assignment]
