"""The output head and the loss of generalised masked diffusion in one operator, without a rows × N tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._dispatch import DTYPES, STAGES, check_reduction, check_tokens, launch, per_row
from .fused_loss import FusedLoss, empty_results, shared_arguments
from .generalized_masked import NUMBERS, check_power, check_power_values, raise_row_fault
from .head import Gradients, Head, Rows, Tile, buffer_size, check_head, float16_unit
from .split import Sums, gather, most_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_generalized_masked_loss"]


_DIFFERENTIABLE = ("hidden", "weight", "bias", "power")


class Arguments(NamedTuple):
    """The arguments of the operator and of its backward."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    power: Tensor
    x_t: Tensor
    x_0: Tensor
    t: Tensor
    loss_weight: Tensor | None
    dim: int
    first: int
    group: str
    dtype: torch.dtype
    buffer_bytes: int
    capacity: int | None
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    grad_power: bool

    @property
    def in_head(self) -> bool:
        """Whether the gradient of the logits is needed."""
        return self.grad_hidden or self.grad_weight or self.grad_bias


class _RowValues(NamedTuple):
    """The values of the rows that go through the head, [R] each."""

    x_t: Tensor
    x_0: Tensor
    t: Tensor
    loss_weight: Tensor

    def of(self, rows: slice) -> _RowValues:
        """The values of a slice of these rows."""
        return _RowValues(*(values[rows] for values in self))


def _launch_tile(
    kernel: str,
    tile: Tile,
    v: _RowValues,
    power: Tensor,
    numbers: Tensor,
    weights: Tensor | None,
    out: Tensor,
    stage: str = "whole",
    row_sums: Tensor | None = None,
) -> tuple[int, int]:
    """Runs a kernel of the operator without a head on the logits of a tile."""
    return launch(
        kernel,
        logits=tile.log_score,
        power=power,
        x_t=v.x_t,
        x_0=v.x_0,
        t=v.t,
        grad_loss=weights,
        numbers=numbers,
        row_sums=row_sums,
        out=out,
        rows=tile.log_score.shape[0],
        width=tile.log_score.shape[1],
        stride=tile.log_score.stride(0),
        first=tile.first,
        dim=power.numel(),
        dtype=DTYPES[tile.log_score.dtype],
        stage=STAGES[stage],
    )


@torch.no_grad()
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    check_power_values(a.power)
    loss, hidden_gradient, weight_gradient, bias_gradient, power_gradient = empty_results(a, _DIFFERENTIABLE)
    dim, power = a.dim, a.power.contiguous()
    # a time above 1 is bad, so its row goes through the head too, and the kernel reports it
    noise = torch.where(a.t <= 1, a.t, torch.nan)
    rows = Rows(a.x_t, noise, None, "absorbing", dim, a.x_0, capacity=a.capacity)
    most = most_rows(a.weight.shape[0], dim, a.group)
    hidden = rows.select_or_zero(a.hidden).to(a.dtype)
    head = Head(hidden, a.weight, a.bias, a.buffer_bytes, whole_rows=True, first=a.first, most=most)
    sums = Sums(a.group)
    gradients = Gradients(head, weight_gradient, bias_gradient, a.grad_hidden, sums)
    t = rows.select(a.t)
    loss_weight = rows.select_or_zero(torch.ones_like(a.t) if a.loss_weight is None else a.loss_weight)
    values = _RowValues(rows.select(a.x_t), rows.select(a.x_0), t, loss_weight)
    losses, numbers = loss.new_zeros(t.shape[0]), t.new_empty(t.shape[0], NUMBERS)
    in_power = t.new_zeros(dim if a.grad_power else 0)
    own_power = in_power[a.first : a.first + a.weight.shape[0]]
    for tile in head.tiles():
        v, tile_numbers = values.of(tile.rows), numbers[tile.rows]
        run = partial(_launch_tile, "generalized_masked", tile, v, power, tile_numbers, None, losses[tile.rows])
        fault, row = _in_stages(run, v.t, a.group) if a.group else run()
        if fault:
            row += tile.rows.start
            raise_row_fault((fault, row if rows.index is None else int(rows.index[row])), a.x_t, a.x_0, a.t, dim)
        if a.grad_power:
            of_tile, weights = torch.empty_like(own_power), v.loss_weight.to(loss.dtype)
            _launch_tile("generalized_masked_power", tile, v, power, tile_numbers, weights, of_tile)
            own_power += of_tile
            if tile.is_last_chunk:
                sums.start(in_power)
        if a.in_head:
            unit = _unit(tile, v, power) if a.dtype == torch.float16 else None
            weights = (v.loss_weight if unit is None else v.loss_weight / unit).to(loss.dtype)
            _launch_tile("generalized_masked_backward", tile, v, power, tile_numbers, weights, tile.log_score)
            gradients.add(tile, unit)
    sums.wait()
    if a.loss_weight is not None:
        losses *= loss_weight.to(losses.dtype)
    loss = rows.restore(losses, loss)
    if a.grad_hidden:
        hidden_gradient = rows.restore(gradients.hidden.to(a.hidden.dtype), hidden_gradient)
    return loss, hidden_gradient, weight_gradient, bias_gradient, power_gradient.copy_(in_power)


