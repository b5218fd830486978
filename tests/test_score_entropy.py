"""The score-entropy loss: value and gradient against float64, the shapes it takes, its manners as an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import score_entropy_loss, to_device
from explicit import PROCESSES, Rows, exponent_error, largest_error, random_log_score, random_rows, term_scales
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sedd_ext import Absorbing, RankOne, Uniform, _dispatch, reference
from sedd_ext.score_entropy import _backward, _sweep_backward

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What a kernel's error may exceed that of plain PyTorch in the same dtype by, in units of the terms that are summed.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}


def value_and_gradient(
    function: Callable[..., Tensor], log_score: Tensor, rows: Rows, process: RankOne, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = log_score.detach().clone().requires_grad_()
    loss = function(leaf, *rows, process, log_score_shift=shift)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def gradient_of_one_sweep(log_score: Tensor, rows: Rows, process: RankOne, shift: Tensor | None = None) -> Tensor:
    leaf = log_score.detach().clone().requires_grad_()
    loss = score_entropy_loss(leaf, *rows, process, log_score_shift=shift, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def check_accuracy(
    log_score: Tensor, rows: Rows, process: RankOne, shift: Tensor | None = None, largest: float = 0.0
) -> None:
    """The error against float64 is no larger than plain PyTorch's in the same dtype, plus a small bound."""
    exact = value_and_gradient(reference.score_entropy_loss, log_score.double(), rows, process, shift)
    plain = value_and_gradient(reference.score_entropy_loss, log_score, rows, process, shift)
    shifted = log_score.double() if shift is None else log_score.double() - shift.double()[..., None]
    scales = term_scales(shifted, rows, process)
    bound = BOUND[log_score.dtype] + exponent_error(log_score.dtype, largest)
    allowed = [largest_error(*v) + bound for v in zip(plain, exact, scales, strict=True)]
    result = value_and_gradient(score_entropy_loss, log_score, rows, process, shift)
    assert result[0].dtype == (torch.float64 if log_score.dtype == torch.float64 else torch.float32)
    assert result[1].dtype == log_score.dtype
    errors = [largest_error(*v) for v in zip(result, exact, scales, strict=True)]
    assert errors[0] <= allowed[0]
    assert errors[1] <= allowed[1]
    at_once = gradient_of_one_sweep(log_score, rows, process, shift)
    assert at_once.dtype == log_score.dtype
    assert largest_error(at_once, exact[1], scales[1]) <= allowed[1]


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 17, 27, 1025, 4099, 50258])
def test_value_and_gradient(process_of: Process, n: int, dtype: torch.dtype) -> None:
    process, count = process_of(n), 3 if n > 10_000 else 24
    check_accuracy(random_log_score((count, n), dtype), random_rows(process, count), process)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_score_shift(process_of: Process, dtype: torch.dtype) -> None:
    process = process_of(1025)
    shift = random_log_score((24,), torch.float64, seed=2, spread=4.0)
    check_accuracy(random_log_score((24, 1025), dtype), random_rows(process, 24), process, shift)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaky_log_scores(process_of: Process, dtype: torch.dtype) -> None:
    """Terms from e^-80 to e^80 (to e^10 in float16, whose gradients end at 65,504)."""
    process, spread = process_of(1025), 10.0 if dtype == torch.float16 else 80.0
    log_score = spread * (2 * torch.rand(24, 1025, generator=torch.Generator().manual_seed(4)) - 1)
    check_accuracy(log_score.to(dtype), random_rows(process, 24), process, largest=spread)


