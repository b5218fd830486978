"""The loss of a mean prediction: forward, forward and backward, and with the head fused in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bench_linear import cases as head_cases
from bench_linear import gradients, head, products
from cases import HEAD_BENCH_ROWS, HEADS, LARGE, Case, Race, Run, compiled, operator_cases, plain_read
from torch import Tensor

from sedd_ext import linear_mean_prediction_loss, mean_prediction_loss, reference

FORWARD = "mean prediction forward"
BOTH = "mean prediction forward + backward, autograd"


def _bytes(case: Case, passes: int) -> int:
    """Logits and gradient, each once a pass; x_t, x_0, σ̄ in float64 and a float32 loss or its gradient."""
    return case.rows * (passes * case.n * case.itemsize + (2 if passes == 3 else 1) * 28)


def _loss(case: Case) -> Callable[[Tensor], Tensor]:
    function, i = mean_prediction_loss if case.contestant == "kernel" else reference.mean_prediction_loss, case.inputs
    rows = (i.x_t, i.x_0, i.sigma)
    few, x = [values[:4] for values in rows], i.log_score[:4].double()
    torch.testing.assert_close(function(x, *few, i.process), mean_prediction_loss(x, *few, i.process))
    if case.contestant == "compiled":
        function = compiled(function, case)
    return lambda x: function(x, *rows, i.process)


def forward(case: Case) -> Run:
    x = case.inputs.log_score
    if case.contestant == "limit":
        return plain_read(x)
    loss = _loss(case)
    return lambda: loss(x)


def both(case: Case) -> Run:
    x = case.inputs.log_score.detach().requires_grad_()
    if case.contestant == "limit":
        read, write = plain_read(x.detach()), x.detach().clone
        return lambda: (read(), write())
    loss = _loss(case)
    return lambda: torch.autograd.grad(loss(x).sum(), x)


def fused(case: Case, d: int, masked: float = 1.0) -> Run:
    i, parts = case.inputs, head(d, case.rows, case.n, case.dtype)
    rows = (torch.where(torch.arange(case.rows) < masked * case.rows, i.x_t, i.x_0), i.x_0, i.sigma)
    match case.contestant:
        case "kernel":
            return gradients(lambda h: linear_mean_prediction_loss(*h, *rows, i.process, reduction="sum"), parts)
        case "limit":
            return products(parts._replace(hidden=parts.hidden[: math.ceil(masked * case.rows)]))
        case "unfused":
            return gradients(lambda h: mean_prediction_loss(F.linear(*h), *rows, i.process, reduction="sum"), parts)
    return gradients(lambda h: F.linear_cross_entropy(*h[:2], i.x_0, linear_bias=h.bias, reduction="sum"), parts)


@pytest.mark.parametrize("case", operator_cases(("dense", "compiled")), ids=str)
def test_forward(race: Race, case: Case) -> None:
    race(FORWARD, case, forward, _bytes(case, 1))


@pytest.mark.parametrize("case", operator_cases(("dense", "compiled")), ids=str)
def test_forward_backward(race: Race, case: Case) -> None:
    race(BOTH, case, both, _bytes(case, 3))


PEERS = ("unfused", "cross_entropy") if hasattr(F, "linear_cross_entropy") else ("unfused",)


@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize("case", head_cases(*PEERS), ids=str)
def test_fused(race: Race, case: Case, d: int) -> None:
    passes = 3 * (d + case.n * d // case.rows) * case.itemsize
    race(
        f"head (d = {d}) + mean prediction, forward + backward", case, functools.partial(fused, d=d), case.rows * passes
    )


@pytest.mark.skipif(len(PEERS) == 1, reason="this torch has no F.linear_cross_entropy")
@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contestant", ["kernel", "cross_entropy"])
def test_fused_half_masked(race: Race, contestant: str, dtype: str, d: int) -> None:
    """Absorbing noise on half of the rows, as in training: the other half has no loss and costs nothing."""
    case = Case("absorbing", LARGE, HEAD_BENCH_ROWS, dtype, contestant)
    run, passes = functools.partial(fused, d=d, masked=0.5), 3 * (d + case.n * d // case.rows) * case.itemsize
    race(f"head (d = {d}) + mean prediction, half masked, forward + backward", case, run, case.rows * passes)
