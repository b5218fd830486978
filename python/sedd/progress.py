"""What a terminal or a notebook is shown: progress bars, tables and lines; plain lines where there is neither."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LINE_EVERY", "console", "is_interactive", "progress_bar", "track"]

T = TypeVar("T")

LINE_EVERY = 30.0
"""Seconds between two lines of progress where there is neither a terminal nor a notebook."""


def is_interactive(console: Console) -> bool:
    """Whether a console can redraw a bar: it is a terminal or a notebook, and not a file, a pipe or a log."""
    return console.is_terminal or console.is_jupyter


@contextmanager
def progress_bar(console: Console, *, first: bool = True) -> Iterator[Callable[[float, str], None]]:
    """A progress bar in a terminal or a notebook; elsewhere a plain line every :data:`LINE_EVERY` seconds.

    Args:
        console: where it is shown.
        first: without a terminal, print the first line at once, not after the first interval.

    Yields:
        A function that takes the part that is done, from 0 to 1, and a text of one line.
    """
    if is_interactive(console):
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(BarColumn(10), TextColumn("{task.description}", markup=False), console=console) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda done, text: bar.update(task, completed=done, description=text)
        return
    printed = None if first else time.monotonic()

    def line(done: float, text: str) -> None:
        nonlocal printed
        if printed is None or time.monotonic() - printed >= LINE_EVERY:
            printed = time.monotonic()
            console.print(f"{done:4.0%}  {text}", highlight=False, soft_wrap=True, markup=False)

    yield line


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The items, with their progress on standard error while they are walked through if ``show``.

    Raises:
        ImportError: ``show`` without rich.
    """
    if not show:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError as error:
        raise ImportError('progress=True needs rich: pip install "sedd_ext[train]"') from error
    console = Console(stderr=True)
    if is_interactive(console):
        return rich_track(items, description=description, console=console)
    return _tracked(items, description, console)


def _tracked(items: Sequence[T], description: str, console: Console) -> Iterator[T]:
    with progress_bar(console, first=False) as show:
        for number, item in enumerate(items, 1):
            yield item
            show(number / len(items), f"{description}: {number:,} of {len(items):,}")


def console() -> Console:
    """Standard output for tables and sentences: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    out = Console(highlight=False, markup=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=160)
