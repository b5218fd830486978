"""Diffusion-weighted denoising score entropy: forward and backward take one pass over the vocabulary each."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sedd_ext._autograd import gradient_function
from sedd_ext._dispatch import (
    DTYPES,
    FAMILIES,
    check_log_score,
    check_process,
    check_reduction,
    check_tokens,
    compute_dtype,
    contiguous,
    empty_beside,
    fresh,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from sedd_ext._operators import define
from sedd_ext.process import RankOne

__all__ = ["score_entropy_loss"]

_ARGUMENTS = (
    "Tensor log_score, Tensor x_t, Tensor x_0, Tensor sigma, Tensor? log_score_shift, Tensor? stationary, "
    "str family, float neg_entropy"
)


def _launch(
    kernel: str,
    grad_loss: Tensor | None,
    out: Tensor,
    log_score: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor,
    log_score_shift: Tensor | None,
    stationary: Tensor | None,
    family: str,
    neg_entropy: float,
) -> Tensor:
    status = launch(
        kernel,
        log_score=log_score.contiguous(),
        x_t=x_t.contiguous(),
        x_0=x_0.contiguous(),
        sigma=sigma.contiguous(),
        shift=contiguous(log_score_shift),
        stationary=contiguous(stationary),
        grad_loss=grad_loss,
        out=out,
        neg_entropy=neg_entropy,
        rows=x_t.numel(),
        dim=log_score.size(-1),
        dtype=DTYPES[log_score.dtype],
        family=FAMILIES[family],
    )
    if status[0]:
        raise_fault(status, {"x_t": x_t, "x_0": x_0}, log_score.size(-1), ("sigma", sigma))
    return out


def _fake(log_score: Tensor, x_t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_t, dtype=compute_dtype(log_score.dtype), memory_format=torch.contiguous_format)


def _forward(log_score: Tensor, x_t: Tensor, *rest: Any) -> Tensor:
    return _launch("score_entropy", None, _fake(log_score, x_t), log_score, x_t, *rest)


def _backward_fake(grad_loss: Tensor, log_score: Tensor, *_: Any) -> Tensor:
    return empty_beside(log_score, log_score.dtype)


def _backward(grad_loss: Tensor, log_score: Tensor, *rest: Any) -> Tensor:
    out = fresh(_backward_fake(grad_loss, log_score))
    # .sum().backward() passes a gradient of stride 0
    grad_loss = grad_loss.to(compute_dtype(log_score.dtype)).contiguous()
    return _launch("score_entropy_backward", grad_loss, out, log_score, *rest)


define(f"score_entropy({_ARGUMENTS}) -> Tensor", _forward, _fake)
define(f"score_entropy_backward(Tensor grad_loss, {_ARGUMENTS}) -> Tensor", _backward, _backward_fake)


_Gradient = gradient_function(
    "score_entropy_loss", lambda *arguments: torch.ops.sedd_ext.score_entropy_backward(*arguments)
)


class _ScoreEntropy(torch.autograd.Function):
    """Saves only the inputs. The backward pass computes the gradient from the log-scores, in one read and one write."""

    @staticmethod
    def forward(
        ctx: Any,
        log_score: Tensor,
        x_t: Tensor,
        x_0: Tensor,
        sigma: Tensor,
        log_score_shift: Tensor | None,
        stationary: Tensor | None,
        family: str,
        neg_entropy: float,
    ) -> Tensor:
        ctx.save_for_backward(log_score, x_t, x_0, sigma, log_score_shift, stationary)
        ctx.family, ctx.neg_entropy = family, neg_entropy
        result: Tensor = torch.ops.sedd_ext.score_entropy(
            log_score, x_t, x_0, sigma, log_score_shift, stationary, family, neg_entropy
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None, None, None, None]:
        grad = _Gradient.apply(grad_loss, *ctx.saved_tensors, ctx.family, ctx.neg_entropy)
        return grad, None, None, None, None, None, None, None


def score_entropy_loss(
    log_score: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """Diffusion-weighted denoising score entropy of every position, without the factor σ(t).

    With s = exp(log_score), a = e^{-σ̄}, b = 1 - a and D = a [x_t = x_0] + b π_{x_t}::

        L = π_x { Σ_{y≠x} s_y - (b/D) Σ_{y≠x} π_y log s_y - [x ≠ x_0] (a/D) log s_{x_0} + C }

    The constant C is included, so L ≥ 0, and L = 0 if s is the true ratio p(y | x_0) / p(x_t | x_0). For training,
    multiply the sum over a sequence by the noise rate σ(t). Positions with π_{x_t} = 0 (unmasked tokens of absorbing
    diffusion) have loss 0 and gradient 0, and are not read. NaN and infinities propagate as in ordinary arithmetic.

    Args:
        log_score: log s_y, [*B, N], float32, bfloat16, float16 or float64. The entry y = x_t is ignored.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row inside the kernel; a number or a floating-point
            tensor that broadcasts to [*B]. Absorbing models pass their σ-scaling, log expm1(σ̄) + log(N - 1).
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.

    Returns:
        The loss, float32 (float64 for float64 log-scores). It is differentiable once, and only with respect to
        ``log_score``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), σ̄ is NaN, infinite or not above 0, ``sigma`` or
            ``log_score_shift`` requires a gradient, or ``reduction`` is unknown.

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 3.6, in closed form for any rank-one process.
    """
    process = check_process(process)
    log_score = check_log_score(log_score, process)
    batch = log_score.shape[:-1]
    x_t, x_0 = check_tokens("x_t", x_t, batch), check_tokens("x_0", x_0, batch)
    check_reduction(reduction)
    device = log_score.device
    loss: Tensor = _ScoreEntropy.apply(  # type: ignore[no-untyped-call]
        log_score,
        x_t,
        x_0,
        per_row("sigma", sigma, batch, device),
        None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary_for(process, log_score.dtype, device),
        process.family,
        process.neg_entropy,
    )
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
