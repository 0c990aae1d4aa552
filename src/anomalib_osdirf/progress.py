# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Named phases in the terminal: a bar with images per second and time left, or plain lines in a log file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
_SECONDS_TO_FIRST_LINE = 10.0
_SECONDS_BETWEEN_LINES = 60.0


class ImagesPerSecond(ProgressColumn):
    """Throughput in images per second."""

    def render(self, task: Task) -> Text:
        """Return the throughput; empty while unknown."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s", style="progress.data.speed")


def phase(
    name: str, items: Iterable[Item], images: int | None, visible: bool, size: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """Yield the items and show progress: a bar on a terminal, occasional lines elsewhere.

    Args:
        name: What is going on.
        items: The items.
        images: Number of images in all items, ``None`` if it is not known.
        visible: Whether the user wants to see it at all.
        size: Number of images in an item.
    """
    if not visible:
        yield from items
        return
    console, start, done = Console(), time.perf_counter(), 0
    next_line = start + _SECONDS_TO_FIRST_LINE
    drawn = has_bars(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, ImagesPerSecond(), TimeRemainingColumn(), console=console, disable=not drawn, transient=True
    )
    with bar if drawn else nullcontext():  # rich before 14.3 writes an empty line for a bar that is not drawn
        task = bar.add_task(name, total=images)
        for item in items:
            yield item
            done += size(item)
            bar.update(task, completed=done)
            now = time.perf_counter()
            if not drawn and now > next_line and done:
                next_line = now + _SECONDS_BETWEEN_LINES
                left = "" if images is None else f", {duration((now - start) / done * (images - done))} left"
                say(f"{name}: {summary(done, now - start)}{left}.", console)
    say(f"{name}: {summary(done, time.perf_counter() - start)}.", console)


@contextmanager
def step(name: str, visible: bool) -> Iterator[None]:
    """Show, if ``visible``, that a step of unknown length is running, and how long it took."""
    if not visible:
        yield
        return
    console, start = Console(), time.perf_counter()
    say(f"{name} ...", console)
    yield
    say(f"{name}: {duration(time.perf_counter() - start)}.", console)


def has_bars(console: Console) -> bool:
    """Return whether bars can be drawn: on a terminal and in a notebook, not in a log file or a pipe."""
    return console.is_terminal or console.is_jupyter


def say(line: str, console: Console | None = None) -> None:
    """Print a line unwrapped and flush."""
    (console or Console()).print(line, soft_wrap=True, highlight=False, markup=False)
    sys.stdout.flush()


def box(title: str, lines: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Print names and values: in a box with a title on a terminal, as plain lines elsewhere."""
    console = console or Console()
    if not console.is_terminal:
        for name, value in lines:
            # Not wrapped: paths and commands are there to be copied.
            say(f"{name + ':':13}{value}", console)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(Panel(table, title=title, title_align="left", expand=False))


def summary(images: int, seconds: float) -> str:
    """Format the throughput, such as ``12 images in 1.5 s, 8.0 images/s``."""
    return f"{counted(images, 'image')} in {duration(seconds)}, {images / max(seconds, 1e-9):.1f} images/s"


def counted(number: int, noun: str) -> str:
    """Format a count, such as ``1 image`` or ``2 images``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Format a duration, such as ``1.5 s`` or ``0:02:03``."""
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def of_processes(name: str, count: int) -> str:
    """Add to a phase's name that the progress is that of the first of several processes."""
    return name if count == 1 else f"{name}, process 1 of {count}"


def images_of(dataloader: Any) -> int | None:
    """Return the number of images of a dataloader, or ``None`` if it is unknown."""
    try:
        return len(dataloader.batch_sampler.sampler)
    except (AttributeError, TypeError):
        return None


def images_in(batch: Any) -> int:
    """Return the number of images in a batch, cached features included."""
    held = getattr(batch, "image", None)
    if held is None:
        held = getattr(batch, "features", None)
    return 0 if held is None else len(held)
