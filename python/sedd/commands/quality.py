"""What ``sedd eval generative`` measures of one kind of samples: of texts, or of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Quality", "Row", "Write", "with_error"]

Row = dict[str, Any]
Write = Callable[["tuple[Tensor, Tensor] | None"], Tensor]
"""Samples blocks [num, L]; its argument are tokens [num, L] and a mask [L] of the given positions, or None."""


class Quality(ABC):
    """The measures of one kind of samples.

    Attributes:
        unit: what a sample is called.
        real_name: what the real data are called.
        num: number of samples unless another is given.
        batch_size: number of samples at a time unless another is given.
        others: options of other kinds of samples.
        title: title of the table.
        note: what has to be said wherever results are shown; empty if there is nothing.
        settings: what results depend on, beside the options.
        tensors: tensors on which results depend, beside the parameters of the model.
        panels: for the plot, values with their label and scale.
    """

    unit: ClassVar[str]
    real_name: ClassVar[str]
    num: ClassVar[int]
    batch_size: ClassVar[int]
    others: ClassVar[tuple[str, ...]]
    title: str
    note: str = ""
    settings: Mapping[str, Any]
    tensors: list[Tensor]
    panels: tuple[tuple[str, str, str], ...]

    @abstractmethod
    def real(self, progress: bool) -> Row | None:
        """The measures of real data; None if there are none."""

    @abstractmethod
    def measure(self, samples: Tensor, write: Write) -> Row:
        """The measures of samples [num, L].

        Args:
            samples: the samples.
            write: makes samples around given tokens.
        """

    @abstractmethod
    def columns(self, rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
        """The headings of the table, and how a cell is shown. Cells of a value that a row lacks are empty."""


def with_error(name: str, digits: int = 2) -> Callable[[Row], str]:
    """Shows a value with its standard error."""

    def show(row: Row) -> str:
        error = row[f"{name}_error"]
        return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    return show
