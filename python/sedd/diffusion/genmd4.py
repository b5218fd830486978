"""GenMD4: masked diffusion in which every token has a noise schedule of its own, and learns it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sedd.diffusion.diffusion import Diffusion, LossOptions, Mean, Parameterization
from sedd.diffusion.position_loss import PositionLoss, Term, expect_process
from sedd.diffusion.schedule import LogLinear, Polynomial, Schedule, checked_time
from sedd_ext import GeneralizedMasked, RankOne, generalized_masked_loss, linear_generalized_masked_loss

__all__ = ["GenMD4", "PerToken"]


class PerToken(nn.Module, Schedule):
    """Token k is masked at time τ with probability (1-ε) τ^{w_k}, and the powers w_k are learned.

    The times t from 0 to 1 of the model are the times τ from ``start`` to 1 of this formula.

    Attributes:
        base: where the powers start from: log-linear (1) or polynomial. It also has ε.
        start: the earliest τ. :meth:`GenMD4.reconstruction` covers the noise before it.
        raw_power: the parameter [N - 1]. The powers are its softplus.

    Source: MD4 (Shi et al. 2024), its generalised form GenMD4.
    """

    def __init__(self, base: LogLinear | Polynomial, tokens: int, start: float) -> None:
        super().__init__()
        self.base, self.start = base, start
        first = base.power if isinstance(base, Polynomial) else 1.0
        self.raw_power = nn.Parameter(torch.full((tokens,), math.log(math.expm1(first))))

    @property
    def original(self) -> Schedule:
        """See :attr:`Schedule.original`."""
        return self.base

    def extra_repr(self) -> str:
        """The schedule and the earliest time."""
        return f"{self.base}, start={self.start}"

    def power(self) -> Tensor:
        """The powers [N], float32, differentiable; 1 for MASK, which has none."""
        return F.pad(F.softplus(self.raw_power.float()), (0, 1), value=1.0)

    def time(self, t: Tensor) -> Tensor:
        """τ(t), float64."""
        return self.start + (1 - self.start) * checked_time(t)

    def total(self, t: Tensor) -> Tensor:
        """The noise of a token with w = 1: what the network gets as its noise level."""
        return -torch.log1p(-(1 - self.base.eps) * self.time(t))

    def rate(self, t: Tensor) -> Tensor:
        """The tokens have no common rate.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "sampler: expected tweedie, tweedie_cosine, confidence or another that needs no common noise rate for "
            "genmd4, whose tokens have a rate each"
        )

    def token_total(self, t: Tensor, x_0: Tensor) -> Tensor:
        """See :meth:`Schedule.token_total`."""
        return -torch.log1p(-self._masked(t, x_0))

    def reverse_step(self, t: Tensor, t_next: Tensor | None) -> GeneralizedMasked:
        """See :meth:`Schedule.reverse_step`."""
        s = 0.0 if t_next is None else float(self.time(t_next))
        return GeneralizedMasked(s, float(self.time(t)), self.power().detach())

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """log q(x_t | x_0) of each position [B, L], float64, differentiable in the powers."""
        eps, time = self.base.eps, self.time(t).unsqueeze(-1)
        masked = math.log1p(-eps) + self._of(x_0) * time.log()
        return torch.where(x_t == len(self.raw_power), masked, torch.log1p(-masked.exp()))

    def _masked(self, t: Tensor, x_0: Tensor) -> Tensor:
        return (1 - self.base.eps) * self.time(t).unsqueeze(-1) ** self._of(x_0)

    def _of(self, x_0: Tensor) -> Tensor:
        """w of each token, float64."""
        return self.power().double()[x_0]


@dataclass(frozen=True)
class GenMD4(PositionLoss):
    """Masked diffusion with a learned schedule for each token.

    Training noises each text twice. The loss has the gradient of its formula, and the powers also change which
    positions are masked; the gradient of that is estimated by REINFORCE, with each copy as the baseline of the other.

    Attributes:
        start: the bound is an integral from this time on, and :meth:`reconstruction` before it.

    Source: MD4 (Shi et al. 2024), its generalised form GenMD4.
    """

    start: float = 1e-3
    earliest_time: ClassVar[float] = 0.0  # which is `start`
    reconstructs: ClassVar[bool] = True

    operator = staticmethod(generalized_masked_loss)
    linear_operator = staticmethod(linear_generalized_masked_loss)

    def __post_init__(self) -> None:
        """Checks 0 < start < 1."""
        if not 0 < self.start < 1:
            raise ValueError(f"start: expected a number between 0 and 1, both excluded, got {self.start}")

    def check(self, process: RankOne) -> None:
        """The process must be absorbing."""
        expect_process("genmd4", "absorbing", process)

    def parameterization(self, config: Any) -> Parameterization:
        """A mean prediction, without one noise level for all tokens."""
        return Mean(per_token=True)

    def schedule(self, schedule: Schedule, process: RankOne) -> Schedule:
        """The learned schedules, which start from the given one."""
        if isinstance(schedule, PerToken):
            return schedule
        if not isinstance(schedule, (LogLinear, Polynomial)):
            raise ValueError(
                "schedule: expected loglinear or polynomial for the objective genmd4, whose powers start from it, got "
                f"{type(schedule).__name__}"
            )
        return PerToken(schedule, process.dim - 1, self.start)

    def terms(self, diffusion: Diffusion, t: Tensor, x_t: Tensor) -> Sequence[Term]:
        """See :meth:`PositionLoss.terms`."""
        schedule = _schedule(diffusion)
        return [(1 - schedule.start, {"t": schedule.time(t).unsqueeze(-1), "power": schedule.power()})]

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Objective.training_loss`. A step costs as much as two of another objective."""
        schedule = _schedule(diffusion)
        both, times = torch.cat([x_0, x_0]), torch.cat([t, t])
        x_t = torch.cat([diffusion.noise(x_0, t, generator=generator, first=options.first) for _ in range(2)])
        # half of it from each copy, so that the gradient at each position has one factor
        labels = None if options.labels is None else options.labels.repeat(2)
        half = dataclasses.replace(options, scale=options.scale / 2, labels=labels)
        nats = self.loss(diffusion, both, x_t, times, half).view(2, -1)
        first, second = nats.detach()
        log_first, log_second = schedule.log_prob(x_t, both, times).sum(1).chunk(2)
        # its value is 0, its gradient is (f_1 - f_2) (∇log q_1 - ∇log q_2), with half of each loss as f
        score = (log_first - log_second) - (log_first - log_second).detach()
        reinforce = (first - second) * score
        reconstruction = self.reconstruction(diffusion, x_0).sum(1)
        # in the dtype of the losses, so that they get one number as their gradient and not copies of it
        total: Tensor = nats.sum(0) + (reinforce + options.scale * reconstruction).float()
        return total

    def reconstruction(self, diffusion: Diffusion, x_0: Tensor) -> Tensor:
        """The part of the bound before the first time: masked positions there are guessed from the powers alone.

        Token v is masked with probability (1-ε) τ^{w_v}, and is then guessed with a probability proportional to
        τ^{w_v}. See :meth:`sedd.diffusion.Objective.reconstruction`.
        """
        schedule = _schedule(diffusion)
        log_masked = schedule.power().double()[:-1] * math.log(schedule.start)
        nats: Tensor = log_masked.logsumexp(0) - log_masked
        return ((1 - schedule.base.eps) * log_masked.exp() * nats)[x_0]


def _schedule(diffusion: Diffusion) -> PerToken:
    assert isinstance(diffusion.schedule, PerToken)
    return diffusion.schedule
