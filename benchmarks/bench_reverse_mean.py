"""Reverse steps from a mean prediction: one token a row from the posterior and from the Euler step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import (
    MEAN_EULER,
    MEAN_TWEEDIE,
    PROCESSES,
    Case,
    Race,
    Run,
    compiled,
    linear_cases,
    operator_cases,
    plain_read,
)
from torch import Tensor

from sedd_ext import Euler, RankOne, Tweedie, reverse_sample

Step = Callable[[Tensor, Tensor, Tensor, RankOne], Tensor]
PART = 0.5
"""The size of a step in units of σ̄."""


def kernel_step(logits: Tensor, x_t: Tensor, sigma: Tensor, process: RankOne, kind: str) -> Tensor:
    step = Tweedie(PART * sigma) if kind == "tweedie" else Euler(PART * sigma)
    return reverse_sample(logits, x_t, step, process, parameterization="mean", sigma=sigma)


def dense_step(logits: Tensor, x_t: Tensor, sigma: Tensor, process: RankOne, kind: str) -> Tensor:
    """Plain PyTorch at its best: a softmax, one random number a row, inverse CDF; of float32 sums."""
    size, n, u = PART * sigma, process.dim, torch.rand_like(sigma)
    a, b = torch.exp(-sigma), -torch.expm1(-sigma)
    if process.family == "absorbing":
        top = logits[:, :-1].amax(-1, keepdim=True)
        cumulative = (logits[:, :-1] - top).exp().cumsum(-1)
        leave = -torch.expm1(-size) * torch.exp(size - sigma) / b if kind == "tweedie" else (size * a / b).clamp(max=1)
        found = torch.searchsorted(cumulative, (u / leave)[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        return torch.where((x_t == n - 1) & (u < leave), found.clamp(max=n - 2), x_t)
    mu, at_x = logits.softmax(-1), x_t[:, None]
    mu_x, here = mu.gather(-1, at_x), (a + b / n)[:, None]
    alpha = 1 - mu_x * a[:, None] / here
    if kind == "tweedie":
        a_s, b_s = torch.exp(size - sigma)[:, None], -torch.expm1(size - sigma)[:, None]
        a_d, b_d = torch.exp(-size)[:, None], -torch.expm1(-size)[:, None]
        weights = (b_d / b[:, None]) * (a_s * mu + b_s * alpha / n)
        stay = (a_d + b_d / n) * (a_s * mu_x / here + b_s * alpha / b[:, None])
    else:
        weights = size[:, None] * (alpha / n + (a / b)[:, None] * mu)
        stay = (1 - weights.sum(-1, keepdim=True) + weights.gather(-1, at_x)).clamp(min=0)
    cumulative = weights.scatter(-1, at_x, stay).cumsum(-1)
    found = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return found.clamp(max=n - 1)


def _same_draws(kind: str, function: Step, process: RankOne) -> None:
    """A race between different laws would mean nothing: frequencies of 20,000 draws, known to within 0.0035."""
    logits = torch.linspace(-1, 1, process.dim).repeat(20_000, 1)
    x_t, sigma = torch.full((20_000,), process.dim - 1), torch.full((20_000,), 0.7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = functools.partial(kernel_step, kind=kind)
        mine, theirs = (f(logits, x_t, sigma, process).bincount(minlength=process.dim) for f in (kernel, function))
    torch.testing.assert_close(theirs / 20_000, mine / 20_000, rtol=0, atol=0.02)


def _step(kind: str, case: Case) -> Run:
    i = case.inputs
    logits, x_t, sigma = i.log_score, i.x_t, i.sigma
    if case.contestant == "limit":
        return plain_read(logits)
    if case.contestant == "kernel":
        return lambda: kernel_step(logits, x_t, sigma, i.process, kind)
    dense = functools.partial(dense_step, kind=kind)
    _same_draws(kind, dense, PROCESSES[case.process](6))
    function = compiled(dense, case) if case.contestant == "compiled" else dense
    return lambda: function(logits, x_t, sigma, i.process)


def tweedie(case: Case) -> Run:
    return _step("tweedie", case)


def euler(case: Case) -> Run:
    return _step("euler", case)


def _bytes(case: Case) -> int:
    """Logits; x_t, σ̄ and the step in float64 and the new token."""
    return case.rows * (case.n * case.itemsize + 32)


@pytest.mark.parametrize("case", operator_cases(("dense", "compiled")), ids=str)
def test_tweedie(race: Race, case: Case) -> None:
    race(MEAN_TWEEDIE, case, tweedie, _bytes(case))


@pytest.mark.parametrize("case", operator_cases(("dense", "compiled")), ids=str)
def test_euler(race: Race, case: Case) -> None:
    race(MEAN_EULER, case, euler, _bytes(case))


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_linear_tweedie(race: Race, case: Case) -> None:
    race(MEAN_TWEEDIE, case, tweedie, _bytes(case), group="linearity: " + MEAN_TWEEDIE)
