"""What a sampler is, and the time grids that samplers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.walk import Walk

__all__ = ["GRIDS", "Sampler", "check_grid", "expect"]

GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "cosine": lambda u: torch.sin(math.pi / 2 * u),
    "quadratic": lambda u: u**2,
}
"""The times t of equal steps u from 1 to 0, by name: ``cosine`` (MD4, MaskGIT) has short steps near the noise,
``quadratic`` near the text. To add one, name an increasing function from [0, 1] to [0, 1] here."""


@dataclass(frozen=True)
class Sampler(ABC):
    """Moves sequences from noise to text. A subclass decides on positions, times and steps.

    Attributes:
        steps: number of reverse steps, at least 1. More steps take longer and give better samples.
        autoregressive: whether it is for autoregressive models, and not for diffusion models.
        needs_mask: whether it is for absorbing processes alone.
        needs_rate: whether it needs one noise schedule for all tokens.
    """

    steps: int
    autoregressive: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """Yields the tokens [B, L] after each step."""

    def check(self, diffusion: Diffusion) -> None:
        """Raises a ValueError if the sampler does not suit the model."""
        if self.needs_mask and diffusion.process.family != "absorbing":
            raise ValueError(
                f"sampler: expected one for {diffusion.process.family} noise, such as tweedie or euler, got "
                f"{type(self).__name__}, which fills in MASK tokens"
            )
        if self.needs_rate:
            diffusion.schedule.rate(torch.ones(()))

    def count(self, walk: Walk) -> int:
        """The number of steps that the walk takes at most, for progress."""
        return self.steps


def expect(name: str, value: object, valid: bool, wanted: str) -> None:
    """Raises a ValueError for a parameter that is not ``valid``."""
    if not valid:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_grid(grid: str) -> None:
    """Raises a ValueError for a name that is not in :data:`GRIDS`."""
    expect("grid", grid, grid in GRIDS, f"one of {', '.join(GRIDS)}")
