"""The operators in plain PyTorch: dense, readable, and independent of the compiled code.

Every operator of :mod:`sedd_ext` without a fused head is implemented again with the same signature, from an explicit
stationary vector π and [..., N] tensors. Tests compare the kernels with these functions. Arithmetic along the
vocabulary is float64 for float64 log-scores and float32 for all other dtypes; the numbers of a row are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .process import RankOne
from .step import GeneralizedMasked, MeanStep, Tweedie
from .unmask import STATISTICS, Unmasked

__all__ = [
    "generalized_masked_loss",
    "implied_log_score",
    "mean_prediction_loss",
    "reverse_probs",
    "reverse_sample",
    "sample_transition",
    "score_entropy_loss",
    "transition_column",
    "transition_row",
    "unmask",
]

# --------------------------------------------------------------------------------------------------------- transitions


def transition_column(x_0: Tensor, sigma: float | Tensor, process: RankOne) -> Tensor:
    """Column x_0 of exp(σQ), p(x_t | x_0): ``a δ_{y,x0} + (1 - a) π_y``. See :func:`sedd_ext.transition_column`."""
    a, b = _decay(_per_row(sigma, x_0))
    pi = process.stationary.to(x_0.device)
    column = a[..., None] * one_hot(x_0, process.dim) + b[..., None] * pi
    return column.to(_sigma_dtype(sigma))


def transition_row(x: Tensor, sigma: float | Tensor, process: RankOne) -> Tensor:
    """Row x of exp(σQ), over the origins of x: ``a δ_{x,y} + (1 - a) π_x``. See :func:`sedd_ext.transition_row`."""
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

    ``L = π_x Σ_{y≠x} (s_y - r_y log s_y + K(r_y))`` with the true ratios ``r_y = p(y|x_0) / p(x|x_0)``. For a
    rank-one process, ``r_y = c π_y + [y = x_0 ≠ x] a/D``. See :func:`sedd_ext.score_entropy_loss`.

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

    # Entry y = x and rows with π_x = 0 are masked before any arithmetic, so that NaN there affects neither the value
    # nor the gradient.
    left_out = _is_entry(x_t, process.dim) | ~live[..., None]
    positive = scores.masked_fill(left_out, -torch.inf).exp().sum(-1)
    weighted = (pi.to(scores.dtype) * scores.masked_fill(left_out | (pi == 0), 0.0)).sum(-1)
    at_x0 = torch.where(live & moved, scores.gather(-1, x_0[..., None]).squeeze(-1), 0.0)

    # multiply by π_x in float64: π_x c and π_x a/D are in the range of float32, c and a/D may not be
    coefficients = (pi_x, pi_x * c, pi_x * a / d, pi_x * constant)
    w, w_c, w_x0, w_constant = (torch.where(live, v, 0.0).to(scores.dtype) for v in coefficients)
    return _reduce(w * positive - w_c * weighted - w_x0 * at_x0 + w_constant, reduction)


# ------------------------------------------------------------------------------------------------------ mean prediction


def mean_prediction_loss(
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: float | Tensor,
    process: RankOne,
    *,
    sigma_s: float | Tensor | None = None,
    loss_weight: float | Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Score entropy at the score that softmax(logits) implies, by plain autograd. With ``sigma_s``, the divergence
    D_KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) of a discrete step. See :func:`sedd_ext.mean_prediction_loss`.

    Source: SEDD, theorem 3.6; D3PM.
    """
    if sigma_s is None:
        loss = score_entropy_loss(implied_log_score(logits, x_t, sigma, process), x_t, x_0, sigma, process)
    else:
        clean = one_hot(x_0, process.dim).to(_compute_dtype(logits))
        predicted = _posterior(_log_mean(logits, process).exp(), x_t, sigma, sigma_s, process)
        true = _posterior(clean, x_t, sigma, sigma_s, process)
        loss = (torch.xlogy(true, true) - torch.xlogy(true, predicted.masked_fill(true == 0, 1.0))).sum(-1)
    loss = loss.masked_fill((process.stationary.to(x_t.device) == 0)[x_t], 0.0)
    if loss_weight is not None:
        loss = loss * _per_row(loss_weight, x_t).to(loss.dtype)
    return _reduce(loss, reduction)


