"""A toy world in which the true score is known: independent positions with one known distribution each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedd.diffusion import Diffusion, Schedule, Score, ScoreEntropy
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
