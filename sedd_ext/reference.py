"""The mathematics again in plain PyTorch: dense, readable, and independent of the compiled code.

Every operator of :mod:`sedd_ext` is stated here a second time with the same signature, from an explicit stationary
vector π and [..., N] tensors. Tests hold the kernels to these functions; so can you. Arithmetic along the vocabulary is
float64 for float64 log-scores and float32 for all other dtypes; the numbers a row needs once are float64.

At the end stand the same loss as one would write it for speed in plain PyTorch (:func:`dense_score_entropy`) and the
formulation of the released SEDD code (``released_*``): what the benchmarks compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sedd_ext.process import RankOne

__all__ = [
    "dense_score_entropy",
    "euler_probs",
    "euler_sample",
    "released_analytic_step",
    "released_euler_step",
    "released_score_entropy",
    "sample_transition",
    "score_entropy_loss",
    "transition_column",
    "transition_row",
    "tweedie_probs",
    "tweedie_sample",
]

# --------------------------------------------------------------------------------------------------------- transitions


def transition_column(x_0: Tensor, sigma: float | Tensor, process: RankOne) -> Tensor:
    """Column x_0 of exp(σQ), the law of x_t: ``a δ_{y,x0} + (1 - a) π_y``. See :func:`sedd_ext.transition_column`."""
    a, b = _decay(_per_row(sigma, x_0))
    pi = process.stationary.to(x_0.device)
    column = a[..., None] * one_hot(x_0, process.dim) + b[..., None] * pi
    return column.to(_sigma_dtype(sigma))


def transition_row(x: Tensor, sigma: float | Tensor, process: RankOne) -> Tensor:
    """Row x of exp(σQ), over where x came from: ``a δ_{x,y} + (1 - a) π_x``. See :func:`sedd_ext.transition_row`."""
    a, b = _decay(_per_row(sigma, x))
    pi = process.stationary.to(x.device)
    row = a[..., None] * one_hot(x, process.dim) + (b * pi[x])[..., None]
    return row.to(_sigma_dtype(sigma))


def sample_transition(
    x_0: Tensor, sigma: float | Tensor, process: RankOne, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draws x_t given x_0: with probability 1 - a a token from π, else x_0. See :func:`sedd_ext.sample_transition`."""
    _, b = _decay(_per_row(sigma, x_0))
    moved = _uniform(x_0.shape, x_0.device, generator) < b
    cumulative = process.stationary.to(x_0.device).cumsum(0)
    return torch.where(moved, _search(cumulative, _uniform(x_0.shape, x_0.device, generator)), x_0)


# -------------------------------------------------------------------------------------------------------- score entropy


