"""A discrete diffusion model: process, noise schedule, network, parameterisation and objective in one module."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sedd.diffusion.schedule import LogLinear, Schedule
from sedd.network import Network
from sedd.runtime import device_of
from sedd_ext import RankOne, sample_transition

__all__ = ["Diffusion", "LossOptions", "Mean", "Objective", "Parameterization", "Score"]


class Parameterization(Protocol):
    """How the output of a network is read.

    :class:`Score` reads log-scores, :class:`Mean` reads logits of the clean token.
    """

    def step_options(self, process: RankOne, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """The keyword arguments with which the reverse steps of :mod:`sedd_ext` read the output.

        Args:
            process: the noise process.
            sigma: total noise σ̄, floating point, broadcasts to the shape of x_t.
            x_t: tokens of the positions [*B], int64.
        """
        ...


@dataclass(frozen=True)
class Score:
    """The network estimates log-scores: log p_t(y) / p_t(x_t), up to a shift that depends on σ̄ alone.

    Attributes:
        scale_by_sigma: use the shift for absorbing processes.
        hybrid_shift: use the shift for hybrid processes.

    Source: SEDD (Lou, Meng & Ermon 2024), appendix C.2, for absorbing processes; extended to hybrid ones.
    """

    scale_by_sigma: bool = True
    hybrid_shift: bool = True

    def step_options(self, process: RankOne, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """See :meth:`Parameterization.step_options`."""
        return {"log_score_shift": self.log_score_shift(process, sigma, x_t)}

    def log_score_shift(self, process: RankOne, sigma: Tensor, x_t: Tensor) -> Tensor | None:
        """The shift that centres the log-scores, so that the head need not depend on σ̄.

        It is log p_t(MASK) / p_t(y) for text of which nothing is known, p_0(y) = 1/n for each of the n = N - 1 tokens.
        With it, a head whose output is zero gives a masked position the true scores of such text. With a = exp(-σ̄)
        and b = 1 - a:

        * absorbing processes, where only masked positions have a loss: log(n b / a) = log expm1(σ̄) + log n at every
          position;
        * hybrid processes with uniform fraction λ: log(n b (1-λ) / (a + b λ)) at masked positions and 0 at the others.
          There the scores of such text are 1, except MASK's, which :meth:`initialize` gives a bias.

        Args:
            process: the noise process.
            sigma: total noise σ̄, floating point, broadcasts to the shape of x_t.
            x_t: tokens of the positions [*B], int64.

        Returns:
            A tensor that broadcasts to [*B]: what is subtracted from all log-scores of a position. None for nothing,
            as for uniform processes.
        """
        n = process.dim - 1
        if process.family == "absorbing":
            if not self.scale_by_sigma:
                return None
            # log expm1(σ) = σ + log(1 - e^{-σ}): no overflow at large σ, no cancellation at small σ
            return sigma + torch.log(-torch.expm1(-sigma)) + math.log(n)
        fraction = process.uniform_fraction if self.hybrid_shift else None
        if fraction is None:
            return None
        moved = -torch.expm1(-sigma)
        ratio = torch.log(moved / (torch.exp(-sigma) + moved * fraction))
        ratio = ratio + math.log(n * (1 - fraction))
        return torch.where(x_t == n, ratio, torch.zeros_like(ratio))

    def initialize(self, bias: Tensor, process: RankOne, schedule: Schedule | None) -> None:
        """Sets the bias of MASK's log-score in the head of a new network for a hybrid process.

        The bias is one log-score for every σ̄ from 0 to σ̄(1). The best one for text of which nothing is known is the log
        of n times the mean of p_t(MASK) = b (1-λ) over the mean of n p_t(y) = a + b λ. It costs 0.25 nats per token at
        λ = 0.1 with the log-linear schedule.

        Args:
            bias: bias of the head [N], changed in place.
            process: the noise process; nothing is done unless it is hybrid.
            schedule: the noise schedule; log-linear if None.
        """
        fraction = process.uniform_fraction if self.hybrid_shift else None
        if fraction is None:
            return
        end = LogLinear() if schedule is None else schedule
        total = float(end.total(torch.ones((), dtype=torch.float64, device="cpu")))
        kept = -math.expm1(-total)  # the integral of a over σ̄; total - kept is the integral of b
        moved = total - kept
        ratio = (1 - fraction) * moved / (kept + fraction * moved)
        with torch.no_grad():
            bias[-1] = math.log((process.dim - 1) * ratio)


@dataclass(frozen=True)
class Mean:
    """The network predicts the clean token: μ = softmax(logits) over all tokens but MASK.

    Attributes:
        per_token: every token has a noise schedule of its own, so steps depend on times and not on a total noise.

    Source: D3PM (Austin et al. 2021); MD4 (Shi et al. 2024).
    """

    per_token: bool = False

    def step_options(self, process: RankOne, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """See :meth:`Parameterization.step_options`."""
        return {"parameterization": "mean", "sigma": None if self.per_token else sigma}


@dataclass(frozen=True)
class LossOptions:
    """Options of a loss, explained at :meth:`Diffusion.loss`.

    Attributes:
        capacity: the share of the positions, in (0, 1], that go through a fused head; None to count those that need it.
        first: for a training loss: the place of the first sequence in the batch of an optimiser step.
        count: the number of sequences in that batch; None if these are all. Random numbers belong to places in it, so
            that they do not depend on how it is divided.
        labels: the class of each sequence [B], int64, for a network with classes; None for others.
    """

    given: int = 0
    scale: float = 1.0
    fused: bool = True
    capacity: float | None = None
    first: int = 0
    count: int | None = None
    labels: Tensor | None = None

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The keyword arguments of :meth:`sedd.network.Network.hidden` other than tokens and noise."""
        return {} if self.labels is None else {"labels": self.labels}

    def positions(self, x: Tensor) -> int | None:
        """The capacity as the number of positions of x [B, L]."""
        return None if self.capacity is None else math.ceil(self.capacity * x.numel())


