# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What a command leaves out of the terminal: other libraries' messages, and tracebacks around a user's mistake."""

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
from typing import Any, TextIO

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
    """Tell whether the user wants to see everything, by ``--verbose`` or ``ANOMALIB_OSDIRF_VERBOSE=1``."""
    return os.environ.get(VERBOSE, "") not in {"", "0"}


def is_quiet() -> bool:
    """Tell whether :func:`quiet` is in force."""
    return _state["quiet"]


@contextmanager
def quiet(level: int = logging.INFO) -> Iterator[None]:
    """Print this package's messages once and plainly, and of all others' only warnings that matter.

    Where the user wants everything (:func:`verbose`), it prints all messages.

    Args:
        level: Least level of the messages.
    """
    import lightning.pytorch  # noqa: F401 - with it come the handlers of its loggers

    if verbose() or is_quiet():
        logging.basicConfig(level=level)
        yield
        return
    handler = logging.StreamHandler()
    handler.setLevel(level)
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
    """Print warnings in a line each, and none that are for developers or ask for nothing."""
    with warnings.catch_warnings():
        if not verbose():
            warnings.showwarning = _show_warning
        yield


class _Plain(logging.Formatter):
    """The message alone, after ``Warning:`` where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {text}"


def _matters(record: logging.LogRecord) -> bool:
    return record.name.startswith(_PACKAGE) or record.levelno >= logging.WARNING


def _silence(logger: logging.Logger) -> Any:  # noqa: ANN401 - a function that undoes it
    """Take away what prints a logger's messages in the terminal, and have the root logger print them."""
    kept, propagate = list(logger.handlers), logger.propagate
    logger.handlers[:] = [handler for handler in kept if type(handler) not in {logging.StreamHandler, RichHandler}]
    logger.propagate = True

    def restore() -> None:
        logger.handlers[:], logger.propagate = kept, propagate

    return restore


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del filename, lineno, file, line
    for_developers = issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
    if not for_developers and not _NOISE.match(str(message)) and category.__name__ != "PossibleUserWarning":
        print(f"Warning: {message}", file=sys.stderr)  # noqa: T201


# ------------------------------------------------------------------ errors


def mistake(error: BaseException) -> str | None:
    """Return the sentence of an error that a user can mend.

    It is of a class of this package, or is raised on purpose by it or by what reads folders and checkpoints, or is
    jsonargparse's about a model of this package, or tells of a file that can't be written.

    Args:
        error: What was raised.

    Returns:
        The sentence, ``None`` for a bug.
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
        sentence = " ".join(re.sub(r"DirType\.(\w+)", lambda kind: kind[1].lower(), text).split())
        if module.startswith("anomalib.data") and not isinstance(error, ValueError):
            sentence += "; check --data.root and the folders in it, such as --data.normal_dir."
        return sentence
    if frame.f_code.co_name in {"_create_test_split", "_create_val_split"}:
        return (
            f"{counted(len(frame.f_locals['self'].train_data), 'normal image')} can't be shared out among training, "
            "validation and test; add normal images (five are enough), or use --data.test_split_mode none "
            "--data.val_split_mode none."
        )
    reason = why_unwritable(error)
    if reason is None or not isinstance(error, OSError):
        return None
    where = f": {str(error.filename)!r}" if error.filename else ""
    return f"{reason}{where}; make room there, or write to another folder."


def _is_raise(frame: Any, line: int) -> bool:  # noqa: ANN401
    """Tell whether an error was raised by a statement, not by a call that went wrong."""
    return linecache.getline(frame.f_code.co_filename, line, frame.f_globals).lstrip().startswith("raise ")


def _about_our_model(message: str) -> str | None:
    """Take the sentence about a model of ours out of a message of jsonargparse, which adds all its arguments."""
    found = _UNION.search(message)
    if found is None or f"{_PACKAGE}." not in message:
        return None
    return " ".join(re.split(r"\n\s*- ", f"\n{found[1]}")[-1].split())


def _nearest_model(message: str) -> str | None:
    """Suggest a model of ours for a misspelt one."""
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
    """Tell whether this process is ``anomalib`` or ``python -m anomalib_osdirf``, on one model."""
    program = Path(sys.argv[0] if sys.argv else "")
    started = program.stem == "anomalib" or (program.name == "__main__.py" and program.parent.name == _PACKAGE)
    return started and sys.argv[1:2] != ["benchmark"] and not verbose()


def take_over() -> None:
    """From the making of one of our models on, keep anomalib's command line quiet, and its errors short."""
    if is_command_line() and not is_quiet():
        _rest_of_process.enter_context(quiet())
        sys.excepthook = partial(_show_error, sys.excepthook)


def _show_error(
    other: Any,  # noqa: ANN401 - the hook that was there
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    sentence = mistake(error)
    if sentence is None:
        other(kind, error, trace)
    else:
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201


def shorten_parser_errors() -> None:
    """In anomalib's command line, have jsonargparse say in a sentence what is wrong with a model of ours."""
    if not is_command_line():
        return
    from jsonargparse import ArgumentParser

    original = ArgumentParser.error

    def error(parser: Any, message: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        sentence = _nearest_model(message) or _about_our_model(message)
        if sentence is None:
            original(parser, message, *args, **kwargs)
        else:
            print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
            parser.exit(2)

    ArgumentParser.error = error  # type: ignore[method-assign,assignment]