@every_variant
def test_exp_is_accurate_to_two_ulp() -> None:
    """At σ̄ = log 2 of absorbing diffusion the gradient of an entry is exp of its log-score, and nothing else."""
    n = 1 << 18
    log_score = torch.linspace(-103.5, 88.72, n, dtype=torch.float64).float().view(1, n)
    rows = (torch.tensor([n - 1]), torch.tensor([0]), torch.tensor([2.0], dtype=torch.float64).log())
    _, gradient = value_and_gradient(score_entropy_loss, log_score, rows, Absorbing(n - 1))
    exact, found = log_score.double().exp()[0, 1:-1], gradient.double()[0, 1:-1]
    ulp = torch.maximum(torch.exp2(exact.log2().floor() - 23), torch.tensor(2.0**-149, dtype=torch.float64))
    assert float(((found - exact).abs() / ulp).max()) <= 2.0


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 200.0, -200.0])
def test_shifts_beyond_the_range_of_exp(process_of: Process, dtype: torch.dtype, shift: float) -> None:
    """The exponent of 16-bit types is one FMA of log-score and shift, with the infinities, zeros and NaN of float32."""
    process, log_score = process_of(41), random_log_score((24, 41), dtype)
    rows, shifts = random_rows(process, 24), torch.full((24,), shift, dtype=torch.float64)
    found, exact = (
        value_and_gradient(score_entropy_loss, v, rows, process, shifts) for v in (log_score, log_score.float())
    )
    for got, true in zip(found, exact, strict=True):
        torch.testing.assert_close(got, true.to(got.dtype), rtol=1e-2, atol=1e-2, equal_nan=True)


def test_one_token_has_nothing_to_learn() -> None:
    process, zeros = Uniform(1), torch.zeros(3, dtype=torch.int64)
    loss, gradient = value_and_gradient(
        score_entropy_loss, torch.ones(3, 1), Rows(zeros, zeros, torch.ones(3).double()), process
    )
    torch.testing.assert_close(loss, torch.zeros(3))
    assert (gradient == 0).all()