def implied_log_score(logits: Tensor, x_t: Tensor, sigma: float | Tensor, process: RankOne) -> Tensor:
    """The log-scores [*B, N] that a mean prediction implies: ``s_y = A π_y + B μ_y`` with μ = softmax(logits),
    ``A = 1/π_x - κ μ_x``, ``κ = a / (π_x (a + b π_x))`` and ``B = a / (b π_x)``. 0 where π_x = 0.
    """
    log_mean = _log_mean(logits, process)
    pi = process.stationary.to(logits.device)
    pi_x, (a, b) = pi[x_t], _decay(_per_row(sigma, x_t))
    pi_x = pi_x.masked_fill(pi_x == 0, 1.0)
    # 1 - μ_x a / (a + b π_x), without cancellation
    here = _is_entry(x_t, process.dim)
    elsewhere = log_mean.exp().masked_fill(here, 0.0).sum(-1)
    at_x = log_mean.gather(-1, x_t[..., None]).squeeze(-1).exp()
    spread = (elsewhere + at_x * (b * pi_x / (a + b * pi_x)).to(at_x.dtype)) / pi_x.to(at_x.dtype)
    gain = (torch.log(a) - torch.log(b * pi_x)).to(at_x.dtype)
    log_score = torch.logaddexp(spread[..., None].log() + pi.to(at_x.dtype).log(), gain[..., None] + log_mean)
    return log_score.masked_fill((process.stationary.to(x_t.device) == 0)[x_t][..., None], 0.0)


def _log_mean(logits: Tensor, process: RankOne) -> Tensor:
    """log μ [*B, N], -inf for MASK."""
    logits = logits.to(_compute_dtype(logits))
    if process.mask_id is not None:
        logits = logits.masked_fill(torch.arange(process.dim, device=logits.device) == process.mask_id, -torch.inf)
    return logits.log_softmax(-1)


def _posterior(mean: Tensor, x_t: Tensor, sigma: float | Tensor, sigma_s: float | Tensor, process: RankOne) -> Tensor:
    """p(x_s | x_t) = Σ_k μ_k q(x_s | x_t, x_0 = k) [*B, N], by Bayes' rule and the closed form of both transitions."""
    pi = process.stationary.to(x_t.device)
    pi_x, here = pi[x_t].masked_fill(pi[x_t] == 0, 1.0), _is_entry(x_t, process.dim)
    sigma, sigma_s = _per_row(sigma, x_t), _per_row(sigma_s, x_t)
    (a_t, b_t), (a_s, b_s), (a_d, b_d) = _decay(sigma), _decay(sigma_s), _decay(sigma - sigma_s)
    evidence = a_t[..., None] * here + (b_t * pi_x)[..., None]  # q(x_t | x_0 = k)
    weighted = mean / evidence
    origin = a_s[..., None] * weighted + b_s[..., None] * pi * weighted.sum(-1, keepdim=True)
    return ((a_d[..., None] * here + (b_d * pi_x)[..., None]) * origin).to(mean.dtype)


# ---------------------------------------------------------------------------------------- generalised masked diffusion


def generalized_masked_loss(
    logits: Tensor, x_t: Tensor, x_0: Tensor, t: float | Tensor, power: Tensor, *, reduction: str = "none"
) -> Tensor:
    """Loss of generalised masked diffusion by plain autograd: ``(1/t) (Σ_k w_k μ_k - w_v - w_v log μ_v)`` for v = x_0.

    μ is the softmax of the logits without MASK's, the last one. See :func:`sedd_ext.generalized_masked_loss`.

    Source: GenMD4 (Shi et al. 2024).
    """
    dtype, masked = _compute_dtype(logits), x_t == logits.shape[-1] - 1
    # rows that are not masked are replaced before any arithmetic, so that NaN there affects nothing
    scores = logits.to(dtype)[..., :-1].masked_fill(~masked[..., None], 0.0)
    w, log_mu = power.to(dtype)[:-1], scores.log_softmax(-1)
    v = torch.where(masked, x_0, 0)
    w_v, log_mu_v = w[v], log_mu.gather(-1, v[..., None]).squeeze(-1)
    loss = (w * log_mu.exp()).sum(-1) - w_v - w_v * log_mu_v
    return _reduce(torch.where(masked, loss, 0.0) / _per_row(t, x_t).to(dtype), reduction)


# -------------------------------------------------------------------------------------------------------- reverse steps


