"""The loss of a mean prediction: value and gradient against float64, what it equals, its manners as an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import mean_prediction_loss, score_entropy_loss, to_device
from explicit import (
    PROCESSES,
    Rows,
    Scales,
    bad_rows,
    largest_error,
    random_log_score,
    random_rows,
    score_entropy_by_terms,
    term_scales,
    transition_matrix,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What a kernel's error may exceed that of plain PyTorch in the same dtype by, in units of the terms that are summed.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}


def clean_rows(process: RankOne, count: int, seed: int = 0) -> Rows:
    """Rows of all kinds, without MASK among the clean tokens."""
    rows = random_rows(process, count, seed)
    return rows if process.mask_id is None else rows._replace(x_0=rows.x_0 % (process.dim - 1))


def value_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, rows: Rows, process: RankOne, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *rows, process, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def scales_of(logits: Tensor, rows: Rows, process: RankOne) -> Scales:
    """How large the terms of score entropy are, and those of the chain rule through the softmax."""
    log_score = reference.implied_log_score(logits.double(), rows.x_t, rows.sigma, process)
    terms = term_scales(log_score, rows, process)
    pi_x, live = process.stationary[rows.x_t], process.stationary[rows.x_t] > 0
    a, b = torch.exp(-rows.sigma), -torch.expm1(-rows.sigma)
    by_score = terms.gradient / log_score.exp()  # π_x (1 + r/s)
    by_mean = (a / (b * pi_x)).where(live, 0.0)[:, None] * by_score.nan_to_num(posinf=0.0)
    bend = (a / (pi_x * (a + b * pi_x))).where(live, 0.0)
    at_x = bend * (process.stationary * by_score.nan_to_num(posinf=0.0)).sum(-1)
    by_mean = by_mean.scatter(-1, rows.x_t[:, None], at_x[:, None])
    mean = logits.double()
    if process.mask_id is not None:
        mean = mean.masked_fill(torch.arange(process.dim) == process.mask_id, -torch.inf)
    mean = mean.softmax(-1)
    # the pull of x_0 is finite where μ_{x_0} underflows: at least the size of its own gradient
    pull = (a / b).where(live, 0.0)[:, None] * F.one_hot(rows.x_0, process.dim)
    return Scales(terms.loss, mean * (by_mean + (mean * by_mean).sum(-1, keepdim=True)) + pull * (1 + mean))


def check_accuracy(logits: Tensor, rows: Rows, process: RankOne, **options: Any) -> None:
    """The error against float64 is no larger than plain PyTorch's in the same dtype, plus a small bound."""
    exact = value_and_gradient(reference.mean_prediction_loss, logits.double(), rows, process, **options)
    plain = value_and_gradient(reference.mean_prediction_loss, logits, rows, process, **options)
    scales = scales_of(logits, rows, process)
    if process.mask_id is not None:  # no gradient at all
        scales.gradient[:, process.mask_id] = 0.0
    if options:  # the divergence of two distributions
        scales = Scales(1 + exact[0].abs(), torch.ones_like(exact[1]))
    result = value_and_gradient(mean_prediction_loss, logits, rows, process, **options)
    assert result[0].dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert result[1].dtype == logits.dtype
    for got, other, true, scale in zip(result, plain, exact, scales, strict=True):
        assert largest_error(got, true, scale) <= largest_error(other, true, scale) + BOUND[logits.dtype]


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 17, 27, 1025, 4099, 50258])
def test_value_and_gradient(process_of: Process, n: int, dtype: torch.dtype) -> None:
    process, count = process_of(n), 3 if n > 10_000 else 24
    check_accuracy(random_log_score((count, n), dtype), clean_rows(process, count), process)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_262145_entries(process_of: Process, dtype: torch.dtype) -> None:
    process = process_of(262_145)
    check_accuracy(random_log_score((3, 262_145), dtype), clean_rows(process, 3), process)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_discrete_steps(process_of: Process, share: float, dtype: torch.dtype) -> None:
    process = process_of(1025)
    rows = clean_rows(process, 24)
    check_accuracy(random_log_score((24, 1025), dtype), rows, process, sigma_s=share * rows.sigma)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [40.0, 1e4])
