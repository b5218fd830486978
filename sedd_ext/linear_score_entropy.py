"""The output head and score entropy in one operator, forward and backward, without log-scores of rows × N."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sedd_ext import _C
from sedd_ext._dispatch import (
    DTYPES,
    FAMILIES,
    addresses,
    check_process,
    check_reduction,
    check_tokens,
    compute_dtype,
    fresh,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from sedd_ext._operators import define
from sedd_ext.linear import (
    BUFFER_BYTES,
    check_linear,
    is_noise,
    is_token,
    live_rows,
    log_score_tile,
    tile_shape,
)
from sedd_ext.process import RankOne

__all__ = ["linear_score_entropy_loss"]

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor x_t, Tensor x_0, Tensor sigma, Tensor? log_score_shift, "
    "Tensor? loss_weight, Tensor? stationary, str family, float neg_entropy, ScalarType dtype, int buffer_bytes, "
    "bool grad_hidden, bool grad_weight, bool grad_bias"
)
_GRADIENTS = "Tensor, Tensor, Tensor"


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden, weight and bias; a gradient nobody wants is empty."""
    dtype, _, grad_hidden, grad_weight, grad_bias = rest[-5:]
    return (
        hidden.new_empty(x_t.shape, dtype=compute_dtype(dtype)),
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if grad_bias else (0,)),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool, unit: Tensor | None) -> None:
    """total = a @ b for the first, total += a @ b for the others; 16-bit products are added up in float32.

    ``unit`` is what the product is in units of, if that is not 1.
    """
    if total.dtype != a.dtype:
        product = torch.mm(a, b)
        if unit is not None:
            product = product.to(total.dtype) * unit
        total.copy_(product) if first else total.add_(product)
    elif first:  # addmm with beta = 0 takes 1.4 times as long
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _largest(values: Tensor) -> Tensor:
    """The largest finite magnitude, at least 1e-30."""
    finite = torch.where(values.isfinite(), values, 0.0).abs()
    return torch.cat([finite.double().flatten(), finite.new_full((1,), 1e-30, dtype=torch.float64)]).amax()


def _unit(
    tile: Tensor, w: Tensor, h: Tensor, first: int, x_t: Tensor, weights: Tensor, sigma: Tensor, pi_x: Tensor
) -> Tensor:
    """A power of two that the gradients of a float16 tile are made in units of, as a float64 number on the device.

    With it, neither a gradient nor a product of gradients with w or h exceeds float16's range, and small ones lose as
    few digits as that allows. Entry x, which has no gradient, becomes -inf in the tile. No gradient exceeds
    ``weight (π_x s + 1 + a/b)``.
    """
    place = (x_t - first)[:, None]
    here = (place >= 0) & (place < tile.shape[1])
    at = place.clamp(0, tile.shape[1] - 1)
    tile.scatter_(1, at, torch.where(here, -torch.inf, tile.gather(1, at)))
    bound = weights.abs() * (pi_x * tile.amax(1).double().exp() + 1 + 1 / torch.expm1(sigma))
    bound = torch.where(bound < 1e38, bound, 0.0)  # beyond it, float32 has no gradient either
    room = 2.0**14 / torch.maximum(tile.shape[1] * _largest(w), tile.shape[0] * _largest(h).clamp(min=1.0))
    return (_largest(bound) / room.clamp(max=2.0**14)).log2().ceil().exp2()


