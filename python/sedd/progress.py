"""A progress bar around a loop, where the caller wants one and rich is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["track"]

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
