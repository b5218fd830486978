"""What the benchmarks compare with: the loss in the fastest plain PyTorch, and the formulas of the released SEDD code.

Tests hold them to :mod:`sedd_ext.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sedd_ext import RankOne


def dense_score_entropy(log_score: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor, process: RankOne) -> Tensor:
    """The loss as fast as plain PyTorch allows: as few passes over [*B, N] as the formula needs.

    No boolean gathers, no masks of size N, no Python branch on data, so ``torch.compile`` sees one graph. Entry
    y = x is added and taken off again, so it must be finite (the released models put 0 there).

    Args:
        log_score: [*B, N].
        x_t: noised tokens [*B], int64.
        x_0: clean tokens [*B], int64.
        sigma: σ̄, a tensor broadcastable to [*B].
        process: the process.

    Returns:
        L [*B], float32 (float64 for float64 log-scores).
    """
    scores = log_score if log_score.dtype == torch.float64 else log_score.float()
    sigma = sigma.to(scores.dtype)
    a, b = torch.exp(-sigma), -torch.expm1(-sigma)
    moved = x_t != x_0
    # one gather for both: the gradient of every gather is a tensor [*B, N] of its own
    at_x, at_x0 = scores.gather(-1, torch.stack([x_t, x_0], dim=-1)).unbind(-1)
    positive = scores.exp().sum(-1) - at_x.exp()
    if process.family == "absorbing":
        ratio = a / b
        loss = positive - moved * (ratio * at_x0 - _k(ratio))
        return torch.where(x_t == process.dim - 1, loss, 0.0)
    if process.family == "uniform":
        pi_x = pi_x0 = torch.full_like(at_x, 1 / process.dim)
        weighted = scores.mean(-1)
    else:
        pi = process.stationary.to(scores)
        pi_x, pi_x0 = pi[x_t], pi[x_0]
        weighted = scores @ pi
    d = torch.where(pi_x > 0, a * ~moved + b * pi_x, 1.0)
    c = b / d
    pair_entropy = torch.xlogy(pi_x, pi_x) + moved * torch.xlogy(pi_x0, pi_x0)
    constant = (
        (torch.xlogy(c, c) - c) * (1 - pi_x - moved * pi_x0)
        + c * (process.neg_entropy - pair_entropy)
        + moved * _k((a + b * pi_x0) / d)
    )
    loss = positive - c * (weighted - pi_x * at_x) - moved * (a / d) * at_x0 + constant
    return torch.where(pi_x > 0, pi_x * loss, 0.0)


def released_score_entropy(log_score: Tensor, sigma: Tensor, x_t: Tensor, x_0: Tensor, process: RankOne) -> Tensor:
    """The loss the way the released SEDD code computes it (argument order included), absorbing and uniform only.

    The absorbing loss picks the masked rows by boolean gathers; arithmetic is in the dtype of ``log_score``.

    Args:
        log_score: [*B, N], entry x_t zero.
        sigma: σ̄, a tensor broadcastable to [*B].
        x_t: noised tokens [*B], int64.
        x_0: clean tokens [*B], int64.
        process: an absorbing or uniform process.

    Returns:
        L [*B].

    Raises:
        NotImplementedError: the released code has no such process.

    Source: github.com/louaaron/Score-Entropy-Discrete-Diffusion, graph_lib.py; restated.
    """
    growth = torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)

    if process.family == "absorbing":
        masked = x_t == process.dim - 1
        ratio = 1 / growth.expand_as(x_t)[masked]
        negative = ratio * log_score[masked].gather(-1, x_0[masked][..., None]).squeeze(-1)
        positive = log_score[masked][:, :-1].exp().sum(dim=-1)
        loss = torch.zeros(x_t.shape, device=x_t.device)
        loss[masked] += positive - negative + ratio * (ratio.log() - 1)
        return loss

    _only_released(process)
    n = process.dim
    stay_ratio = 1 - n / (growth + n)
    mean_of_others = log_score.mean(dim=-1) - log_score.gather(-1, x_t[..., None]).squeeze(-1) / n
    at_x0 = log_score.gather(-1, x_0[..., None]).squeeze(-1)
    stayed = x_t == x_0
    negative = torch.where(stayed, stay_ratio * mean_of_others, at_x0 / growth + mean_of_others)
    constant = torch.where(
        stayed,
        (n - 1) / n * stay_ratio * (stay_ratio.log() - 1),
        ((-stay_ratio.log() - 1) / stay_ratio - (n - 2)) / n,
    )
    score = log_score.exp()
    positive = score.mean(dim=-1) - score.gather(-1, x_t[..., None]).squeeze(-1) / n
    return positive - negative + constant


def released_analytic_step(
    log_score: Tensor,
    x_t: Tensor,
    dsigma: Tensor,
    process: RankOne,
    *,
    denoise: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One Tweedie ("analytic") step of the released SEDD code, its one-stage Gumbel draw included.

    Its tail is wrong in float32: the draw divides by ``1e-10 - log(u + 1e-10)``, and u has 24 bits.

    Args:
        log_score: [*B, N], entry x_t zero.
        x_t: tokens [*B], int64.
        dsigma: Δ, a tensor broadcastable to [*B].
        process: an absorbing or uniform process.
        denoise: drop MASK (the last entry) before the draw, as its denoiser does for absorbing processes.
        generator: random number generator; torch's default one if None.

    Returns:
        tokens [*B], int64.

    Raises:
        NotImplementedError: the released code has no such process.

    Source: as :func:`released_score_entropy`, with sampling.py and catsample.py; restated.
    """
    _only_released(process)
    score = log_score.exp()
    grow, decay = dsigma.exp()[..., None], torch.exp(-dsigma)[..., None]
    total = score.sum(dim=-1, keepdim=True)
    if process.family == "absorbing":
        staggered = score.clone()
        staggered *= grow
        staggered[..., -1:] += (1 - grow) * total
        transition = decay * one_hot(x_t, num_classes=process.dim)
        transition = transition + torch.where((x_t == process.dim - 1)[..., None], 1 - decay, 0.0)
    else:
        staggered = (decay - 1) / (process.dim * decay) * total + score / decay
        at_x = x_t[..., None]
        transition = torch.ones_like(score) * ((1 - decay) / process.dim)
        transition = transition.scatter(-1, at_x, torch.zeros_like(transition))
        transition = transition.scatter(-1, at_x, 1 - transition.sum(dim=-1, keepdim=True))
    probs = staggered * transition
    if denoise and process.family == "absorbing":
        probs = probs[..., :-1]
    return one_stage_gumbel(probs, generator)


