# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_osdirf``: anomalib's command line with our models present, and subcommands of our own.

It needs no import hook, so it works where ``.pth`` files are not read (``python -S``, ``pip install --target``).
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table

from anomalib_osdirf.arguments import fail, hint, is_anomalibs
from anomalib_osdirf.terminal import VERBOSE, mistake, verbose, without_noise

PROGRAM = "python -m anomalib_osdirf"

# Subcommand: the module whose `main` runs it, and a line of help. It takes the rest of the command line and the name
# for help and errors, and returns the exit status; errors that the user can fix become one line in `main` below.
SUBCOMMANDS = {
    "train": ("anomalib_osdirf.train", "Train on a folder of parts, test, export and report, all into one folder."),
    "predict": ("anomalib_osdirf.predict", "Score images, a video or a camera with a checkpoint or an exported model."),
    "quickstart": ("anomalib_osdirf.quickstart", "Train, test and export OSDIRF on the embedded data set."),
    "threshold": ("anomalib_osdirf.threshold", "Set the image threshold of a checkpoint or an OpenVINO export."),
    "verify": ("anomalib_osdirf.verify", "Compare exported models with the checkpoint that they are of."),
    "benchmark": (
        "anomalib_osdirf.benchmark",
        "Compare models: accuracy, time, memory, size and speed (replaces anomalib's command of this name).",
    ),
    "report": ("anomalib_osdirf.report.command", "Make one page about one or more tested models."),
    "app": ("anomalib_osdirf.app.command", "Try a model in the browser."),
    "score": ("anomalib_osdirf.bulk.command", "Score many images with an exported model, on one machine or a cluster."),
    "doctor": ("anomalib_osdirf.doctor", "Check this installation and suggest a fix for each problem."),
}

# anomalib's own, which this program hands on: those of both names where their arguments are anomalib's.
ANOMALIB_SUBCOMMANDS = ("train", "test", "predict", "export", "fit", "validate", "install")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of our subcommands, or else anomalib's command line; return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if "--verbose" in arguments and command != "install":
        arguments.remove("--verbose")
        os.environ[VERBOSE] = "1"
    if command in {"-h", "--help"}:
        _print_help()
        return 0
    known = [*SUBCOMMANDS, *ANOMALIB_SUBCOMMANDS]
    if not command.startswith("-") and command not in known:
        end = hint(command, known, f"`{PROGRAM} --help` lists them.")
        return fail(PROGRAM, f"there is no command {command!r}; {end}", 2)
    program = f"{PROGRAM} {command}"
    try:
        if command in SUBCOMMANDS and not (command in ANOMALIB_SUBCOMMANDS and is_anomalibs(arguments[1:])):
            module, _ = SUBCOMMANDS[command]
            with without_noise():
                return int(import_module(module).main(arguments[1:], program))
        _run_anomalib(arguments)
    except Exception as error:
        sentence = None if verbose() else mistake(error)
        if sentence is None:
            raise
        return fail(program, sentence)
    return 0


def _print_help() -> None:
    table = Table.grid(padding=(0, 2))
    for name, (_, text) in SUBCOMMANDS.items():
        table.add_row(f"  {name}", text)
    names = ", ".join(name for name in ANOMALIB_SUBCOMMANDS if name not in SUBCOMMANDS)
    console = Console(highlight=False)
    console.print(f"Usage: {PROGRAM} COMMAND [--verbose] ...\n", markup=False)
    console.print(table)
    console.print(
        f"\nanomalib's commands, with the models of this package: {names}.\n"
        f"`{PROGRAM} COMMAND --help` explains one. --verbose shows all messages of other libraries, and tracebacks; "
        f"`anomalib` itself does so with {VERBOSE}=1 in the environment.",
        markup=False,
    )


def _run_anomalib(arguments: Sequence[str]) -> None:
    # Imported here so that `doctor` can run, and tell why, where anomalib can't be imported.
    try:
        with without_noise():
            import_module("anomalib_osdirf.models")
            from anomalib.cli import AnomalibCLI
            from anomalib.loggers import configure_logger
    except ImportError as error:
        message = f"{PROGRAM} can't start, because an import failed: {error}. Run `{PROGRAM} doctor` to see what to do."
        raise SystemExit(message) from error
    from jsonargparse import ArgumentParser

    class CommandLine(AnomalibCLI):
        """anomalib's command line under our program name."""

        @staticmethod
        def init_parser(**kwargs: object) -> ArgumentParser:
            """Make anomalib's parser, with the name that this program was started by."""
            return AnomalibCLI.init_parser(**{"prog": PROGRAM, **kwargs})

    configure_logger()
    CommandLine(arguments)


if __name__ == "__main__":
    sys.exit(main())
