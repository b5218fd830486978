"""Output for a terminal or a notebook: progress bars, tables and lines; elsewhere plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sedd.hints import pip_install

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CONTROLS", "LINE_EVERY", "console", "is_interactive", "printable", "progress_bar", "track"]

T = TypeVar("T")

CONTROLS: dict[int, int] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}
"""For ``str.translate``: control characters become visible symbols (␛ for escape); characters that change the text
direction or cannot be displayed become U+FFFD. Untrusted text must not control the terminal."""


def printable(text: str) -> str:
    """Returns untrusted text, such as a file name, as one line that cannot control the terminal."""
    return text.translate(CONTROLS | {ord("\n"): 0x240A, ord("\t"): 0x2409, 0x2028: 0xFFFD, 0x2029: 0xFFFD})


LINE_EVERY = 30.0
"""Seconds between two progress lines outside a terminal or notebook."""


def is_interactive(console: Console) -> bool:
    """Whether a console is a terminal or a notebook, which can redraw a bar, and not a file or a pipe."""
    return console.is_terminal or console.is_jupyter


@contextmanager
def progress_bar(console: Console, *, first: bool = True) -> Iterator[Callable[[float, str], None]]:
    """A progress bar in a terminal or a notebook; elsewhere a plain line every :data:`LINE_EVERY` seconds.

    Args:
        console: the console for the output.
        first: without a terminal, whether to print the first line at once instead of after the first interval.

    Yields:
        A function of the completed fraction, from 0 to 1, and a one-line text.
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
    """Returns the items; if ``show``, iterating over them displays the progress on standard error.

    Raises:
        ImportError: ``show`` is true and rich is not installed.
    """
    if not show:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError as error:
        raise ImportError(f"progress=True needs rich: {pip_install('train', 'rich')}") from error
    console = Console(stderr=True)
    if is_interactive(console):
        return rich_track(items, description=description, console=console)
    return _tracked(items, description, console)


def _tracked(items: Sequence[T], description: str, console: Console) -> Iterator[T]:
    with progress_bar(console, first=False) as show:
        for number, item in enumerate(items, 1):
            yield item
            show(number / len(items), f"{description}: {number:,} of {len(items):,}")


def console(stderr: bool = False) -> Console:
    """Returns a console for tables and sentences, in which text cannot control the terminal (:data:`CONTROLS`).

    Its width is that of the terminal; without a terminal, it is wide enough for tables.
    """
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(CONTROLS), **options)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Safe(stderr=stderr, highlight=False, markup=False, soft_wrap=True, width=None if terminal else 160)
