"""What a terminal is shown: a progress bar around a loop, tables and lines; where rich is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "track"]

T = TypeVar("T")


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
        raise ImportError('progress=True needs rich: pip install "sedd_ext[train]"') from error
    return rich_track(items, description=description, console=Console(stderr=True))


def console() -> Console:
    """Standard output for tables and sentences: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    out = Console(highlight=False, markup=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=160)
