"""Learning-rate schedules by name: the fraction of the peak learning rate at each point of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["LR_SCHEDULES", "learning_rate_factor"]


def constant(done: float, decay: float) -> float:
    """Constant at the peak."""
    return 1.0


def linear(done: float, decay: float) -> float:
    """Linear decay from the start to the end."""
    return 1.0 - done


def cosine(done: float, decay: float) -> float:
    """Cosine decay from the start to the end."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def wsd(done: float, decay: float) -> float:
    """Warm-up, stable, decay: constant at the peak, then 1 - sqrt(completed fraction of the decay).

    Source: form of the decay from Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations".
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
"""All schedules by name. To add one: write a function of the completed fraction of the run, from 0 to 1, and of the
length of the decay as a fraction of the run; it decreases from 1 to 0. Register it here."""


def learning_rate_factor(name: str, done: float, *, final: float = 0.0, decay: float = 0.2) -> float:
    """The learning rate as a fraction of its peak, without warm-up.

    Args:
        name: a key of :data:`LR_SCHEDULES`.
        done: the completed fraction of the run, from 0 to 1.
        final: the factor at the end of the run, in [0, 1]; not used by "constant".
        decay: the length of the decay of "wsd" as a fraction of the run, in [0, 1].

    Returns:
        A number from ``final`` to 1.
    """
    return final + (1.0 - final) * LR_SCHEDULES[name](done, decay)
