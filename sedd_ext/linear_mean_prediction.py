"""The output head and the loss of a mean prediction in one operator, without a rows × N tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._dispatch import check_process, check_reduction, check_tokens, contiguous, per_row, stationary_for
from .fused_loss import FusedLoss, empty_results, shared_arguments
from .head import Gradients, Head, Rows, buffer_size, check_head, float16_unit
from .mean_prediction import launch_mean_prediction
from .process import RankOne
from .split import Sums, gather, most_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_mean_prediction_loss"]


class Arguments(NamedTuple):
    """The arguments of the operator and of its backward."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    x_t: Tensor
    x_0: Tensor
    sigma: Tensor
    sigma_s: Tensor | None
    loss_weight: Tensor | None
    stationary: Tensor | None
    family: str
    mask: int
    dim: int
    first: int
    group: str
    dtype: torch.dtype
    buffer_bytes: int
    capacity: int | None
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool


@torch.no_grad()
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Computes some rows of logits at once and their loss, overwrites them with the gradient, and adds its products."""
    a = Arguments(*arguments)
    loss, hidden_gradient, weight_gradient, bias_gradient = empty_results(a)
    stationary, needs_gradient = contiguous(a.stationary), a.grad_hidden or a.grad_weight or a.grad_bias
    rows = Rows(a.x_t, a.sigma, stationary, a.family, a.dim, a.x_0, capacity=a.capacity)
    most = most_rows(a.weight.shape[0], a.dim, a.group)
    hidden = rows.select_or_zero(a.hidden).to(a.dtype)
    head = Head(hidden, a.weight, a.bias, a.buffer_bytes, whole_rows=True, first=a.first, most=most)
    sums = Sums(a.group)
    gradients = Gradients(head, weight_gradient, bias_gradient, a.grad_hidden, sums)
    x_t, x_0, sigma = rows.select(a.x_t), rows.select(a.x_0), rows.select(a.sigma)
    sigma_s = None if a.sigma_s is None else rows.select(a.sigma_s)
    weights = rows.select_or_zero(torch.ones_like(a.sigma) if a.loss_weight is None else a.loss_weight)
    losses = loss.new_zeros(sigma.shape[0])
    for tile in head.tiles():
        at = tile.rows
        numbers = sigma.new_empty(tile.log_score.shape[0], _C.mean_prediction_numbers) if needs_gradient else None
        options: dict[str, Any] = {
            "x_t": x_t[at],
            "x_0": x_0[at],
            "sigma": sigma[at],
            "sigma_s": None if sigma_s is None else sigma_s[at],
            "stationary": stationary,
            "family": a.family,
            "mask": a.mask,
            "dim": a.dim,
            "first": a.first,
        }
        run = partial(launch_mean_prediction, "mean_prediction", tile.log_score, losses[at], None, numbers, **options)
        fault, row = _in_stages(run, sigma[at], a) if a.group else run()
        if fault:
            tokens = {"x_t": a.x_t, "x_0": a.x_0}
            rows.raise_fault((fault, at.start + row), tokens, ("sigma", a.sigma), sigma_s=a.sigma_s)
        if needs_gradient:
            upstream, unit = weights[at], None
            if a.dtype == torch.float16:  # no gradient exceeds scale (1 + a), with scale = 1/b or less
                unit = float16_unit(upstream.abs() * 2 / -torch.expm1(-sigma[at]), tile)
                upstream = upstream / unit
            launch_mean_prediction(
                "mean_prediction_backward",
                tile.log_score,
                tile.log_score,
                upstream.to(losses.dtype),
                numbers,
                **options,
            )
            gradients.add(tile, unit)
    sums.wait()
    if a.loss_weight is not None:
        losses *= weights.to(losses.dtype)
    loss = rows.restore(losses, loss)
    if a.grad_hidden:
        hidden_gradient = rows.restore(gradients.hidden.to(a.hidden.dtype), hidden_gradient)
    return loss, hidden_gradient, weight_gradient, bias_gradient


def _in_stages(run: Callable[..., tuple[int, int]], sigma: Tensor, a: Arguments) -> tuple[int, int]:
    """Computes losses from the logits that each process has. All of them find the same first bad row."""
    row_logits = sigma.new_zeros(len(sigma), _C.mean_prediction_logits)
    status = run(stage="logits", row_logits=row_logits)
    if status[0]:
        return status
    x, x_0, others, top = gather(row_logits, a.group).unbind(-1)
    row_logits = torch.stack([x.amax(0), x_0.amax(0), others.logsumexp(0), top.amax(0)], 1)
    row_sums = sigma.new_zeros(len(sigma), _C.mean_prediction_sums)
    if a.family != "absorbing":  # whose sums follow from the logits
        run(stage="sums", row_logits=row_logits, row_sums=row_sums)
        sums = Sums(a.group)
        sums.start(row_sums)
        sums.wait()
    return run(stage="loss", row_logits=row_logits, row_sums=row_sums)


_loss = FusedLoss("linear_mean_prediction", Arguments, _forward)


def linear_mean_prediction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    sigma_s: Tensor | float | None = None,
    loss_weight: Tensor | float | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    buffer_bytes: int | None = None,
    capacity: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The output head and the loss in one operator: ``mean_prediction_loss(F.linear(hidden, weight, bias), ...)``.

    The logits exist only for some rows at a time, in a buffer of fixed size. Apart from the gradients of hidden, weight
    and bias, the memory does not grow with rows × N. Rows with π_{x_t} = 0 (unmasked tokens of absorbing diffusion)
    skip the head. On a GPU, the call waits until the other rows are counted, unless there is a ``capacity``.

    The gradients are computed in the forward pass, for an upstream gradient of 1. The backward pass scales them. If the
    upstream gradient differs from row to row, the backward pass computes them again. So for a mean, use
    ``reduction="mean"`` or pass ``loss_weight``. The gradients of weight and bias are added up in float32.

    Args:
        hidden: hidden states, [*B, d].
        weight: weight of the head, [N, d], of the same dtype as ``hidden`` unless autocast is on.
        bias: bias of the head, [N], or None.
        x_t: as for :func:`mean_prediction_loss`.
        x_0: as for :func:`mean_prediction_loss`.
        sigma: as for :func:`mean_prediction_loss`.
        process: as for :func:`mean_prediction_loss`.
        sigma_s: as for :func:`mean_prediction_loss`.
        loss_weight: as for :func:`mean_prediction_loss`.
        reduction: ``"none"`` gives [*B]; ``"mean"`` and ``"sum"`` give a scalar over all positions.
        buffer_bytes: memory for logits, as many rows as fit, but at least one; None for 64 MiB.
        capacity: the most positions that go through the head, so that a GPU need not count those that need it. These
            come first, in order, and others fill up. If more need the head, the call raises on the CPU, and on a GPU
            the loss of those left out is NaN. None: they are counted; or, while a CUDA graph is captured, all positions
            go through the head.
        group: processes over which the vocabulary is split. Process r of P passes the rows ``weight.chunk(P)[r]`` and
            ``bias.chunk(P)[r]`` and gets their gradients; all other arguments, the loss and its gradient must be the
            same in all of them. For each position that needs the head, the processes exchange four float64, then three
            more unless the process is absorbing, and the gradient of its hidden state. If weight and bias are DTensors
            with the placement ``Shard(0)``, the group is that of their mesh.

    Returns:
        The loss, float32 (float64 for float64 matrix products). It is differentiable once, with respect to ``hidden``,
        ``weight`` and ``bias``. Gradients that are not needed are not computed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: as :func:`mean_prediction_loss`, or ``buffer_bytes`` is neither None nor a positive int, or the
            weight does not have the rows that ``group`` asks for.

    Source: see :func:`mean_prediction_loss`.
    """
    process = check_process(process)
    hidden, weight, bias, dtype, share = check_head(hidden, weight, bias, process.dim, group, capacity)
    buffer_bytes = buffer_size(buffer_bytes, hidden.device, True)
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
        sigma_s=None if sigma_s is None else per_row("sigma_s", sigma_s, batch, device),
        stationary=stationary_for(process, dtype, device),
        family=process.family,
        mask=-1 if process.mask_id is None else process.mask_id,
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
