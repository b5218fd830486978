"""Columns, rows and samples of exp(σQ)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from backends import sample_transition, to_device, transition_column, transition_row
from explicit import PROCESSES, chi_square, random_rows, transition_matrix
from hypothesis import given
from hypothesis import strategies as st

from sedd_ext import Absorbing, RankOne, Uniform, reference

pytestmark = pytest.mark.operators

Process = Callable[[int], RankOne]

OPERATORS = {
    "column": (transition_column, reference.transition_column),
    "row": (transition_row, reference.transition_row),
}
names = st.sampled_from(sorted(PROCESSES))


@pytest.mark.every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 3, 27, 1025, 50258])
@pytest.mark.parametrize("which", OPERATORS)
def test_against_reference(process_of: Process, which: str, n: int, dtype: torch.dtype) -> None:
    operator, plain = OPERATORS[which]
    process = process_of(n)
    rows = random_rows(process, 6)
    sigma = rows.sigma.to(dtype)
    result = operator(rows.x_0, sigma, process)
    assert result.dtype == dtype
    exact = plain(rows.x_0, sigma.double(), process)
    rounding = (
        1e-15 if dtype == torch.float64 else 2e-7
    )  # every entry is a sum of two terms: relative error, not absolute
    torch.testing.assert_close(result.double(), exact, rtol=rounding, atol=0)


@pytest.mark.parametrize("sigma", [1e-4, 0.3, 2.0, 9.0])
def test_against_matrices(process_of: Process, sigma: float) -> None:
    process, tokens = process_of(7), torch.arange(7)
    matrix, given_sigma = transition_matrix(process, sigma), torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(transition_column(tokens, given_sigma, process), matrix.T, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(transition_row(tokens, given_sigma, process), matrix, rtol=1e-12, atol=1e-15)


@given(names, st.integers(2, 40), st.floats(1e-6, 30.0))
def test_columns_sum_to_one(name: str, n: int, sigma: float) -> None:
    columns = transition_column(torch.arange(n), torch.tensor(sigma, dtype=torch.float64), PROCESSES[name](n))
    assert (columns >= 0).all()
    torch.testing.assert_close(columns.sum(-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-14)


@given(names, st.integers(2, 40), st.floats(1e-6, 10.0), st.floats(1e-6, 10.0))
def test_semigroup(name: str, n: int, first: float, second: float) -> None:
    """exp(σ₁Q) exp(σ₂Q) = exp((σ₁+σ₂)Q)."""
    process, tokens = PROCESSES[name](n), torch.arange(n)
    one, two, both = (
        transition_column(tokens, torch.tensor(s, dtype=torch.float64), process).T
        for s in (first, second, first + second)
    )
    torch.testing.assert_close(one @ two, both, rtol=1e-13, atol=1e-15)


@given(names, st.integers(2, 40), st.floats(1e-6, 10.0))
def test_rows_are_the_columns_read_across(name: str, n: int, sigma: float) -> None:
    process, tokens = PROCESSES[name](n), torch.arange(n)
    given_sigma = torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(
        transition_row(tokens, given_sigma, process),
        transition_column(tokens, given_sigma, process).T,
        rtol=1e-15,
        atol=0,
    )


@pytest.mark.parametrize("operator", [transition_column, transition_row])
def test_shapes_and_dtypes(process_of: Process, operator: Callable[..., torch.Tensor]) -> None:
    process = process_of(11)
    tokens = torch.arange(8).view(2, 4)
    per_row = operator(tokens, torch.tensor([[0.5], [2.0]]), process)
    assert per_row.shape == (2, 4, 11)
    assert per_row.dtype == torch.float32
    assert torch.equal(per_row[1, 2], operator(torch.tensor(6), 2.0, process))
    assert operator(tokens, 0.5, process).dtype == torch.float32
    assert operator(tokens[:, :0], 0.5, process).shape == (2, 0, 11)
    strided = torch.arange(16).view(2, 8)[:, ::2] % 11
    assert torch.equal(operator(strided, 0.5, process), operator(strided.contiguous(), 0.5, process))


# ---------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("sigma", [0.05, 3.0])
def test_samples_follow_the_column(process_of: Process, sigma: float) -> None:
    process, draws = process_of(27), 500_000
    tokens = sample_transition(torch.full((draws,), 4), sigma, process, generator=torch.Generator().manual_seed(0))
    column = reference.transition_column(torch.tensor(4), torch.tensor(sigma, dtype=torch.float64), process)
    assert chi_square(tokens.bincount(minlength=27), column) > 1e-3


def test_rare_tokens_get_their_share() -> None:
    """A thousand tokens of 1e-9 to 1e-5 each, drawn four million times, pooled by how rare they are."""
    rare = torch.logspace(-9, -5, 1000, dtype=torch.float64)
    process = RankOne(torch.cat([rare, (1 - rare.sum())[None]]))
    draws = torch.full((4_000_000,), 1000)
    tokens = sample_transition(draws, 1.0, process, generator=torch.Generator().manual_seed(0))
    column = reference.transition_column(torch.tensor(1000), torch.tensor(1.0).double(), process)
    assert chi_square(tokens.bincount(minlength=1001), column) > 1e-3


def test_every_token_of_a_large_vocabulary() -> None:
    process = Uniform(50258)
    draws = torch.full((2_000_000,), 7)
    tokens = sample_transition(draws, 2.0, process, generator=torch.Generator().manual_seed(0))
    column = reference.transition_column(torch.tensor(7), torch.tensor(2.0).double(), process)
    assert chi_square(tokens.bincount(minlength=50258), column) > 1e-3


def test_the_random_numbers_have_more_bits_than_float32() -> None:
    """The low byte of a token out of 2^48: 24 random bits would leave it 0."""
    tokens = sample_transition(
        torch.zeros(200_000).long(), 60.0, Uniform(2**48), generator=torch.Generator().manual_seed(0)
    )
    assert chi_square((tokens & 255).bincount(minlength=256), torch.full((256,), 1 / 256)) > 1e-3
    assert chi_square((tokens >> 40).bincount(minlength=256), torch.full((256,), 1 / 256)) > 1e-3


def test_positions_are_independent() -> None:
    """Neighbouring positions of one call, and the same position of two calls, move independently of each other."""
    process, generator = Absorbing(1), torch.Generator().manual_seed(0)
    first, second = (
        sample_transition(torch.zeros(400_000).long(), 0.7, process, generator=generator) for _ in range(2)
    )
    moved = 1 - torch.exp(torch.tensor(-0.7, dtype=torch.float64))
    pairs = torch.stack([(1 - moved) ** 2, moved * (1 - moved), moved * (1 - moved), moved**2])
    for a, b in ((first[::2], first[1::2]), (first, second)):
        assert chi_square((a + 2 * b).bincount(minlength=4), pairs) > 1e-3


def test_each_position_has_its_own_sigma() -> None:
    process = Absorbing(5)
    sigma = torch.tensor([[1e-9], [40.0]])
    tokens = sample_transition(torch.zeros(2, 1000, dtype=torch.int64), sigma, process)
    assert tokens.shape == (2, 1000)
    assert tokens.dtype == torch.int64
    assert (tokens[0] == 0).all()
    assert (tokens[1] == process.mask_id).all()


def test_same_generator_same_tokens(process_of: Process, threads: Callable[[int], None]) -> None:
    process = process_of(1025)
    x_0 = random_rows(process, 5000).x_0
    drawn = []
    for count in (1, 2):
        threads(count)
        generator = torch.Generator().manual_seed(11)
        drawn.append([sample_transition(x_0, 1.0, process, generator=generator) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    if process.family != "absorbing":
        assert not torch.equal(drawn[0][0], drawn[0][1])


def test_parts_of_a_batch_have_the_numbers_of_the_whole(process_of: Process) -> None:
    process = process_of(1025)
    x_0 = random_rows(process, 3000).x_0.view(30, 100)

    def drawn(rows: slice) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        return sample_transition(x_0[rows], 1.0, process, generator=generator, first_row=100 * rows.start)

    whole = drawn(slice(0, 30))
    parts = [drawn(slice(first, last)) for first, last in ((0, 7), (7, 8), (8, 30))]
    assert torch.equal(torch.cat(parts), whole)
    far = [drawn_far(process, 2**40 + offset) for offset in (0, 0, 1)]
    assert torch.equal(far[0], far[1])
    assert torch.equal(far[0][1:], far[2][:-1])


def drawn_far(process: RankOne, first_row: int) -> torch.Tensor:
    """1,000 times the first token, far inside a huge batch."""
    generator = torch.Generator().manual_seed(3)
    return sample_transition(torch.zeros(1000).long(), 1.0, process, generator=generator, first_row=first_row)


def test_the_default_generator_is_torchs() -> None:
    process, x_0 = Uniform(100), torch.zeros(200, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = sample_transition(x_0, 1.0, process)
        second = sample_transition(x_0, 1.0, process)
        torch.manual_seed(5)
        again = sample_transition(x_0, 1.0, process)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_draws_of_an_empty_batch_and_of_one_token() -> None:
    process = Uniform(10)
    assert sample_transition(torch.zeros(2, 0, dtype=torch.int64), 1.0, process).shape == (2, 0)
    assert sample_transition(torch.tensor(3), 1.0, process).shape == ()


def test_random_numbers_have_53_bits() -> None:
    """A vocabulary of 2^53 tokens shows them: every bit is one in half of the draws."""
    tokens = sample_transition(torch.zeros(4000).long(), 40.0, Uniform(2**53))
    ones = torch.stack([(tokens >> bit) & 1 for bit in range(53)]).sum(1)
    assert ((ones - 2000).abs() < 6 * math.sqrt(1000)).all(), ones.tolist()


# --------------------------------------------------------------------------------------------------------- operator


@pytest.mark.operators("cpu", "cuda")  # the emulation is no device of torch
def test_opcheck(process_of: Process) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    vector = process.family == "rank_one"
    for dtype in (torch.float32, torch.float64):
        stationary = process.stationary.to(dtype) if vector else None
        for operator in (torch.ops.sedd_ext.transition_column, torch.ops.sedd_ext.transition_row):
            arguments = (rows.x_0, rows.sigma, stationary, process.family, process.dim, dtype)
            torch.library.opcheck(operator, to_device(arguments))
    cumulative = process.cumulative if vector else None
    torch.library.opcheck(
        torch.ops.sedd_ext.sample_transition,
        to_device((rows.x_0, rows.sigma, cumulative, process.family, process.dim, torch.tensor([3]), 7)),
    )


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(name: str) -> None:
    torch.compiler.reset()  # one function compiled for every backend and process meets the limit of recompilations
    process = PROCESSES[name](27)
    rows = random_rows(process, 24)
    for operator in (transition_column, transition_row, sample_transition):

        def call(
            x: torch.Tensor, sigma: torch.Tensor, operator: Callable[..., torch.Tensor] = operator
        ) -> torch.Tensor:
            return operator(x, sigma, process) + 1

        results = []
        with torch.random.fork_rng():
            for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
                torch.manual_seed(5)
                results.append(function(rows.x_0, rows.sigma))
        assert torch.equal(*results)
