"""What a terminal is shown: a progress bar around a loop, tables and lines; where rich is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sedd.hints import pip_install

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CONTROLS", "console", "printable", "track"]

T = TypeVar("T")

CONTROLS: dict[int, int] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}
"""For ``str.translate``: control characters become their pictures, ␛ for escape, and what a terminal would take for a
change of direction, or cannot show, becomes U+FFFD. Text of others must not steer the terminal."""


def printable(text: str) -> str:
    """Returns text of others, such as the name of a file, as one line that cannot steer the terminal."""
    return text.translate(CONTROLS | {ord("\n"): 0x240A, ord("\t"): 0x2409, 0x2028: 0xFFFD, 0x2029: 0xFFFD})


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The items, with a progress bar in the terminal while they are walked through if ``show``.

    Raises:
        ImportError: ``show`` without rich.
    """
    if not show:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError as error:
        raise ImportError(f"progress=True needs rich: {pip_install('train', 'rich')}") from error
    return rich_track(items, description=description, console=Console(stderr=True))


def console(stderr: bool = False) -> Console:
    """Returns a console for tables and sentences, in which no text can steer the terminal (:data:`CONTROLS`).

    It is as wide as the terminal, and wide enough for tables where there is none.
    """
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(CONTROLS), **options)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Safe(stderr=stderr, highlight=False, markup=False, soft_wrap=True, width=None if terminal else 160)
