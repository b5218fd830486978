"""The head fused with score entropy and with the Tweedie step: against the unfused ones and the products alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import (
    HEAD_BENCH_ROWS,
    HEAD_ROWS,
    HEADS,
    LARGE,
    Case,
    Race,
    Run,
    compiled,
    fused_loss,
    fused_sample,
    smaller,
)
from memory import measure_memory
from peers import dense_score_entropy, released_analytic_step, released_score_entropy
from torch import Tensor

from sedd_ext import Tweedie, linear_reverse_sample, linear_score_entropy_loss, reverse_sample, score_entropy_loss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor


@functools.lru_cache(maxsize=2)
def head(d: int, rows: int, n: int, dtype: str) -> Head:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d, generator=generator)
    weight = torch.randn(n, d, generator=generator) / d**0.5
    tensors = (hidden, weight, torch.full((n,), -float(torch.tensor(float(n)).log())))
    return Head(*(tensor.to(getattr(torch, dtype)) for tensor in tensors))


def gradients(loss: Callable[[Head], Tensor], parts: Head) -> Run:
    leaves = Head(*(tensor.detach().requires_grad_() for tensor in parts))
    return lambda: torch.autograd.grad(loss(leaves), leaves)


def products(parts: Head) -> Run:
    """The limit: the three matrix products of head and gradients, into memory that is there."""
    hidden, weight, bias = parts
    scores = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.addmm(bias, hidden, weight.T, out=scores)
        torch.mm(scores, weight, out=hidden_gradient)
        torch.mm(scores.T, hidden, out=weight_gradient)

    return run


def loss(case: Case, d: int) -> Run:
    i, parts = case.inputs, head(d, case.rows, case.n, case.dtype)
    rows: tuple[Any, ...] = (i.x_t, i.x_0, i.sigma)

    def unfused(function: Callable[..., Tensor]) -> Callable[[Head], Tensor]:
        return lambda h: function(F.linear(*h), *rows, i.process).sum()

    match case.contestant:
        case "kernel":
            return gradients(lambda h: linear_score_entropy_loss(*h, *rows, i.process, reduction="sum"), parts)
        case "limit":
            return products(parts)
        case "unfused":
            return gradients(unfused(score_entropy_loss), parts)
        case "dense":
            return gradients(unfused(dense_score_entropy), parts)
        case "compiled":
            return gradients(compiled(unfused(dense_score_entropy), case), parts)
        case "released":
            return gradients(
                lambda h: released_score_entropy(F.linear(*h), i.sigma, i.x_t, i.x_0, i.process).sum(), parts
            )
    # what the same discipline costs for plain cross-entropy, in torch's own operator
    return gradients(lambda h: F.linear_cross_entropy(*h[:2], i.x_0, linear_bias=h.bias, reduction="sum"), parts)


def sample(case: Case, d: int) -> Run:
    i, parts = case.inputs, head(d, case.rows, case.n, case.dtype)
    step = i.step["tweedie"]
    match case.contestant:
        case "kernel":
            return lambda: linear_reverse_sample(*parts, i.x_t, Tweedie(step), i.process)
        case "limit":
            scores = torch.empty(len(parts.hidden), len(parts.weight), dtype=parts.hidden.dtype)
            return lambda: torch.addmm(parts.bias, parts.hidden, parts.weight.T, out=scores)
        case "unfused":
            return lambda: reverse_sample(F.linear(*parts), i.x_t, Tweedie(step), i.process)
    return lambda: released_analytic_step(F.linear(*parts).float(), i.x_t, step, i.process)


def _bytes(case: Case, d: int, passes: int) -> int:
    """Hidden states and weight, which the least read, once each in every pass."""
    return case.rows * passes * (d + case.n * d // case.rows) * case.itemsize


def cases(*peers: str) -> list[Case]:
    result = [
        Case("absorbing", LARGE, HEAD_BENCH_ROWS, dtype, who)
        for dtype in ("float32", "bfloat16")
        for who in ("kernel", "limit", *peers)
    ]
    return result + [Case(process, LARGE, HEAD_BENCH_ROWS, "float32", "kernel") for process in ("uniform", "hybrid")]


LOSS_PEERS = ("unfused", "dense", "compiled", "released") + (
    ("cross_entropy",) if hasattr(F, "linear_cross_entropy") else ()
)


@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize("case", cases(*LOSS_PEERS), ids=str)
def test_loss(race: Race, case: Case, d: int) -> None:
    race(fused_loss(d), case, functools.partial(loss, d=d), _bytes(case, d, 3))


@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize("case", cases("unfused", "released"), ids=str)
def test_sample(race: Race, case: Case, d: int) -> None:
    race(fused_sample(d), case, functools.partial(sample, d=d), _bytes(case, d, 1))


@pytest.mark.parametrize("contestant", ["kernel", "unfused"])
@pytest.mark.parametrize("rows", HEAD_ROWS)
def test_memory(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, rows: int, contestant: str) -> None:
    """Peak memory of loss and gradients, at d = 768."""
    case = Case("absorbing", LARGE, rows, "float32", contestant)
    case = smaller(case) if request.config.getoption("--smoke") else case
    measure_memory(benchmark, fused_loss(768), case, "bench_linear", "loss", d=768)