def reverse_probs(
    log_score: Tensor,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
    parameterization: Literal["score", "mean"] = "score",
    sigma: float | Tensor | None = None,
) -> Tensor:
    """Probabilities of one reverse step. See :func:`sedd_ext.reverse_probs`.

    Tweedie: ``p(y) ∝ max(0, (exp(-ΔQ) s)_y) · exp(ΔQ)[x, y]``, in closed form
    ``max(0, e^Δ s_y + (1 - e^Δ) π_y S) · (e^{-Δ} [y = x] + (1 - e^{-Δ}) π_x)`` with ``S = Σ_z s_z``, ``s_x = 1``.

    Euler: ``p(y) = step · π_x s_y`` for y ≠ x and the rest of the mass, if any, on x.

    From a mean prediction, with μ = softmax(logits) without MASK and D_y = a_t [y = x] + b_t π_x, Tweedie is the
    posterior ``p(y) = (a_d [y = x] + b_d π_x) (a_s μ_y / D_y + b_s π_y Σ_k μ_k / D_k)``, and Euler has the score
    ``π_x s_y = (1 - μ_x a_t / D_x) π_y + (a_t / b_t) μ_y``.

    Source: SEDD, equations 19 and 17.
    """
    if parameterization == "mean":
        return _mean_probs(log_score, x_t, step, process, sigma, denoise)
    if isinstance(step, GeneralizedMasked):
        raise TypeError("step: expected Tweedie(dsigma) or Euler(step), got GeneralizedMasked")
    score, here, pi_x = _reverse_score(log_score, x_t, process, log_score_shift)
    noise = _per_row(step.noise, x_t)
    weights = (
        _tweedie(score, here, pi_x, noise, process) if isinstance(step, Tweedie) else _euler(score, here, pi_x, noise)
    )
    return _normalised(weights, process, denoise)


