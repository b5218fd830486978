"""Noise schedules: how much noise a token has met by time t, found by name in :data:`SCHEDULES`.

A schedule is the total noise ``σ̄(t) = ∫₀ᵗ σ`` and its rate ``σ(t) = dσ̄/dt`` for t in [0, 1]. A token survives until t
with probability ``α(t) = exp(-σ̄(t))``. Both are computed and returned in float64: near t = 1 the log-linear rate grows
to 1/ε, and reverse steps take differences of σ̄.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedd_ext import GeneralizedMasked, Tweedie

__all__ = [
    "SCHEDULES",
    "Cosine",
    "Geometric",
    "LogLinear",
    "Polynomial",
    "Schedule",
    "checked_time",
    "construct",
    "default_numbers",
    "get_schedule",
    "schedule_params",
]


class Schedule(ABC):
    """The noise a token has met by time t, and how fast it meets more."""

    @abstractmethod
    def total(self, t: Tensor) -> Tensor:
        """The total noise σ̄(t).

        Args:
            t: times in [0, 1], floating point, any shape.

        Returns:
            σ̄(t), float64, same shape and device.

        Raises:
            TypeError: ``t`` is not a floating-point tensor.
            ValueError: a time lies outside [0, 1] (looked for on the CPU only: elsewhere it would wait for the device).
        """

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """The noise rate σ(t) = dσ̄/dt, with the arguments, result and errors of :meth:`total`."""

    def moved(self, t: Tensor) -> Tensor:
        """The probability 1 - α(t) that a token has met noise; arguments, result and errors as of :meth:`total`."""
        return -torch.expm1(-self.total(t))

    def time(self, moved: Tensor) -> Tensor:
        """The time at which a token has met noise with a probability: the inverse of :meth:`moved`.

        Found by bisection, unless a subclass has a formula.

        Args:
            moved: probabilities, float64, any shape.

        Returns:
            Times in [0, 1], float64, same shape and device: 0 for less noise than at t = 0, 1 for more than at t = 1.
        """
        early, late = torch.zeros_like(moved), torch.ones_like(moved)
        for _ in range(53):
            t = (early + late) / 2
            before = self.moved(t) < moved
            early, late = torch.where(before, t, early), torch.where(before, late, t)
        return late

    @property
    def original(self) -> Schedule:
        """The schedule that an objective has made this one from; the schedule itself otherwise."""
        return self

    def token_total(self, t: Tensor, x_0: Tensor) -> Tensor:
        """The total noise of each token: the same for all of them, unless a subclass says otherwise.

        Args:
            t: time of each sequence [B].
            x_0: clean tokens [B, L], int64.

        Returns:
            σ̄, float64, broadcasts to [B, L].
        """
        return self.total(t).unsqueeze(-1)

    def reverse_step(self, t: Tensor, t_next: Tensor | None) -> Tweedie | GeneralizedMasked | None:
        """The reverse step from a time to an earlier one.

        Args:
            t: the time, a scalar.
            t_next: the earlier time, a scalar; None: to the clean text.

        Returns:
            The step; None if there is no noise between the two times.
        """
        sigma = float(self.total(t))
        noise = sigma if t_next is None else sigma - float(self.total(t_next))
        return Tweedie(noise) if noise > 0 else None


def checked_time(t: Tensor) -> Tensor:
    """Checks times and returns them in float64."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        given = f"a {t.dtype} tensor" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected a floating-point tensor of times in [0, 1], got {given}")
    t = t.double()
    # not(...) so that NaN fails too
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t: expected times in [0, 1], got values from {float(t.min()):.6g} to {float(t.max()):.6g}")
    return t


def _check(name: str, value: float, valid: bool, wanted: str) -> None:
    if not (math.isfinite(value) and valid):
        raise ValueError(f"{name}: expected {wanted}, got {value}")


@dataclass(frozen=True)
class Geometric(Schedule):
    """Total noise that grows geometrically: ``σ̄ = σ_min^{1-t} σ_max^t``, so ``σ = σ̄ log(σ_max / σ_min)``.

    Attributes:
        sigma_min: σ̄(0) > 0: this much noise is on the text before the process starts.
        sigma_max: σ̄(1).

    Source: SEDD (Lou, Meng & Ermon 2024), section 5 and appendix C.
    """

    sigma_min: float = 1e-5
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        """Checks 0 < sigma_min < sigma_max."""
        _check("sigma_min", self.sigma_min, self.sigma_min > 0, "a positive number")
        _check("sigma_max", self.sigma_max, self.sigma_max > self.sigma_min, f"a number above {self.sigma_min=}")

    def total(self, t: Tensor) -> Tensor:
        """σ_min^{1-t} σ_max^t, see :meth:`Schedule.total`."""
        return self.sigma_min * torch.exp(checked_time(t) * math.log(self.sigma_max / self.sigma_min))

    def rate(self, t: Tensor) -> Tensor:
        """σ̄(t) log(σ_max / σ_min), see :meth:`Schedule.rate`."""
        return self.total(t) * math.log(self.sigma_max / self.sigma_min)

    def time(self, moved: Tensor) -> Tensor:
        """See :meth:`Schedule.time`."""
        t = torch.log(-torch.log1p(-moved) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, 1)


