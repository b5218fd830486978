"""Score entropy of a mean prediction: one loss for MD4, UDLM, GIDD, D3PM and any other rank-one process."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _C
from ._autograd import gradient_function
from ._dispatch import (
    DTYPES,
    FAMILIES,
    STAGES,
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
    row_stride_of,
    stationary_for,
)
from ._operators import OPERATORS, define
from .process import RankOne

__all__ = ["mean_prediction_loss"]

_ARGUMENTS = (
    "Tensor logits, Tensor x_t, Tensor x_0, Tensor sigma, Tensor? sigma_s, Tensor? stationary, str family, int mask"
)


def launch_mean_prediction(
    kernel: str,
    logits: Tensor,
    out: Tensor,
    grad_loss: Tensor | None,
    numbers: Tensor | None,
    *,
    family: str,
    dim: int | None = None,
    first: int = 0,
    stage: str = "whole",
    row_logits: Tensor | None = None,
    row_sums: Tensor | None = None,
    **others: Any,
) -> tuple[int, int]:
    """Runs ``mean_prediction`` or ``mean_prediction_backward``, whose other arguments are those of the operator.

    If the vocabulary is split over processes, the logits [..., n] are those from ``first`` on of the ``dim`` tokens,
    and the processes exchange ``row_logits`` and ``row_sums`` between the stages; see ``csrc/mean_prediction.h``.
    """
    width = logits.size(-1)
    return launch(
        kernel,
        logits=logits,
        grad_loss=grad_loss,
        numbers=numbers,
        row_logits=row_logits,
        row_sums=row_sums,
        out=out,
        rows=others["x_t"].numel(),
        width=width,
        stride=row_stride_of(logits),
        first=first,
        dim=width if dim is None else dim,
        dtype=DTYPES[logits.dtype],
        family=FAMILIES[family],
        stage=STAGES[stage],
        **others,
    )


def _launch(
    kernel: str,
    grad_loss: Tensor | None,
    numbers: Tensor | None,
    out: Tensor,
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor,
    sigma_s: Tensor | None,
    stationary: Tensor | None,
    family: str,
    mask: int,
) -> Tensor:
    status = launch_mean_prediction(
        kernel,
        logits.contiguous(),
        out,
        grad_loss,
        numbers,
        x_t=x_t.contiguous(),
        x_0=x_0.contiguous(),
        sigma=sigma.contiguous(),
        sigma_s=contiguous(sigma_s),
        stationary=contiguous(stationary),
        family=family,
        mask=mask,
    )
    if status[0]:
        raise_fault(status, {"x_t": x_t, "x_0": x_0}, logits.size(-1), ("sigma", sigma), sigma_s=sigma_s)
    return out


def _fake(logits: Tensor, x_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The loss, and what the backward pass needs: some numbers per row, or nothing if no gradient is needed."""
    loss = torch.empty_like(x_t, dtype=compute_dtype(logits.dtype), memory_format=torch.contiguous_format)
    return loss, x_t.new_empty((x_t.numel() if rest[-1] else 0, _C.mean_prediction_numbers), dtype=torch.float64)


def _forward(logits: Tensor, x_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss, numbers = _fake(logits, x_t, *rest)
    return _launch("mean_prediction", None, numbers if rest[-1] else None, loss, logits, x_t, *rest[:-1]), numbers


def _backward_fake(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_beside(logits, logits.dtype)


def _backward(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    out = fresh(_backward_fake(grad_loss, numbers, logits))
    # .sum().backward() passes a gradient of stride 0
    grad_loss = grad_loss.to(compute_dtype(logits.dtype)).contiguous()
    return _launch("mean_prediction_backward", grad_loss, numbers.contiguous(), out, logits, *rest)


define(f"mean_prediction({_ARGUMENTS}, bool needs_gradient) -> (Tensor, Tensor)", _forward, _fake)
define(f"mean_prediction_backward(Tensor grad_loss, Tensor numbers, {_ARGUMENTS}) -> Tensor", _backward, _backward_fake)


_Gradient = gradient_function("mean_prediction_loss", lambda *arguments: OPERATORS.mean_prediction_backward(*arguments))


class _MeanPrediction(torch.autograd.Function):
    """Saves the inputs, and a few numbers per row with which the gradient takes one read and one write."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, numbers = OPERATORS.mean_prediction(*arguments)
        ctx.save_for_backward(numbers, *arguments[:6])
        ctx.options = arguments[6:-1]
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _Gradient.apply(grad_loss, *ctx.saved_tensors, *ctx.options)
        return gradient, *(None,) * 8


def mean_prediction_loss(
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    sigma_s: Tensor | float | None = None,
    loss_weight: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """Score entropy of every position for a network that predicts the clean token, without the factor σ(t).

    With μ = softmax(logits) over all tokens but MASK, a = e^{-σ̄} and b = 1 - a, the prediction implies the score::

        s_y = A π_y + B μ_y for y ≠ x_t,   A = (1 - μ_x a / (a + b π_x)) / π_x,   B = a / (b π_x)

    and the result is :func:`score_entropy_loss` of log s. It is at least 0, and 0 if μ is all on x_0. For training,
    multiply the sum over a sequence by the noise rate σ(t). What this is called depends on the process:

    * absorbing: ``-log μ_{x_0} / expm1(σ̄)`` at masked positions, the weighted cross-entropy of MD4 and MDLM;
    * uniform: UDLM, DUO;
    * hybrid: GIDD with a constant mixing distribution;
    * with ``sigma_s``: the loss of one step of D3PM.

    Positions with π_{x_t} = 0 (unmasked tokens of absorbing diffusion) have loss 0 and gradient 0, and are not read.
    NaN and infinities propagate as in ordinary arithmetic.

    Args:
        logits: [*B, N], float32, bfloat16, float16 or float64. The logit of ``process.mask_id``, if there is one, is
            ignored.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        sigma_s: total noise σ̄(s) at an earlier time s, in [0, σ̄(t)). With it, the result is the loss of one discrete
            step, D_KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)); with 0, that is -log p(x_0 | x_t). It needs no factor σ(t).
        loss_weight: a factor for the loss of each position, for example the noise rate σ(t); a number or a floating-
            point tensor that broadcasts to [*B].
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.

    Returns:
        The loss, float32 (float64 for float64 logits). It is differentiable once, and only with respect to ``logits``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), σ̄ is NaN, infinite or not above 0, ``sigma_s`` is
            not in [0, σ̄), an argument that gets no gradient requires one, or ``reduction`` is unknown.

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 3.6, at the implied score. MD4 (Shi et al. 2024) and MDLM (Sahoo et
        al. 2024) have it for absorbing processes; D3PM (Austin et al. 2021) has the discrete step.
    """
    process = check_process(process)
    logits = check_log_score(logits, process, "logits")
    batch, device = logits.shape[:-1], logits.device
    x_t, x_0 = check_tokens("x_t", x_t, batch, "logits"), check_tokens("x_0", x_0, batch, "logits")
    check_reduction(reduction)
    weight = None if loss_weight is None else per_row("loss_weight", loss_weight, batch, device)
    loss: Tensor = _MeanPrediction.apply(  # type: ignore[no-untyped-call]
        logits,
        x_t,
        x_0,
        per_row("sigma", sigma, batch, device),
        None if sigma_s is None else per_row("sigma_s", sigma_s, batch, device),
        stationary_for(process, logits.dtype, device),
        process.family,
        -1 if process.mask_id is None else process.mask_id,
        torch.is_grad_enabled() and logits.requires_grad,
    )
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
