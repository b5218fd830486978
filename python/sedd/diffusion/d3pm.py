"""D3PM: diffusion in a number of discrete steps, with its own bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sedd.diffusion.diffusion import Diffusion, LossOptions
from sedd.diffusion.position_loss import MeanPrediction, Term
from sedd.diffusion.schedule import Schedule, checked_time
from sedd_ext import RankOne

__all__ = ["D3PM", "DiscreteTime"]


@dataclass(frozen=True)
class DiscreteTime(Schedule):
    """A schedule in equal steps: the noise at time t is that of ``base`` at the end of the step that t lies in.

    At t = 0 there is no noise, whatever ``base`` starts with.

    Attributes:
        base: a schedule in continuous time.
        steps: number of steps T.
    """

    base: Schedule
    steps: int

    @property
    def original(self) -> Schedule:
        """See :attr:`Schedule.original`."""
        return self.base

    def total(self, t: Tensor) -> Tensor:
        """σ̄ at ⌈tT⌉ / T, see :meth:`Schedule.total`."""
        return self._at(self._step(t))

    def before(self, t: Tensor) -> Tensor:
        """σ̄ at the start of the step that t lies in, with the arguments and result of :meth:`total`."""
        return self._at(self._step(t) - 1)

    def rate(self, t: Tensor) -> Tensor:
        """The mean rate of the step that t lies in, see :meth:`Schedule.rate`."""
        return self.steps * (self.total(t) - self.before(t))

    def _step(self, t: Tensor) -> Tensor:
        return torch.ceil(checked_time(t) * self.steps - 1e-9)  # i/T times T may be a little above i

    def _at(self, step: Tensor) -> Tensor:
        noise = self.base.total(step.clamp(min=0) / self.steps)
        return torch.where(step > 0, noise, 0.0)


@dataclass(frozen=True)
class D3PM(MeanPrediction):
    """Diffusion in T discrete steps, with a mean prediction; for any process.

    The bound is the sum over the steps of D_KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)). The first step, to the clean text, is
    -log p(x_0 | x_t). Training adds the cross-entropy of x_0 with a weight; unless the process is absorbing, that
    computes the head a second time.

    p is the mean of q(x_s | x_t, x_0) over the predicted x_0. The paper weights the predicted x_0 with
    q(x_s, x_t | x_0) instead, which for absorbing noise is the same, and for other noise another way to write the same
    p.

    Attributes:
        steps: T.
        ce_weight: λ, the weight of the cross-entropy in training. It is not part of the bound.

    Source: D3PM (Austin et al. 2021).
    """

    steps: int = 1000
    ce_weight: float = 0.01
    earliest_time: ClassVar[float] = 1e-6  # the first step is trained too

    def __post_init__(self) -> None:
        """Checks the parameters, and converts ``steps``, which may come from a file as 1000.0."""
        if not (self.steps >= 1 and self.steps == int(self.steps)):
            raise ValueError(f"steps: expected a whole number of at least 1, got {self.steps}")
        object.__setattr__(self, "steps", int(self.steps))
        if not 0 <= self.ce_weight < float("inf"):
            raise ValueError(f"ce_weight: expected a number of at least 0, got {self.ce_weight}")

    def schedule(self, schedule: Schedule, process: RankOne) -> Schedule:
        """The schedule in T steps."""
        if isinstance(schedule, nn.Module):
            raise ValueError("schedule: expected one without parameters for the objective d3pm, got a module")
        return DiscreteTime(schedule.original, self.steps)

    def terms(self, diffusion: Diffusion, t: Tensor, x_t: Tensor) -> Sequence[Term]:
        """T times the divergence of the step that t lies in; see :meth:`PositionLoss.terms`."""
        schedule = diffusion.schedule
        assert isinstance(schedule, DiscreteTime)
        return [(float(self.steps), self._arguments(diffusion, t, schedule.before(t).unsqueeze(-1)))]

    def _training_terms(self, diffusion: Diffusion, t: Tensor, x_t: Tensor) -> Sequence[Term]:
        if self.ce_weight == 0:
            return self.terms(diffusion, t, x_t)
        cross_entropy = self._arguments(diffusion, t, torch.zeros_like(t).unsqueeze(-1))  # from t to the clean text
        if diffusion.process.family != "absorbing":
            return [*self.terms(diffusion, t, x_t), (self.ce_weight, cross_entropy)]
        # the divergence is (α_s - α_t) / (1 - α_t) times the cross-entropy
        schedule = diffusion.schedule
        assert isinstance(schedule, DiscreteTime)
        moved = -torch.expm1(-schedule.total(t))
        share = (moved + torch.expm1(-schedule.before(t))) / moved
        return [(self.steps * share + self.ce_weight, cross_entropy)]

    def _arguments(self, diffusion: Diffusion, t: Tensor, sigma_s: Tensor) -> dict[str, Any]:
        sigma = diffusion.schedule.total(t).unsqueeze(-1)
        return {"sigma": sigma, "process": diffusion.process, "sigma_s": sigma_s}

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """Adds the cross-entropy; see :meth:`sedd.diffusion.Objective.training_loss`."""
        x_t = diffusion.noise(x_0, t, generator=generator, first=options.first)
        return self.weighted(self._training_terms(diffusion, t, x_t), diffusion, x_0, x_t, t, options)