@dataclass(frozen=True)
class _AlphaSchedule(Schedule):
    """A schedule given by the moved fraction m(t) = 1 - α₀(t), which goes from 0 to 1.

    ``α = 1 - (1-ε) m``, which leaves α(1) = ε and σ̄(1) = -log ε finite, so
    ``σ̄ = -log1p(-(1-ε) m)`` and ``σ = (1-ε) m' / (1 - (1-ε) m)``.

    Attributes:
        eps: ε, the fraction of tokens that survives to t = 1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Checks 0 < eps < 1."""
        _check("eps", self.eps, 0 < self.eps < 1, "a number between 0 and 1, both excluded")

    @abstractmethod
    def _moved(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """m(t) and m'(t), float64."""

    @abstractmethod
    def _inverse(self, m: Tensor) -> Tensor:
        """The t at which m(t) = m, for m in [0, 1], float64."""

    def time(self, moved: Tensor) -> Tensor:
        """See :meth:`Schedule.time`."""
        return self._inverse((moved / (1 - self.eps)).clamp(0, 1))

    def total(self, t: Tensor) -> Tensor:
        """-log1p(-(1-ε) m(t)), see :meth:`Schedule.total`."""
        moved, _ = self._moved(checked_time(t))
        return -torch.log1p(-(1 - self.eps) * moved)

    def rate(self, t: Tensor) -> Tensor:
        """(1-ε) m'(t) / (1 - (1-ε) m(t)), see :meth:`Schedule.rate`."""
        moved, slope = self._moved(checked_time(t))
        return (1 - self.eps) * slope / (1 - (1 - self.eps) * moved)


@dataclass(frozen=True)
class LogLinear(_AlphaSchedule):
    """The fraction of moved tokens grows linearly: m = t, ``σ̄ = -log1p(-(1-ε)t)``.

    Attributes:
        eps: ε, the fraction of tokens that survives to t = 1.

    Source: SEDD (Lou, Meng & Ermon 2024), section 5 and appendix C.
    """

    def _moved(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)

    def _inverse(self, m: Tensor) -> Tensor:
        return m


@dataclass(frozen=True)
class Cosine(_AlphaSchedule):
    """Few tokens move early, per unit of time, at high t: ``m = cos(π/2 (1-t)) = sin(π/2 t)``.

    Attributes:
        eps: ε, the fraction of tokens that survives to t = 1.

    Source: MD4 (Shi et al. 2024), table 1.
    """

    def _moved(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return torch.sin(angle), math.pi / 2 * torch.cos(angle)

    def _inverse(self, m: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(m)


@dataclass(frozen=True)
class Polynomial(_AlphaSchedule):
    """The moved fraction is a power of the time: ``m = t^w``.

    Attributes:
        eps: ε, the fraction of tokens that survives to t = 1.
        power: w ≥ 1. At 1 this is :class:`LogLinear`; below it the rate at t = 0 would be infinite.

    Source: MD4 (Shi et al. 2024), table 1.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        """Checks eps and power."""
        super().__post_init__()
        _check("power", self.power, self.power >= 1, "a number of at least 1")

    def _moved(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t**self.power, self.power * t ** (self.power - 1)

    def _inverse(self, m: Tensor) -> Tensor:
        return m ** (1 / self.power)


SCHEDULES: dict[str, type[Schedule]] = {
    "loglinear": LogLinear,
    "geometric": Geometric,
    "cosine": Cosine,
    "polynomial": Polynomial,
}
"""Every schedule by its name. To add one: write its class above and name it here."""


def construct(noun: str, name: str, kind: type, params: Mapping[str, float]) -> Any:
    """Makes an instance of a registered class.

    Args:
        noun: what the class is, for the error message.
        name: its name in the registry.
        kind: the class.
        params: its parameters.

    Raises:
        TypeError: the class has no parameter of that name.
        ValueError: a parameter is out of range.
    """
    known = inspect.signature(kind).parameters
    for param in params:
        if param not in known:
            has = f"the parameters {', '.join(known)}" if known else "no parameters"
            raise TypeError(f"{noun} {name!r} has {has}; got {param!r}")
    return kind(**params)


def get_schedule(name: str, **params: float) -> Schedule:
    """Makes the schedule of that name.

    Args:
        name: a key of :data:`SCHEDULES`.
        **params: the fields of that class; its defaults where left out.

    Returns:
        The schedule.

    Raises:
        ValueError: no schedule of that name, or a parameter out of range.
        TypeError: the schedule has no parameter of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {name!r}")
    schedule: Schedule = construct("schedule", name, SCHEDULES[name], params)
    return schedule


def default_numbers(kind: type) -> dict[str, float]:
    """The parameters of a class that are numbers, with their defaults; others cannot be given by name in a file."""
    known = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default for parameter in known if type(parameter.default) in (int, float)}


def schedule_params(name: str, params: Mapping[str, float]) -> dict[str, float]:
    """All parameters of the schedule of that name: the given ones, and defaults for the others."""
    return {**default_numbers(SCHEDULES[name]), **params}
