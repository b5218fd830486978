"""Score entropy: forward, backward into an existing buffer and through autograd, and both together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import (
    AUTOGRAD,
    BACKWARD,
    BOTH,
    FORWARD,
    PEERS,
    Case,
    Race,
    Run,
    compiled,
    linear_cases,
    operator_cases,
    plain_read,
)
from peers import dense_score_entropy, released_score_entropy
from torch import Tensor

from sedd_ext import RankOne, score_entropy_loss
from sedd_ext._dispatch import stationary_for
from sedd_ext.score_entropy import Arguments, _launch_backward


def _bytes(case: Case, passes: int) -> int:
    """Log-scores and gradient, each once a pass; x_t, x_0, σ̄ in float64 and a float32 loss or its gradient."""
    return case.rows * (passes * case.n * case.itemsize + (2 if passes == 3 else 1) * 28)


def _kernel(x: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor, process: RankOne) -> Tensor:
    return score_entropy_loss(x, x_t, x_0, sigma, process)


def _released(x: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor, process: RankOne) -> Tensor:
    return released_score_entropy(x, sigma, x_t, x_0, process)


def _loss(case: Case) -> Callable[[Tensor], Tensor]:
    contestants = {
        "kernel": _kernel,
        "released": _released,
        "dense": dense_score_entropy,
        "compiled": dense_score_entropy,
    }
    function, i = contestants[case.contestant], case.inputs
    # A race between different formulas would mean nothing. In float64: in float32
    # the released uniform loss loses digits (2 % off at N = 50,258 and σ̄ = 0.18).
    few, x, sigma = slice(0, 4), i.log_score[:4].double(), i.sigma[:4].double()
    mine, theirs = (f(x, i.x_t[few], i.x_0[few], sigma, i.process) for f in (_kernel, function))
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5, check_dtype=False)
    if case.contestant == "compiled":
        function = compiled(function, case)
    return lambda x: function(x, i.x_t, i.x_0, i.sigma, i.process)


def forward(case: Case) -> Run:
    x = case.inputs.log_score
    if case.contestant == "limit":
        return plain_read(x)
    loss = _loss(case)
    return lambda: loss(x)


@functools.lru_cache(maxsize=2)
def _buffer(rows: int, n: int, dtype: str) -> Tensor:
    """Where gradients and copies go: written once before, so no page of it is new."""
    return torch.zeros(rows, n, dtype=getattr(torch, dtype))


def backward(case: Case) -> Run:
    i = case.inputs
    out = _buffer(case.rows, case.n, case.dtype)
    if case.contestant == "limit":
        return lambda: out.copy_(i.log_score)
    arguments = Arguments(
        log_score=i.log_score,
        x_t=i.x_t,
        x_0=i.x_0,
        sigma=i.sigma.double(),
        log_score_shift=None,
        stationary=stationary_for(i.process, i.log_score.dtype, out.device),
        family=i.process.family,
        neg_entropy=i.process.neg_entropy,
    )
    return lambda: _launch_backward(out, torch.ones(case.rows), None, arguments)


def backward_autograd(case: Case) -> Run:
    x = case.inputs.log_score.detach().requires_grad_()
    if case.contestant == "limit":
        return x.detach().clone
    loss = _loss(case)(x)
    grad_loss = torch.ones_like(loss)
    return lambda: torch.autograd.grad(loss, x, grad_loss, retain_graph=True)


def both(case: Case) -> Run:
    x = case.inputs.log_score.detach().requires_grad_()
    if case.contestant == "limit":
        return x.detach().clone
    loss, i = _loss(case), case.inputs
    if case.contestant == "kernel":  # one sweep
        return lambda: torch.autograd.grad(score_entropy_loss(x, i.x_t, i.x_0, i.sigma, i.process, reduction="sum"), x)
    return lambda: torch.autograd.grad(loss(x).sum(), x)


@pytest.mark.parametrize("case", operator_cases(PEERS), ids=str)
def test_forward(race: Race, case: Case) -> None:
    race(FORWARD, case, forward, _bytes(case, 1))


@pytest.mark.parametrize("case", operator_cases(), ids=str)
def test_backward_into_buffer(race: Race, case: Case) -> None:
    race(BACKWARD, case, backward, _bytes(case, 2))


@pytest.mark.parametrize("case", operator_cases(), ids=str)
def test_backward_autograd(race: Race, case: Case) -> None:
    race(AUTOGRAD, case, backward_autograd, _bytes(case, 2))


@pytest.mark.parametrize("case", operator_cases(PEERS, beyond=False), ids=str)
def test_forward_backward(race: Race, case: Case) -> None:
    race(BOTH, case, both, _bytes(case, 3))


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_linear_forward(race: Race, case: Case) -> None:
    race(FORWARD, case, forward, _bytes(case, 1), group="linearity: " + FORWARD)


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_linear_backward(race: Race, case: Case) -> None:
    race(BACKWARD, case, backward, _bytes(case, 2), group="linearity: " + BACKWARD)