def test_peaky_logits(process_of: Process, spread: float, dtype: torch.dtype) -> None:
    """A softmax that is all on one token, also on x_t: 1 - μ_x is then 1e-30 or 0, and never negative."""
    process = process_of(131)
    logits = spread * (2 * torch.rand(48, 131, generator=torch.Generator().manual_seed(4)) - 1)
    rows = clean_rows(process, 48)
    logits[::4].scatter_(1, rows.x_t[::4, None], spread)
    logits[1::4].scatter_(1, rows.x_0[1::4, None], spread)
    rows = rows._replace(sigma=rows.sigma.clamp(min=1e-2))
    exact = value_and_gradient(reference.mean_prediction_loss, logits.to(dtype).double(), rows, process)
    loss, gradient = value_and_gradient(mean_prediction_loss, logits.to(dtype), rows, process)
    assert (loss >= 0).all()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
    torch.testing.assert_close(loss.double(), exact[0], rtol=max(1e-5, tolerance * 1e-3), atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- what it equals


def test_score_entropy_of_the_implied_score(process_of: Process) -> None:
    process = process_of(131)
    rows, logits = clean_rows(process, 48), random_log_score((48, 131), torch.float64)
    log_score = reference.implied_log_score(logits, rows.x_t, rows.sigma, process)
    loss = score_entropy_loss(log_score, *rows, process)
    allowed = 1e-13 * term_scales(log_score, rows, process).loss
    assert ((mean_prediction_loss(logits, *rows, process) - loss).abs() <= allowed).all()


def test_explicit_matrices(process_of: Process) -> None:
    """The score is Σ_k μ_k q(y | k) / q(x | k) with matrix exponentials, and L is summed term by term."""
    process = process_of(5)
    rows, logits = clean_rows(process, 24), random_log_score((24, 5), torch.float64)
    masked = logits.clone()
    if process.mask_id is not None:
        masked[:, process.mask_id] = -torch.inf
    loss = mean_prediction_loss(logits, *rows, process)
    for i, (x, x_0, sigma) in enumerate(zip(*(v.tolist() for v in rows), strict=True)):
        if process.stationary[x] == 0:
            assert loss[i] == 0
            continue
        columns = transition_matrix(process, sigma)
        score = (masked[i].softmax(0) * columns / columns[x]).sum(1)
        exact = score_entropy_by_terms(score.log(), x, x_0, sigma, process)
        torch.testing.assert_close(loss[i], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_explicit_divergence(process_of: Process, share: float) -> None:
    """With sigma_s: D_KL(q(x_s | x_t, x_0) ‖ Σ_k μ_k q(x_s | x_t, k)) with matrix exponentials and Bayes' rule."""
    process = process_of(5)
    rows, logits = clean_rows(process, 24), random_log_score((24, 5), torch.float64)
    masked = logits.clone()
    if process.mask_id is not None:
        masked[:, process.mask_id] = -torch.inf
    loss = mean_prediction_loss(logits, *rows, process, sigma_s=share * rows.sigma)
    for i, (x, x_0, sigma) in enumerate(zip(*(v.tolist() for v in rows), strict=True)):
        if process.stationary[x] == 0:
            continue
        earlier, rest, whole = (transition_matrix(process, sigma * f) for f in (share, 1 - share, 1.0))
        posterior = rest[x][:, None] * earlier / whole[x]  # [x_s, x_0]
        predicted = posterior @ masked[i].softmax(0)
        exact = (torch.xlogy(posterior[:, x_0], posterior[:, x_0] / predicted)).nansum()
        torch.testing.assert_close(loss[i], exact, rtol=1e-8, atol=1e-9)


@every_variant
def test_absorbing_is_weighted_cross_entropy() -> None:
    """MD4 and MDLM: -log μ_{x_0} / expm1(σ̄) at masked positions."""
    process, logits = Absorbing(130), random_log_score((24, 131), torch.float64)
    rows = clean_rows(process, 24)
    cross_entropy = F.cross_entropy(logits[:, :-1], rows.x_0, reduction="none")
    expected = torch.where(rows.x_t == 130, cross_entropy / torch.expm1(rows.sigma), 0.0)
    torch.testing.assert_close(mean_prediction_loss(logits, *rows, process), expected)


def test_small_steps_tend_to_continuous_time(process_of: Process) -> None:
    """D_KL of a step from σ̄ to σ̄ - δ is δ L as δ tends to 0."""
    process, logits = process_of(17), random_log_score((48, 17), torch.float64)
    rows = clean_rows(process, 48)._replace(sigma=torch.linspace(0.2, 3.0, 48).double())
    limit = mean_prediction_loss(logits, *rows, process)
    errors = [
        (mean_prediction_loss(logits, *rows, process, sigma_s=rows.sigma - step) / step - limit).abs().max()
        for step in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[1] < errors[0] / 8
    assert errors[2] < errors[1] / 8


@given(st.sampled_from(sorted(PROCESSES)), st.integers(2, 40), st.floats(1e-4, 10.0), st.integers(0, 2**31))
def test_never_negative(name: str, n: int, sigma: float, seed: int) -> None:
    process = PROCESSES[name](n)
    rows = clean_rows(process, 9, seed)._replace(sigma=torch.full((9,), sigma, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        logits = random_log_score((9, n), dtype, seed, 20.0)
        assert (mean_prediction_loss(logits, *rows, process) >= 0).all()


@every_variant
def test_zero_where_the_prediction_is_right(process_of: Process) -> None:
    process, rows = process_of(37), clean_rows(process_of(37), 24)
    logits = F.one_hot(rows.x_0, 37).double().log()
    for options in ({}, {"sigma_s": 0.5 * rows.sigma}):
        loss = mean_prediction_loss(logits, *rows, process, **options)
        torch.testing.assert_close(loss, torch.zeros(24).double(), rtol=0, atol=1e-12)


@every_variant
def test_small_losses_keep_their_digits() -> None:
    """At σ̄ = 14 and x_t = x_0 the score differs from the true one by a thousandth; the loss is about the square."""
    process = Uniform(1000)
    x = random_rows(process, 24).x_0
    rows = Rows(x, x, torch.full((24,), 14.0).double())
    logits = random_log_score((24, 1000), torch.float32, spread=0.5)
    exact = mean_prediction_loss(logits.double(), *rows, process)
    assert float(exact.max()) < 1e-6
    torch.testing.assert_close(mean_prediction_loss(logits, *rows, process).double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_the_logit_of_mask_is_ignored(value: float) -> None:
    for process in (Absorbing(36), Hybrid(36, 0.2)):
        rows, logits = clean_rows(process, 24), random_log_score((24, 37), torch.float32)
        dirty = logits.clone()
        dirty[:, -1] = value
        for a, b in zip(
            *(value_and_gradient(mean_prediction_loss, v, rows, process) for v in (logits, dirty)), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_cannot_move_are_exactly_zero(dtype: torch.dtype) -> None:
    rows = Rows(torch.tensor([3, 5, 7]), torch.tensor([3, 1, 2]), torch.full((3,), 0.5).double())
    for filling in (1.0, float("nan"), float("inf")):
        logits = torch.full((3, 38), filling, dtype=dtype)
        for result in value_and_gradient(mean_prediction_loss, logits, rows, Absorbing(37)):
            assert (result == 0).all()


@every_variant
@pytest.mark.parametrize("n", [5, 150])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_through(process_of: Process, value: float, n: int) -> None:
    """Row i has the value at entry i: its loss is NaN wherever it is, unless the row is not read or it is MASK's."""
    process, rows = process_of(n), clean_rows(process_of(n), n)
    logits = random_log_score((n, n), torch.float32).fill_diagonal_(value)
    counts = process.stationary[rows.x_t] > 0
    if process.mask_id is not None:
        counts[process.mask_id] = False
    loss, gradient = value_and_gradient(mean_prediction_loss, logits, rows, process)
    assert torch.equal(loss.isnan(), counts)
    assert torch.equal(gradient.isnan().any(-1), counts)


# ----------------------------------------------------------------------------------------------------- its manners


def test_batches_weights_and_reductions() -> None:
    process, rows = Uniform(11), random_rows(Uniform(11), 24)
    logits, weight = random_log_score((4, 6, 11), torch.float32), torch.linspace(0.1, 3.0, 4).double()[:, None]
    x_t, x_0, sigma = rows.x_t.view(4, 6), rows.x_0.view(4, 6), rows.sigma[:4, None]
    loss = mean_prediction_loss(logits, x_t, x_0, sigma, process)
    assert loss.shape == (4, 6)
    one = mean_prediction_loss(logits[2, 3], x_t[2, 3], x_0[2, 3], sigma[2, 0], process)
    assert torch.equal(one, loss[2, 3])
    weighted = mean_prediction_loss(logits, x_t, x_0, sigma, process, loss_weight=weight)
    torch.testing.assert_close(weighted, loss * weight.float())
    for reduction in ("mean", "sum"):
        reduced = mean_prediction_loss(logits, x_t, x_0, sigma, process, loss_weight=weight, reduction=reduction)
        torch.testing.assert_close(reduced, getattr(weighted, reduction)())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    tokens, logits = torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 11, requires_grad=True)
    loss = mean_prediction_loss(logits, tokens, tokens, 0.5, Absorbing(10))
    assert loss.shape == shape
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (*shape, 11)


def test_gradients_handed_down(process_of: Process) -> None:
    """Stride 0 from .sum(), a transposed vector, and strided logits give what the chain rule says."""
    process, rows = process_of(27), clean_rows(process_of(27), 24)
    logits = random_log_score((27, 24), torch.float64).T.requires_grad_()
    assert not logits.is_contiguous()
    loss = mean_prediction_loss(logits, *rows, process)
    (ones,) = torch.autograd.grad(loss, logits, torch.ones(24).double(), retain_graph=True)
    (summed,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    assert torch.equal(summed, ones)
    weights = random_log_score((24, 2), torch.float64)[:, 0]
    (weighted,) = torch.autograd.grad(loss, logits, weights)
    torch.testing.assert_close(weighted, weights[:, None] * ones)


def test_gradcheck(process_of: Process) -> None:
    process, rows = process_of(7), clean_rows(process_of(7), 12)
    rows = rows._replace(sigma=rows.sigma.clamp(min=0.1))
    logits = random_log_score((12, 7), torch.float64).requires_grad_()
    for options in ({}, {"sigma_s": 0.4 * rows.sigma}):
        assert torch.autograd.gradcheck(lambda v, o=options: mean_prediction_loss(v, *rows, process, **o), logits)


def test_a_second_derivative_raises() -> None:
    rows, logits = random_rows(Uniform(7), 3), random_log_score((3, 7), torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(mean_prediction_loss(logits, *rows, Uniform(7)).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_the_number_of_threads_does_not_matter(process_of: Process) -> None:
    process, rows = process_of(5003), clean_rows(process_of(5003), 30)
    logits, threads = random_log_score((30, 5003), torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_and_gradient(mean_prediction_loss, logits, rows, process)
        torch.set_num_threads(3)
        three = value_and_gradient(mean_prediction_loss, logits, rows, process)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


@pytest.mark.operators("cpu", "cuda")
def test_opcheck(process_of: Process) -> None:
    process, rows = process_of(27), random_rows(process_of(27), 6)
    stationary = process.stationary.float() if process.family == "rank_one" else None
    mask, logits = -1 if process.mask_id is None else process.mask_id, random_log_score((6, 27), torch.float32)
    for sigma_s in (None, 0.5 * rows.sigma):
        arguments = (logits, *rows, sigma_s, stationary, process.family, mask)
        operator = torch.ops.sedd_ext.mean_prediction
        torch.library.opcheck(operator, to_device((*arguments, False)))
        torch.library.opcheck(operator, to_device((*arguments, True)))
        _, numbers = operator(*to_device((*arguments, True)))
        torch.library.opcheck(
            torch.ops.sedd_ext.mean_prediction_backward, (*to_device((torch.rand(6),)), numbers, *to_device(arguments))
        )


@pytest.mark.operators("cpu", "cuda")
def test_compile(process_of: Process) -> None:
    process, rows = process_of(27), clean_rows(process_of(27), 6)

    def loss(logits: Tensor) -> Tensor:
        return mean_prediction_loss(logits, *rows, process, loss_weight=2.0).sum()

    torch.compiler.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logits = random_log_score((6, 27), torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(function(logits), logits)
        expected = value_and_gradient(mean_prediction_loss, logits, rows, process, loss_weight=2.0)[1]
        torch.testing.assert_close(gradient, expected)


BAD = {
    "x_t": (torch.tensor([1, 27, 3]), r"x_t: expected tokens in \[0, 27\), got 27 at index \[1\]"),
    "x_0": (torch.tensor([1, -1, 3]), r"x_0: expected tokens in \[0, 27\), got -1 at index \[1\]"),
    "sigma": (torch.tensor([1.0, -2.0, 1.0]).double(), r"sigma: expected finite numbers above 0, got -2.0 at index"),
    "sigma_s": (
        torch.tensor([0.0, 1.0, 0.5]).double(),
        r"sigma_s: expected numbers in \[0, sigma\), got 1.0 at index \[1\], where sigma is 1.0",
    ),
}


@every_variant
@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_values(name: str) -> None:
    """The CPU names the row; a CUDA kernel leaves NaN in it, and in no other."""
    arguments: dict[str, Any] = {
        "x_t": torch.tensor([1, 2, 3]),
        "x_0": torch.tensor([4, 5, 6]),
        "sigma": torch.ones(3).double(),
        "sigma_s": torch.tensor([0.0, 0.2, 0.5]).double(),
        name: BAD[name][0],
    }
    logits = random_log_score((3, 27), torch.float32).requires_grad_()
    if backends.current.names_bad_rows:
        with pytest.raises(ValueError, match=BAD[name][1]):
            mean_prediction_loss(logits, process=Uniform(27), **arguments)
        return
    loss = mean_prediction_loss(logits, process=Uniform(27), **arguments)
    assert bad_rows(loss.detach()) == [1]
    assert bad_rows(torch.autograd.grad(loss.sum(), logits)[0]) == [1]


def test_wrong_arguments() -> None:
    logits, tokens = torch.zeros(3, 27), torch.zeros(3, dtype=torch.int64)
    for change, error, message in (
        ({"logits": torch.zeros(3, 26)}, ValueError, r"logits: expected shape \[\*B, 27\]"),
        ({"logits": torch.zeros(3, 27, dtype=torch.int64)}, TypeError, "logits: expected a float32"),
        ({"x_t": tokens[:2]}, ValueError, r"x_t: expected shape \[3\], logits's but for its last axis"),
        ({"sigma_s": "soon"}, TypeError, "sigma_s: expected a number"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'none', 'mean' or 'sum'"),
        ({"process": "uniform"}, TypeError, "process: expected a process"),
    ):
        arguments: dict[str, Any] = {
            "logits": logits,
            "x_t": tokens,
            "x_0": tokens,
            "sigma": 1.0,
            "process": Uniform(27),
            **change,
        }
        with pytest.raises(error, match=message):
            mean_prediction_loss(**arguments)
    assert math.isfinite(float(mean_prediction_loss(logits, tokens, tokens, 1.0, Uniform(27)).sum()))
