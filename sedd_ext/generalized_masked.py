"""Loss of generalised masked diffusion: a schedule for each token, with a gradient in the schedules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _C
from ._autograd import gradient_function
from ._dispatch import (
    DTYPES,
    STAGES,
    check_device,
    check_reduction,
    check_tokens,
    compute_dtype,
    empty_beside,
    fresh,
    kind_of,
    launch,
    per_row,
    raise_fault,
)
from ._operators import OPERATORS, define

__all__ = ["generalized_masked_loss"]

NUMBERS = _C.generalized_masked_row_numbers
"""float64 numbers per row that the forward pass saves for the backward pass."""
_ARGUMENTS = "Tensor logits, Tensor x_t, Tensor x_0, Tensor t, Tensor power"


def check_power(value: object, dim: int, dtype: torch.dtype) -> Tensor:
    """Checks that ``value`` is a tensor of powers [dim], and converts it to the compute dtype of ``dtype``.

    Its values are checked by :func:`check_power_values`, because torch.compile cannot trace a decision on values.
    """
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"power: expected a float32 or float64 tensor, got {kind_of(value)}")
    if value.shape != (dim,):
        raise ValueError(f"power: expected shape [{dim}], one number a token, got {list(value.shape)}")
    return value.to(compute_dtype(dtype))


def check_power_values(power: Tensor) -> None:
    """Checks on the CPU that the powers of all tokens but MASK are finite and above 0. Does not wait for a GPU."""
    tokens = power[:-1]
    if not power.is_cpu or bool(((tokens > 0) & (tokens < torch.inf)).all()):
        return
    at = int((~((tokens > 0) & (tokens < torch.inf))).nonzero()[0])
    raise ValueError(
        f"power: expected finite numbers above 0, got {float(tokens[at])} at index [{at}]; use softplus of a parameter"
    )


def raise_row_fault(status: tuple[int, int], x_t: Tensor, x_0: Tensor, t: Tensor, dim: int) -> None:
    """Raises the error of a bad row. A clean token may be anything but MASK at a masked position."""
    code, row = status
    if code == _C.faults["x_0"] and int(x_0.reshape(-1)[row]) == dim - 1:
        dim -= 1
    raise_fault(status, {"x_t": x_t, "x_0": x_0}, dim, ("t", t), most=1.0)


def _launch(
    kernel: str,
    grad_loss: Tensor | None,
    numbers: Tensor,
    out: Tensor,
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor,
    power: Tensor,
) -> Tensor:
    status = launch(
        kernel,
        logits=logits.contiguous(),
        power=power.contiguous(),
        x_t=x_t.contiguous(),
        x_0=x_0.contiguous(),
        t=t.contiguous(),
        # .sum().backward() passes a gradient of stride 0
        grad_loss=None if grad_loss is None else grad_loss.to(compute_dtype(logits.dtype)).contiguous(),
        numbers=numbers.contiguous(),
        row_sums=None,
        out=out,
        rows=x_t.numel(),
        width=logits.size(-1),
        stride=logits.size(-1),
        first=0,
        dim=logits.size(-1),
        dtype=DTYPES[logits.dtype],
        stage=STAGES["whole"],
    )
    if status[0]:
        raise_row_fault(status, x_t, x_0, t, logits.size(-1))
    return out


def _fake(logits: Tensor, x_t: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the numbers of the rows."""
    loss = torch.empty_like(x_t, dtype=compute_dtype(logits.dtype), memory_format=torch.contiguous_format)
    return loss, logits.new_empty((*x_t.shape, NUMBERS), dtype=torch.float64)