class Objective(ABC):
    """A likelihood bound, and a training loss, which is the integrand of the bound unless a subclass says otherwise.

    Found by name in ``OBJECTIVES``. A subclass may have numbers as parameters, such as the fields of a dataclass.

    Attributes:
        autoregressive: the loss is the exact -log p(x_0) of a causal network, which ignores time and noise. Such models
            have an exact likelihood instead of a bound, and write from left to right.
        earliest_time: training times are drawn from here to 1.
        reconstructs: the part of the bound below σ̄(0) > 0 has a formula, :meth:`reconstruction`. Otherwise the bound
            integrates over the noise from 0 to σ̄(0) too.
    """

    autoregressive: ClassVar[bool] = False
    earliest_time: ClassVar[float] = 1e-3
    reconstructs: ClassVar[bool] = False

    def check(self, process: RankOne) -> None:  # noqa: B027 - any process, unless a subclass says otherwise
        """Raises a ValueError if the objective does not suit the process."""

    def check_network(self, network: Network) -> None:  # noqa: B027 - any network, unless a subclass says otherwise
        """Raises a ValueError if the objective does not suit the network."""

    def schedule(self, schedule: Schedule, process: RankOne) -> Schedule:
        """The schedule of the model, made from the given one; a schedule that it has made is returned as it is.

        Raises:
            ValueError: the schedule does not suit the objective.
        """
        return schedule

    def parameterization(self, config: Any) -> Parameterization:
        """How the network's output is read.

        Args:
            config: options with ``scale_by_sigma`` and ``hybrid_shift``, such as :class:`sedd.network.ModelConfig`.
        """
        return Score(config.scale_by_sigma, config.hybrid_shift)

    @abstractmethod
    def loss(self, diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: Tensor, options: LossOptions) -> Tensor:
        """The integrand of the bound; see :meth:`Diffusion.loss` for the arguments and the result."""

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """The training loss: noises the sequences and returns :meth:`loss`. See :meth:`Diffusion.forward`."""
        x_t = diffusion.noise(x_0, t, generator=generator, first=options.first)
        return self.loss(diffusion, x_0, x_t, t, options)

    def reconstruction(self, diffusion: Diffusion, x_0: Tensor) -> Tensor:
        """The part of the bound below σ̄(0) > 0 for an objective that :attr:`reconstructs` it; 0 for others.

        Args:
            diffusion: the model.
            x_0: clean tokens, any shape, int64.

        Returns:
            Nats of each token, of the shape of x_0.
        """
        return torch.zeros(x_0.shape, device=x_0.device)


