"""Objectives that were tried before the others, to compare with: they are noisier or train badly.

They store numbers of the whole vocabulary, and their bound is that of the objective which replaced them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion, LossOptions
from sedd.diffusion.position_loss import MD4, ScoreEntropy, expect_process, scored_rows
from sedd_ext import RankOne, mean_prediction_loss

__all__ = ["ConcreteScore", "ImplicitScoreEntropy", "TauLDR", "neighbours"]


@torch.no_grad()
def neighbours(
    x_t: Tensor,
    process: RankOne,
    generator: torch.Generator | None = None,
    first: int = 0,
    count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences after one more jump of the forward process, drawn in proportion to the rates of the jumps.

    Args:
        x_t: tokens [B, L], int64.
        process: the process.
        generator: random number generator; torch's default one if None.
        first: place of the first sequence in a larger batch.
        count: number of sequences in that batch; None if these are all.

    Returns:
        The sequences [B, L]; the position of the jump [B]; and the rate of all jumps together at σ = 1 [B], float64,
        which is 0 if there is none. Such a sequence is returned unchanged.
    """
    stationary = process.stationary.to(x_t.device)
    leave = 1 - stationary[x_t]  # the rate at which each position jumps
    rate = leave.sum(1)
    none = rate == 0
    rows = len(x_t) if count is None else count
    uniform = torch.rand(rows, 2, generator=generator, dtype=torch.float64, device=x_t.device)[first:][: len(x_t)]
    position = _draw(leave + none[:, None], uniform[:, :1])
    token = x_t.gather(1, position)
    others = stationary.expand(len(x_t), -1).scatter(1, token, 0.0)
    others = torch.where(none[:, None], stationary, others)
    new = _draw(others, uniform[:, 1:])
    new = torch.where(none[:, None], token, new)
    return x_t.scatter(1, position, new), position.squeeze(1), rate


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [B, 1] drawn in proportion to weights [B, K], by numbers [B, 1] in [0, 1); never one of weight 0."""
    sums = weights.double().cumsum(1)
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(sums[:, -1:]))  # uniform * sum may be rounded up to the sum
    return torch.searchsorted(sums, torch.minimum(uniform * sums[:, -1:], below), right=True)


class TauLDR(MD4):
    """Masked diffusion as it was first trained in continuous time: by the probability of undoing one sampled jump.

    Of each noised sequence, one more token is masked, and the loss is the cross-entropy of this token, times the rate
    of all such jumps. Its expectation is that of :class:`MD4`, which scores all masked positions.

    Source: Campbell et al. 2022, for absorbing processes; compared in MD4 (Shi et al. 2024).
    """

    def check(self, process: RankOne) -> None:
        """The process must be absorbing."""
        expect_process("tauldr", "absorbing", process)

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Objective.training_loss`."""
        network, process, schedule = diffusion.network, diffusion.process, diffusion.schedule
        x_t = diffusion.noise(x_0, t, generator=generator, first=options.first)
        after, position, rate = neighbours(x_t, process, generator, options.first, options.count)
        rows = torch.arange(len(x_t), device=x_t.device)
        sigma = schedule.total(t)
        logits = network.head(network.hidden(after, sigma, **options.conditions)[rows, position])
        # the step to the clean text: a cross-entropy
        nats = mean_prediction_loss(
            logits, after[rows, position], x_0[rows, position], sigma, process, sigma_s=torch.zeros_like(sigma)
        )
        return (options.scale * schedule.rate(t) * rate * nats).float()