@every_variant
@pytest.mark.parametrize("n", [5, 150])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_goes_through(process_of: Process, dtype: torch.dtype, value: float, n: int) -> None:
    """Row i has the value at entry i, so that every place of a vector loop has it once."""
    process = process_of(n)
    log_score = random_log_score((n, n), dtype)
    log_score.fill_diagonal_(value)
    rows = random_rows(process, n)
    exact = value_and_gradient(reference.score_entropy_loss, log_score.double(), rows, process)
    result = value_and_gradient(score_entropy_loss, log_score, rows, process)
    # float16 and bfloat16 round what is finite; what is not must be the same
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    at_once = gradient_of_one_sweep(log_score, rows, process)
    for got, true in zip((*result, at_once), (*exact, exact[1]), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_stands_at_x_does_not_matter(process_of: Process, value: float) -> None:
    process = process_of(37)
    rows = random_rows(process, 48)
    clean = random_log_score((48, 37), torch.float32).scatter(-1, rows.x_t[:, None], 0.0)
    dirty = clean.scatter(-1, rows.x_t[:, None], value)
    for a, b in zip(*(value_and_gradient(score_entropy_loss, v, rows, process) for v in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["absorbing", "vector_with_zeros"])
def test_rows_that_cannot_move_are_exactly_zero(name: str, dtype: torch.dtype) -> None:
    process = PROCESSES[name](38)
    still = (process.stationary == 0).nonzero()[:, 0]
    x_0 = torch.where(torch.arange(len(still)) % 2 == 0, still, 0)  # also one that the process could not have made
    rows = Rows(still, x_0, torch.full((len(still),), 0.5, dtype=torch.float64))
    for filling in (1.0, float("nan"), float("inf")):
        log_score = torch.full((len(still), 38), filling, dtype=dtype)
        for result in value_and_gradient(score_entropy_loss, log_score, rows, process):
            assert (result == 0).all()


# ------------------------------------------------------------------------------------------------------- properties

dims = st.integers(2, 40)
names = st.sampled_from(sorted(PROCESSES))
sigmas = st.floats(1e-4, 10.0)
seeds = st.integers(0, 2**31)


@given(names, dims, sigmas, seeds, st.floats(0.1, 8.0))
def test_never_negative(name: str, n: int, sigma: float, seed: int, spread: float) -> None:
    process = PROCESSES[name](n)
    rows = random_rows(process, 9, seed)._replace(sigma=torch.full((9,), sigma, dtype=torch.float64))
    log_score = random_log_score((9, n), torch.float64, seed, spread)
    loss = score_entropy_loss(log_score, *rows, process)
    assert (loss >= -1e-13 * term_scales(log_score, rows, process).loss).all()


@given(names, dims, sigmas, seeds)
def test_zero_value_and_gradient_at_the_true_ratio(name: str, n: int, sigma: float, seed: int) -> None:
    process = PROCESSES[name](n)
    x_0 = torch.randint(n, (), generator=torch.Generator().manual_seed(seed))
    column = reference.transition_column(x_0, torch.tensor(sigma, dtype=torch.float64), process)
    reachable = column.nonzero()[:, 0]
    log_score = column.log() - column[reachable].log()[:, None]
    rows = Rows(reachable, x_0.expand_as(reachable), torch.full(reachable.shape, sigma, dtype=torch.float64))
    scales = term_scales(log_score, rows, process)
    loss, gradient = value_and_gradient(score_entropy_loss, log_score, rows, process)
    assert (loss.abs() <= 1e-12 * scales.loss).all()
    assert (gradient.abs() <= 1e-12 * scales.gradient).all()


# ----------------------------------------------------------------------------------------------------------- shapes


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, RankOne]:
    """log_score [4, 6, 11], x_t and x_0 [4, 6], sigma [4, 1], process."""
    process = Uniform(11)
    rows = random_rows(process, 24)
    sigma = rows.sigma[:4, None]
    return random_log_score((4, 6, 11), torch.float32), rows.x_t.view(4, 6), rows.x_0.view(4, 6), sigma, process


def test_batches_and_broadcasting(batch: tuple[Tensor, Tensor, Tensor, Tensor, RankOne]) -> None:
    log_score, x_t, x_0, sigma, process = batch
    loss = score_entropy_loss(log_score, x_t, x_0, sigma, process)
    assert loss.shape == (4, 6)
    for i in range(4):
        for j in range(6):
            one = score_entropy_loss(log_score[i, j], x_t[i, j], x_0[i, j], sigma[i, 0], process)
            assert one.shape == ()
            assert torch.equal(one, loss[i, j])
    full = score_entropy_loss(log_score, x_t, x_0, sigma.expand(4, 6), process)
    assert torch.equal(full, loss)
    number = score_entropy_loss(log_score, x_t, x_0, 0.37, process)
    tensor = score_entropy_loss(log_score, x_t, x_0, torch.tensor(0.37, dtype=torch.float64), process)
    assert torch.equal(number, tensor)
    shifted = score_entropy_loss(log_score, x_t, x_0, sigma, process, log_score_shift=torch.full((6,), 0.5))
    assert torch.equal(shifted, score_entropy_loss(log_score, x_t, x_0, sigma, process, log_score_shift=0.5))


def test_reductions(batch: tuple[Tensor, Tensor, Tensor, Tensor, RankOne]) -> None:
    loss = score_entropy_loss(*batch)
    torch.testing.assert_close(score_entropy_loss(*batch, reduction="sum"), loss.sum())
    torch.testing.assert_close(score_entropy_loss(*batch, reduction="mean"), loss.mean())


def test_weights(batch: tuple[Tensor, Tensor, Tensor, Tensor, RankOne]) -> None:
    log_score, *others = batch
    weight = torch.linspace(0.0, 2.0, 6)
    loss = score_entropy_loss(*batch) * weight
    torch.testing.assert_close(score_entropy_loss(*batch, loss_weight=weight), loss)
    for reduction, expected in (("none", loss), ("sum", loss.sum()), ("mean", loss.mean())):
        gradients = []
        for weighted in (True, False):
            leaf = log_score.clone().requires_grad_()
            if weighted:
                result = score_entropy_loss(leaf, *others, loss_weight=weight, reduction=reduction)
                torch.testing.assert_close(result, expected)
            else:
                result = score_entropy_loss(leaf, *others) * weight
                result = result.mean() if reduction == "mean" else result
            result.sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


def test_one_sweep_reads_and_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and its gradient in one kernel; nothing more unless a multiple of the loss goes into the backward."""
    process = Uniform(27)
    rows, seen = random_rows(process, 24), []
    real = _dispatch.launch

    def noted(kernel: str, **arguments: Any) -> tuple[int, int]:
        seen.append((kernel, arguments.get("unless_one") is not None))
        return real(kernel, **arguments)

    monkeypatch.setattr("sedd_ext.score_entropy.launch", noted)
    for dtype, reduction, expected in (
        (torch.float32, "sum", ["score_entropy_tile", "score_entropy_backward"]),
        (torch.bfloat16, "mean", ["score_entropy_tile", "score_entropy_backward"]),
        (torch.float32, "none", ["score_entropy", "score_entropy_backward"]),
        (torch.float16, "sum", ["score_entropy", "score_entropy_backward"]),
    ):
        seen.clear()
        log_score = random_log_score((24, 27), dtype)
        score_entropy_loss(log_score, *rows, process, reduction=reduction)
        assert seen == [("score_entropy", False)]  # no gradient is needed
        seen.clear()
        score_entropy_loss(log_score.requires_grad_(), *rows, process, reduction=reduction).sum().backward()
        at_once = expected[0] == "score_entropy_tile"
        assert seen == [(expected[0], False), (expected[1], at_once)]


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_one_sweep_stays_for_a_factor_of_one(process_of: Process, dtype: torch.dtype) -> None:
    """For a factor of 1 the kernel leaves every element as it finds it; for another one it computes the gradient."""
    process = process_of(1025)
    rows = random_rows(process, 24)
    arguments = (
        random_log_score((24, 1025), dtype),
        *rows,
        None,
        process.stationary.float() if process.family == "rank_one" else None,
        process.family,
        process.neg_entropy,
    )
    weight = torch.linspace(0.5, 2.0, 24, dtype=torch.float64)
    expected = _backward(3.0 * weight, *arguments)
    for factor in (1.0, 3.0):
        gradient = torch.full((24, 1025), 7.0, dtype=dtype)
        _sweep_backward(gradient, torch.tensor(factor, dtype=torch.float64), weight, *arguments)
        assert torch.equal(gradient, torch.full_like(gradient, 7.0) if factor == 1.0 else expected)


def test_several_backward_passes(process_of: Process) -> None:
    """Through a graph that is kept, with factors: no gradient that was handed out changes later."""
    process = process_of(27)
    rows = random_rows(process, 24)
    log_score = random_log_score((24, 27), torch.float32).requires_grad_()
    weight = torch.linspace(0.5, 2.0, 24)
    (expected,) = torch.autograd.grad((weight * score_entropy_loss(log_score, *rows, process)).sum(), log_score)
    for factors in ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (0.0, 2.0)):
        loss = score_entropy_loss(log_score, *rows, process, loss_weight=weight, reduction="sum")
        found = [torch.autograd.grad(factor * loss, log_score, retain_graph=True)[0] for factor in factors]
        for factor, gradient in zip(factors, found, strict=True):
            torch.testing.assert_close(gradient, factor * expected)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    process, tokens = Absorbing(10), torch.zeros(shape, dtype=torch.int64)
    log_score = torch.zeros(*shape, 11, requires_grad=True)
    loss = score_entropy_loss(log_score, tokens, tokens, 0.5, process)
    assert loss.shape == shape
    loss.sum().backward()
    assert log_score.grad is not None
    assert log_score.grad.shape == (*shape, 11)
    for reduction in ("sum", "mean"):
        total = score_entropy_loss(log_score, tokens, tokens, 0.5, process, reduction=reduction)
        assert total == 0
        total.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(process_of: Process, dtype: torch.dtype) -> None:
    """Transposed log-scores, every second token, expanded σ: the same as their contiguous copies."""
    process = process_of(27)
    rows = random_rows(process, 24)
    log_score = random_log_score((27, 24), dtype).T
    x_t, x_0 = (torch.stack([v, v.flip(0)], dim=-1)[:, 0] for v in (rows.x_t, rows.x_0))
    assert not log_score.is_contiguous()
    assert not x_t.is_contiguous()
    strided = value_and_gradient(score_entropy_loss, log_score, Rows(x_t, x_0, rows.sigma[:1].expand(24)), process)
    plain = value_and_gradient(
        score_entropy_loss, log_score.contiguous(), rows._replace(sigma=rows.sigma[:1].repeat(24)), process
    )
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)
    at_once = gradient_of_one_sweep(log_score, Rows(x_t, x_0, rows.sigma[:1].expand(24)), process)
    assert torch.equal(at_once, gradient_of_one_sweep(log_score.contiguous(), Rows(x_t, x_0, rows.sigma[:1]), process))


def test_expanded_log_score() -> None:
    """One row for many positions: stride 0 in the input, a summed gradient out."""
    process = Uniform(27)
    rows = random_rows(process, 24)
    log_score = random_log_score((27,), torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(score_entropy_loss(log_score.expand(24, 27), *rows, process).sum(), log_score)
    every = log_score.detach().repeat(24, 1).requires_grad_()
    (expected,) = torch.autograd.grad(score_entropy_loss(every, *rows, process).sum(), every)
    torch.testing.assert_close(gradient, expected.sum(0))


def test_gradients_handed_down(process_of: Process) -> None:
    """Stride 0 from .sum(), a vector of weights, and a transposed one give what the chain rule says."""
    process = process_of(27)
    rows = random_rows(process, 24)
    log_score = random_log_score((24, 27), torch.float64).requires_grad_()
    loss = score_entropy_loss(log_score, *rows, process)
    (ones,) = torch.autograd.grad(loss, log_score, torch.ones(24, dtype=torch.float64), retain_graph=True)
    (summed,) = torch.autograd.grad(loss.sum(), log_score, retain_graph=True)
    assert torch.equal(summed, ones)
    weights = random_log_score((24, 2), torch.float64)[:, 0]
    (weighted,) = torch.autograd.grad(loss, log_score, weights)
    torch.testing.assert_close(weighted, weights[:, None] * ones)


@pytest.mark.costly("csrc", "sedd_ext")
def test_more_than_two_to_the_31_elements() -> None:
    """43,000 rows of which one is masked: the others are never read, so that the system never provides their memory."""
    process, rows = Absorbing(50257), 43_000
    log_score = torch.empty(rows, 50258, dtype=torch.bfloat16)
    log_score[-1] = random_log_score((50258,), torch.bfloat16)
    x_t = torch.zeros(rows, dtype=torch.int64)
    x_t[-1] = process.mask_id
    loss = score_entropy_loss(log_score, x_t, torch.zeros_like(x_t), 0.5, process)
    assert torch.equal(loss[-1], score_entropy_loss(log_score[-1], x_t[-1], x_t[0], 0.5, process))
    assert not loss[:-1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_round_as_torch_does(dtype: torch.dtype) -> None:
    """Scores of 1 hand the incoming float32 gradient through: any bit pattern, subnormal and overflowing ones too."""
    process, rows = Absorbing(40), 20_000
    patterns = torch.randint(-(2**31), 2**31, (rows,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    handed = patterns.to(torch.int32).view(torch.float32)
    # random patterns seldom have float16's exponents, and never lie half-way between two numbers
    handed[::2] = torch.logspace(-9, 5, rows // 2)
    below = handed[::4].to(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    handed[1::4] = (below.float() + above.float()) / 2
    handed[:6] = torch.tensor([65519.0, 65520.0, 2**-25, 1.5 * 2**-24, 0.0, -0.0])
    log_score = torch.zeros(rows, 41, dtype=dtype, requires_grad=True)
    x_t = torch.full((rows,), process.mask_id)
    (gradient,) = torch.autograd.grad(
        score_entropy_loss(log_score, x_t, torch.zeros_like(x_t), 0.5, process), log_score, handed
    )
    expected = handed.to(dtype)[:, None].expand(rows, 39)
    torch.testing.assert_close(gradient[:, 1:40], expected, rtol=0, atol=0, equal_nan=True)


def test_inputs_are_left_alone(process_of: Process) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    log_score = random_log_score((24, 27), torch.float32)
    before = [v.clone() for v in (log_score, *rows)]
    value_and_gradient(score_entropy_loss, log_score, rows, process)
    for now, then in zip((log_score, *rows), before, strict=True):
        assert torch.equal(now, then)


# --------------------------------------------------------------------------------------------------------- operator


def test_no_pull_is_none_at_minus_infinity() -> None:
    """At σ̄ = 800 nothing is left of x_0 (a = 0): its term vanishes, and is not 0 · -∞."""
    log_score = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64)
    x_t, x_0 = torch.tensor([1]), torch.tensor([0])
    loss = score_entropy_loss(log_score, x_t, x_0, 800.0, RankOne(torch.tensor([0.0, 0.5, 0.5])))
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize("sigma", [1e-250, 1e-30, 700.0, 1e300])
def test_extreme_noise(process_of: Process, sigma: float) -> None:
    """Never NaN: what float64 holds is right, and what float32 does not hold is infinite."""
    process, x = process_of(7), torch.tensor([6, 6, 5])
    rows = Rows(x, torch.tensor([1, 6, 2]), torch.full((3,), sigma, dtype=torch.float64))
    log_score = random_log_score((3, 7), torch.float64, spread=20.0)
    exact = reference.score_entropy_loss(log_score, *rows, process)
    torch.testing.assert_close(score_entropy_loss(log_score, *rows, process), exact, rtol=1e-12, atol=1e-12)
    single = score_entropy_loss(log_score.float(), *rows, process)
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=1e-5)


def test_rare_tokens_of_the_stationary_distribution() -> None:
    """π_x = 1.2e-38, the least that a process takes: 1/π_x is in the loss, and float32's end is not."""
    process = RankOne(torch.tensor([1.2e-38, 0.5, 0.5], dtype=torch.float64))
    rows = Rows(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]).double())
    log_score = torch.tensor([[0.0, 1.0, 2.0]])
    exact = reference.score_entropy_loss(log_score.double(), *rows, process)
    torch.testing.assert_close(score_entropy_loss(log_score, *rows, process), exact.float(), rtol=1e-5, atol=0)


