"""The output head and score entropy in one operator, forward and backward, without a rows × N tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._dispatch import (
    FAMILIES,
    Status,
    check_process,
    check_reduction,
    check_tokens,
    contiguous,
    launch,
    per_row,
    stationary_for,
)
from .fused_loss import FusedLoss, empty_results, shared_arguments
from .head import Gradients, Head, Rows, Tile, buffer_size, check_head, float16_unit
from .process import RankOne
from .split import Sums, most_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_score_entropy_loss"]


class Arguments(NamedTuple):
    """The arguments of the operator and of its backward."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    x_t: Tensor
    x_0: Tensor
    sigma: Tensor
    log_score_shift: Tensor | None
    loss_weight: Tensor | None
    stationary: Tensor | None
    family: str
    neg_entropy: float
    dim: int
    first: int
    group: str
    dtype: torch.dtype
    buffer_bytes: int
    capacity: int | None
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which gradients are needed."""
        return self.grad_hidden, self.grad_weight, self.grad_bias


class _RowValues(NamedTuple):
    """The values of the rows that go through the head, [R] each."""

    x_t: Tensor
    x_0: Tensor
    sigma: Tensor
    shift: Tensor | None
    loss_weight: Tensor

    def of(self, rows: slice) -> _RowValues:
        """The values of a slice of these rows."""
        x_t, x_0, sigma, shift, loss_weight = self
        return _RowValues(x_t[rows], x_0[rows], sigma[rows], None if shift is None else shift[rows], loss_weight[rows])


Epilogue = Callable[[Tile, dict[str, Any]], Status]
"""Computes a tile's product and what the kernel does with it, see :mod:`sedd_ext.triton_head`."""


@torch.no_grad()
def _forward(*arguments: Any, epilogue: Epilogue | None = None) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    loss, hidden_gradient, weight_gradient, bias_gradient = empty_results(a)
    dim, stationary = a.dim, contiguous(a.stationary)
    rows = Rows(a.x_t, a.sigma, stationary, a.family, dim, a.x_0, capacity=a.capacity)
    most = most_rows(a.weight.shape[0], dim, a.group)
    hidden = rows.select_or_zero(a.hidden).to(a.dtype)
    head = Head(hidden, a.weight, a.bias, a.buffer_bytes, first=a.first, most=most)
    sums = Sums(a.group)
    gradients = Gradients(head, weight_gradient, bias_gradient, a.grad_hidden, sums)
    sigma = rows.select(a.sigma)
    values = _RowValues(
        rows.select(a.x_t),
        rows.select(a.x_0),
        sigma,
        None if a.log_score_shift is None else rows.select(a.log_score_shift),
        rows.select_or_zero(torch.ones_like(a.sigma) if a.loss_weight is None else a.loss_weight),
    )
    losses = loss.new_zeros(sigma.shape[0])
    sweeps = sigma.new_empty(sigma.shape[0], _C.score_entropy_sweep_numbers)
    for tile in head.tiles(computed=epilogue is None):
        v = values.of(tile.rows)
        weights, unit = (v.loss_weight if any(a.wanted) else None), None
        if weights is not None and a.dtype == torch.float16:
            unit = _unit(tile, v, stationary, a.family, dim)
            weights = weights / unit
        given = tile.arguments(dim) | {
            "x_t": v.x_t,
            "x_0": v.x_0,
            "sigma": v.sigma,
            "shift": v.shift,
            "stationary": stationary,
            "grad_loss": weights,
            "gradient": None if weights is None else tile.log_score,
            "sweeps": sweeps[tile.rows],
            "out": losses[tile.rows],
            "begin": a.first,
            "neg_entropy": a.neg_entropy,
            "family": FAMILIES[a.family],
        }
        fault, row = launch("score_entropy_tile", **given) if epilogue is None else epilogue(tile, given)
        if fault:
            status = fault, tile.rows.start + row
            rows.raise_fault(status, {"x_t": a.x_t, "x_0": a.x_0}, ("sigma", a.sigma))
        if (a.group or epilogue is not None) and tile.is_last and tile.is_last_chunk:
            parts = _parts(sweeps, a)
            sums.start(parts)
        if any(a.wanted):
            gradients.add(tile, unit)
    sums.wait()
    if (a.group or epilogue is not None) and len(losses):
        losses = parts.to(losses.dtype)
    if a.loss_weight is not None:
        losses *= values.loss_weight.to(losses.dtype)
    loss = rows.restore(losses, loss)
    if a.grad_hidden:
        hidden_gradient = rows.restore(gradients.hidden.to(a.hidden.dtype), hidden_gradient)
    return loss, hidden_gradient, weight_gradient, bias_gradient


def _parts(sweeps: Tensor, a: Arguments) -> Tensor:
    """The part of the loss of each row that this process's entries of the vocabulary contribute, [R], float64.

    The loss is linear in its sums over the vocabulary, so one number for each row is enough.
    """
    weight, slope, pull, constant, scores, dot, log_score_x_0 = sweeps.unbind(1)
    parts = weight * scores - slope * (dot / a.dim if a.family == "uniform" else dot)
    parts -= torch.where(pull == 0, 0.0, pull * log_score_x_0)  # 0 for the processes that do not have x_0
    return parts + constant if a.first == 0 else parts


