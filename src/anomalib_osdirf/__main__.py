# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_osdirf``: anomalib's command line with our models present, and subcommands of our own.

It needs no import hook, so it works where ``.pth`` files are not read (``python -S``, ``pip install --target``).
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from anomalib_osdirf.disk import why_unwritable

PROGRAM = "python -m anomalib_osdirf"

# Subcommand: the module whose `main(arguments) -> exit status` runs it, and a line of help.
SUBCOMMANDS = {
    "quickstart": ("anomalib_osdirf.quickstart", "Train, test and export OSDIRF on the embedded data set."),
    "benchmark": (
        "anomalib_osdirf.benchmark",
        "Compare models: accuracy, time, memory, size and speed (in the place of anomalib's, which `anomalib` has).",
    ),
    "report": ("anomalib_osdirf.report.command", "Make one page about one or more tested models."),
    "app": ("anomalib_osdirf.app.command", "Try a model in the browser."),
    "score": ("anomalib_osdirf.bulk.command", "Score many images with an exported model, on one machine or a cluster."),
    "doctor": ("anomalib_osdirf.doctor", "Check this installation and say what to do where something is amiss."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of our subcommands, or else anomalib's command line.

    Args:
        arguments (Sequence[str] | None): The command line; that of the process where it is ``None``.

    Returns:
        int: The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0] in SUBCOMMANDS:
            module, _ = SUBCOMMANDS[arguments[0]]
            return int(import_module(module).main(arguments[1:], f"{PROGRAM} {arguments[0]}"))
        _run_anomalib(arguments)
    except OSError as error:
        sentence = why_unwritable(error)
        if sentence is None:
            raise
        if not sentence.endswith("."):  # not one of ours
            where = "" if error.filename is None else f": {str(error.filename)!r}"
            sentence += f"{where}; make room there, or write to another folder."
        print(f"{PROGRAM}: {sentence}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _run_anomalib(arguments: Sequence[str]) -> None:
    # Imported here so that `doctor` can run, and tell why, where anomalib can't be imported.
    try:
        import_module("anomalib_osdirf.models")
        from anomalib.cli import AnomalibCLI
        from anomalib.loggers import configure_logger
    except ImportError as error:
        message = f"{PROGRAM} can't start, because an import failed: {error}. Run `{PROGRAM} doctor` to see what to do."
        raise SystemExit(message) from error
    from jsonargparse import ArgumentParser

    class CommandLine(AnomalibCLI):
        """anomalib's command line under our program name, with our subcommands in its help."""

        @staticmethod
        def init_parser(**kwargs: object) -> ArgumentParser:
            """Make anomalib's parser, with the name that this program was started by."""
            return AnomalibCLI.init_parser(**{"prog": PROGRAM, **kwargs})

        def add_subcommands(self, **kwargs: object) -> None:
            """Add anomalib's subcommands, and mention ours, which never reach this parser."""
            super().add_subcommands(**kwargs)
            ours = ". ".join(f"{name}: {text.rstrip('.')}" for name, (_, text) in SUBCOMMANDS.items())
            self.parser.epilog = f"Further subcommands of anomalib-osdirf: {ours}."

    configure_logger()
    CommandLine(arguments)


if __name__ == "__main__":
    sys.exit(main())
