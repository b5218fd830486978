"""Plots: checks the output path early, and writes atomically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sedd.files import whole_file
from sedd.hints import pip_install

__all__ = ["check_figure", "write_figure"]


def check_figure(path: str | Path) -> None:
    """Checks that a plot can be written, before the work begins.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not support the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plotting needs matplotlib: {pip_install('eval', 'matplotlib')}") from error
    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(
            f"plot: expected a file name that ends in one of {', '.join(sorted(formats))}; got {str(path)!r}"
        )


def write_figure(path: str | Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Writes a plot atomically.

    Args:
        path: the file; its suffix determines the format.
        size: width and height in inches.
        draw: function that draws on a ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not support the suffix.
        OSError: the file cannot be written; an existing one is not changed.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with whole_file(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)
