"""Reverse steps from a mean prediction: the posterior, the Euler step, generalized masked diffusion, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, linear_reverse_sample, reverse_probs, reverse_sample, running_on, to_device
from explicit import (
    PROCESSES,
    bad_rows,
    chi_square,
    exponent_error,
    largest_error,
    random_log_score,
    random_rows,
    rare_or_not,
    rare_tokens,
    transition_matrix,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sedd_ext import Absorbing, Euler, GeneralizedMasked, Hybrid, RankOne, Tweedie, Uniform, reference
from sedd_ext.reverse_mean import mean_numbers
from sedd_ext.step import MeanStep

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}
STEPS: dict[str, Callable[[Tensor], MeanStep]] = {
    "tweedie": lambda sigma: Tweedie(0.3 * sigma),
    "last": Tweedie,
    "euler": lambda sigma: Euler(0.2 * sigma),
}
"""A step from σ̄."""
all_steps = pytest.mark.parametrize("kind", STEPS)


def options(sigma: Tensor | float | None, **others: Any) -> dict[str, Any]:
    return {"parameterization": "mean", "sigma": sigma, **others}


def without_mask(logits: Tensor, process: RankOne) -> Tensor:
    """μ in float64."""
    logits = logits.double().clone()
    if process.mask_id is not None:
        logits[..., process.mask_id] = -math.inf
    return logits.softmax(-1)


def powers(n: int) -> Tensor:
    return 0.2 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- probabilities


def check_accuracy(
    logits: Tensor, x: Tensor, step: MeanStep, process: RankOne, *, largest: float = 0.0, **given: Any
) -> None:
    """Relative to each probability where it is a normal number, as they are sums of terms above 0."""
    exact = reference.reverse_probs(logits.double(), x, step, process, **given)
    plain = reference.reverse_probs(logits, x, step, process, **given)
    result = reverse_probs(logits, x, step, process, **given)
    assert result.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    at_x = torch.arange(process.dim) == x[:, None]
    scale = torch.where(at_x, 1.0, exact) + (exact > 0).double() * (
        torch.finfo(result.dtype).tiny / BOUND[logits.dtype]
    )
    bound = BOUND[logits.dtype] + exponent_error(logits.dtype, largest)
    assert largest_error(result, exact, scale) <= largest_error(plain, exact, scale) + bound
    ones = torch.ones(len(x), dtype=result.dtype)
    torch.testing.assert_close(result.sum(-1), ones, rtol=0, atol=2 * BOUND[logits.dtype])


@every_variant
@all_steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 17, 27, 1000, 4099])
def test_probs(process_of: Process, kind: str, n: int, dtype: torch.dtype) -> None:
    process, count = process_of(n), 12 if n > 4000 else 24
    rows = random_rows(process, count)
    step = STEPS[kind](rows.sigma)
    for denoise in (False, True)[: n - 1]:  # of two tokens, of which one is MASK, a step of Euler may leave neither
        given = options(rows.sigma, denoise=denoise)
        check_accuracy(random_log_score((count, n), dtype), rows.x_t, step, process, **given)


@all_steps
def test_probs_of_a_large_vocabulary(process_of: Process, kind: str) -> None:
    process, sigma = process_of(262_145), torch.full((1,), 0.7, dtype=torch.float64)
    x = process.stationary.nonzero()[-1]
    check_accuracy(random_log_score((1, 262_145), torch.float32), x, STEPS[kind](sigma), process, **options(sigma))


def posterior(process: RankOne, mu: Tensor, sigma: float, dsigma: float) -> Tensor:
    """Σ_k μ_k q(x_s | x_t, x_0 = k) from matrix exponentials, [x_t, x_s]; NaN in rows that no process reaches."""
    step, before = transition_matrix(process, dsigma), transition_matrix(process, sigma - dsigma)
    joint = step[:, :, None] * before[None]  # [x_t, x_s, x_0]
    return ((joint / transition_matrix(process, sigma)[:, None]) * mu).sum(-1)


@given(
    st.sampled_from(sorted(PROCESSES)),
    st.integers(2, 9),
    st.floats(0.1, 5.0),
    st.floats(0.01, 1.0),
    st.integers(0, 2**31),
)
def test_tweedie_is_the_posterior(name: str, n: int, sigma: float, part: float, seed: int) -> None:
    process, dsigma = PROCESSES[name](n), sigma * part
    logits = random_log_score((n,), torch.float64, seed)
    expected = posterior(process, without_mask(logits, process), sigma, dsigma)
    probs = reverse_probs(logits.repeat(n, 1), torch.arange(n), Tweedie(dsigma), process, **options(sigma))
    live = process.stationary > 0
    torch.testing.assert_close(probs[live], expected[live], rtol=1e-9, atol=1e-12)
    assert torch.equal(probs[~live], torch.eye(n, dtype=torch.float64)[~live])


@given(st.sampled_from(sorted(PROCESSES)), st.integers(3, 30), st.floats(0.05, 5.0), st.booleans(), st.integers(0, 99))
def test_the_implied_score(name: str, n: int, sigma: float, denoise: bool, seed: int) -> None:
    """The kernels of scores, given log s_y = log(A π_y + B μ_y), have the same probabilities."""
    process = PROCESSES[name](n)
    logits, x = random_log_score((n, n), torch.float64, seed), torch.arange(n)
    mu, pi, a, b = without_mask(logits, process), process.stationary, math.exp(-sigma), -math.expm1(-sigma)
    pi_x, mu_x = pi[:, None].clamp(min=1e-30), mu.diagonal()[:, None]
    score = (1 - mu_x * a / (a + b * pi_x)) / pi_x * pi + a / (b * pi_x) * mu
    score = torch.where(pi[:, None] > 0, score, 1.0)
    for step in (Tweedie(0.4 * sigma), Tweedie(sigma), Euler(0.1 * sigma), Euler(3.0)):
        expected = reverse_probs(score.log(), x, step, process, denoise=denoise)
        probs = reverse_probs(logits, x, step, process, **options(sigma, denoise=denoise))
        torch.testing.assert_close(probs, expected, rtol=1e-9, atol=1e-12)


@every_variant
@all_steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [27, 1000])
def test_peaky_logits(process_of: Process, kind: str, n: int, dtype: torch.dtype) -> None:
    """Logits of up to 1e4 in magnitude, all of one sign or of both; a constant changes nothing."""
    process = process_of(n)
    rows = random_rows(process, 24)
    logits = 1e4 * (2 * torch.rand(24, n, generator=seeded(4), dtype=torch.float64) - 1)
    for shift in (0.0, -1.5e4, 1.5e4):
        values = (logits + shift).to(dtype)
        # a normal number is an exp of -88 or more
        check_accuracy(values, rows.x_t, STEPS[kind](rows.sigma), process, largest=88.0, **options(rows.sigma))
        drawn = reverse_sample(values, rows.x_t, STEPS[kind](rows.sigma), process, **options(rows.sigma))
        probs = reference.reverse_probs(
            values.double(), rows.x_t, STEPS[kind](rows.sigma), process, **options(rows.sigma)
        )
        assert (probs.gather(-1, drawn[:, None]) > 0).all()


def test_a_prediction_of_x_itself_leaves_its_share_to_the_others(backend: Backend) -> None:
    """1 - μ_x = e^{-60}: a share below the precision of μ_x keeps its digits."""
    process = Uniform(5)
    logits = torch.tensor([[60.0, 0.0, 1.0, 2.0, -1.0]], dtype=torch.float64)
    sigma, size = 1e-3, 1e20
    probs = reverse_probs(logits, torch.tensor([0]), Euler(size), process, **options(sigma))
    others = logits[0, 1:].exp() / logits.exp().sum()
    a, b = math.exp(-sigma), -math.expm1(-sigma)
    weights = a / b * others + (others.sum() + b / 5 / (a + b / 5)) / 5
    torch.testing.assert_close(probs[0, 1:], weights / weights.sum(), rtol=1e-10, atol=0)


@all_steps
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_the_logit_of_mask_does_not_matter(kind: str, value: float) -> None:
    sigma = torch.full((24,), 0.8, dtype=torch.float64)
    for process in (Absorbing(36), Hybrid(36, 0.3), RankOne(Hybrid(36, 0.3).stationary.flip(0), mask_id=0)):
        assert process.mask_id is not None
        x, clean = random_rows(process, 24).x_t, random_log_score((24, 37), torch.float32)
        dirty = clean.clone()
        dirty[:, process.mask_id] = value
        results = [reverse_probs(v, x, STEPS[kind](sigma), process, **options(sigma)) for v in (clean, dirty)]
        assert torch.equal(*results)
        drawn = [
            reverse_sample(v, x, STEPS[kind](sigma), process, generator=seeded(), **options(sigma))
            for v in (clean, dirty)
        ]
        assert torch.equal(*drawn)


@all_steps
@pytest.mark.parametrize("denoise", [False, True])
def test_rows_that_cannot_move_stay(kind: str, denoise: bool) -> None:
    process, x, sigma = Absorbing(37), torch.arange(37), torch.full((37,), 0.5, dtype=torch.float64)
    logits = torch.full((37, 38), float("nan"))
    step, given = STEPS[kind](sigma), options(sigma, denoise=denoise)
    assert torch.equal(reverse_probs(logits, x, step, process, **given), torch.eye(37, 38))
    assert torch.equal(reverse_sample(logits, x, step, process, **given), x)


def test_the_last_step_leaves_nothing_on_mask(backend: Backend) -> None:
    """Δ = σ̄, and what rounding makes of it: a float32 number may be larger."""
    process, x = Absorbing(26), torch.full((50,), 26)
    logits = random_log_score((50, 27), torch.float32)
    sigma = torch.linspace(0.1, 3.0, 50, dtype=torch.float64)
    for step in (Tweedie(sigma), Tweedie(sigma * (1 + 5e-7)), Tweedie(sigma.float().nextafter(torch.tensor(9.0)))):
        probs = reverse_probs(logits, x, step, process, **options(sigma))
        assert (probs[:, 26] == 0).all()
        torch.testing.assert_close(probs.double(), without_mask(logits, process), rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------- generalized masked


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 27, 1000, 4099])
@pytest.mark.parametrize("denoise", [False, True])
def test_generalized_masked(n: int, dtype: torch.dtype, denoise: bool) -> None:
    """Steps of all sizes: the smallest, whose 1 - (s/t)^w cancels, and to s = 0."""
    process, count = Absorbing(n - 1), 12
    x = torch.full((count,), n - 1)
    x[3] = 0
    t = torch.linspace(0.1, 1.0, count, dtype=torch.float64)
    ratio = [0.0, 1e-8, 1e-3, 0.1, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9]
    s = t * torch.tensor(ratio, dtype=torch.float64)
    step = GeneralizedMasked(s, t, powers(n))
    logits = random_log_score((count, n), dtype)
    exact = without_mask(logits, process) * -torch.expm1(powers(n) * (s / t).log()[:, None])
    exact = torch.where(s[:, None] > 0, exact, without_mask(logits, process))
    exact[:, -1] = 0.0 if denoise else 1 - exact[:, :-1].sum(-1)
    exact[3] = torch.eye(n)[0]
    exact /= exact.sum(-1, keepdim=True)
    probs = reverse_probs(logits, x, step, process, parameterization="mean", denoise=denoise)
    scale = torch.where(torch.arange(n) == n - 1, 1.0, exact)
    scale = torch.where((exact == 0) & (x == 0)[:, None], 0.0, scale)
    log_ratio_error = 1e-7  # the test's own quotient at s/t = 1 - 1e-9
    assert largest_error(probs, exact, scale) <= 3 * BOUND[dtype] + log_ratio_error
    if denoise:
        assert (probs[x == n - 1, -1] == 0).all()
    again = reference.reverse_probs(logits.double(), x, step, process, parameterization="mean", denoise=denoise)
    torch.testing.assert_close(again, exact, rtol=1e-6, atol=1e-9)


def test_equal_powers_are_the_ordinary_step(backend: Backend) -> None:
    """All w = 1 is the schedule α = 1 - t, whose σ̄ is -log(1 - t)."""
    process, x, logits = Absorbing(26), torch.full((24,), 26), random_log_score((24, 27), torch.float64)
    for s, t in ((0.2, 0.5), (0.0, 0.7), (0.899, 0.9)):
        sigma, before = -math.log1p(-t), -math.log1p(-s)
        one = reverse_probs(logits, x, Tweedie(sigma - before), process, **options(sigma))
        step = GeneralizedMasked(s, t, torch.ones(27))
        torch.testing.assert_close(reverse_probs(logits, x, step, process, **options(None)), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [27, 1000])
def test_samples_of_generalized_masked(backend: Backend, n: int, dtype: torch.dtype) -> None:
    process, draws = Absorbing(n - 1), backend.draws(20_000) // (1 if n < 100 else 5)
    logits, step = random_log_score((n,), dtype), GeneralizedMasked(0.3, 0.6, powers(n))
    for denoise in (False, True):
        probs = reference.reverse_probs(
            logits.double(), torch.tensor(n - 1), step, process, **options(None, denoise=denoise)
        )
        drawn = reverse_sample(
            logits.repeat(draws, 1),
            torch.full((draws,), n - 1),
            step,
            process,
            generator=seeded(),
            **options(None, denoise=denoise),
        )
        assert chi_square(drawn.bincount(minlength=n), probs) > 1e-3


# ---------------------------------------------------------------------------------------------------------- samples


@all_steps
@pytest.mark.parametrize(("dtype", "denoise"), list(zip(DTYPES, [False, True, True, False], strict=True)), ids=str)
def test_samples_follow_the_probabilities(
    backend: Backend, process_of: Process, kind: str, dtype: torch.dtype, denoise: bool
) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    logits, generator = random_log_score((27,), dtype), seeded()
    sigma = torch.full((), 0.9, dtype=torch.float64)
    for x in (4, 26):  # of absorbing diffusion only the second can move
        given = options(sigma, denoise=denoise)
        drawn = reverse_sample(
            logits.repeat(draws, 1),
            torch.full((draws,), x),
            STEPS[kind](sigma),
            process,
            generator=generator,
            **given,
        )
        probs = reference.reverse_probs(logits.double(), torch.tensor(x), STEPS[kind](sigma), process, **given)
        counts = drawn.bincount(minlength=27)
        if (probs == 1).any():
            assert int(counts[probs == 1]) == draws
        else:
            assert chi_square(counts, probs) > 1e-3


@pytest.mark.parametrize("name", ["uniform", "hybrid", "vector"])
def test_draws_that_come_from_the_stationary_distribution(backend: Backend, name: str) -> None:
    """At σ̄ = 6 nearly all of them: an entry too many or too few beside x shows."""
    process, draws, logits = PROCESSES[name](27), backend.draws(20_000), random_log_score((27,), torch.float32)
    for x in (0, 4, 26):
        step, given = Tweedie(3.0), options(6.0)
        rows = logits.repeat(draws, 1), torch.full((draws,), x)
        drawn = reverse_sample(*rows, step, process, generator=seeded(x), **given)
        probs = reference.reverse_probs(logits.double(), torch.tensor(x), step, process, **given)
        assert chi_square(drawn.bincount(minlength=27), probs) > 1e-3


@pytest.mark.parametrize("place", [0, 3, 26])
@pytest.mark.parametrize("denoise", [False, True])
def test_tokens_between_the_excluded_ones(backend: Backend, place: int, denoise: bool) -> None:
    """π with zeros at its ends and MASK anywhere; nearly all of a draw comes from π, around x and MASK."""
    weights = torch.arange(27.0).double() % 4 + 1
    weights[torch.tensor([1, 5, 24, 25])] = 0.0
    process, draws = RankOne(weights / weights.sum(), mask_id=place), backend.draws(20_000)
    logits, sigma = random_log_score((27,), torch.float32), torch.tensor(6.0, dtype=torch.float64)
    for x in (0, 4, 26):
        given = options(sigma, denoise=denoise)
        if denoise and x == place:
            continue
        step = Tweedie(0.5 * sigma)
        drawn = reverse_sample(
            logits.repeat(draws, 1), torch.full((draws,), x), step, process, generator=seeded(x), **given
        )
        probs = reference.reverse_probs(logits.double(), torch.tensor(x), step, process, **given)
        assert chi_square(drawn.bincount(minlength=27), probs) > 1e-3


@pytest.mark.operators("cpu", "cuda")
@all_steps
def test_samples_of_a_large_vocabulary(backend: Backend, process_of: Process, kind: str) -> None:
    """50,258 tokens whose frequencies fall like 1/rank; the largest logit is anywhere."""
    process, draws = process_of(50258), backend.draws(2000)
    ranks = torch.randperm(50258, generator=seeded()) + 1.0
    sigma = torch.tensor(1.5, dtype=torch.float64)
    x = process.stationary.nonzero()[-1].expand(100)
    generator = seeded(1)
    drawn = torch.cat(
        [
            reverse_sample(
                (-ranks.log()).repeat(100, 1), x, STEPS[kind](sigma), process, generator=generator, **options(sigma)
            )
            for _ in range(draws // 100)
        ]
    )
    probs = reference.reverse_probs(-ranks.log().double(), x[0], STEPS[kind](sigma), process, **options(sigma))
    assert chi_square(drawn.bincount(minlength=50258), probs) > 1e-3


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("kind", ["tweedie", "euler", "generalized"])
def test_rare_tokens_get_their_share(kind: str, threads: Callable[[int], None]) -> None:
    """A small step from a MASK that mostly stays, as in test_reverse.py."""
    threads(1)
    process, wanted = Absorbing(4096), rare_tokens()
    leave = float(wanted[:-1].sum())
    logits = wanted.log().float()
    sigma: float | None = 1.0
    a, b = math.exp(-1.0), -math.expm1(-1.0)
    step: MeanStep = Tweedie(math.log1p(leave * b / a)) if kind == "tweedie" else Euler(leave * b / a)
    if kind == "generalized":
        step, sigma = GeneralizedMasked(1 - leave, 1.0, torch.ones(4097)), None
    given = options(sigma)
    probs = reference.reverse_probs(logits.double(), torch.tensor(4096), step, process, **given)
    assert 0.5 * leave < 1 - float(probs[-1]) < 2 * leave
    rows, x, generator = logits.repeat(250, 1), torch.full((250,), 4096), seeded()
    drawn = [reverse_sample(rows, x, step, process, generator=generator, **given) for _ in range(1600)]
    counts = torch.cat(drawn).bincount(minlength=4097)
    assert chi_square(counts, probs) > 0.01
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) > 0.01


def test_a_stationary_mass_close_to_one(backend: Backend) -> None:
    """π_x = 1 - 1e-6: in float32 the rest of π would have lost half of its digits."""
    pi = torch.tensor([0.5e-6, 0.3e-6, 0.2e-6, 1 - 1e-6], dtype=torch.float64)
    process, sigma = RankOne(pi), torch.tensor(30.0, dtype=torch.float64)
    logits, x = torch.tensor([0.0, 0.0, 0.0, 40.0]), torch.tensor([3])
    exact = reference.reverse_probs(logits[None].double(), x, Tweedie(1.0), process, **options(sigma))
    numbers = mean_numbers(x, Tweedie(1.0), process, sigma, None, False, torch.float32)
    assert numbers.cumulative is not None
    probs = reverse_probs(logits[None], x, Tweedie(1.0), process, **options(sigma))
    torch.testing.assert_close(probs.double()[:, :3], exact[:, :3], rtol=1e-5, atol=0)
    draws = 4_000_000 if backend.kind != "emulated" else 0
    if draws:
        drawn = reverse_sample(
            logits.expand(draws, 4).contiguous(),
            x.expand(draws).contiguous(),
            Euler(3e5),
            process,
            generator=seeded(),
            **options(sigma),
        )
        exact = reference.reverse_probs(logits.double(), x[0], Euler(3e5), process, **options(sigma))
        assert chi_square(drawn.bincount(minlength=4), exact) > 1e-3


@every_variant
@all_steps
def test_same_generator_same_tokens(process_of: Process, kind: str, threads: Callable[[int], None]) -> None:
    process = process_of(1025)
    rows, logits = random_rows(process, 97), random_log_score((97, 1025), torch.float32)
    step, given, results = STEPS[kind](rows.sigma), options(rows.sigma), []
    for count in (1, 2):
        threads(count)
        generator = seeded(11)
        tokens = [reverse_sample(logits, rows.x_t, step, process, generator=generator, **given) for _ in range(2)]
        results.append((*tokens, reverse_probs(logits, rows.x_t, step, process, **given)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.operators("emulated")
@pytest.mark.parametrize("n", [27, 5003])
@pytest.mark.parametrize("kind", [*STEPS, "generalized"])
def test_tokens_are_those_of_the_cpu(process_of: Process, kind: str, n: int) -> None:
    process, count = process_of(n), 1000 if n < 100 else 100
    rows, logits = random_rows(process, count), random_log_score((count, n), torch.float32)
    step, given = STEPS.get(kind, Tweedie)(rows.sigma), options(rows.sigma)
    if kind == "generalized":
        process, step, given = Absorbing(n - 1), GeneralizedMasked(0.4, 0.9, powers(n)), options(None)
    emulated = reverse_sample(logits, rows.x_t, step, process, generator=seeded(3), **given)
    with running_on(BACKENDS["cpu"][0]):
        assert torch.equal(reverse_sample(logits, rows.x_t, step, process, generator=seeded(3), **given), emulated)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 0.6)])
def test_temperature_and_top_p(backend: Backend, process_of: Process, temperature: float, top_p: float) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    logits, sigma, x = random_log_score((27,), torch.float32), 0.9, torch.tensor(26)
    tempering = {"temperature": temperature, "top_p": top_p}
    rows = logits.repeat(draws, 1), x.repeat(draws)
    drawn = reverse_sample(*rows, Tweedie(0.4), process, generator=seeded(5), **tempering, **options(sigma))
    probs = reference.reverse_probs(logits.double(), x, Tweedie(0.4), process, **options(sigma))
    law = reference._tempered(probs, x, temperature, top_p)
    if (law == 1).any():
        assert (drawn == 26).all()
    else:
        assert chi_square(drawn.bincount(minlength=27), law) > 1e-3


# -------------------------------------------------------------------------------------------------------- bad input


@every_variant
@all_steps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [5, 37])
def test_rows_without_a_distribution_are_refused(
    backend: Backend, process_of: Process, kind: str, value: float, at: int
) -> None:
    process, x = process_of(38), torch.full((3,), 37)
    logits, sigma = random_log_score((3, 38), torch.float32), torch.full((3,), 0.7, dtype=torch.float64)
    logits[1, at] = value
    for operator in (reverse_probs, reverse_sample):
        if process.mask_id == at:  # the logit of MASK is ignored
            assert bad_rows(operator(logits, x, STEPS[kind](sigma), process, **options(sigma))) == []
        elif backend.names_bad_rows:
            with pytest.raises(ValueError, match=r"log_score: .*index \[1\]"):
                operator(logits, x, STEPS[kind](sigma), process, **options(sigma))
        else:
            assert bad_rows(operator(logits, x, STEPS[kind](sigma), process, **options(sigma))) == [1]


@pytest.mark.parametrize("n", [7, 3000])
def test_nothing_but_minus_infinity(backend: Backend, n: int) -> None:
    process, x = Absorbing(n - 1), torch.full((2,), n - 1)
    logits = torch.full((2, n), -math.inf)
    logits[1, -2] = -1e4
    for operator in (reverse_probs, reverse_sample):
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match="log_score"):
                operator(logits, x, Tweedie(0.3), process, **options(0.7))
        else:
            assert bad_rows(operator(logits, x, Tweedie(0.3), process, **options(0.7))) == [0]
    drawn = reverse_sample(logits[1:], x[1:], Tweedie(0.3), process, **options(0.7, denoise=True))
    assert drawn.tolist() == [n - 2]
    probs = reverse_probs(logits[1:], x[1:], Tweedie(0.3), process, **options(0.7, denoise=True))
    assert torch.equal(probs, torch.eye(n)[n - 2 : n - 1])


BAD = {
    "sigma": (Tweedie(0.1), [0.5, -1.0, 0.5], r"^sigma: .*-1.*\[1\]"),
    "sigma nan": (Euler(0.1), [0.5, math.nan, 0.5], r"^sigma: .*nan.*\[1\]"),
    "dsigma": (Tweedie(torch.tensor([0.1, 0.0, 0.1])), 0.5, r"^dsigma: .*0\.0.*\[1\]"),
    "step": (Euler(torch.tensor([0.1, math.inf, 0.1])), 0.5, r"^step: .*inf.*\[1\]"),
    "beyond": (
        Tweedie(torch.tensor([0.1, 0.501, 0.5])),
        0.5,
        r"^dsigma: expected at most sigma = 0\.5, got 0\.50.*\[1\]",
    ),
    "s": (GeneralizedMasked(torch.tensor([0.1, 0.6, 0.0]), 0.5, torch.ones(7)), None, r"^s: .*0 <= s < t.*\[1\]"),
    "s = t": (GeneralizedMasked(torch.tensor([0.1, 0.5, 0.0]), 0.5, torch.ones(7)), None, r"^s: .*\[1\]"),
    "s < 0": (GeneralizedMasked(torch.tensor([0.1, -0.1, 0.0]), 0.5, torch.ones(7)), None, r"^s: .*\[1\]"),
    "t nan": (GeneralizedMasked(0.1, torch.tensor([0.2, math.nan, 0.3]), torch.ones(7)), None, r"^s: .*\[1\]"),
}


@every_variant
@pytest.mark.parametrize("name", BAD)
def test_bad_numbers(backend: Backend, name: str) -> None:
    step, sigma, message = BAD[name]
    given = options(torch.tensor(sigma).double() if isinstance(sigma, list) else sigma)
    logits, x, process = torch.zeros(3, 7), torch.full((3,), 6), Absorbing(6)
    for operator in (reverse_probs, reverse_sample):
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match=message):
                operator(logits, x, step, process, **given)
        else:
            assert bad_rows(operator(logits, x, step, process, **given)) == [1]
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=message):
            linear_reverse_sample(torch.zeros(3, 2), torch.zeros(7, 2), None, x, step, process, **given)
    else:
        drawn = linear_reverse_sample(torch.zeros(3, 2), torch.zeros(7, 2), None, x, step, process, **given)
        assert bad_rows(drawn) == [1]


@every_variant
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_powers(backend: Backend, value: float) -> None:
    power = torch.ones(7)
    power[6] = value  # MASK's does not matter
    logits, x, process = torch.zeros(2, 7), torch.tensor([0, 6]), Absorbing(6)
    for operator in (reverse_probs, reverse_sample):
        assert bad_rows(operator(logits, x, GeneralizedMasked(0.1, 0.5, power), process, **options(None))) == []
    power[2] = value
    for operator in (reverse_probs, reverse_sample):
        if backend.kind != "cuda":  # the emulation has tensors on the CPU
            with pytest.raises(ValueError, match=r"^power: .* at index \[2\]"):
                operator(logits, x, GeneralizedMasked(0.1, 0.5, power), process, **options(None))
        else:
            assert bad_rows(operator(logits, x, GeneralizedMasked(0.1, 0.5, power), process, **options(None))) == [1]


def test_options_that_do_not_fit(backend: Backend) -> None:
    logits, x, process = torch.zeros(2, 7), torch.tensor([0, 6]), Absorbing(6)
    general = GeneralizedMasked(0.1, 0.5, torch.ones(7))
    assert reverse_probs(logits, x, Tweedie(0.1), process, **options(0.2)).shape == (2, 7)
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (Tweedie(0.1), process, options(None), r"^sigma: expected the total noise"),
        (Tweedie(0.1), process, options("a"), r"^sigma: expected a number"),
        (Tweedie(0.1), process, {"sigma": 0.2}, r"^sigma: expected None with parameterization='score'"),
        (Tweedie(0.1), process, {"parameterization": "logits"}, r"^parameterization: expected 'score' or 'mean'"),
        (Tweedie(0.1), process, options(0.2, log_score_shift=0.5), r"^log_score_shift: expected None"),
        (general, process, {}, r"^step: expected Tweedie\(dsigma\) or Euler\(step\), got GeneralizedMasked"),
        (general, process, options(0.2), r"^sigma: expected None for GeneralizedMasked"),
        (general, Hybrid(6, 0.1), options(None), r"^process: expected an absorbing process"),
        (GeneralizedMasked(0.1, 0.5, torch.ones(6)), process, options(None), r"^power: expected shape \[7\]"),
        (
            GeneralizedMasked(0.1, 0.5, torch.ones(7).int()),
            process,
            options(None),
            r"^power: expected a float32 or float64 tensor",
        ),
        (0.1, process, options(0.2), r"^step: expected Tweedie\(dsigma\), Euler\(step\) or GeneralizedMasked"),
    ]
    for step, noise, extra, message in wrong:
        for operator in (reverse_probs, reverse_sample):
            with pytest.raises((TypeError, ValueError), match=message):
                operator(logits, x, step, noise, **extra)
        with pytest.raises((TypeError, ValueError), match=message):
            linear_reverse_sample(torch.zeros(2, 2), torch.zeros(7, 2), None, x, step, noise, **extra)


# --------------------------------------------------------------------------------------------------------- operator


@all_steps
def test_batches_and_broadcasting(process_of: Process, kind: str) -> None:
    process = process_of(11)
    logits, x = random_log_score((4, 6, 11), torch.float32), random_rows(process, 24).x_t.view(4, 6)
    sigma = torch.tensor([[0.1], [0.5], [2.0], [1.0]])
    step = STEPS[kind](sigma)
    probs = reverse_probs(logits, x, step, process, **options(sigma))
    assert probs.shape == (4, 6, 11)
    one = reverse_probs(logits[2, 3], x[2, 3], STEPS[kind](sigma[2, 0]), process, **options(sigma[2, 0]))
    assert torch.equal(probs[2, 3], one)
    strided = torch.stack([logits, logits], -1)[..., 0]
    assert torch.equal(reverse_probs(strided, x, step, process, **options(sigma)), probs)
    assert reverse_sample(logits, x, step, process, **options(sigma)).shape == (4, 6)
    assert reverse_sample(logits[:, :0], x[:, :0], step, process, **options(sigma)).shape == (4, 0)
    part = slice(1, None), slice(1, None)  # of CUDA kernels, which divide a row at addresses, another order of sums
    later = reverse_probs(logits[part], x[part], STEPS[kind](sigma[1:]), process, **options(sigma[1:]))
    torch.testing.assert_close(later, probs[part], rtol=1e-5, atol=1e-7)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("kind", [*STEPS, "generalized"])
def test_opcheck(process_of: Process, kind: str) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    step, sigma = STEPS.get(kind, Tweedie)(rows.sigma), rows.sigma
    if kind == "generalized":
        process, step, sigma = Absorbing(26), GeneralizedMasked(0.2, 0.9, torch.ones(27)), None
    numbers = mean_numbers(rows.x_t, step, process, sigma, None, True, torch.float32)
    arguments = to_device((random_log_score((24, 27), torch.float32), *numbers))
    torch.library.opcheck(torch.ops.sedd_ext.reverse_mean_probs, arguments)
    torch.library.opcheck(torch.ops.sedd_ext.reverse_mean_sample, (*arguments, *to_device((torch.tensor([3]),))))


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("kind", [*STEPS, "generalized"])
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(kind: str, name: str) -> None:
    torch.compiler.reset()
    process = PROCESSES[name](27)
    rows = random_rows(process, 24)
    logits = random_log_score((24, 27), torch.float32)
    if kind == "generalized":
        process = Absorbing(26)
    for operator in (reverse_probs, reverse_sample):

        def call(logits: Tensor, x: Tensor, sigma: Tensor, operator: Callable[..., Tensor] = operator) -> Tensor:
            if kind == "generalized":
                step: MeanStep = GeneralizedMasked(0.2 * sigma, sigma, torch.ones(27))
                return operator(2 * logits, x, step, process, parameterization="mean") + 1
            return operator(2 * logits, x, STEPS[kind](sigma), process, parameterization="mean", sigma=sigma) + 1

        results = []
        with torch.random.fork_rng():
            for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
                torch.manual_seed(5)
                results.append(function(logits, rows.x_t, rows.sigma))
        assert torch.equal(*results)