def released_euler_step(
    log_score: Tensor, x_t: Tensor, step: Tensor, process: RankOne, *, generator: torch.Generator | None = None
) -> Tensor:
    """One Euler step of the released SEDD code. Arguments as :func:`released_analytic_step`, ``step`` = Δt σ(t)."""
    _only_released(process)
    at_x = x_t[..., None]
    if process.family == "absorbing":
        transposed = -one_hot(x_t, num_classes=process.dim)
        transposed[x_t == process.dim - 1] += 1
    else:
        transposed = torch.ones_like(log_score) / process.dim
        transposed = transposed.scatter(-1, at_x, -(process.dim - 1) / process.dim)
    rate = transposed * log_score.exp()
    rate.scatter_(-1, at_x, torch.zeros_like(rate))
    rate.scatter_(-1, at_x, -rate.sum(dim=-1, keepdim=True))
    rate = step[..., None] * rate
    return one_stage_gumbel(one_hot(x_t, num_classes=process.dim).to(rate) + rate, generator)


def _k(ratio: Tensor) -> Tensor:
    """K(r) = r (log r - 1), with K(0) = 0."""
    return torch.xlogy(ratio, ratio) - ratio


def _only_released(process: RankOne) -> None:
    if process.family == "rank_one":
        raise NotImplementedError(f"process: the released code has absorbing and uniform processes only, got {process}")


def one_stage_gumbel(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device, generator=generator)
    return (probs / (1e-10 - (noise + 1e-10).log())).argmax(dim=-1)
