"""The plain PyTorch reference against explicit N×N matrices, term-by-term sums and the released formulation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explicit import (
    chi_square,
    generator_matrix,
    random_log_score,
    random_rows,
    score_entropy_by_terms,
    transition_matrix,
    true_log_score,
)

from sedd_ext import Absorbing, Euler, Hybrid, RankOne, Tweedie, reference
from sedd_ext.step import Step

Process = Callable[[int], RankOne]

STEPS = (Tweedie(0.1), Euler(0.1))
SIGMAS = [1e-4, 0.3, 2.0, 9.0]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("n", [2, 7, 27])
def test_transition(process_of: Process, n: int, sigma: float) -> None:
    process, tokens = process_of(n), torch.arange(n)
    matrix, given = transition_matrix(process, sigma), torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(reference.transition_column(tokens, given, process), matrix.T, **EXACT)
    torch.testing.assert_close(reference.transition_row(tokens, given, process), matrix, **EXACT)


@pytest.mark.parametrize("n", [2, 7, 27])
def test_loss_and_gradient_by_terms(process_of: Process, n: int) -> None:
    process = process_of(n)
    rows = random_rows(process, 24)
    log_score = random_log_score((24, n), torch.float64).requires_grad_()
    loss = reference.score_entropy_loss(log_score, *rows, process)
    (gradient,) = torch.autograd.grad(loss.sum(), log_score)
    by_terms = torch.stack(
        [
            score_entropy_by_terms(log_score[i], int(rows.x_t[i]), int(rows.x_0[i]), float(rows.sigma[i]), process)
            for i in range(24)
        ]
    )
    (gradient_by_terms,) = torch.autograd.grad(by_terms.sum(), log_score)
    torch.testing.assert_close(loss, by_terms, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, gradient_by_terms, rtol=1e-11, atol=1e-11)


def test_tweedie_with_the_true_score_is_the_posterior(process_of: Process) -> None:
    process, x = process_of(7), torch.arange(7)
    p_0 = torch.rand(7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p_0 /= p_0.sum()
    sigma, dsigma = 1.3, 0.4
    p_s, p_t = transition_matrix(process, sigma - dsigma) @ p_0, transition_matrix(process, sigma) @ p_0
    posterior = transition_matrix(process, dsigma) * p_s / p_t[:, None]  # Bayes; [x_t, x_s]
    probs = reference.reverse_probs(true_log_score(process, p_0, x, sigma), x, Tweedie(dsigma), process)
    torch.testing.assert_close(probs, posterior, **EXACT)


def test_tweedie_by_matrices(process_of: Process) -> None:
    """With any score: the clamped product of exp(-ΔQ) s and a row of exp(ΔQ)."""
    process, x, dsigma = process_of(7), torch.arange(7), 0.4
    log_score = random_log_score((7, 7), torch.float64)
    score = log_score.exp()
    score[x, x] = 1.0
    weights = (score @ transition_matrix(process, -dsigma).T).clamp(min=0) * transition_matrix(process, dsigma)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(reference.reverse_probs(log_score, x, Tweedie(dsigma), process), expected, **EXACT)


@pytest.mark.parametrize("step", [0.01, 3.0])  # the second takes more mass than there is
def test_euler_by_matrices(process_of: Process, step: float) -> None:
    process, x = process_of(7), torch.arange(7)
    log_score = random_log_score((7, 7), torch.float64)
    rate = log_score.exp() * generator_matrix(process)
    rate[x, x] = 0.0
    rate[x, x] = -rate.sum(-1)
    weights = (torch.eye(7, dtype=torch.float64) + step * rate).clamp(min=0)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(reference.reverse_probs(log_score, x, Euler(step), process), expected, **EXACT)


@pytest.mark.parametrize("step", STEPS, ids=["tweedie", "euler"])
@pytest.mark.parametrize("process", [Absorbing(6), Hybrid(6, 0.3)], ids=["absorbing", "hybrid"])
def test_denoising_is_the_step_without_the_mask(step: Step, process: RankOne) -> None:
    x, log_score = torch.arange(7), random_log_score((7, 7), torch.float64)
    expected = reference.reverse_probs(log_score, x, step, process)[:, :-1]
    if process.family == "absorbing":  # where nothing but the mask itself is left for the others to become
        torch.testing.assert_close(expected[:-1], torch.eye(6, dtype=torch.float64), **EXACT)
    last = reference.reverse_probs(log_score, x, step, process, denoise=True)
    assert (last[:, -1] == 0).all()
    torch.testing.assert_close(last[:, :-1], expected / expected.sum(-1, keepdim=True), **EXACT)


def test_shift_is_subtracted(process_of: Process) -> None:
    process = process_of(9)
    rows = random_rows(process, 12)
    log_score = random_log_score((12, 9), torch.float64)
    shift = random_log_score((12,), torch.float64, seed=2)
    shifted = log_score - shift[:, None]
    torch.testing.assert_close(
        reference.score_entropy_loss(log_score, *rows, process, log_score_shift=shift),
        reference.score_entropy_loss(shifted, *rows, process),
    )
    for step in STEPS:
        torch.testing.assert_close(
            reference.reverse_probs(log_score, rows.x_t, step, process, log_score_shift=shift),
            reference.reverse_probs(shifted, rows.x_t, step, process),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_at_x_does_not_matter(process_of: Process, value: float) -> None:
    process = process_of(9)
    rows = random_rows(process, 12)
    log_score = random_log_score((12, 9), torch.float64)
    spoilt = log_score.scatter(-1, rows.x_t[:, None], value)
    spoilt[process.stationary[rows.x_t] == 0] = value
    results = []
    for given in (log_score, spoilt):
        leaf = given.clone().requires_grad_()
        loss = reference.score_entropy_loss(leaf, *rows, process)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss, gradient, *(reference.reverse_probs(given, rows.x_t, step, process) for step in STEPS)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_samplers_draw_from_their_probabilities(process_of: Process) -> None:
    process, draws = process_of(7), 30_000
    generator = torch.Generator().manual_seed(0)
    log_score = random_log_score((7,), torch.float64)
    for x in (0, 6):
        tokens, rows = torch.full((draws,), x), log_score.expand(draws, 7)
        column = reference.transition_column(torch.tensor(x), torch.tensor(0.7).double(), process)
        for drawn, probs in (
            (reference.sample_transition(tokens, 0.7, process, generator=generator), column),
            (
                reference.reverse_sample(rows, tokens, Tweedie(0.7), process, generator=generator),
                reference.reverse_probs(log_score, torch.tensor(x), Tweedie(0.7), process),
            ),
            (
                reference.reverse_sample(rows, tokens, Euler(0.1), process, generator=generator),
                reference.reverse_probs(log_score, torch.tensor(x), Euler(0.1), process),
            ),
        ):
            counts = drawn.bincount(minlength=7)
            if (probs == 1).any():
                assert int(counts[probs == 1]) == draws
            else:
                assert chi_square(counts, probs) > 1e-3
