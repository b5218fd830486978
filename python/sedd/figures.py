"""Pictures: refused before the work where they could not be written, and written whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sedd.files import whole_file
from sedd.hints import pip_install

__all__ = ["check_figure", "write_figure"]


def check_figure(path: str | Path) -> None:
    """Refuses a picture that could not be written, before there is anything to draw.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib has no format of that ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plotting needs matplotlib: {pip_install('eval', 'matplotlib')}") from error
    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"plot: expected a name that ends in one of {', '.join(sorted(formats))}; got {str(path)!r}")


def write_figure(path: str | Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Writes a picture that is there whole or not at all.

    Args:
        path: the file; its ending gives the format.
        size: width and height in inches.
        draw: draws onto a ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib has no format of that ending.
        OSError: it cannot be written; the one from before stays.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with whole_file(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)