def _unit(tile: Tile, v: _RowValues, stationary: Tensor | None, family: str, dim: int) -> Tensor:
    """The unit of the gradients of a float16 tile, see :func:`sedd_ext.head.float16_unit`.

    No gradient exceeds ``loss_weight (π_x s + 1 + a/b)``. This function sets entry x of the tile, which has no
    gradient, to -inf.
    """
    if stationary is None:
        pi_x = torch.full_like(v.sigma, 1.0 / dim if family == "uniform" else 1.0)
    else:
        pi_x = stationary[v.x_t.clamp(0, dim - 1)].double()
    if v.shift is not None:
        pi_x = pi_x * torch.exp(-v.shift)
    scores, width = tile.log_score, tile.log_score.shape[1]
    entry = (v.x_t - tile.first)[:, None]
    is_here = (entry >= 0) & (entry < width)
    entry = entry.clamp(0, width - 1)
    scores.scatter_(1, entry, torch.where(is_here, -torch.inf, scores.gather(1, entry)))
    bound = v.loss_weight.abs() * (pi_x * scores.amax(1).double().exp() + 1 + 1 / torch.expm1(v.sigma))
    return float16_unit(bound, tile)


_loss = FusedLoss("linear_score_entropy", Arguments, _forward)


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
    buffer_bytes: int | None = None,
    capacity: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The output head and score entropy in one operator: ``score_entropy_loss(F.linear(hidden, weight, bias), ...)``.

    The log-scores exist only tile by tile, in a buffer of fixed size. Apart from the gradients of hidden, weight and
    bias, the memory does not grow with rows × N. Rows with π_{x_t} = 0 (unmasked tokens of absorbing diffusion) skip
    the head. On a GPU, the call waits until the other rows are counted, unless there is a ``capacity``.

    The forward pass also computes the gradients, tile by tile, under the assumption that the upstream gradient is the
    same number for every position, as for sums and means. If the backward pass receives different numbers, it computes
    the gradients again, which costs one more matrix product. So pass known weights of positions as ``loss_weight``.
    With ``reduction="mean"``, with ``"sum"`` and with ``loss.sum()``, the backward pass knows that the numbers are the
    same. With ``loss.mean()`` it compares them, which waits for a GPU, unless the head is frozen; with a ``capacity``
    it computes the gradients again.

    Under autocast the matrix products use its dtype. Sums, and gradients over tiles and rows, are accumulated in
    float32 (float64 for float64).

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
        loss_weight: a factor for the loss of each position, for example the noise rate σ(t); a number or a floating-
            point tensor that broadcasts to [*B].
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.
        buffer_bytes: memory for a tile of log-scores; None for 64 MiB (32 MiB on a GPU). A tile has 2,048 entries of
            the vocabulary (8,192 on a GPU) and as many rows as fit.
        capacity: the most positions that go through the head, so that a GPU need not count those that need it. These
            come first, in order, and others fill up. If more need the head, the call raises on the CPU, and on a GPU
            the loss of those left out is NaN. None: they are counted; or, while a CUDA graph is captured, all positions
            go through the head.
        group: processes over which the vocabulary is split. Process r of P passes the rows ``weight.chunk(P)[r]`` and
            ``bias.chunk(P)[r]`` and gets their gradients; all other arguments, the loss and its gradient must be the
            same in all of them. The processes exchange one float64 for each position that needs the head, and the
            gradient of its hidden state. If weight and bias are DTensors with the placement ``Shard(0)``, the group is
            that of their mesh.

    Returns:
        The loss, float32 (float64 for float64 matrix products). It is differentiable once, with respect to ``hidden``,
        ``weight`` and ``bias``. Gradients that are not needed are not computed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), σ̄ is NaN, infinite or not above 0, an argument
            that gets no gradient requires one, ``reduction`` is unknown, ``buffer_bytes`` is neither None nor a
            positive int, or the weight does not have the rows that ``group`` asks for.

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 3.6, in closed form for any rank-one process.
    """
    process = check_process(process)
    hidden, weight, bias, dtype, share = check_head(hidden, weight, bias, process.dim, group, capacity)
    buffer_bytes = buffer_size(buffer_bytes, hidden.device, False)
    batch, device = hidden.shape[:-1], hidden.device
    x_t, x_0 = check_tokens("x_t", x_t, batch, "hidden"), check_tokens("x_0", x_0, batch, "hidden")
    check_reduction(reduction)
    arguments = Arguments(
        hidden=hidden,
        weight=weight,
        bias=bias,
        x_t=x_t,
        x_0=x_0,
        sigma=per_row("sigma", sigma, batch, device),
        log_score_shift=None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary=stationary_for(process, dtype, device),
        family=process.family,
        neg_entropy=process.neg_entropy,
        dim=share.dim,
        first=share.first,
        group=share.group,
        dtype=dtype,
        buffer_bytes=buffer_bytes,
        capacity=capacity,
        **shared_arguments(reduction, loss_weight, batch, device, hidden=hidden, weight=weight, bias=bias),
    )
    loss = _loss(*arguments)
    return loss if reduction == "none" else loss.sum()