class Diffusion(nn.Module):
    """A discrete diffusion model. Calling it computes the training loss.

    The parameters of the network are ``network.*``. If the schedule is a module, its parameters are ``schedule.*``:
    optimiser, moving average and checkpoints treat both alike.

    Args:
        network: reads noised tokens, see :class:`sedd.network.Network`.
        process: the noise process.
        schedule: total noise and noise rate over time; :meth:`Objective.schedule` may change it.
        objective: bound and training loss.
        parameterization: how the network's output becomes log-scores; :class:`Score` if None.
    """

    def __init__(
        self,
        network: Network,
        process: RankOne,
        schedule: Schedule,
        objective: Objective,
        parameterization: Parameterization | None = None,
    ) -> None:
        super().__init__()
        objective.check(process)
        objective.check_network(network)
        self.network = network
        self.process = process
        self.schedule = objective.schedule(schedule, process)
        self.objective = objective
        self.parameterization = Score() if parameterization is None else parameterization

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU if there are none."""
        return device_of(self)

    def with_schedule(self, schedule: Schedule) -> Diffusion:
        """The same network under another noise schedule, for an objective that does not make its own."""
        return Diffusion(self.network, self.process, schedule, self.objective, self.parameterization)

    def step_options(self, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """See :meth:`Parameterization.step_options`."""
        return self.parameterization.step_options(self.process, sigma, x_t)

    @torch.no_grad()
    def noise(self, x_0: Tensor, t: Tensor, *, generator: torch.Generator | None = None, first: int = 0) -> Tensor:
        """Noised sequences x_t ~ p_t(· | x_0). An autoregressive model gets no noise.

        Args:
            x_0: clean tokens [B, L], int64.
            t: time of each sequence [B], in (0, 1].
            generator: random number generator; torch's default one if None.
            first: place of the first sequence in a larger batch; see :func:`sedd_ext.sample_transition`.

        Returns:
            Tokens [B, L], int64.

        Raises:
            ValueError: ``x_0`` is not [B, L] or ``t`` not [B]; tokens or times out of range.
        """
        if x_0.dim() != 2:
            raise ValueError(f"x_0: expected a tensor [B, L], got shape {list(x_0.shape)}")
        if t.shape != x_0.shape[:1]:
            raise ValueError(f"t: expected shape [{x_0.shape[0]}], one time for each sequence, got {list(t.shape)}")
        if self.objective.autoregressive:
            return x_0
        sigma, first_row = self.schedule.token_total(t, x_0), first * x_0.shape[1]
        return sample_transition(x_0, sigma, self.process, generator=generator, first_row=first_row)

    def loss(
        self,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        *,
        given: int = 0,
        scale: float = 1.0,
        fused: bool = True,
        capacity: float | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The integrand of the likelihood bound for noised sequences.

        Args:
            x_0: clean tokens [B, L], int64.
            x_t: noised tokens [B, L], int64.
            t: time of each sequence [B], in (0, 1].
            given: number of tokens at the beginning that are given: the network reads them, and they are not scored.
            scale: factor of the result. Fused heads compute gradients in the forward pass: for a mean, pass 1/n here.
            fused: fuse a linear head with the loss, which then needs no log-scores of rows × N.
            capacity: the share of the positions, in (0, 1], that go through a fused head, so that a GPU need not count
                those that have a loss; see :func:`sedd_ext.linear_score_entropy_loss`. None: they are counted.
            labels: for a network with classes: the class of each sequence [B], int64; None for no class.

        Returns:
            Nats per sequence times ``scale`` [B], float32, differentiable. The expectation over t ~ U(0, 1) is the
            integral of the likelihood bound (:func:`sedd.diffusion.elbo`).
        """
        return self.objective.loss(self, x_0, x_t, t, LossOptions(given, scale, fused, capacity, labels=labels))

    def forward(
        self,
        x_0: Tensor,
        t: Tensor,
        *,
        scale: float = 1.0,
        fused: bool = True,
        capacity: float | None = None,
        generator: torch.Generator | None = None,
        first: int = 0,
        count: int | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The training loss of sequences, with the arguments of :meth:`noise` and :meth:`loss`.

        Args:
            x_0: clean tokens [B, L], int64.
            t: time of each sequence [B], in (0, 1].
            scale: see :meth:`loss`.
            fused: see :meth:`loss`.
            capacity: see :meth:`loss`.
            generator: random number generator; torch's default one if None.
            first: place of the first sequence in the batch of an optimiser step.
            count: number of sequences in that batch; None if these are all. The parts of a batch get the same random
                numbers as the whole, if the generator is in the same state for each.
            labels: see :meth:`loss`.

        Returns:
            Nats per sequence times ``scale`` [B], float32, differentiable. For most objectives it is :meth:`loss` of
            noised sequences.
        """
        options = LossOptions(scale=scale, fused=fused, capacity=capacity, first=first, count=count, labels=labels)
        return self.objective.training_loss(self, x_0, t, options, generator)