def score_entropy_loss(
    log_score: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: float | Tensor,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Diffusion-weighted denoising score entropy L(x_t, x_0), without its factor σ(t), by plain autograd.

    ``L = π_x Σ_{y≠x} (s_y - r_y log s_y + K(r_y))`` with the true ratios ``r_y = p(y|x_0) / p(x|x_0)`` of a rank-one
    process put in: ``r_y = c π_y + [y = x_0 ≠ x] a/D``. See :func:`sedd_ext.score_entropy_loss`.

    Source: SEDD, theorem 3.6.
    """
    scores = _shifted(log_score, log_score_shift, x_t)
    pi = process.stationary.to(log_score.device)
    pi_x, pi_x0 = pi[x_t], pi[x_0]
    live, moved = pi_x > 0, x_t != x_0

    # per row, in float64: the coefficients of the true ratios, and the constant of the loss
    a, b = _decay(_per_row(sigma, x_t))
    d = torch.where(live, a * ~moved + b * pi_x, 1.0)
    c = b / d
    in_pair = pi_x + moved * pi_x0
    pair_entropy = torch.xlogy(pi_x, pi_x) + moved * torch.xlogy(pi_x0, pi_x0)
    constant = (
        (torch.xlogy(c, c) - c) * (1 - in_pair)
        + c * (torch.xlogy(pi, pi).sum() - pair_entropy)
        + moved * _k((a + b * pi_x0) / d)
    )

    # Entry y = x and rows with π_x = 0 are left out before any arithmetic: whatever they hold, NaN included, reaches
    # neither the value nor the gradient.
    left_out = _is_entry(x_t, process.dim) | ~live[..., None]
    positive = scores.masked_fill(left_out, -torch.inf).exp().sum(-1)
    weighted = (pi.to(scores.dtype) * scores.masked_fill(left_out | (pi == 0), 0.0)).sum(-1)
    at_x0 = torch.where(live & moved, scores.gather(-1, x_0[..., None]).squeeze(-1), 0.0)

    # π_x goes into the coefficients while they are float64: π_x c and π_x a/D stay in range where c and a/D may not
    coefficients = (pi_x, pi_x * c, pi_x * a / d, pi_x * constant)
    w, w_c, w_x0, w_constant = (torch.where(live, v, 0.0).to(scores.dtype) for v in coefficients)
    return _reduce(w * positive - w_c * weighted - w_x0 * at_x0 + w_constant, reduction)


# -------------------------------------------------------------------------------------------------------- reverse steps


def tweedie_probs(
    log_score: Tensor,
    x_t: Tensor,
    dsigma: float | Tensor,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
) -> Tensor:
    """The Tweedie step's probabilities, Δ = ``dsigma``. See :func:`sedd_ext.tweedie_probs`.

    ``p(y) ∝ max(0, (exp(-ΔQ) s)_y) · exp(ΔQ)[x, y]``, in closed form
    ``max(0, e^Δ s_y + (1 - e^Δ) π_y S) · (e^{-Δ} [y = x] + (1 - e^{-Δ}) π_x)`` with ``S = Σ_z s_z``, ``s_x = 1``.

    Source: SEDD, equation 19.
    """
    score, here, pi_x = _reverse_score(log_score, x_t, process, log_score_shift)
    pi = process.stationary.to(score)
    delta = _per_row(dsigma, x_t)
    grow, (a, b) = torch.expm1(delta).to(score.dtype)[..., None], _decay(delta)
    # e^Δ s_y + (1 - e^Δ) π_y S, written around s_y so that a small Δ cancels nothing
    earlier = score + grow * (score - pi * score.sum(-1, keepdim=True))
    row = a.to(score.dtype)[..., None] * here + (b * pi_x).to(score.dtype)[..., None]
    return _normalised(earlier.clamp(min=0) * row, process, denoise)


def tweedie_sample(
    log_score: Tensor,
    x_t: Tensor,
    dsigma: float | Tensor,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw from :func:`tweedie_probs`. See :func:`sedd_ext.tweedie_sample`."""
    probs = tweedie_probs(log_score, x_t, dsigma, process, log_score_shift=log_score_shift, denoise=denoise)
    return _draw(probs, generator)


def euler_probs(
    log_score: Tensor,
    x_t: Tensor,
    step: float | Tensor,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
) -> Tensor:
    """The Euler (τ-leaping) step's probabilities, ``step`` = Δt σ(t). See :func:`sedd_ext.euler_probs`.

    ``p(y) = step · π_x s_y`` for y ≠ x and the rest of the mass, if any, on x.

    Source: SEDD, equation 17.
    """
    score, here, pi_x = _reverse_score(log_score, x_t, process, log_score_shift)
    rate = (_per_row(step, x_t) * pi_x).to(score.dtype)[..., None]
    leave = (rate * score).masked_fill(here, 0.0)
    stay = (1 - leave.sum(-1, keepdim=True)).clamp(min=0)
    return _normalised(torch.where(here, stay, leave), process, denoise)


def euler_sample(
    log_score: Tensor,
    x_t: Tensor,
    step: float | Tensor,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw from :func:`euler_probs`. See :func:`sedd_ext.euler_sample`."""
    probs = euler_probs(log_score, x_t, step, process, log_score_shift=log_score_shift, denoise=denoise)
    return _draw(probs, generator)


# ------------------------------------------------------------------------------------------- for comparison


def dense_score_entropy(log_score: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor, process: RankOne) -> Tensor:
    """:func:`score_entropy_loss` as fast as plain PyTorch allows: as few passes over [*B, N] as the formula needs.

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
    scores = log_score.to(_compute_dtype(log_score))
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
    return _one_stage_gumbel(probs, generator)


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
    return _one_stage_gumbel(one_hot(x_t, num_classes=process.dim).to(rate) + rate, generator)


# -------------------------------------------------------------------------------------------------------------- helpers


def _compute_dtype(log_score: Tensor) -> torch.dtype:
    return torch.float64 if log_score.dtype == torch.float64 else torch.float32


def _sigma_dtype(sigma: float | Tensor) -> torch.dtype:
    return _compute_dtype(sigma) if isinstance(sigma, Tensor) else torch.float32


def _per_row(value: float | Tensor, like: Tensor) -> Tensor:
    """A number per row, float64, from a Python number or a tensor that broadcasts to the rows."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).expand(like.shape)


def _decay(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """a = e^{-σ} and 1 - a."""
    return torch.exp(-sigma), -torch.expm1(-sigma)


def _k(ratio: Tensor) -> Tensor:
    """K(r) = r (log r - 1), with K(0) = 0."""
    return torch.xlogy(ratio, ratio) - ratio


def _is_entry(token: Tensor, n: int) -> Tensor:
    """[*B, N], true where y is the row's token."""
    return torch.arange(n, device=token.device) == token[..., None]


def _shifted(log_score: Tensor, shift: float | Tensor | None, x_t: Tensor) -> Tensor:
    scores = log_score.to(_compute_dtype(log_score))
    return scores if shift is None else scores - _per_row(shift, x_t).to(scores.dtype)[..., None]


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _reverse_score(
    log_score: Tensor, x_t: Tensor, process: RankOne, shift: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores with s_x = 1, the mask [*B, N] of entry y = x, and π_x in float64.

    A row with π_x = 0 stays where it is whatever its scores are, so they are set to 0 there.
    """
    here = _is_entry(x_t, process.dim)
    pi_x = process.stationary.to(x_t.device)[x_t]
    score = _shifted(log_score, shift, x_t).masked_fill((pi_x == 0)[..., None], -torch.inf).exp()
    return score.masked_fill(here, 1.0), here, pi_x


def _normalised(weights: Tensor, process: RankOne, denoise: bool) -> Tensor:
    if denoise and process.mask_id is not None:
        weights = weights.masked_fill(torch.arange(process.dim, device=weights.device) == process.mask_id, 0.0)
    total = weights.sum(-1, keepdim=True)
    if not bool(((total > 0) & (total < torch.inf)).all()):
        raise ValueError(
            "log_score: expected rows whose probabilities have a finite positive total, got NaN, infinity or 0"
        )
    return weights / total


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def _search(cumulative: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the first index whose cumulative weight exceeds u times the total (never one of weight 0)."""
    total = cumulative[..., -1]
    # u < 1, but u · total may round to the total
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    if cumulative.dim() == 1:
        return torch.searchsorted(cumulative, target, right=True)
    return torch.searchsorted(cumulative, target[..., None], right=True).squeeze(-1)


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    return _search(probs.double().cumsum(-1), _uniform(probs.shape[:-1], probs.device, generator))


def _only_released(process: RankOne) -> None:
    if process.family == "rank_one":
        raise NotImplementedError(f"process: the released code has absorbing and uniform processes only, got {process}")


def _one_stage_gumbel(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device, generator=generator)
    return (probs / (1e-10 - (noise + 1e-10).log())).argmax(dim=-1)
