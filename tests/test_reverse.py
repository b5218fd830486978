"""Reverse steps: Tweedie and Euler, their probabilities and their samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from backends import Backend, reverse_probs, reverse_sample, to_device
from explicit import (
    PROCESSES,
    bad_rows,
    chi_square,
    exponent_error,
    generator_matrix,
    largest_error,
    random_log_score,
    random_rows,
    rare_or_not,
    rare_tokens,
    transition_matrix,
    true_log_score,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sedd_ext import Absorbing, Euler, Hybrid, RankOne, Tweedie, Uniform, reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]


StepOf = Callable[..., Tweedie | Euler]
"""A step from its noise."""
both_steps = pytest.mark.parametrize("step", [Tweedie, Euler], ids=["tweedie", "euler"])

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}


def term_scale(log_score: Tensor, x: Tensor, size: Tensor, process: RankOne, step: StepOf) -> Tensor:
    """How large the terms are whose differences become the weights, in units of the total weight. [rows, N]"""
    here = torch.arange(process.dim) == x[:, None]
    pi = process.stationary
    live = (pi[x] > 0)[:, None]
    score = torch.where(here, 1.0, log_score.double().exp() * live)
    size = size.double()[:, None]
    if step is Euler:
        leave = (size * pi[x][:, None] * score).masked_fill(here, 0.0)
        stay, terms = 1 - leave.sum(-1, keepdim=True), leave
        weights = torch.where(here, stay.clamp(min=0), leave)
        terms = torch.where(here, 1 + leave.sum(-1, keepdim=True), leave)
    else:
        gain, loss = size.exp() * score, torch.expm1(size) * pi * score.sum(-1, keepdim=True)
        row = here * torch.exp(-size) - torch.expm1(-size) * pi[x][:, None]
        weights, terms = (gain - loss).clamp(min=0) * row, (gain + loss) * row
    return terms / weights.sum(-1, keepdim=True)


def check_accuracy(
    step: StepOf,
    log_score: Tensor,
    x: Tensor,
    size: Tensor,
    process: RankOne,
    *,
    largest: float = 0.0,
    **options: object,
) -> None:
    exact = reference.reverse_probs(log_score.double(), x, step(size), process, **options)
    plain = reference.reverse_probs(log_score, x, step(size), process, **options)
    shift = options.get("log_score_shift")
    shifted = log_score.double() - shift[:, None] if isinstance(shift, Tensor) else log_score
    scale = term_scale(shifted, x, size, process, step)
    bound = BOUND[log_score.dtype] + exponent_error(log_score.dtype, largest)
    allowed = largest_error(plain, exact, scale) + bound
    result = reverse_probs(log_score, x, step(size), process, **options)
    assert result.dtype == (torch.float64 if log_score.dtype == torch.float64 else torch.float32)
    assert largest_error(result, exact, scale) <= allowed
    torch.testing.assert_close(
        result.sum(-1), torch.ones(len(x), dtype=result.dtype), rtol=0, atol=BOUND[log_score.dtype]
    )


def step_sizes(count: int) -> Tensor:
    return torch.logspace(-4, 0.5, count, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- probabilities


@every_variant
@both_steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 17, 27, 1025, 4099, 50258])
def test_probs(process_of: Process, step: StepOf, n: int, dtype: torch.dtype) -> None:
    process, count = process_of(n), 3 if n > 10_000 else 24
    x = random_rows(process, count).x_t
    check_accuracy(step, random_log_score((count, n), dtype), x, step_sizes(count), process)


@both_steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probs_with_shift(process_of: Process, step: StepOf, dtype: torch.dtype) -> None:
    process = process_of(1025)
    x, shift = random_rows(process, 24).x_t, random_log_score((24,), torch.float64, seed=2, spread=4.0)
    check_accuracy(step, random_log_score((24, 1025), dtype), x, step_sizes(24), process, log_score_shift=shift)


@every_variant
@both_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_peaky_log_scores(process_of: Process, step: StepOf, dtype: torch.dtype) -> None:
    process = process_of(1025)
    log_score = 80 * (2 * torch.rand(24, 1025, generator=torch.Generator().manual_seed(4)) - 1)
    check_accuracy(step, log_score.to(dtype), random_rows(process, 24).x_t, step_sizes(24), process, largest=80.0)


@given(
    st.sampled_from(sorted(PROCESSES)),
    st.integers(2, 30),
    st.floats(0.1, 5.0),
    st.floats(0.01, 0.9),
    st.integers(0, 2**31),
)
def test_tweedie_with_the_true_score_is_the_posterior(name: str, n: int, sigma: float, part: float, seed: int) -> None:
    """p(x_s | x_t) by Bayes from matrix exponentials, for any data distribution."""
    process, dsigma = PROCESSES[name](n), sigma * part
    p_0 = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    p_0 /= p_0.sum()
    p_s, p_t = transition_matrix(process, sigma - dsigma) @ p_0, transition_matrix(process, sigma) @ p_0
    posterior = transition_matrix(process, dsigma) * p_s / p_t[:, None]
    probs = reverse_probs(
        true_log_score(process, p_0, torch.arange(n), sigma), torch.arange(n), Tweedie(dsigma), process
    )
    torch.testing.assert_close(probs, posterior, rtol=1e-9, atol=1e-12)


EQUAL = {
    "256": Uniform(256),
    "300": Uniform(300),
    "50258": Uniform(50258),
    "vector": RankOne(torch.tensor([0.5, 0.25, 0.125, 0.125])),
}


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EQUAL)
def test_equal_scores(name: str, dtype: torch.dtype) -> None:
    """Data that have reached π: p(y) = p(y | x), of weights that are e^{-Δ} of the terms they are differences of."""
    process = EQUAL[name]
    dsigma = torch.tensor([1e-3, 1.0, 10.0, 17.0, 18.0, 40.0, 100.0, 800.0], dtype=torch.float64)
    x = torch.arange(8) % process.dim
    log_score = (process.stationary.log() - process.stationary[x].log()[:, None]).to(dtype)
    # log 2 has no exact number: at steps beyond these its rounding is more than e^{-Δ}
    exact = 3 if dtype in (torch.float32, torch.float64) else 1
    rows = slice(0, exact if name == "vector" else 8)
    probs = reverse_probs(log_score[rows], x[rows], Tweedie(dsigma[rows]), process)
    expected = reference.transition_column(x, dsigma, process)[rows]
    # a lane of the baseline adds up 512 equal numbers in float32, each time rounded the same way: up to 512 * 2^-25
    tolerance = 5e-3 if name == "vector" else 3e-5
    torch.testing.assert_close(probs.double(), expected, rtol=tolerance, atol=1e-9)


def test_samples_of_equal_scores(backend: Backend) -> None:
    process, draws = Uniform(300), backend.draws(20_000)
    log_score, x = torch.zeros(draws, 300), torch.full((draws,), 7)
    drawn = reverse_sample(log_score, x, Tweedie(40.0), process, generator=torch.Generator().manual_seed(0))
    assert chi_square(drawn.bincount(minlength=300), process.stationary) > 1e-3


@given(st.sampled_from(sorted(PROCESSES)), st.integers(2, 30), st.floats(1e-6, 1e-4), st.integers(0, 2**31))
def test_small_steps_agree(name: str, n: int, size: float, seed: int) -> None:
    """Both steps are I + size · (reverse rate) to first order."""
    process, x = PROCESSES[name](n), torch.arange(n)
    log_score = random_log_score((n, n), torch.float64, seed, spread=0.5)
    rate = log_score.exp() * generator_matrix(process)
    rate[x, x] = 0.0
    rate[x, x] = -rate.sum(-1)
    first_order = torch.eye(n, dtype=torch.float64) + size * rate
    for step in (Euler, Tweedie):
        error = (reverse_probs(log_score, x, step(size), process) - first_order).abs().max()
        assert error <= 10 * (size * rate.abs().max()) ** 2


@both_steps
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_stands_at_x_does_not_matter(process_of: Process, step: StepOf, value: float) -> None:
    process = process_of(37)
    x = random_rows(process, 48).x_t
    clean = random_log_score((48, 37), torch.float32).scatter(-1, x[:, None], 0.0)
    dirty = clean.scatter(-1, x[:, None], value)
    assert torch.equal(reverse_probs(dirty, x, step(0.1), process), reverse_probs(clean, x, step(0.1), process))
    drawn = [
        reverse_sample(v, x, step(0.1), process, generator=torch.Generator().manual_seed(0)) for v in (clean, dirty)
    ]
    assert torch.equal(*drawn)


@both_steps
@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_cannot_move_stay(step: StepOf, dtype: torch.dtype, denoise: bool) -> None:
    """Unmasked positions of absorbing diffusion, whatever their log-scores are."""
    process, x = Absorbing(37), torch.arange(37)
    for filling in (1.0, float("nan"), float("inf"), -float("inf")):
        log_score = torch.full((37, 38), filling, dtype=dtype)
        probs = reverse_probs(log_score, x, step(0.5), process, denoise=denoise)
        assert torch.equal(probs, torch.eye(37, 38, dtype=probs.dtype))
        assert torch.equal(reverse_sample(log_score, x, step(0.5), process, denoise=denoise), x)


@both_steps
@pytest.mark.parametrize("process", [Absorbing(26), Hybrid(26, 0.3)], ids=["absorbing", "hybrid"])
def test_denoising_never_returns_the_mask(step: StepOf, process: RankOne) -> None:
    x = random_rows(process, 200).x_t
    log_score = random_log_score((200, 27), torch.float32)
    probs = reverse_probs(log_score, x, step(1e-3), process, denoise=True)
    assert (probs[:, process.mask_id] == 0).all()
    exact = reference.reverse_probs(log_score.double(), x, step(1e-3), process, denoise=True)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-7)
    drawn = reverse_sample(log_score.repeat(100, 1), x.repeat(100), step(1e-3), process, denoise=True)
    assert (drawn != process.mask_id).all()


@both_steps
def test_denoising_changes_nothing_where_there_is_no_mask(step: StepOf) -> None:
    process, x = Uniform(27), torch.arange(27)
    log_score = random_log_score((27, 27), torch.float32)
    last, usual = (reverse_probs(log_score, x, step(0.1), process, denoise=d) for d in (True, False))
    assert torch.equal(last, usual)


@both_steps
def test_forbidden_tokens(process_of: Process, step: StepOf) -> None:
    """A log-score of -∞ takes a token out (constrained decoding)."""
    process = process_of(38)
    x = torch.full((20_000,), 37)
    log_score = random_log_score((38,), torch.float32)
    log_score[1:30] = -math.inf
    assert (reverse_probs(log_score, x[0], step(0.3), process)[1:30] == 0).all()
    drawn = reverse_sample(
        log_score.repeat(20_000, 1), x, step(0.3), process, generator=torch.Generator().manual_seed(0)
    )
    assert not ((drawn >= 1) & (drawn < 30)).any()


@every_variant
@both_steps
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_rows_without_a_distribution_are_refused(
    backend: Backend, process_of: Process, step: StepOf, value: float
) -> None:
    process, x = process_of(38), torch.full((3,), 37)
    log_score = random_log_score((3, 38), torch.float32)
    log_score[1, 5] = value
    for operator in (reverse_probs, reverse_sample):
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match=r"log_score: .*index \[1\]"):
                operator(log_score, x, step(0.3), process)
        else:
            assert bad_rows(operator(log_score, x, step(0.3), process)) == [1]


@both_steps
def test_denoising_with_nothing_left_is_refused(backend: Backend, step: StepOf) -> None:
    process, x = Absorbing(6), torch.full((2,), 6)
    log_score = torch.full((2, 7), -math.inf)
    log_score[1, 3] = 0.0
    for operator in (reverse_probs, reverse_sample):
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match="log_score"):
                operator(log_score, x, step(0.3), process, denoise=True)
        else:
            assert bad_rows(operator(log_score, x, step(0.3), process, denoise=True)) == [0]


# ----------------------------------------------------------------------------------------------------------- shapes


@both_steps
def test_batches_and_broadcasting(process_of: Process, step: StepOf) -> None:
    process = process_of(11)
    log_score, x = random_log_score((4, 6, 11), torch.float32), random_rows(process, 24).x_t.view(4, 6)
    size = torch.tensor([[1e-3], [0.1], [0.5], [2.0]])
    probs = reverse_probs(log_score, x, step(size), process)
    assert probs.shape == (4, 6, 11)
    assert torch.equal(probs[2, 3], reverse_probs(log_score[2, 3], x[2, 3], step(size[2, 0]), process))
    shifted = reverse_probs(log_score, x, step(size), process, log_score_shift=torch.full((6,), 0.5))
    assert torch.equal(shifted, reverse_probs(log_score, x, step(size), process, log_score_shift=0.5))
    tokens = reverse_sample(log_score, x, step(size), process)
    assert tokens.shape == (4, 6)
    assert tokens.dtype == torch.int64
    assert reverse_sample(log_score[0, 0], x[0, 0], step(0.1), process).shape == ()
    assert reverse_sample(log_score[:, :0], x[:, :0], step(0.1), process).shape == (4, 0)
    assert reverse_probs(log_score[:, :0], x[:, :0], step(0.1), process).shape == (4, 0, 11)


@both_steps
def test_strided_inputs(process_of: Process, step: StepOf) -> None:
    process = process_of(27)
    log_score, x = random_log_score((27, 24), torch.float32).T, random_rows(process, 48).x_t[::2]
    assert torch.equal(
        reverse_probs(log_score, x, step(0.1), process),
        reverse_probs(log_score.contiguous(), x.contiguous(), step(0.1), process),
    )
    one, two = (
        reverse_sample(v, x, step(0.1), process, generator=torch.Generator().manual_seed(0))
        for v in (log_score, log_score.contiguous())
    )
    assert torch.equal(one, two)


# ---------------------------------------------------------------------------------------------------------- samples


@both_steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_follow_the_probabilities(
    backend: Backend, process_of: Process, step: StepOf, dtype: torch.dtype
) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    log_score = random_log_score((27,), dtype)
    generator = torch.Generator().manual_seed(0)
    for x in (4, 26):  # of absorbing diffusion only the second can move
        drawn = reverse_sample(
            log_score.repeat(draws, 1), torch.full((draws,), x), step(0.2), process, generator=generator
        )
        probs = reference.reverse_probs(log_score.double(), torch.tensor(x), step(0.2), process)
        counts = drawn.bincount(minlength=27)
        if (probs == 1).any():
            assert int(counts[probs == 1]) == draws
        else:
            assert chi_square(counts, probs) > 1e-3


@pytest.mark.operators("cpu", "cuda")
@both_steps
def test_samples_of_a_large_vocabulary(backend: Backend, process_of: Process, step: StepOf) -> None:
    """50,258 tokens whose frequencies fall like 1/rank: 2,000 draws, pooled by how rare the tokens are."""
    process, draws = process_of(50258), backend.draws(2000)
    ranks = torch.randperm(50257, generator=torch.Generator().manual_seed(0)) + 1.0
    log_score = torch.cat([-ranks.log() - math.log(math.log(50257)), torch.zeros(1)])
    if process.family != "absorbing":
        log_score -= process.stationary[-1].log().float()
    rows, x = log_score.repeat(100, 1), torch.full((100,), 50257)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([reverse_sample(rows, x, step(0.5), process, generator=generator) for _ in range(draws // 100)])
    probs = reference.reverse_probs(log_score.double(), x[0], step(0.5), process)
    assert chi_square(drawn.bincount(minlength=50258), probs) > 1e-3


@both_steps
@pytest.mark.operators("cpu", "cuda")  # the emulation draws the CPU's tokens, see test_cuda_kernels.py
def test_rare_tokens_get_their_share(step: StepOf, threads: Callable[[int], None]) -> None:
    """A small step from a MASK that mostly stays. See test_peers.py for a sampler that fails this."""
    threads(1)  # many small calls
    process, size, wanted = Absorbing(4096), 0.002, rare_tokens()
    log_score = (wanted / (math.expm1(size) if step is Tweedie else size)).log().float()
    probs = reference.reverse_probs(log_score.double(), torch.tensor(4096), step(size), process)
    rows, x, generator = log_score.repeat(250, 1), torch.full((250,), 4096), torch.Generator().manual_seed(0)
    drawn = [reverse_sample(rows, x, step(size), process, generator=generator) for _ in range(1600)]
    counts = torch.cat(drawn).bincount(minlength=4097)
    assert chi_square(counts, probs) > 0.01
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) > 0.01


@every_variant
@both_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_generator_same_tokens(
    process_of: Process, step: StepOf, threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    process = process_of(1025)
    x, log_score = random_rows(process, 97).x_t, random_log_score((97, 1025), dtype)
    results = []
    for count in (1, 2):
        threads(count)
        generator = torch.Generator().manual_seed(11)
        tokens = [reverse_sample(log_score, x, step(0.5), process, generator=generator) for _ in range(2)]
        results.append((*tokens, reverse_probs(log_score, x, step(0.5), process)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.costly("csrc", "sedd_ext")
def test_more_than_two_to_the_31_elements() -> None:
    """43,000 rows of which one is masked: the others are never read, so that the system never provides their memory."""
    process, rows = Absorbing(50257), 43_000
    log_score = torch.empty(rows, 50258, dtype=torch.bfloat16)
    log_score[-1] = -math.inf
    log_score[-1, 1234] = 0.0
    x = torch.zeros(rows, dtype=torch.int64)
    x[-1] = process.mask_id
    drawn = reverse_sample(log_score, x, Tweedie(0.5), process, denoise=True)
    assert int(drawn[-1]) == 1234
    assert not drawn[:-1].any()


@both_steps
def test_inputs_are_left_alone(process_of: Process, step: StepOf) -> None:
    process = process_of(27)
    x, log_score = random_rows(process, 24).x_t, random_log_score((24, 27), torch.float32)
    before = x.clone(), log_score.clone()
    reverse_probs(log_score, x, step(0.5), process, denoise=True)
    reverse_sample(log_score, x, step(0.5), process, denoise=True)
    assert torch.equal(x, before[0])
    assert torch.equal(log_score, before[1])


# --------------------------------------------------------------------------------------------------------- operator


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("kind", ["tweedie", "euler"])
def test_opcheck(process_of: Process, kind: str) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    arguments = (
        random_log_score((24, 27), torch.float32),
        rows.x_t,
        rows.sigma,
        random_log_score((24,), torch.float64),
        process.stationary.float() if process.family == "rank_one" else None,
        process.family,
        kind,
        -1,
    )
    torch.library.opcheck(torch.ops.sedd_ext.reverse_probs, to_device(arguments))
    torch.library.opcheck(torch.ops.sedd_ext.reverse_sample, to_device((*arguments, torch.tensor([3]))))


@pytest.mark.operators("cpu", "cuda")
@both_steps
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(step: StepOf, name: str) -> None:
    torch.compiler.reset()  # one function compiled for every backend and process meets the limit of recompilations
    process = PROCESSES[name](27)
    rows = random_rows(process, 24)
    log_score, shift = random_log_score((24, 27), torch.float32), torch.full((24,), 0.5)
    for operator in (reverse_probs, reverse_sample):

        def call(log_score: Tensor, x: Tensor, size: Tensor, operator: Callable[..., Tensor] = operator) -> Tensor:
            return operator(2 * log_score, x, step(size), process, log_score_shift=shift) + 1

        results = []
        with torch.random.fork_rng():
            for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
                torch.manual_seed(5)
                results.append(function(log_score, rows.x_t, rows.sigma))
        assert torch.equal(*results)
