"""The forward process: columns and rows of exp(σQ), and noised tokens."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COLUMN,
    FEW_ROWS,
    LARGE,
    PEERS,
    ROW,
    SAMPLE,
    SMALL,
    SMALL_ROWS,
    Case,
    Race,
    Run,
    compiled,
    operator_cases,
)
from torch import Tensor
from torch.nn.functional import one_hot

from sedd_ext import RankOne, sample_transition, transition_column, transition_row


def dense_probabilities(x: Tensor, sigma: Tensor, process: RankOne, column: bool) -> Tensor:
    """Plain PyTorch at its best: one fill, one scatter."""
    a, b = torch.exp(-sigma), -torch.expm1(-sigma)
    if process.family == "uniform":
        filled = (b / process.dim)[:, None].repeat(1, process.dim)
    elif column:
        filled = b.new_zeros(len(x), process.dim)
        filled[:, -1] = b
    else:
        filled = torch.where(x == process.dim - 1, b, 0.0)[:, None].repeat(1, process.dim)
    return filled.scatter_add_(-1, x[:, None], a[:, None])


def released_probabilities(x: Tensor, sigma: Tensor, process: RankOne, column: bool) -> Tensor:
    """``transition`` and ``transp_transition`` of the released code, restated; it has no absorbing column."""
    decay = torch.exp(-sigma)[:, None]
    if process.family == "absorbing":
        assert not column
        row = decay * one_hot(x, num_classes=process.dim)
        return row + torch.where(x == process.dim - 1, 1 - decay.squeeze(-1), 0.0)[:, None]
    filled = torch.ones(*x.shape, process.dim) * ((1 - decay) / process.dim)
    filled = filled.scatter(-1, x[:, None], torch.zeros_like(filled))
    return filled.scatter(-1, x[:, None], 1 - filled.sum(dim=-1, keepdim=True))


def released_sample(x_0: Tensor, sigma: Tensor, process: RankOne) -> Tensor:
    """``sample_transition`` of the released code, restated: the best that plain PyTorch does as well."""
    moved = torch.rand(x_0.shape) < 1 - torch.exp(-sigma)
    target = (
        torch.full_like(x_0, process.dim - 1) if process.family == "absorbing" else torch.randint_like(x_0, process.dim)
    )
    return torch.where(moved, target, x_0)


def _probabilities(case: Case, column: bool) -> Run:
    i = case.inputs
    x = i.x_0 if column else i.x_t
    if case.contestant == "limit":
        return lambda: torch.full((case.rows, case.n), 0.5)
    kernel = transition_column if column else transition_row
    if case.contestant == "kernel":
        return lambda: kernel(x, i.sigma, i.process)
    peer = released_probabilities if case.contestant == "released" else dense_probabilities
    if case.contestant == "compiled":
        peer = compiled(peer, case)
    torch.testing.assert_close(peer(x, i.sigma, i.process, column), kernel(x, i.sigma, i.process), rtol=1e-3, atol=1e-5)
    return lambda: peer(x, i.sigma, i.process, column)


def column(case: Case) -> Run:
    return _probabilities(case, column=True)


def row(case: Case) -> Run:
    return _probabilities(case, column=False)


def sample(case: Case) -> Run:
    i = case.inputs
    if case.contestant == "limit":
        return i.x_0.clone
    if case.contestant == "kernel":
        return lambda: sample_transition(i.x_0, i.sigma, i.process)
    peer = compiled(released_sample, case) if case.contestant == "compiled" else released_sample
    return lambda: peer(i.x_0, i.sigma, i.process)


def _probability_cases(column: bool) -> list[Case]:
    def takes_part(case: Case) -> bool:
        unknown = column and case.process == "absorbing" and case.contestant == "released"
        return case.dtype == "float32" and not unknown

    return [case for case in operator_cases(PEERS, beyond=False) if takes_part(case)]


def _sample_cases() -> list[Case]:
    result = []
    for n in (SMALL, LARGE):
        for process in ("absorbing", "uniform"):
            contestants = ("kernel", "limit", "released", "compiled")
            result += [Case(process, n, SMALL_ROWS, "float32", who) for who in contestants]
        result += [Case("hybrid", n, SMALL_ROWS, "float32", who) for who in ("kernel", "limit")]
    return result + [
        Case("absorbing", n, rows, "float32", who) for n, rows in FEW_ROWS for who in ("kernel", "released")
    ]


@pytest.mark.parametrize("case", _probability_cases(column=True), ids=str)
def test_column(race: Race, case: Case) -> None:
    race(COLUMN, case, column, case.rows * (4 * case.n + 16))


@pytest.mark.parametrize("case", _probability_cases(column=False), ids=str)
def test_row(race: Race, case: Case) -> None:
    race(ROW, case, row, case.rows * (4 * case.n + 16))


@pytest.mark.parametrize("case", _sample_cases(), ids=str)
def test_sample(race: Race, case: Case) -> None:
    race(SAMPLE, case, sample, case.rows * 24)
