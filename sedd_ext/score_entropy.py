"""Diffusion-weighted denoising score entropy: one pass over the vocabulary for the loss, the gradient, or both."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._autograd import gradient_function
from ._dispatch import (
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
from ._operators import OPERATORS, define, schema
from .fused_loss import row_weights
from .process import RankOne

__all__ = ["score_entropy_loss"]


class Arguments(NamedTuple):
    """The arguments of the operators."""

    log_score: Tensor
    x_t: Tensor
    x_0: Tensor
    sigma: Tensor
    log_score_shift: Tensor | None
    stationary: Tensor | None
    family: str
    neg_entropy: float


def _launch(kernel: str, out: Tensor, a: Arguments, **others: Any) -> Tensor:
    status = launch(
        kernel,
        log_score=a.log_score.contiguous(),
        x_t=a.x_t.contiguous(),
        x_0=a.x_0.contiguous(),
        sigma=a.sigma.contiguous(),
        shift=contiguous(a.log_score_shift),
        stationary=contiguous(a.stationary),
        out=out,
        neg_entropy=a.neg_entropy,
        rows=a.x_t.numel(),
        dim=a.log_score.size(-1),
        dtype=DTYPES[a.log_score.dtype],
        family=FAMILIES[a.family],
        **others,
    )
    if status[0]:
        raise_fault(status, {"x_t": a.x_t, "x_0": a.x_0}, a.log_score.size(-1), ("sigma", a.sigma))
    return out


def _loss(a: Arguments) -> Tensor:
    dtype = compute_dtype(a.log_score.dtype)
    return torch.empty_like(a.x_t, dtype=dtype, memory_format=torch.contiguous_format)


def _gradient(a: Arguments) -> Tensor:
    return empty_beside(a.log_score, a.log_score.dtype)


def _forward(*arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    return _launch("score_entropy", _loss(a), a, grad_loss=None, unless_one=None)


def _launch_backward(out: Tensor, grad_loss: Tensor, factor: Tensor | None, a: Arguments) -> Tensor:
    # .sum().backward() passes a gradient of stride 0
    grad_loss = grad_loss.to(compute_dtype(a.log_score.dtype)).contiguous()
    return _launch("score_entropy_backward", out, a, grad_loss=grad_loss, unless_one=factor)


def _backward(grad_loss: Tensor, *arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    return _launch_backward(fresh(_gradient(a)), grad_loss, None, a)


def _sweep(loss_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    gradient = fresh(_gradient(a))
    # rounded as in the backward pass, which gives the same bits
    grad_loss = loss_weight.to(compute_dtype(a.log_score.dtype)).double().contiguous()
    loss = _launch(
        "score_entropy_tile",
        _loss(a),
        a,
        grad_loss=grad_loss,
        gradient=gradient,
        sweeps=a.sigma.new_empty(a.x_t.numel(), _C.score_entropy_sweep_numbers),
        width=a.log_score.size(-1),
        stride=a.log_score.size(-1),
        first=0,
        begin=0,
    )
    return loss, gradient


def _sweep_backward(gradient: Tensor, factor: Tensor, loss_weight: Tensor, *arguments: Any) -> None:
    _launch_backward(gradient, loss_weight * factor, factor, Arguments(*arguments))


_ARGUMENTS = schema(Arguments)
define(f"score_entropy({_ARGUMENTS}) -> Tensor", _forward, lambda *a: _loss(Arguments(*a)))
define(
    f"score_entropy_backward(Tensor grad_loss, {_ARGUMENTS}) -> Tensor",
    _backward,
    lambda _, *a: _gradient(Arguments(*a)),
)
# the loss, and the gradient of loss_weight · loss, which the second operator computes again if the factor is not 1
define(
    f"score_entropy_sweep(Tensor loss_weight, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _sweep,
    lambda _, *a: (_loss(Arguments(*a)), _gradient(Arguments(*a))),
)
define(
    f"score_entropy_sweep_backward(Tensor(a!) gradient, Tensor factor, Tensor loss_weight, {_ARGUMENTS}) -> ()",
    _sweep_backward,
    lambda *_: None,
)


_Gradient = gradient_function("score_entropy_loss", lambda *arguments: OPERATORS.score_entropy_backward(*arguments))


def _in_place(gradient: Tensor, *others: Any) -> Tensor:
    OPERATORS.score_entropy_sweep_backward(gradient, *others)
    return gradient


_SweepGradient = gradient_function("score_entropy_loss", _in_place)


class _ScoreEntropy(torch.autograd.Function):
    """Saves only the inputs. The backward pass computes the gradient from the log-scores, in one read and one write."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.family, ctx.neg_entropy = arguments
        ctx.save_for_backward(*tensors)
        result: Tensor = OPERATORS.score_entropy(*arguments)
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad = _Gradient.apply(grad_loss, *ctx.saved_tensors, ctx.family, ctx.neg_entropy)
        return grad, *[None] * 7


