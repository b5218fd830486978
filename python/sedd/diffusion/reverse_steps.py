"""Samplers that take reverse steps between given times, at all positions at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sedd.diffusion.sampler import GRIDS, Sampler, check_grid, expect
from sedd.diffusion.walk import Walk
from sedd_ext import Euler, Tweedie

__all__ = [
    "T_END",
    "AncestralSampler",
    "CosineTweedieSampler",
    "EulerSampler",
    "PredictorCorrectorSampler",
    "RemaskSampler",
    "TweedieSampler",
]

T_END = 1e-5
"""Time at which the reverse steps end and the denoising step starts, as in the released code."""


@dataclass(frozen=True)
class _Steps(Sampler):
    """Reverse steps from t = 1 to t = 1e-5, then a denoising step.

    Attributes:
        steps: number of reverse steps.
        denoise: take the denoising step. Without it, absorbing processes may leave MASK tokens.
        grid: the times between the steps, a key of :data:`GRIDS`.
    """

    denoise: bool = True
    grid: str = "uniform"

    def __post_init__(self) -> None:
        """Checks the parameters."""
        check_grid(self.grid)

    @abstractmethod
    def move(self, walk: Walk, t: Tensor, t_next: Tensor | None) -> None:
        """Moves the sequences from t to the earlier time t_next, float64 scalars; None: to the clean text."""

    def times(self) -> Tensor:
        """The times between the steps, from 1 to 1e-5, float64."""
        u = torch.linspace(1.0, 0.0, self.steps + 1, dtype=torch.float64)
        return T_END + (1 - T_END) * GRIDS[self.grid](u)

    def count(self, walk: Walk) -> int:
        """One step more if there is a denoising step."""
        return self.steps + int(self.denoise)

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        times = self.times()
        ends: list[Tensor | None] = [*times[1:]]
        for t, t_next in zip(times, [*ends, None] if self.denoise else ends, strict=False):
            self.move(walk, t, t_next)
            yield walk.tokens


class TweedieSampler(_Steps):
    """Tweedie τ-leaping: the best step that moves positions independently. Source: SEDD, equation 19."""

    def move(self, walk: Walk, t: Tensor, t_next: Tensor | None) -> None:
        """A step with Δ = σ̄(t) - σ̄(t_next)."""
        step = walk.schedule.reverse_step(t, t_next)
        if step is not None:
            walk.step(t, step, denoise=t_next is None)


@dataclass(frozen=True)
class CosineTweedieSampler(TweedieSampler):
    """:class:`TweedieSampler` with the cosine grid by default. Source: MD4 (Shi et al. 2024)."""

    grid: str = "cosine"


class EulerSampler(TweedieSampler):
    """Euler's method, with a Tweedie step as the last one. Source: SEDD, equation 17."""

    needs_rate: ClassVar[bool] = True

    def move(self, walk: Walk, t: Tensor, t_next: Tensor | None) -> None:
        """A step of size Δt σ(t)."""
        if t_next is None:
            super().move(walk, t, None)
        else:
            walk.step(t, Euler(float((t - t_next) * walk.schedule.rate(t))))


class AncestralSampler(_Steps):
    """A masked position unmasks with probability (α_s - α_t) / (1 - α_t) in a step from t to s, whatever the logits.

    Its token is drawn from the softmax of the logits. For networks that predict the clean token this is the law of
    :class:`TweedieSampler`; for networks that estimate scores, Tweedie's probability is that of the estimates. Only
    sequences in which a position unmasks go through the network, so a sequence takes at most one call per position.

    Source: the ancestral sampling of MD4 (Shi et al. 2024).
    """

    needs_mask: ClassVar[bool] = True
    needs_rate: ClassVar[bool] = True

    def remask_probability(self, kept: float, kept_next: float) -> float:
        """The probability that an unmasked position returns to MASK, for α_t and α_s."""
        return 0.0

    def move(self, walk: Walk, t: Tensor, t_next: Tensor | None) -> None:
        """Unmasks, and puts MASK at positions that were not masked, so that a share α_s is unmasked at s."""
        moved = float(walk.schedule.moved(t))
        moved_next = 0.0 if t_next is None else float(walk.schedule.moved(t_next))
        back = self.remask_probability(1 - moved, 1 - moved_next)
        leave = (moved - moved_next + back * (1 - moved)) / moved
        masked, u = walk.open(), walk.uniform(*walk.tokens.shape)
        returning = walk.free & ~masked & (u < back)
        walk.fill(masked & (u < leave), t)
        walk.remask(returning)


@dataclass(frozen=True)
class RemaskSampler(AncestralSampler):
    """:class:`AncestralSampler` in which unmasked positions return to MASK, so that early mistakes can be corrected.

    In a step from t to s, an unmasked position is masked with probability σ = min(η, (1 - α_s) / α_t), and a masked one
    unmasks with probability (α_s - (1 - σ) α_t) / (1 - α_t). The share of unmasked positions is that of the process.

    Attributes:
        eta: η, from 0 to 1. At 0 this is :class:`AncestralSampler`.

    Source: ReMDM (Wang et al. 2025), its capped schedule.
    """

    eta: float = 0.02

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        expect("eta", self.eta, 0 <= self.eta <= 1, "a number from 0 to 1")

    def remask_probability(self, kept: float, kept_next: float) -> float:
        """min(η, (1 - α_s) / α_t)."""
        return min(self.eta, (1 - kept_next) / kept)


@dataclass(frozen=True)
class PredictorCorrectorSampler(TweedieSampler):
    """:class:`TweedieSampler` with corrector steps after each step, which leave the law at that time unchanged.

    A corrector at time t adds noise up to a later time and takes a Tweedie step back to t. Both have the law p_t as a
    fixed point for the exact network, up to positions that change together in one step. For any process.

    Attributes:
        correctors: corrector steps after each step, at least 1.
        size: from 0 to 1. A corrector noises a token with probability ``size`` times (1 - α_t).

    Source: Campbell et al. 2022, section 4.4, who run forward and reverse rates at once; here one follows the other.
    """

    correctors: int = 1
    size: float = 0.1
    needs_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        expect("correctors", self.correctors, self.correctors >= 1, "at least 1")
        expect("size", self.size, 0 < self.size <= 1, "a number above 0 and at most 1")

    def move(self, walk: Walk, t: Tensor, t_next: Tensor | None) -> None:
        """A Tweedie step and the correctors."""
        super().move(walk, t, t_next)
        if t_next is not None:
            for _ in range(self.correctors):
                self.correct(walk, t_next)

    def correct(self, walk: Walk, t: Tensor) -> None:
        """One corrector step at time t. At t = 1 there is no later time, and nothing changes."""
        moved, most = walk.schedule.moved(torch.stack([t, torch.ones_like(t)]))
        later = walk.schedule.time(torch.minimum(moved + self.size * moved * (1 - moved), most))
        step = walk.schedule.reverse_step(later, t)
        if isinstance(step, Tweedie):
            walk.noise(float(step.noise))
            walk.step(later, step)
