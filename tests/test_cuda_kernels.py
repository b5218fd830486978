"""The CUDA kernels against the CPU's: every width and alignment, equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from backends import (
    BACKENDS,
    emulated_kernels,
    reverse_probs,
    reverse_sample,
    running_on,
    sample_transition,
    score_entropy_loss,
    transition_column,
    transition_row,
)
from explicit import PROCESSES, random_log_score, random_rows
from torch import Tensor

from sedd_ext import Absorbing, Euler, Hybrid, RankOne, Tweedie, Uniform, reference
from sedd_ext.step import Step

pytestmark = pytest.mark.operators("emulated", "cuda")
CPU = BACKENDS["cpu"][0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STEPS = [Tweedie, Euler]
# Below a vector, around the vectors of every dtype, one to nine segments of 2 KiB, and around 4,096.
WIDTHS = [*range(1, 36), 63, 64, 65, 127, 129, 255, 256, 257, 505, 511, 512, 513, 1000, 1023, 1024, 1025, 1535, 2048]
WIDTHS += [2049, 3001, 4095, 4096, 4097, 4098, 4099]

CHANGED = pytest.mark.costly("csrc", "sedd_ext", "tests/cuda_on_cpu")
MANY_DRAWS = [pytest.param(n, draws, marks=CHANGED) for n, draws in [(27, 50_000), (1000, 8_000), (50_258, 400)]]


def everything(process: RankOne, rows: int, dtype: torch.dtype, offset: int = 0) -> dict[str, Tensor]:
    """Every operator's result; the log-scores start `offset` elements behind where torch would put them."""
    x_t, x_0, sigma = random_rows(process, rows, seed=process.dim)
    values = random_log_score((offset + rows * process.dim,), dtype)
    log_score = values.requires_grad_()[offset:].view(rows, process.dim)
    loss = score_entropy_loss(log_score, x_t, x_0, sigma, process)
    (gradient,) = torch.autograd.grad(loss.sum(), log_score)
    fixed, size = log_score.detach(), 0.2 * sigma

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    return {
        "loss": loss.detach(),
        "gradient": gradient,
        **{f"{step.name}_probs": reverse_probs(fixed, x_t, step(size), process) for step in STEPS},
        **{
            f"{step.name}_sample": reverse_sample(fixed, x_t, step(size), process, generator=generator())
            for step in STEPS
        },
        "column": transition_column(x_0, sigma.to(loss.dtype), process),
        "row": transition_row(x_t, sigma.to(loss.dtype), process),
        "sample": sample_transition(x_0, sigma, process, generator=generator()),
    }


def check_like_the_cpu(process: RankOne, rows: int, dtype: torch.dtype, offset: int = 0) -> None:
    """What is a number agrees to the dtype's rounding of sums in another order; tokens are the same."""
    result = everything(process, rows, dtype, offset)
    with running_on(CPU):
        expected = everything(process, rows, dtype, offset)
    digits = 1e-12 if dtype == torch.float64 else 2e-6
    stored = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, digits)
    for name, value in result.items():
        true = expected[name]
        assert value.dtype == true.dtype
        if value.dtype == torch.int64:
            assert torch.equal(value, true), name
        elif name == "loss":
            # as large as the terms that cancel in it: some N e^ℓ
            torch.testing.assert_close(value, true, rtol=digits, atol=10 * digits * process.dim)
        else:
            size = true.double().abs().amax(-1, keepdim=True) if true.numel() else true.double()
            relative = stored if name == "gradient" else digits
            error = (value.double() - true.double()).abs()
            assert (error <= relative * true.double().abs() + digits * size + (name == "gradient") * 2**-25).all(), name


@pytest.mark.every_variant
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(process_of: Callable[[int], RankOne], dtype: torch.dtype, rows: int) -> None:
    for n in WIDTHS:
        if n > 1 or process_of is PROCESSES["uniform"]:
            check_like_the_cpu(process_of(n), rows, dtype)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment(process_of: Callable[[int], RankOne], dtype: torch.dtype, offset: int) -> None:
    """Rows of an odd length start on every boundary in turn; a view starts where the gradient's memory does not."""
    for n in (2, 5, 131, 1029, 4099):
        check_like_the_cpu(process_of(n), 17, dtype, offset)


