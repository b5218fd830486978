"""The loss of generalised masked diffusion: forward, each gradient into an existing buffer, and all together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import BEYOND_ROWS, CACHED_ROWS, LARGE, SMALL, SMALL_ROWS, Case, Race, Run, compiled, plain_read
from torch import Tensor

from sedd_ext import generalized_masked_loss, reference
from sedd_ext.generalized_masked import _launch

FORWARD, BACKWARD = "generalized masked forward", "generalized masked backward, existing buffer"
POWER, BOTH = "generalized masked power gradient", "generalized masked forward + backward, autograd"


class Rows(NamedTuple):
    """The arguments after the logits; every row is masked."""

    x_t: Tensor
    x_0: Tensor
    t: Tensor
    power: Tensor


@functools.lru_cache(maxsize=2)
def _rows(rows: int, n: int) -> Rows:
    generator = torch.Generator().manual_seed(2)
    power, t = 0.5 + torch.rand(n, generator=generator), 0.01 + 0.99 * torch.rand(rows, generator=generator)
    return Rows(torch.full((rows,), n - 1), torch.randint(n - 1, (rows,), generator=generator), t.double(), power)


def _cases(*peers: str, beyond: bool = True) -> list[Case]:
    """Both vocabularies, float32 and bfloat16, and beyond the cache if wanted; the peers on float32."""
    sizes = [(SMALL, SMALL_ROWS), (LARGE, CACHED_ROWS), *([(LARGE, BEYOND_ROWS)] if beyond else [])]
    cases = [
        Case("absorbing", n, rows, dtype, who)
        for n, rows in sizes
        for dtype in ("float32", "bfloat16")
        for who in ("kernel", "limit")
    ]
    return cases + [Case("absorbing", n, rows, "float32", who) for n, rows in sizes[:2] for who in peers]


def _bytes(case: Case, passes: int) -> int:
    """Logits and gradient, each once a pass; x_t, x_0, t, a float32 loss and the numbers of the rows."""
    return case.rows * (passes * case.n * case.itemsize + 28 + 40)


def _loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    rows = _rows(case.rows, case.n)
    if case.contestant == "kernel":
        return lambda x, power: generalized_masked_loss(x, *rows[:3], power)
    function = reference.generalized_masked_loss
    few = [values[:4] for values in rows[:3]]
    x = case.inputs.log_score[:4].double()
    torch.testing.assert_close(function(x, *few, rows.power), generalized_masked_loss(x, *few, rows.power))
    if case.contestant == "compiled":
        function = compiled(function, case)
    return lambda x, power: function(x, *rows[:3], power)


def forward(case: Case) -> Run:
    x = case.inputs.log_score
    if case.contestant == "limit":
        return plain_read(x)
    loss = _loss(case)
    return lambda: loss(x, _rows(case.rows, case.n).power)


@functools.lru_cache(maxsize=2)
def _buffer(rows: int, n: int, dtype: str) -> Tensor:
    """Where gradients and copies go: written once before, so no page of it is new."""
    return torch.zeros(rows, n, dtype=getattr(torch, dtype))


def _gradient(kernel: str, case: Case, out: Tensor) -> Run:
    x, rows = case.inputs.log_score, _rows(case.rows, case.n)
    _, numbers = torch.ops.sedd_ext.generalized_masked(x, *rows)
    grad_loss = torch.ones(case.rows)
    return lambda: _launch(kernel, grad_loss, numbers, out, x, *rows)


def backward(case: Case) -> Run:
    out = _buffer(case.rows, case.n, case.dtype)
    if case.contestant == "limit":
        x = case.inputs.log_score
        return lambda: out.copy_(x)
    return _gradient("generalized_masked_backward", case, out)


def power(case: Case) -> Run:
    if case.contestant == "limit":
        return plain_read(case.inputs.log_score)
    return _gradient("generalized_masked_power", case, torch.zeros(case.n, dtype=torch.float64))


def both(case: Case) -> Run:
    x, power = case.inputs.log_score.detach().requires_grad_(), _rows(case.rows, case.n).power.clone().requires_grad_()
    if case.contestant == "limit":  # the gradient in the powers takes a read of its own
        read, write = plain_read(x.detach()), x.detach().clone
        return lambda: (read(), read(), write())
    loss = _loss(case)
    return lambda: torch.autograd.grad(loss(x, power).sum(), (x, power))


@pytest.mark.parametrize("case", _cases("dense", "compiled"), ids=str)
def test_forward(race: Race, case: Case) -> None:
    race(FORWARD, case, forward, _bytes(case, 1))


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_backward_into_buffer(race: Race, case: Case) -> None:
    race(BACKWARD, case, backward, _bytes(case, 2))


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_power(race: Race, case: Case) -> None:
    race(POWER, case, power, _bytes(case, 1))


@pytest.mark.parametrize("case", _cases("dense", "compiled", beyond=False), ids=str)
def test_forward_backward(race: Race, case: Case) -> None:
    race(BOTH, case, both, _bytes(case, 4))