def _in_stages(run: Callable[..., tuple[int, int]], t: Tensor, group: str) -> tuple[int, int]:
    """Computes losses from the logits that each process has. All of them find the same first bad row."""
    row_sums = t.new_zeros(len(t), _C.generalized_masked_sums)
    status = run(stage="logits", row_sums=row_sums)
    if status[0]:
        return status
    tops, rest, dot, logit_v = gather(row_sums, group).unbind(-1)
    top = tops.amax(0)
    scale = torch.where(tops == -torch.inf, 0.0, (tops - top).exp())
    row_sums = torch.stack([top, (rest * scale).sum(0), (dot * scale).sum(0), logit_v.amax(0)], 1)
    return run(stage="loss", row_sums=row_sums)


def _unit(tile: Tile, v: _RowValues, power: Tensor) -> Tensor:
    """The unit of the gradients of a float16 tile, see :func:`sedd_ext.head.float16_unit`.

    No gradient exceeds ``loss_weight · 2 max w / t``.
    """
    largest = power[:-1].amax().double() if power.numel() > 1 else power.new_ones((), dtype=torch.float64)
    return float16_unit(v.loss_weight.abs() * (2 * largest / v.t), tile)


_loss = FusedLoss("linear_generalized_masked", Arguments, _forward, _DIFFERENTIABLE)


def linear_generalized_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor | float,
    power: Tensor,
    *,
    loss_weight: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    buffer_bytes: int | None = None,
    capacity: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The output head and the loss of generalised masked diffusion in one operator.

    The same as ``generalized_masked_loss(F.linear(hidden, weight, bias), x_t, x_0, t, power)``, but the logits exist
    only for some rows at a time, in a buffer of fixed size. Apart from the gradients, the memory does not grow with
    rows × N. Only masked rows go through the head. On a GPU, the call waits until they are counted,
    unless there is a ``capacity``.

    The forward pass also computes the gradients, under the assumption that the upstream gradient is the same number for
    every position, as for sums and means. If the backward pass receives different numbers, it computes the gradients
    again, which costs one more matrix product. So pass known weights of positions as ``loss_weight``. With
    ``reduction="mean"``, with ``"sum"`` and with ``loss.sum()``, the backward pass knows that the numbers are the same.
    With ``loss.mean()`` it compares them, which waits for a GPU; with a ``capacity`` it computes the gradients again.

    Under autocast the matrix products use its dtype. Sums, and gradients over tiles and rows, are accumulated in
    float32 (float64 for float64).

    Args:
        hidden: states before the head, [*B, d], float32, bfloat16, float16 or float64.
        weight: the head's weight, [N, d], of the same dtype (any, under autocast). MASK is the last of the N tokens.
        bias: the head's bias [N], or None.
        x_t: noised tokens, [*B], int64, in [0, N).
        x_0: clean tokens, [*B], int64, in [0, N), and not MASK where ``x_t`` is MASK.
        t: times in (0, 1], a number or a floating-point tensor that broadcasts to [*B].
        power: w > 0, [N], float32 or float64. MASK's entry is ignored and gets a gradient of 0.
        loss_weight: a factor for the loss of each position; a number or a floating-point tensor that broadcasts to
            [*B].
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.
        buffer_bytes: memory for the logits of a tile, which has as many rows as fit, but at least one; None for 64 MiB.
        capacity: the most positions that go through the head, so that a GPU need not count those that need it. These
            come first, in order, and others fill up. If more need the head, the call raises on the CPU, and on a GPU
            the loss of those left out is NaN. None: they are counted; or, while a CUDA graph is captured, all positions
            go through the head.
        group: processes over which the vocabulary is split. Process r of P passes the rows ``weight.chunk(P)[r]`` and
            ``bias.chunk(P)[r]`` and gets their gradients; all other arguments, the loss, its gradient and that of
            ``power`` are the same in all of them. For each masked position, the processes exchange four float64 and the
            gradient of its hidden state, and for the gradient of ``power`` N float64. N is the length of ``power``. If
            weight and bias are DTensors with the placement ``Shard(0)``, the group is that of their mesh.

    Returns:
        The loss, float32 (float64 for float64 matrix products). It is differentiable once, with respect to ``hidden``,
        ``weight``, ``bias`` and ``power``. Gradients that are not needed are not computed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token is not valid, t does not lie in (0, 1], a power is not finite or not
            above 0, an argument that gets no gradient requires one, ``reduction`` is unknown, ``buffer_bytes`` is not a
            positive int, or the weight does not have the rows that ``group`` asks for. On a GPU the values are not
            checked, see :func:`generalized_masked_loss`.

    Source: see :func:`generalized_masked_loss`.
    """
    dim = power.numel() if group is not None and isinstance(power, Tensor) else None
    hidden, weight, bias, dtype, share = check_head(hidden, weight, bias, dim, group, capacity)
    buffer_bytes = buffer_size(buffer_bytes, hidden.device, True)
    batch, device = hidden.shape[:-1], hidden.device
    x_t, x_0 = check_tokens("x_t", x_t, batch, "hidden"), check_tokens("x_0", x_0, batch, "hidden")
    check_reduction(reduction)
    power = check_power(power, share.dim, dtype)
    arguments = Arguments(
        hidden=hidden,
        weight=weight,
        bias=bias,
        power=power,
        x_t=x_t,
        x_0=x_0,
        t=per_row("t", t, batch, device),
        dim=share.dim,
        first=share.first,
        group=share.group,
        dtype=dtype,
        buffer_bytes=buffer_bytes,
        capacity=capacity,
        **shared_arguments(reduction, loss_weight, batch, device, hidden=hidden, weight=weight, bias=bias, power=power),
    )
    loss = _loss(*arguments)
    return loss if reduction == "none" else loss.sum()