class _WeightedSum(torch.autograd.Function):
    """Σ loss_weight · loss, with the gradient from the same sweep.

    If the factor that autograd passes to the backward pass is not 1, or in a second backward pass, the gradient is
    computed from the log-scores again. On a GPU, the kernel compares the factor, so that nothing waits for it.
    """

    @staticmethod
    def forward(ctx: Any, loss_weight: Tensor, *arguments: Any) -> Tensor:
        *tensors, ctx.family, ctx.neg_entropy = arguments
        ctx.save_for_backward(loss_weight, *tensors)
        loss, ctx.gradient = OPERATORS.score_entropy_sweep(loss_weight, *arguments)
        result: Tensor = (loss * loss_weight.to(loss.dtype)).sum()
        return result

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        loss_weight, *tensors = ctx.saved_tensors
        arguments = *tensors, ctx.family, ctx.neg_entropy
        gradient, ctx.gradient = ctx.gradient, None  # handed out once, as the caller may change it
        if gradient is None:
            grad = _Gradient.apply(factor * loss_weight, *arguments)
        else:
            grad = _SweepGradient.apply(gradient, factor.double(), loss_weight, *arguments)
        return None, grad, *[None] * 7


def score_entropy_loss(
    log_score: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    loss_weight: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """Diffusion-weighted denoising score entropy of every position, without the factor σ(t).

    With s = exp(log_score), a = e^{-σ̄}, b = 1 - a and D = a [x_t = x_0] + b π_{x_t}::

        L = π_x { Σ_{y≠x} s_y - (b/D) Σ_{y≠x} π_y log s_y - [x ≠ x_0] (a/D) log s_{x_0} + C }

    The constant C is included, so L ≥ 0, and L = 0 if s is the true ratio p(y | x_0) / p(x_t | x_0). For training,
    multiply the sum over a sequence by the noise rate σ(t). Positions with π_{x_t} = 0 (unmasked tokens of absorbing
    diffusion) have loss 0 and gradient 0, and are not read. NaN and infinities propagate as in ordinary arithmetic.

    With ``reduction="sum"`` or ``"mean"``, the sweep over the vocabulary that computes the loss also writes its
    gradient. Forward and backward then read the log-scores once and write the gradient once, if the backward pass
    starts from this loss. If it starts from a multiple of the loss, the gradient is computed again: pass the factor as
    ``loss_weight``. With ``"none"``, for float16, and under torch.compile, the gradient takes a sweep of its own.

    Args:
        log_score: log s_y, [*B, N], float32, bfloat16, float16 or float64. The entry y = x_t is ignored.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row inside the kernel; a number or a floating-point
            tensor that broadcasts to [*B]. Absorbing models pass their σ-scaling, log expm1(σ̄) + log(N - 1).
        loss_weight: a factor for the loss of each position, such as the noise rate σ(t); a number or a floating-point
            tensor that broadcasts to [*B].
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.

    Returns:
        The loss, float32 (float64 for float64 log-scores). It is differentiable once, and only with respect to
        ``log_score``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), σ̄ is NaN, infinite or not above 0, ``sigma``,
            ``log_score_shift`` or ``loss_weight`` requires a gradient, or ``reduction`` is unknown.

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 3.6, in closed form for any rank-one process.
    """
    process = check_process(process)
    log_score = check_log_score(log_score, process)
    batch = log_score.shape[:-1]
    x_t, x_0 = check_tokens("x_t", x_t, batch), check_tokens("x_0", x_0, batch)
    check_reduction(reduction)
    device = log_score.device
    arguments = Arguments(
        log_score=log_score,
        x_t=x_t,
        x_0=x_0,
        sigma=per_row("sigma", sigma, batch, device),
        log_score_shift=None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary=stationary_for(process, log_score.dtype, device),
        family=process.family,
        neg_entropy=process.neg_entropy,
    )
    weight = row_weights(reduction, loss_weight, batch, device)
    if (
        reduction != "none"
        and log_score.requires_grad
        and torch.is_grad_enabled()
        and log_score.dtype != torch.float16  # small gradients would be lost before they are scaled
        and not torch.compiler.is_compiling()
    ):
        weight = torch.ones_like(arguments.sigma) if weight is None else weight
        result: Tensor = _WeightedSum.apply(weight, *arguments)  # type: ignore[no-untyped-call]
        return result
    loss: Tensor = _ScoreEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    return loss if reduction == "none" else loss.sum()
