"""The output head and the loss of generalised masked diffusion in one operator, without a rows × N tensor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sedd_ext._dispatch import DTYPES, check_reduction, check_tokens, launch, per_row
from sedd_ext.fused_loss import FusedLoss, empty_results, shared_arguments
from sedd_ext.generalized_masked import NUMBERS, check_power, check_power_values, raise_row_fault
from sedd_ext.head import BUFFER_BYTES, Gradients, Head, Rows, Tile, check_head, float16_unit

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
    dtype: torch.dtype
    buffer_bytes: int
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
    kernel: str, tile: Tile, v: _RowValues, power: Tensor, numbers: Tensor, weights: Tensor | None, out: Tensor
) -> tuple[int, int]:
    """Runs a kernel of the operator without a head on the logits of a tile."""
    rows, dim = tile.log_score.shape
    return launch(
        kernel,
        logits=tile.log_score,
        power=power,
        x_t=v.x_t,
        x_0=v.x_0,
        t=v.t,
        grad_loss=weights,
        numbers=numbers,
        out=out,
        rows=rows,
        dim=dim,
        dtype=DTYPES[tile.log_score.dtype],
    )


@torch.no_grad()
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    check_power_values(a.power)
    loss, hidden_gradient, weight_gradient, bias_gradient, power_gradient = empty_results(a, _DIFFERENTIABLE)
    dim, power = a.weight.shape[0], a.power.contiguous()
    # a time above 1 is bad, so its row goes through the head too, and the kernel reports it
    rows = Rows(a.x_t, torch.where(a.t <= 1, a.t, torch.nan), None, "absorbing", dim, a.x_0)
    head = Head(rows.select(a.hidden).to(a.dtype), a.weight, a.bias, a.buffer_bytes, whole_rows=True)
    gradients = Gradients(head, weight_gradient, bias_gradient, a.grad_hidden)
    t = rows.select(a.t)
    loss_weight = torch.ones_like(t) if a.loss_weight is None else rows.select(a.loss_weight)
    values = _RowValues(rows.select(a.x_t), rows.select(a.x_0), t, loss_weight)
    losses, numbers = loss.new_zeros(t.shape[0]), t.new_empty(t.shape[0], NUMBERS)
    in_power = t.new_zeros(dim if a.grad_power else 0)
    for tile in head.tiles():
        v, tile_numbers = values.of(tile.rows), numbers[tile.rows]
        fault, row = _launch_tile("generalized_masked", tile, v, power, tile_numbers, None, losses[tile.rows])
        if fault:
            row += tile.rows.start
            raise_row_fault((fault, row if rows.index is None else int(rows.index[row])), a.x_t, a.x_0, a.t, dim)
        if a.grad_power:
            of_tile, weights = torch.empty_like(in_power), v.loss_weight.to(loss.dtype)
            _launch_tile("generalized_masked_power", tile, v, power, tile_numbers, weights, of_tile)
            in_power += of_tile
        if a.in_head:
            unit = _unit(tile, v, power) if a.dtype == torch.float16 else None
            weights = (v.loss_weight if unit is None else v.loss_weight / unit).to(loss.dtype)
            _launch_tile("generalized_masked_backward", tile, v, power, tile_numbers, weights, tile.log_score)
            gradients.add(tile, unit)
    if a.loss_weight is not None:
        losses *= loss_weight.to(losses.dtype)
    loss = rows.restore(losses, loss)
    if a.grad_hidden:
        hidden_gradient = rows.restore(gradients.hidden.to(a.hidden.dtype), hidden_gradient)
    return loss, hidden_gradient, weight_gradient, bias_gradient, power_gradient.copy_(in_power)


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
    buffer_bytes: int = BUFFER_BYTES,
) -> Tensor:
    """The output head and the loss of generalised masked diffusion in one operator.

    The same as ``generalized_masked_loss(F.linear(hidden, weight, bias), x_t, x_0, t, power)``, but the logits exist
    only for some rows at a time, in a buffer of fixed size. Apart from the gradients, the memory does not grow with
    rows × N. Only masked rows go through the head. On a GPU, the call waits until they are counted.

    The forward pass also computes the gradients, under the assumption that the upstream gradient is the same number for
    every position, as for sums and means. If the backward pass receives different numbers, it computes the gradients
    again, which costs one more matrix product. So pass known weights of positions as ``loss_weight``. With
    ``reduction="mean"``, with ``"sum"`` and with ``loss.sum()``, the backward pass knows that the numbers are the same.
    With ``loss.mean()`` it compares them, which waits for a GPU.

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
        buffer_bytes: memory for the logits of a tile, which has as many rows as fit, but at least one.

    Returns:
        The loss, float32 (float64 for float64 matrix products). It is differentiable once, with respect to ``hidden``,
        ``weight``, ``bias`` and ``power``. Gradients that are not needed are not computed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token is not valid, t does not lie in (0, 1], a power is not finite or not
            above 0, an argument that gets no gradient requires one, ``reduction`` is unknown, or ``buffer_bytes`` is
            not a positive int. On a GPU the values are not checked, see :func:`generalized_masked_loss`.

    Source: see :func:`generalized_masked_loss`.
    """
    hidden, weight, bias, dtype, _ = check_head(hidden, weight, bias, None, buffer_bytes)
    batch, device = hidden.shape[:-1], hidden.device
    x_t, x_0 = check_tokens("x_t", x_t, batch, "hidden"), check_tokens("x_0", x_0, batch, "hidden")
    check_reduction(reduction)
    power = check_power(power, weight.shape[0], dtype)
    arguments = Arguments(
        hidden=hidden,
        weight=weight,
        bias=bias,
        power=power,
        x_t=x_t,
        x_0=x_0,
        t=per_row("t", t, batch, device),
        dtype=dtype,
        buffer_bytes=buffer_bytes,
        **shared_arguments(reduction, loss_weight, batch, device, hidden=hidden, weight=weight, bias=bias, power=power),
    )
    loss = _loss(*arguments)
    return loss if reduction == "none" else loss.sum()