def test_gradcheck(process_of: Process) -> None:
    process = process_of(7)
    rows = random_rows(process, 9)._replace(sigma=torch.linspace(0.1, 2.0, 9, dtype=torch.float64))
    shift = random_log_score((9,), torch.float64, seed=2)
    log_score = random_log_score((9, 7), torch.float64, spread=1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: score_entropy_loss(v, *rows, process, log_score_shift=shift), (log_score,), atol=1e-6, rtol=1e-5
    )
    assert torch.autograd.gradcheck(
        lambda v: score_entropy_loss(v, *rows, process, log_score_shift=shift, reduction="mean"), (log_score,)
    )


def test_second_derivatives_are_refused() -> None:
    """Never a gradient that lacks a term without saying so, as a gradient penalty would get it."""
    process = Uniform(7)
    log_score = random_log_score((9, 7), torch.float64).requires_grad_()
    rows = random_rows(process, 9)
    loss = score_entropy_loss(log_score, *rows, process)
    at_once = score_entropy_loss(log_score, *rows, process, reduction="mean")
    for function in (
        loss,
        loss**2,
        at_once,
        at_once**2,
    ):  # what comes down to the operator has no gradient of its own, or has one
        (gradient,) = torch.autograd.grad(function.sum(), log_score, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"score_entropy_loss: .*once"):
            (function.sum() + (gradient**2).sum()).backward(retain_graph=True)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(process_of: Process, threads: Callable[[int], None], dtype: torch.dtype) -> None:
    process = process_of(1025)
    rows = random_rows(process, 97)
    log_score = random_log_score((97, 1025), dtype)
    results = []
    for count in (1, 2):
        threads(count)
        at_once = gradient_of_one_sweep(log_score, rows, process)
        results.append((*value_and_gradient(score_entropy_loss, log_score, rows, process), at_once))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.operators("cpu", "cuda")  # the emulation is no device of torch
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(name: str, compiler: str) -> None:
    torch.compiler.reset()  # one function compiled for every backend and process meets the limit of recompilations
    process = PROCESSES[name](27)
    rows = random_rows(process, 24)

    def loss_of(log_score: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return score_entropy_loss(2 * log_score, x_t, x_0, sigma, process, log_score_shift=shift, reduction="mean")

    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    log_score, shift = random_log_score((24, 27), torch.float32), torch.full((24,), 0.5)
    results = []
    for function in (loss_of, compiled):
        leaf = log_score.clone().requires_grad_()
        loss = function(leaf, *rows, shift)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(process_of: Process, dtype: torch.dtype) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    arguments = (
        random_log_score((24, 27), dtype),
        *rows,
        random_log_score((24,), torch.float64),
        process.stationary.float() if process.family == "rank_one" else None,
        process.family,
        process.neg_entropy,
    )
    torch.library.opcheck(torch.ops.sedd_ext.score_entropy, to_device(arguments))
    torch.library.opcheck(torch.ops.sedd_ext.score_entropy_backward, to_device((torch.rand(24), *arguments)))
    weight = torch.rand(24, dtype=torch.float64)
    torch.library.opcheck(torch.ops.sedd_ext.score_entropy_sweep, to_device((weight, *arguments)))
    rescaled = torch.zeros(24, 27, dtype=dtype), torch.tensor(3.0, dtype=torch.float64), weight, *arguments
    torch.library.opcheck(torch.ops.sedd_ext.score_entropy_sweep_backward, to_device(rescaled))