@torch.no_grad()
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor,
    log_score_shift: Tensor | None,
    loss_weight: Tensor | None,
    stationary: Tensor | None,
    family: str,
    neg_entropy: float,
    dtype: torch.dtype,
    buffer_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flags = (grad_hidden, grad_weight, grad_bias)
    loss, *gradients = _fake(hidden, weight, bias, x_t, dtype, buffer_bytes, *flags)
    dim, d = weight.shape
    stationary = None if stationary is None else stationary.contiguous()
    bad = ~(is_token(x_t, dim) & is_token(x_0, dim) & is_noise(sigma)).reshape(-1)
    rows = live_rows(x_t.reshape(-1), bad, stationary, family, dim)

    def live(values: Tensor) -> Tensor:
        values = values.reshape(-1, *values.shape[x_t.dim() :])
        return values.contiguous() if rows is None else values[rows]

    h = live(hidden).to(dtype)
    tokens, clean, noise = live(x_t), live(x_0), live(sigma)
    shift = None if log_score_shift is None else live(log_score_shift)
    factor = torch.ones_like(noise) if loss_weight is None else live(loss_weight)
    unit: Tensor | None = None
    if dtype == torch.float16:
        if stationary is None:
            pi_x = torch.full_like(noise, 1.0 / dim if family == "uniform" else 1.0)
        else:
            pi_x = stationary[tokens.clamp(0, dim - 1)].double()
    count = h.shape[0]
    losses = loss.new_zeros(count)
    sweeps = noise.new_empty(count, _C.score_entropy_sweep_numbers)
    exact = loss.dtype  # that gradients are added up in
    h_grad = h.new_zeros(h.shape if grad_hidden else (0,), dtype=exact)
    for gradient in gradients[1:]:
        fresh(gradient) if count else gradient.zero_()
    part, width = tile_shape(count, dim, dtype, h.device, buffer_bytes)
    buffer = h.new_empty(min(part, count) * width)
    ones = h.new_ones(1, part)

    for first in range(0, dim, width):
        entries = slice(first, first + width)
        w = weight[entries].to(dtype)
        b = None if bias is None else bias[entries].to(dtype)
        w_grad, b_grad = (gradient[entries].to(exact) for gradient in gradients[1:])  # itself, if it has the dtype
        for begin in range(0, count, part):
            at = slice(begin, begin + part)
            tile = log_score_tile(h[at], w, b, buffer)
            weights = factor[at] if any(flags) else None
            if dtype == torch.float16 and weights is not None:
                scale = torch.exp(-shift[at]) if shift is not None else 1.0
                unit = _unit(tile, w, h[at], first, tokens[at], weights, noise[at], pi_x[at] * scale)
                weights = weights / unit
            tensors = addresses(
                tile,
                tokens[at],
                clean[at],
                noise[at],
                None if shift is None else shift[at],
                stationary,
                weights,
                sweeps[at],
                losses[at],
            )
            numbers = (neg_entropy, *tile.shape, first, dim, DTYPES[dtype], FAMILIES[family])
            sizes = (tile.shape[0], tile.shape[1], DTYPES[dtype])
            fault, row = launch("score_entropy_tile", losses, (*tensors, *numbers), sizes)
            if fault:
                row = begin + row if rows is None else int(rows[begin + row])
                raise_fault((fault, row), {"x_t": x_t, "x_0": x_0}, dim, ("sigma", sigma))
            if grad_hidden:
                _add_product(h_grad[at], tile, w, first == 0, unit)
            if grad_weight:
                _add_product(w_grad, tile.T, h[at], begin == 0, unit)
            if grad_bias:
                _add_product(b_grad.unsqueeze(0), ones[:, : len(tile)], tile, begin == 0, unit)
        for gradient, total in zip(gradients[1:], (w_grad, b_grad), strict=True):
            if gradient.dtype != exact:
                gradient[entries] = total
    if loss_weight is not None:
        losses *= factor.to(exact)
    if rows is None:
        loss, gradients[0] = losses.view(loss.shape), h_grad.to(hidden.dtype).view(gradients[0].shape)
    else:
        loss.zero_().view(-1)[rows] = losses
        if grad_hidden:
            gradients[0].zero_().view(-1, d)[rows] = h_grad.to(hidden.dtype)
    return loss, gradients[0], gradients[1], gradients[2]


def _backward_fake(
    grad_loss: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor, bias_gradient: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(g) for g in (hidden_gradient, weight_gradient, bias_gradient))


