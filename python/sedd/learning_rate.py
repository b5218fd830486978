"""Learning-rate schedules: the part of the peak learning rate at each point of a run, found by name."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["LR_SCHEDULES", "learning_rate_factor"]


def constant(done: float, decay: float) -> float:
    """The peak to the end."""
    return 1.0


def linear(done: float, decay: float) -> float:
    """Falls evenly from the start to the end."""
    return 1.0 - done


def cosine(done: float, decay: float) -> float:
    """Falls along half a cosine from the start to the end."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def wsd(done: float, decay: float) -> float:
    """Warm-up, stable, decay: the peak, then a fall by 1 - sqrt(part of the decay that is done).

    Source: the form of the decay is that of Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations".
    """
    if decay == 0.0:
        return 1.0
    return 1.0 - math.sqrt(max(0.0, done - (1.0 - decay)) / decay)


LR_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}
"""Every schedule by its name. To add one: write a function of the part of the run that is done, from 0 to 1, and of the
length of the decay as a part of the run; it falls from 1 to 0. Name it here."""


def learning_rate_factor(name: str, done: float, *, final: float = 0.0, decay: float = 0.2) -> float:
    """The learning rate as a part of its peak, without the warm-up.

    Args:
        name: a key of :data:`LR_SCHEDULES`.
        done: the part of the run that is done, from 0 to 1.
        final: the factor at the end of the run, in [0, 1]; "constant" does not look at it.
        decay: the length of the decay of "wsd", as a part of the run, in [0, 1].

    Returns:
        A number from ``final`` to 1.
    """
    return final + (1.0 - final) * LR_SCHEDULES[name](done, decay)
