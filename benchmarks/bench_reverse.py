"""Reverse steps: one token a row from the Tweedie and from the Euler step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import EULER, PEERS, PROCESSES, TWEEDIE, Case, Race, Run, compiled, linear_cases, operator_cases, plain_read
from peers import released_analytic_step, released_euler_step
from torch import Tensor

from sedd_ext import Euler, RankOne, Tweedie, reverse_sample

Step = Callable[[Tensor, Tensor, Tensor, RankOne], Tensor]
STEPS = {"tweedie": Tweedie, "euler": Euler}
RELEASED: dict[str, Step] = {"tweedie": released_analytic_step, "euler": released_euler_step}


def kernel_step(log_score: Tensor, x_t: Tensor, step: Tensor, process: RankOne, kind: str) -> Tensor:
    return reverse_sample(log_score, x_t, STEPS[kind](step), process)


def dense_step(log_score: Tensor, x_t: Tensor, step: Tensor, process: RankOne, kind: str) -> Tensor:
    """Plain PyTorch at its best: few passes, one random number a row, inverse CDF. Entry x_t of log_score is 0."""
    score = log_score.exp()
    u = torch.rand_like(step)
    if process.family == "absorbing":
        # both steps leave MASK for y with weight rate · s_y, and stay with what is left of 1
        rate = torch.expm1(step) if kind == "tweedie" else step
        cumulative = score[:, :-1].cumsum(-1)
        leave = rate * cumulative[:, -1]
        target = u * (leave + (1 - leave).clamp(min=0)) / rate
        # past the end is N - 1, MASK
        found = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        return torch.where(x_t == process.dim - 1, found, x_t)
    at_x = x_t[:, None]
    total = score.sum(-1, keepdim=True)
    if kind == "tweedie":
        a, b = torch.exp(-step)[:, None], -torch.expm1(-step)[:, None] / process.dim
        weights = (score + torch.expm1(step)[:, None] * (score - total / process.dim)).clamp(min=0) * b
        weights = weights.scatter(-1, at_x, weights.gather(-1, at_x) * ((a + b) / b))
    else:
        rate = step[:, None] / process.dim
        weights = (score * rate).scatter(-1, at_x, (1 - rate * (total - 1)).clamp(min=0))
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return found.clamp(max=process.dim - 1)


def _same_draws(kind: str, function: Step, process: RankOne) -> None:
    """A race between different laws would mean nothing: frequencies of 20,000 draws, known to within 0.0035."""
    log_score = torch.linspace(-1, 1, process.dim).repeat(20_000, 1)
    log_score[:, -1] = 0
    x_t, step = torch.full((20_000,), process.dim - 1), torch.full((20_000,), 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = functools.partial(kernel_step, kind=kind)
        mine, theirs = (f(log_score, x_t, step, process).bincount(minlength=process.dim) for f in (kernel, function))
    torch.testing.assert_close(theirs / 20_000, mine / 20_000, rtol=0, atol=0.02)


def _step(kind: str, case: Case) -> Run:
    i = case.inputs
    x, x_t, step = i.log_score, i.x_t, i.step[kind]
    if case.contestant == "limit":
        return plain_read(x)
    if case.contestant == "kernel":
        return lambda: kernel_step(x, x_t, step, i.process, kind)
    dense = functools.partial(dense_step, kind=kind)
    function = RELEASED[kind] if case.contestant == "released" else dense
    _same_draws(kind, function, PROCESSES[case.process](6))
    if case.contestant == "compiled":
        function = compiled(dense, case)
    return lambda: function(x, x_t, step, i.process)


def tweedie(case: Case) -> Run:
    return _step("tweedie", case)


def euler(case: Case) -> Run:
    return _step("euler", case)


def _bytes(case: Case) -> int:
    """Log-scores; x_t, the step in float64 and the new token."""
    return case.rows * (case.n * case.itemsize + 24)


@pytest.mark.parametrize("case", operator_cases(PEERS), ids=str)
def test_tweedie(race: Race, case: Case) -> None:
    race(TWEEDIE, case, tweedie, _bytes(case))


@pytest.mark.parametrize("case", operator_cases(PEERS), ids=str)
def test_euler(race: Race, case: Case) -> None:
    race(EULER, case, euler, _bytes(case))


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_linear_tweedie(race: Race, case: Case) -> None:
    race(TWEEDIE, case, tweedie, _bytes(case), group="linearity: " + TWEEDIE)