@torch.no_grad()
def _backward(
    grad_loss: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor, bias_gradient: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    gradients = (hidden_gradient, weight_gradient, bias_gradient)
    _, grad_weight, grad_bias = arguments[-3:]
    if not grad_weight and not grad_bias:  # a row's gradient is proportional to what comes down for it
        factors = grad_loss.unsqueeze(-1).to(hidden_gradient.dtype)
        return hidden_gradient * factors if arguments[-3] else hidden_gradient.clone(), *map(torch.clone, gradients[1:])
    factor = _common(grad_loss)
    if factor is not None:
        return tuple(gradient * factor.to(gradient.dtype) for gradient in gradients)
    loss_weight = grad_loss.double() if arguments[7] is None else arguments[7] * grad_loss
    everything: tuple[Tensor, ...] = torch.ops.sedd_ext.linear_score_entropy(
        *arguments[:7], loss_weight.contiguous(), *arguments[8:]
    )
    return everything[1:]


def _common(grad_loss: Tensor) -> Tensor | None:
    """What comes down from above, if it is one number for all rows: the usual case.

    Memory of stride 0, which sums hand down, says so itself. To look at other numbers waits for the device.
    """
    if grad_loss.numel() == 0:
        return grad_loss.new_ones(())
    first = grad_loss[(0,) * grad_loss.dim()]
    if all(stride == 0 or size == 1 for stride, size in zip(grad_loss.stride(), grad_loss.shape, strict=True)):
        return first
    if grad_loss.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be waited for: the gradients are made anew, which is right for all numbers
    return first if bool((grad_loss == first).all()) else None


define(f"linear_score_entropy({_ARGUMENTS}) -> (Tensor, {_GRADIENTS})", _forward, _fake)
define(
    "linear_score_entropy_backward(Tensor grad_loss, Tensor hidden_gradient, Tensor weight_gradient, "
    f"Tensor bias_gradient, {_ARGUMENTS}) -> ({_GRADIENTS})",
    _backward,
    _backward_fake,
)


class _LinearScoreEntropyGradient(torch.autograd.Function):
    """The gradients, and a refusal to differentiate them again, which would otherwise drop terms in silence."""

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = arguments[:3]
        if not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and bool((grad_loss == 1).all()):
            return gradients
        gradients = torch.ops.sedd_ext.linear_score_entropy_backward(grad_loss, *arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("linear_score_entropy_loss: differentiable once only, and this asks for a second derivative")


class _LinearScoreEntropy(torch.autograd.Function):
    """Makes the gradients beside the loss, as if 1 came down from above for every row.

    One number for all rows scales them. Different numbers are known in the backward pass only, and need the head's
    product once more.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, weight, bias, x_t, x_0, sigma, shift, loss_weight, stationary, *rest = arguments
        loss, *gradients = torch.ops.sedd_ext.linear_score_entropy(*arguments)
        ctx.save_for_backward(*gradients, hidden, weight, bias, x_t, x_0, sigma, shift, loss_weight, stationary)
        ctx.rest = rest
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _LinearScoreEntropyGradient.apply(  # type: ignore[no-untyped-call]
            grad_loss, *ctx.saved_tensors, *ctx.rest
        )
        wanted = ctx.rest[-3:]
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 13


def linear_score_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    loss_weight: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    buffer_bytes: int = BUFFER_BYTES,
) -> Tensor:
    """The output head and score entropy in one: ``score_entropy_loss(F.linear(hidden, weight, bias), ...)``.

    The log-scores exist tile by tile only, in a buffer of fixed size: beside the gradients of hidden, weight and bias
    nothing grows with rows × N. Rows with π_{x_t} = 0 (unmasked tokens of absorbing diffusion) do not go through the
    head at all; to know how many are left waits for a GPU. The gradients are made in the forward pass, tile by tile,
    as if each position's loss had the same weight in what is differentiated (as in sums and means, of any scale); where
    the backward pass finds that they have not, it makes them anew, at the cost of one more matrix product. So weights
    that are known beforehand are better given as ``loss_weight``. The backward pass of ``reduction="mean"``, of
    ``"sum"`` and of ``loss.sum()`` knows without looking; that of ``loss.mean()`` has to look at the numbers that come
    down, which waits for a GPU, unless the head is frozen. Under autocast the matrix products run in its dtype;
    the sums, and the gradients over tiles and rows, are added up in float32 (float64 for float64).

    Args:
        hidden: states before the head, [*B, d], float32, bfloat16, float16 or float64.
        weight: the head's weight, [N, d], of the same dtype (any, under autocast).
        bias: the head's bias [N], or None.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        loss_weight: what each position's loss is multiplied by, the noise rate σ(t) for one; a number or a
            floating-point tensor that broadcasts to [*B].
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.
        buffer_bytes: memory for a tile of log-scores. A tile has 2,048 entries of the vocabulary (8,192 on a GPU) and
            as many rows as fit.

    Returns:
        float32 (float64 for float64 matrix products); differentiable once, with respect to ``hidden``, ``weight`` and
        ``bias``. A gradient that nobody needs costs nothing.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), σ̄ is NaN, infinite or not above 0, an argument
            without gradient requires one, or ``reduction`` or ``buffer_bytes`` is not one of those above.

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 3.6, in closed form for any rank-one process.
    """
    process = check_process(process)
    hidden, weight, bias, dtype = check_linear(hidden, weight, bias, process, buffer_bytes)
    batch, device = hidden.shape[:-1], hidden.device
    x_t, x_0 = check_tokens("x_t", x_t, batch, "hidden"), check_tokens("x_0", x_0, batch, "hidden")
    check_reduction(reduction)
    if reduction == "mean":
        scale = 1.0 / max(1, batch.numel())
        loss_weight = scale if loss_weight is None else loss_weight * scale
    differentiable = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    loss: Tensor = _LinearScoreEntropy.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        x_t,
        x_0,
        per_row("sigma", sigma, batch, device),
        None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        None if loss_weight is None else per_row("loss_weight", loss_weight, batch, device),
        stationary_for(process, dtype, device),
        process.family,
        process.neg_entropy,
        dtype,
        buffer_bytes,
        *differentiable,
    )
    return loss if reduction == "none" else loss.sum()
