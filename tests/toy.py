"""A toy world in which the true score is known: independent positions with one known distribution each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sedd.diffusion import Diffusion, LossOptions, Schedule, Score, ScoreEntropy
from sedd.hub import SEDD
from sedd_ext import RankOne

VOCABULARY = 5
P_0 = torch.tensor([0.45, 0.3, 0.2, 0.049, 0.001], dtype=torch.float64)


class OwnShift:
    """The shift of a toy network's log-scores, which the network itself knows."""

    def __init__(self, network: TrueScore) -> None:
        self.network = network

    def step_options(self, process: RankOne, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        return {"log_score_shift": self.network.log_score_shift(sigma, x_t)}


def diffusion(network: TrueScore | SEDD, process: RankOne, schedule: Schedule) -> Diffusion:
    """A network with its process, a schedule and score entropy."""
    how: Score | OwnShift = network.parameterization if isinstance(network, SEDD) else OwnShift(network)
    model = Diffusion(network, process, schedule, ScoreEntropy(), how)
    return model.train(network.training)


class TrueScore(nn.Module):
    """A score model that is exactly right for text whose tokens are drawn independently from p_0.

    Its hidden states are the true log-scores log p_t(y)/p_t(x_t), raised by ``shift``, which it reports as
    ``log_score_shift`` for the caller to take off again.
    """

    def __init__(self, process: RankOne, p_0: Tensor = P_0, shift: float | None = None) -> None:
        super().__init__()
        self.process, self.shift = process, shift
        self.p_0 = torch.zeros(process.dim, dtype=torch.float64)
        self.p_0[: len(p_0)] = p_0
        self.time_conditioning = True
        self.rows_scored: list[int] = []
        self.modes: list[bool] = []

    def p_t(self, sigma: Tensor) -> Tensor:
        a = torch.exp(-sigma.double())[..., None]
        return a * self.p_0 - torch.expm1(-sigma.double())[..., None] * self.process.stationary

    def hidden(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        self.modes.append(self.training)
        log_p = self.p_t(sigma).log()[:, None].expand(*x_t.shape, -1)
        return log_p - log_p.gather(-1, x_t[..., None]) + (self.shift or 0.0)

    def head(self, hidden: Tensor) -> Tensor:
        self.rows_scored.append(hidden.shape[:-1].numel())
        return hidden

    def head_parameters(self) -> None:
        """The head is no matrix."""

    def log_score_shift(self, sigma: Tensor, x_t: Tensor) -> Tensor | None:
        return None if self.shift is None else torch.full_like(sigma, self.shift)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Text of this world."""
        n = shape[0] * shape[1]
        return torch.multinomial(self.p_0, n, replacement=True, generator=generator).view(shape)


class JointScore(TrueScore):
    """Exactly right for short text of one known joint distribution, whose tokens depend on one another.

    Every sequence that the noise can make is summed over, so log p_t, and with it every score, is exact. ``error`` is
    added to the log-scores of all tokens but the one that is there, to be wrong by a known amount.

    Args:
        process: the process.
        joint: probability of each text [n, ..., n], float64, one axis a position.
        error: what the log-scores are too high by.
    """

    def __init__(self, process: RankOne, joint: Tensor, error: float = 0.0) -> None:
        super().__init__(process)
        self.joint, self.error = joint, error

    def hidden(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        a, n = torch.exp(-sigma.double())[:, None, None], self.joint.shape[0]
        # q[b, x_0, x_t]: what becomes of each token
        q = a * torch.eye(n, self.process.dim, dtype=torch.float64) + (1 - a) * self.process.stationary
        p = self.joint.expand(len(x_t), *self.joint.shape)
        for axis in range(1, p.dim()):
            p = torch.einsum("b...x,bxy->b...y", p.movedim(axis, -1), q).movedim(-1, axis)
        rows, columns = torch.arange(len(x_t)), []
        for position in range(x_t.shape[1]):  # p_t of the sequence with this one position varied
            others = [x_t[:, i] for i in range(x_t.shape[1]) if i != position]
            columns.append(p.movedim(position + 1, -1)[(rows, *others)].log())
        log_p = torch.stack(columns, 1)
        log_score = log_p - log_p.gather(-1, x_t[..., None]) + self.error
        return log_score.scatter(-1, x_t[..., None], 0.0)


def sequences(tokens: int, length: int) -> Tensor:
    """All sequences [tokens ** length, length]."""
    return torch.cartesian_prod(*[torch.arange(tokens)] * length).view(-1, length)


class Enumerated:
    """A short text of a known joint distribution under noise, with every sum over sequences written out.

    Args:
        joint: probability of each text [n, ..., n], float64, one axis a position.
        q: what becomes of each token [n, N]: its distribution after the noise.
    """

    def __init__(self, joint: Tensor, q: Tensor) -> None:
        self.joint, self.q, self.length = joint, q, joint.dim()
        self.x_t = sequences(q.shape[1], self.length)

    def given(self, x_0: Tensor) -> Tensor:
        """q(x_t | x_0) of every sequence of ``x_t``, for one text [L]."""
        return self.q[x_0[None].expand(len(self.x_t), -1), self.x_t].prod(1)

    def marginal(self) -> Tensor:
        """q(x_t) of every sequence of ``x_t``."""
        p = self.joint
        for axis in range(self.length):
            p = torch.einsum("...x,xy->...y", p.movedim(axis, -1), self.q).movedim(-1, axis)
        return p.flatten()

    def information(self, x_0: Tensor) -> float:
        """E log q(x_t | x_0) / q(x_t): what x_t still says of the text. -log p(x_0) without noise."""
        given = self.given(x_0)
        return float(torch.special.xlogy(given, given / self.marginal()).nansum())


class JointMean(nn.Module):
    """Predicts the clean token exactly, for short text of one known joint distribution.

    Args:
        dim: N.
        joint: see :class:`Enumerated`.
        noise: what becomes of each token [B, n, N] at total noise σ̄ [B].
    """

    time_conditioning = True

    def __init__(self, dim: int, joint: Tensor, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dim, self.joint, self.noise = dim, joint, noise

    def hidden(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        q, rows = self.noise(sigma).expand(len(x_t), -1, -1), torch.arange(len(x_t))
        p = self.joint.expand(len(x_t), *self.joint.shape)
        for i in range(x_t.shape[1]):
            shape = [len(x_t), *([1] * x_t.shape[1])]
            shape[i + 1] = -1
            p = p * q[rows, :, x_t[:, i]].view(shape)
        axes = range(1, p.dim())
        mean = torch.stack([p.sum([a for a in axes if a != i]) if len(axes) > 1 else p for i in axes], 1)
        log_mean = (mean / mean.sum(-1, keepdim=True)).log()
        return nn.functional.pad(log_mean, (0, self.dim - log_mean.shape[-1]))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def head_parameters(self) -> None:
        """The head is no matrix."""


def expected(diffusion: Diffusion, toy: Enumerated, x_0: Tensor, t: float) -> float:
    """The integrand of the bound at time t, its expectation over x_t written out."""
    clean, times = x_0.expand(len(toy.x_t), -1), torch.full((len(toy.x_t),), t, dtype=torch.float64)
    weight = toy.given(x_0)
    here = weight > 0
    loss = diffusion.objective.loss(diffusion, clean[here], toy.x_t[here], times[here], LossOptions(fused=False))
    return float((weight[here] * loss.detach().double()).sum())
