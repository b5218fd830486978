"""Tokens and statistics of positions: one token a row from softmax(logits), its confidence, margin and entropy."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import UNMASK, UNMASK_NUCLEUS, Case, Race, Run, compiled, linear_cases, operator_cases, plain_read
from torch import Tensor

from sedd_ext import unmask


def kernel(logits: Tensor, top_p: float) -> tuple[Tensor, ...]:
    found = unmask(logits, mask_id=logits.shape[-1] - 1, top_p=top_p)
    return tuple(value for value in found if value is not None)


def dense(logits: Tensor, top_p: float) -> tuple[Tensor, ...]:
    """Plain PyTorch at its best: a softmax, the two largest, one random number a row, inverse CDF; of float32 sums."""
    logits = logits[:, :-1].float()
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    two, which = probs.topk(2, -1)
    entropy = -(probs * log_probs).sum(-1)
    weights, entries = probs, None
    if top_p < 1.0:
        weights, entries = probs.sort(-1, descending=True)
        weights = torch.where(weights.cumsum(-1) - weights < top_p, weights, 0.0)
    cumulative = weights.cumsum(-1)
    target = torch.rand_like(entropy)[:, None] * cumulative[:, -1:]
    at = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    token = (at if entries is None else entries.gather(-1, at))[:, 0]
    log_prob = log_probs.gather(-1, token[:, None])[:, 0]
    return token, which[:, 0], log_prob, two[:, 0], two[:, 0] - two[:, 1], entropy


@functools.cache
def _check_same(top_p: float) -> None:
    """A race between different results would mean nothing: frequencies of 20,000 draws, known to within 0.0035."""
    logits = torch.linspace(-1, 1, 6).repeat(20_000, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine, theirs = (f(logits, top_p) for f in (kernel, dense))
    shares = [tokens.bincount(minlength=6) / 20_000 for tokens in (mine[0], theirs[0])]
    torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0.02)
    for a, b in zip([mine[1], *mine[3:]], [theirs[1], *theirs[3:]], strict=True):
        torch.testing.assert_close(a, b)


def _unmask(case: Case, top_p: float) -> Run:
    logits = case.inputs.log_score
    if case.contestant == "limit":
        return plain_read(logits)
    _check_same(top_p)
    function = kernel if case.contestant == "kernel" else dense
    function = compiled(function, case) if case.contestant == "compiled" else function
    return lambda: function(logits, top_p)


def plain(case: Case) -> Run:
    return _unmask(case, 1.0)


def nucleus(case: Case) -> Run:
    return _unmask(case, 0.9)


def _bytes(case: Case) -> int:
    """Logits; two tokens and four statistics in float64."""
    return case.rows * (case.n * case.itemsize + 48)


def _cases(*peers: str) -> list[Case]:
    """The process does not matter."""
    return [case for case in operator_cases(peers) if case.process == "absorbing"]


@pytest.mark.parametrize("case", _cases("dense", "compiled"), ids=str)
def test_unmask(race: Race, case: Case) -> None:
    race(UNMASK, case, plain, _bytes(case))


@pytest.mark.parametrize("case", _cases("dense"), ids=str)
def test_unmask_nucleus(race: Race, case: Case) -> None:
    race(UNMASK_NUCLEUS, case, nucleus, _bytes(case))


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_unmask_is_linear(race: Race, case: Case) -> None:
    race(UNMASK, case, plain, _bytes(case), group="linearity: " + UNMASK)