def _forward(logits: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    check_power_values(power)
    loss, numbers = _fake(logits, x_t)
    _launch("generalized_masked", None, numbers, loss, logits, x_t, x_0, t, power)
    return loss, numbers


def _backward_fake(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
    return empty_beside(logits, logits.dtype)


def _backward(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    out = fresh(_backward_fake(grad_loss, numbers, logits))
    return _launch("generalized_masked_backward", grad_loss, numbers, out, logits, *rest)


def _power_fake(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(rest[-1], memory_format=torch.contiguous_format)


def _power(grad_loss: Tensor, numbers: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    out = logits.new_empty(logits.shape[-1], dtype=torch.float64)
    return _launch("generalized_masked_power", grad_loss, numbers, out, logits, *rest).to(rest[-1].dtype)


define(f"generalized_masked({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake)
define(
    f"generalized_masked_backward(Tensor grad_loss, Tensor row_numbers, {_ARGUMENTS}) -> Tensor",
    _backward,
    _backward_fake,
)
define(f"generalized_masked_power(Tensor grad_loss, Tensor row_numbers, {_ARGUMENTS}) -> Tensor", _power, _power_fake)


_LogitsGradient, _PowerGradient = (
    gradient_function("generalized_masked_loss", compute)
    for compute in (
        lambda *arguments: OPERATORS.generalized_masked_backward(*arguments),
        lambda *arguments: OPERATORS.generalized_masked_power(*arguments),
    )
)


class _GeneralizedMasked(torch.autograd.Function):
    """Saves the inputs and a few numbers of each row. The backward pass reads the logits once for each gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, power: Tensor) -> Tensor:
        loss: Tensor
        loss, numbers = OPERATORS.generalized_masked(logits, x_t, x_0, t, power)
        ctx.save_for_backward(numbers, logits, x_t, x_0, t, power)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        in_logits, _, _, _, in_power = ctx.needs_input_grad
        arguments = (grad_loss, *ctx.saved_tensors)
        logits_gradient = _LogitsGradient.apply(*arguments) if in_logits else None
        power_gradient = _PowerGradient.apply(*arguments) if in_power else None
        return logits_gradient, None, None, None, power_gradient


def generalized_masked_loss(
    logits: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor | float,
    power: Tensor,
    *,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """Loss of generalised masked diffusion (GenMD4): masked diffusion with a schedule for each token.

    Token k is masked at time t with probability ``1 - α_k(t) = t^{w_k}``. With μ = softmax of the logits without
    MASK's, a masked position of the clean token v costs::

        L = (1/t) { Σ_k w_k μ_k - w_v - w_v log μ_v }

    L ≥ 0, and L = 0 if μ_v = 1. With equal powers w, L is the weighted cross-entropy ``-(w/t) log μ_v`` of MD4. Other
    positions have loss 0 and gradient 0, and are not read. NaN and infinities propagate as in ordinary arithmetic. The
    gradient in ``power`` is that of this expression; that ``power`` also changes the distribution of ``x_t`` is not
    part of it.

    Args:
        logits: [*B, N], float32, bfloat16, float16 or float64. MASK is the last of the N tokens; its logit is ignored.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N), and not MASK where ``x_t`` is MASK.
        t: times in (0, 1], a number or a floating-point tensor that broadcasts to [*B].
        power: w > 0, [N], float32 or float64. MASK's entry is ignored and gets a gradient of 0.
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.

    Returns:
        The loss, float32 (float64 for float64 logits). It is differentiable once, with respect to ``logits`` and
        ``power``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token is not valid, t does not lie in (0, 1], a power is not finite or not
            above 0, ``t`` requires a gradient, or ``reduction`` is unknown. On a GPU the values are not checked: an
            invalid row has loss and gradient NaN, and the gradient in ``power`` is NaN.

    Source: GenMD4 of "Simplified and Generalized Masked Diffusion" (Shi et al. 2024).
    """
    if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(logits)}")
    if logits.dim() == 0 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [*B, N], got {list(logits.shape)}")
    check_device("logits", logits)
    batch, dim = logits.shape[:-1], logits.shape[-1]
    x_t, x_0 = check_tokens("x_t", x_t, batch, "logits"), check_tokens("x_0", x_0, batch, "logits")
    check_reduction(reduction)
    times = per_row("t", t, batch, logits.device)
    loss: Tensor = _GeneralizedMasked.apply(  # type: ignore[no-untyped-call]
        logits, x_t, x_0, times, check_power(power, dim, logits.dtype)
    )
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