@pytest.mark.parametrize("n", [50257, 50258])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_vocabulary(process_of: Callable[[int], RankOne], dtype: torch.dtype, n: int) -> None:
    check_like_the_cpu(process_of(n), 5, dtype)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize(("n", "draws"), [(27, 5_000), (1000, 800), (50_258, 40), *MANY_DRAWS])
def test_the_cpu_draws_the_same_tokens(
    process_of: Callable[[int], RankOne], step: Callable[[float], Step], n: int, draws: int
) -> None:
    """From the same seed. A sum's order moves a boundary between tokens by 1e-7 of the axis: what falls there differs.

    Over all processes 29,200 draws a sampler, and ten times as many where a source has changed. One in 10,000 may
    differ; pytest -rP shows how many do.
    """
    process = process_of(n)
    x_t, log_score = random_rows(process, draws).x_t, random_log_score((draws, n), torch.float32)
    if process.family == "absorbing":  # a perfect model's scores at this noise; else every MASK would go
        log_score -= log_score.logsumexp(-1, keepdim=True)
    tokens = reverse_sample(log_score, x_t, step(0.5), process, generator=torch.Generator().manual_seed(3))
    with running_on(CPU):
        expected = reverse_sample(log_score, x_t, step(0.5), process, generator=torch.Generator().manual_seed(3))
    differing = int((tokens != expected).sum())
    print(f"{differing} of {draws} tokens differ")
    assert differing <= draws // 10_000
    assert (tokens != x_t).any()


@contextmanager
def shared_memory(most: int) -> Iterator[None]:
    """A block of the emulated kernels can have so many bytes."""
    emulated_kernels().set_max_shared(most)
    try:
        yield
    finally:
        emulated_kernels().set_max_shared(-1)


@pytest.mark.operators("emulated")
def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    """1,024 rows, whose first pass is split over blocks, and 1,025, where each block does its own: the same bits.

    Of rows that shared memory has no room for.
    """
    process = Hybrid(5000, 0.3)
    x_t, log_score = random_rows(process, 1025).x_t, random_log_score((1025, 5001), torch.bfloat16)
    with shared_memory(0):
        many, few = (reverse_probs(log_score[:rows], x_t[:rows], Tweedie(0.4), process) for rows in (1025, 1024))
    assert torch.equal(many[:1024], few)


@pytest.mark.operators("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameterization", ["score", "mean"])
def test_a_kept_row_has_the_bits_of_one_that_is_read_again(
    process_of: Callable[[int], RankOne], parameterization: Literal["score", "mean"], dtype: torch.dtype
) -> None:
    """From eight rows a block to a row with more segments a warp than its copies have groups, at every alignment."""
    for n in (27, 131, 1029, 4099, 50_257, 320_000 // dtype.itemsize + 1):
        process = process_of(n)
        x_t, _, sigma = random_rows(process, 9 if n < 200 else 3)
        options = {"parameterization": parameterization, "sigma": sigma if parameterization == "mean" else None}
        for offset in (0, 1, 3):
            log_score = random_log_score((offset + len(x_t) * n,), dtype)[offset:].view(-1, n)
            probs, used = [], []
            for most in (2**20, 0):
                with shared_memory(most):
                    probs.append(reverse_probs(log_score, x_t, Tweedie(0.5 * sigma), process, denoise=True, **options))
                    used.append(emulated_kernels().launch_shared_bytes())
            assert used[0] >= n * dtype.itemsize + used[1]
            assert not probs[0].isnan().any()
            assert torch.equal(*probs), (n, offset)


@pytest.mark.every_variant
def test_the_same_bits_from_run_to_run(process_of: Callable[[int], RankOne]) -> None:
    first, second = (everything(process_of(3001), 5, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("n", "size"), [(2049, 82.0), (11, -92.0)])
def test_totals_beyond_float32(n: int, size: float) -> None:
    """2,049 scores of e^82 add up to more than float32 has, and so does the inverse of ten of e^-92."""
    for process in (Absorbing(n - 1), Uniform(n)):
        log_score, x_t = torch.full((2, n), size), torch.full((2,), n - 1)
        log_score[0, 7] += 2
        probs = reverse_probs(log_score, x_t, Euler(1.0), process, denoise=True)
        exact = reference.reverse_probs(log_score.double(), x_t, Euler(1.0), process, denoise=True)
        torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-12)
