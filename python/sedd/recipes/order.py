"""Whether figures have the order of a paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

__all__ = ["Figure", "Order", "compare", "paper_pairs"]

Pair = tuple[str, str]
SEPARATE = 2.0
"""Standard errors of a difference from which it is not a coincidence."""


@dataclass(frozen=True)
class Figure:
    """A measured figure, which may be infinite, and its standard error; None if it is unknown."""

    value: float
    error: float | None


@dataclass
class Order:
    """Pairs of rows ``(better, worse)`` in the paper: how they came out here."""

    same: list[Pair] = field(default_factory=list)
    unclear: list[Pair] = field(default_factory=list)
    reversed: list[Pair] = field(default_factory=list)


def paper_pairs(
    figures: Mapping[str, float],
    chains: Sequence[Sequence[str]],
    better: Literal["lower", "higher"],
    equal_within: float = 0.0,
) -> list[Pair]:
    """The pairs of rows that have an order in the paper, the better one first.

    Args:
        figures: the figures of the paper by row.
        chains: rows, best first, of which the paper says the order without figures.
        better: which figures are better.
        equal_within: figures that differ by no more than this have no order.
    """
    pairs = []
    for first, second in combinations(figures, 2):
        difference = figures[second] - figures[first]
        if abs(difference) > equal_within:
            pairs.append((first, second) if (difference > 0) == (better == "lower") else (second, first))
    stated = [pair for chain in chains for pair in combinations(chain, 2)]
    return list(dict.fromkeys([*pairs, *stated]))


def compare(pairs: Sequence[Pair], ours: Mapping[str, Figure], better: Literal["lower", "higher"]) -> Order:
    """Sorts the pairs of the paper by how they came out here.

    A difference is that of two figures if it exceeds :data:`SEPARATE` standard errors of the difference; without an
    error, it is unclear. Pairs with a row that was not measured are left out.
    """
    order = Order()
    for pair in pairs:
        if not all(row in ours for row in pair):
            continue
        first, second = (ours[row] for row in pair)
        ahead = second.value - first.value if better == "lower" else first.value - second.value
        if not _separate(first, second):
            order.unclear.append(pair)
        else:
            (order.same if ahead > 0 else order.reversed).append(pair)
    return order


def _separate(first: Figure, second: Figure) -> bool:
    """Whether the errors of two figures separate them."""
    if first.error is None or second.error is None:
        return False
    return abs(first.value - second.value) > SEPARATE * math.hypot(first.error, second.error)
