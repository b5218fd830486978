"""What the benchmarks compare with computes the same as the reference, so that the races are fair."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from explicit import chi_square, random_log_score, random_rows, rare_or_not, rare_tokens

from sedd_ext import Absorbing, Euler, Hybrid, RankOne, Tweedie, Uniform, reference

Process = Callable[[int], RankOne]


@pytest.mark.parametrize("process", [Absorbing(26), Uniform(27)], ids=["absorbing", "uniform"])
def test_released_and_dense_loss_agree(process: RankOne) -> None:
    rows = random_rows(process, 60)
    if process.family == "absorbing":  # the released loss takes any masked row for one that has moved
        rows = rows._replace(x_0=rows.x_0.clamp(max=25))
    released_input = random_log_score((60, 27), torch.float64).scatter(-1, rows.x_t[:, None], 0.0).requires_grad_()
    losses = [
        reference.score_entropy_loss(released_input, *rows, process),
        peers.released_score_entropy(released_input, rows.sigma, rows.x_t, rows.x_0, process).double(),
        peers.dense_score_entropy(released_input, *rows, process),
    ]
    gradients = [torch.autograd.grad(loss.sum(), released_input)[0] for loss in losses]
    # the released code adds entry x and takes it off again, in value and gradient
    for loss, gradient, tolerance in zip(losses[1:], gradients[1:], (1e-6, 1e-9), strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, gradients[0], rtol=tolerance, atol=tolerance)


def test_dense_loss_agrees_for_any_process(process_of: Process) -> None:
    process = process_of(27)
    rows = random_rows(process, 60)
    log_score = random_log_score((60, 27), torch.float64)
    torch.testing.assert_close(
        peers.dense_score_entropy(log_score, *rows, process),
        reference.score_entropy_loss(log_score, *rows, process),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("process", [Absorbing(6), Uniform(7)], ids=["absorbing", "uniform"])
def test_released_steps_draw_from_the_same_law(process: RankOne) -> None:
    """Where no token is rare: the one-stage Gumbel draw is right there."""
    draws, step = 200_000, 0.3
    log_score = random_log_score((7,), torch.float32, spread=0.5)
    log_score[6] = 0.0
    x, rows, steps = torch.full((draws,), 6), log_score.expand(draws, 7), torch.full((draws,), step)
    generator = torch.Generator().manual_seed(0)
    tweedie = peers.released_analytic_step(rows, x, steps, process, generator=generator)
    last = peers.released_analytic_step(rows, x, steps, process, denoise=True, generator=generator)
    euler = peers.released_euler_step(rows, x, steps / 10, process, generator=generator)
    at_6 = torch.tensor(6)
    for tokens, probs in (
        (tweedie, reference.reverse_probs(log_score.double(), at_6, Tweedie(step), process)),
        (last, reference.reverse_probs(log_score.double(), at_6, Tweedie(step), process, denoise=True)),
        (euler, reference.reverse_probs(log_score.double(), at_6, Euler(step / 10), process)),
    ):
        assert chi_square(tokens.bincount(minlength=7), probs) > 1e-3


def test_released_code_has_two_processes() -> None:
    process = Hybrid(6, 0.1)
    rows = random_rows(process, 2)
    with pytest.raises(NotImplementedError, match="process: "):
        peers.released_score_entropy(torch.zeros(2, 7), rows.sigma, rows.x_t, rows.x_0, process)
    with pytest.raises(NotImplementedError, match="process: "):
        peers.released_analytic_step(torch.zeros(2, 7), rows.x_t, rows.sigma, process)
    with pytest.raises(NotImplementedError, match="process: "):
        peers.released_euler_step(torch.zeros(2, 7), rows.x_t, rows.sigma, process)


@pytest.mark.costly("benchmarks/peers.py")
def test_one_stage_gumbel_denies_rare_tokens_their_share(threads: Callable[[int], None]) -> None:
    """In float32, as the released code draws: a tenth. So the samplers' tests of rare tokens can fail."""
    threads(1)
    probs, generator = rare_tokens() / rare_tokens().sum(), torch.Generator().manual_seed(0)
    rows = probs.float().repeat(250, 1)
    counts = sum(peers.one_stage_gumbel(rows, generator).bincount(minlength=4097) for _ in range(640))
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) < 0.01