def reverse_sample(
    log_score: Tensor,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    *,
    log_score_shift: float | Tensor | None = None,
    denoise: bool = False,
    parameterization: Literal["score", "mean"] = "score",
    sigma: float | Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw from :func:`reverse_probs`. See :func:`sedd_ext.reverse_sample`."""
    probs = reverse_probs(
        log_score,
        x_t,
        step,
        process,
        log_score_shift=log_score_shift,
        denoise=denoise,
        parameterization=parameterization,
        sigma=sigma,
    )
    if temperature != 1.0 or top_p != 1.0:
        probs = _tempered(probs, x_t, temperature, top_p)
    return _draw(probs, generator)


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

    A row with π_x = 0 keeps its token whatever its scores are, so this function sets them to 0.
    """
    here = _is_entry(x_t, process.dim)
    pi_x = process.stationary.to(x_t.device)[x_t]
    score = _shifted(log_score, shift, x_t).masked_fill((pi_x == 0)[..., None], -torch.inf).exp()
    return score.masked_fill(here, 1.0), here, pi_x


def _tweedie(score: Tensor, here: Tensor, pi_x: Tensor, delta: Tensor, process: RankOne) -> Tensor:
    """The weights of a Tweedie step [*B, N]."""
    pi = process.stationary.to(score)
    grow, (a, b) = torch.expm1(delta).to(score.dtype)[..., None], _decay(delta)
    # e^Δ s_y + (1 - e^Δ) π_y S, written around s_y to avoid cancellation for a small Δ
    earlier = score + grow * (score - pi * score.sum(-1, keepdim=True))
    row = a.to(score.dtype)[..., None] * here + (b * pi_x).to(score.dtype)[..., None]
    return earlier.clamp(min=0) * row


def _euler(score: Tensor, here: Tensor, pi_x: Tensor, step: Tensor) -> Tensor:
    """The weights of an Euler step [*B, N]."""
    rate = (step * pi_x).to(score.dtype)[..., None]
    leave = (rate * score).masked_fill(here, 0.0)
    stay = (1 - leave.sum(-1, keepdim=True)).clamp(min=0)
    return torch.where(here, stay, leave)


def _mean_probs(
    logits: Tensor, x_t: Tensor, step: MeanStep, process: RankOne, sigma: float | Tensor | None, denoise: bool
) -> Tensor:
    """The probabilities of a step from a mean prediction [*B, N]."""
    here, pi = _is_entry(x_t, process.dim), process.stationary.to(logits.device)
    pi_x = pi[x_t]
    logits = logits.to(_compute_dtype(logits)).masked_fill((pi_x == 0)[..., None], 0.0)
    if process.mask_id is not None:
        logits = logits.masked_fill(torch.arange(process.dim, device=logits.device) == process.mask_id, -torch.inf)
    mu = logits.softmax(-1)
    if isinstance(step, GeneralizedMasked):
        ratio = _per_row(step.s, x_t) / _per_row(step.t, x_t)
        power = step.power.to(device=logits.device, dtype=torch.float64)
        weights = mu * -torch.expm1(ratio.log()[..., None] * power).to(mu.dtype)
    else:
        assert sigma is not None
        total = _per_row(sigma, x_t)
        if isinstance(step, Tweedie):
            earlier = (total - _per_row(step.dsigma, x_t)).clamp(min=0)
            weights = _posterior(mu, x_t, total, earlier, process)
        else:
            weights = _euler_weights(mu, here, pi, pi_x, _per_row(step.step, x_t), total)
    if not isinstance(step, Tweedie):
        weights = weights.masked_fill(here, 0.0)
        weights = torch.where(here, (1 - weights.sum(-1, keepdim=True)).clamp(min=0), weights)
    return _normalised(torch.where((pi_x == 0)[..., None], here.to(mu.dtype), weights), process, denoise)


def _euler_weights(mu: Tensor, here: Tensor, pi: Tensor, pi_x: Tensor, step: Tensor, sigma: Tensor) -> Tensor:
    """The weights of an Euler step from a mean prediction for y ≠ x [*B, N]: ``step (α π_y + (a/b) μ_y)``."""
    a, b = _decay(sigma)
    mu_x = (mu * here).sum(-1, dtype=torch.float64)
    alpha = 1 - mu_x * a / torch.where(pi_x > 0, a + b * pi_x, 1.0)
    return ((step * alpha)[..., None] * pi).to(mu.dtype) + (step * a / b)[..., None].to(mu.dtype) * mu


def _tempered(probs: Tensor, x_t: Tensor, temperature: float, top_p: float) -> Tensor:
    """``temperature`` and ``top_p`` applied to the probabilities of the tokens y ≠ x; p(x) stays."""
    here, stay = _is_entry(x_t, probs.shape[-1]), probs.double().gather(-1, x_t[..., None])
    jump = probs.double().masked_fill(here, 0.0)
    jump = (jump / jump.amax(-1, keepdim=True)) ** (1 / temperature)
    ordered, entries = jump.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
    jump = torch.zeros_like(jump).scatter(-1, entries, kept * (1 - stay) / kept.sum(-1, keepdim=True))
    # a row that cannot move has no tokens y ≠ x to choose from
    return torch.where(here | (stay == 1), torch.where(here, stay, 0.0), jump)


def _normalised(weights: Tensor, process: RankOne, denoise: bool) -> Tensor:
    if denoise and process.mask_id is not None:
        weights = weights.masked_fill(torch.arange(process.dim, device=weights.device) == process.mask_id, 0.0)
    total = weights.sum(-1, keepdim=True)
    if not bool(((total > 0) & (total < torch.inf)).all()):
        raise ValueError(
            "log_score: expected rows whose probabilities have a finite positive total, got NaN, infinity or 0"
        )
    return weights / total


# ------------------------------------------------------------------------------------------------------------ unmasking


def unmask(
    logits: Tensor,
    *,
    mask_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    statistics: Sequence[str] = STATISTICS,
    generator: torch.Generator | None = None,
) -> Unmasked:
    """Tokens drawn from softmax(logits), and statistics of it. See :func:`sedd_ext.unmask`."""
    logits = logits.to(_compute_dtype(logits))
    if mask_id is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == mask_id, -torch.inf)
    log_probs = logits.log_softmax(-1)
    argmax = logits.argmax(-1)
    if not bool(log_probs.gather(-1, argmax[..., None]).isfinite().all()):
        raise ValueError("logits: expected rows with a softmax, got NaN, +inf or nothing but -inf")
    token = argmax
    if temperature > 0:
        probs = (logits.double() / temperature).softmax(-1)
        if top_p < 1:
            ordered = probs.sort(-1, descending=True).values
            # of equally probable tokens, the first in the order has all more probable ones before it
            first = torch.searchsorted(-ordered, -probs)
            before = (ordered.cumsum(-1) - ordered).gather(-1, first)
            probs = probs.masked_fill(before >= top_p, 0.0)
        token = _draw(probs, generator)
    probs = log_probs.exp()
    two = probs.topk(min(2, probs.shape[-1]), -1).values
    found = {
        "log_prob": log_probs.gather(-1, token[..., None]).squeeze(-1),
        "max_prob": two[..., 0],
        "margin": two[..., 0] - two[..., 1:].sum(-1),
        "entropy": -torch.special.xlogy(probs, probs).sum(-1),
    }
    return Unmasked(token, argmax, **{name: found[name] for name in statistics})


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
