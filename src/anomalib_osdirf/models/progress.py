# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Named progress bars for the phases around Lightning's own training loop."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def phase(name: str, items: Iterable[Item], total: int, visible: bool) -> Iterator[Item]:
    """Yield the items under a progress bar; a log file or a pipe gets none.

    Args:
        name: What is going on.
        items: What is gone through.
        total: Number of items.
        visible: Whether the user wants progress bars at all.

    Yields:
        The items.
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (visible and console.is_terminal), transient=True) as bar:
        yield from bar.track(items, total=total, description=name)