class ImplicitScoreEntropy(ScoreEntropy):
    """Score entropy without the clean token: of the noised sequence, and of one sampled neighbour.

    σ(t) { Σ_i π_{x_i} Σ_{y≠x_i} s_y - R log s' }, with R the rate of all jumps from x_t and s' the score, after one of
    them, of undoing it. The expectation differs from that of :class:`ScoreEntropy` by a number that does not depend on
    the network. So the training loss is not a bound, and can be negative. A step calls the network twice.

    Source: SEDD (Lou, Meng & Ermon 2024), proposition 3.3.
    """

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Objective.training_loss`."""
        process, schedule = diffusion.process, diffusion.schedule
        x_t = diffusion.noise(x_0, t, generator=generator, first=options.first)
        after, position, rate = neighbours(x_t, process, generator, options.first, options.count)
        log_score, rows = _log_scores(diffusion, x_t, t, options)
        stationary = process.stationary.to(x_t.device)[x_t.flatten()[rows]]
        total = _by_sequence(stationary * log_score.exp().sum(1), rows, x_t)
        # log-scores at the position of the jump alone
        sequence = torch.arange(len(x_t), device=x_t.device)
        hidden = diffusion.network.hidden(after, schedule.total(t), **options.conditions)[sequence, position]
        here = _shifted(diffusion, diffusion.network.head(hidden), after[sequence, position], schedule.total(t))
        undone = here[sequence, x_t[sequence, position]]
        return (options.scale * schedule.rate(t) * (total - rate * torch.where(rate > 0, undone, 0.0))).float()


class ConcreteScore(ScoreEntropy):
    """The squared error of the scores instead of their score entropy: π_x Σ_{y≠x} (s_y - r_y)² / 2.

    r is the ratio p_t(y | x_0) / p_t(x | x_0), which is large at small noise. Training is unstable.

    Source: concrete score matching (Meng et al. 2022), with the denoising ratios; compared in SEDD (Lou, Meng & Ermon
        2024).
    """

    def training_loss(
        self, diffusion: Diffusion, x_0: Tensor, t: Tensor, options: LossOptions, generator: torch.Generator | None
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Objective.training_loss`."""
        process, schedule = diffusion.process, diffusion.schedule
        x_t = diffusion.noise(x_0, t, generator=generator, first=options.first)
        log_score, rows = _log_scores(diffusion, x_t, t, options)
        x, clean = x_t.flatten()[rows, None], x_0.flatten()[rows, None]
        stationary = process.stationary.to(x_t.device)
        sigma = schedule.total(t)[rows // x_t.shape[1], None]
        kept, moved = torch.exp(-sigma), -torch.expm1(-sigma)
        here = moved * stationary[x] + torch.where(x == clean, kept, 0.0)  # p_t(x | x_0)
        ratio = (moved / here) * stationary
        ratio = ratio.scatter_add(1, clean, kept / here).scatter(1, x, 0.0)
        squares = (log_score.exp() - ratio).square().sum(1) / 2
        return (options.scale * schedule.rate(t) * _by_sequence(stationary[x[:, 0]] * squares, rows, x_t)).float()


def _log_scores(diffusion: Diffusion, x_t: Tensor, t: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Log-scores [R, N] of the R positions that have a loss, -∞ for the token that is there, and their indices [R]."""
    rows = scored_rows(x_t, diffusion.process)
    sigma = diffusion.schedule.total(t)
    hidden = diffusion.network.hidden(x_t, sigma, **options.conditions).flatten(0, 1).index_select(0, rows)
    x = x_t.flatten()[rows]
    log_score = _shifted(diffusion, diffusion.network.head(hidden), x, sigma[rows // x_t.shape[1]])
    return log_score.scatter(1, x[:, None], -torch.inf), rows


def _shifted(diffusion: Diffusion, output: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Log-scores [R, N], float64, from the output of the head, for tokens x_t [R] at total noise [R]."""
    shift = diffusion.step_options(sigma, x_t)["log_score_shift"]
    return output.double() if shift is None else output.double() - shift.unsqueeze(-1)


def _by_sequence(values: Tensor, rows: Tensor, x_t: Tensor) -> Tensor:
    """Sums the values of positions [R] over each sequence [B]."""
    return values.new_zeros(len(x_t)).index_add(0, rows // x_t.shape[1], values)
