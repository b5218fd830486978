"""The CUDA kernels against the CPU's: every width and alignment, equal tokens; and the runtime's errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import (
    BACKENDS,
    emulated_kernels,
    euler_probs,
    euler_sample,
    running_on,
    sample_transition,
    score_entropy_loss,
    transition_column,
    transition_row,
    tweedie_probs,
    tweedie_sample,
)
from explicit import PROCESSES, random_log_score, random_rows
from torch import Tensor

from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, _dispatch, reference

pytestmark = pytest.mark.operators("emulated", "cuda")
CPU = BACKENDS["cpu"][0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Below a vector, around the vectors of every dtype, one to nine segments of 2 KiB, and around 4,096.
WIDTHS = [*range(1, 36), 63, 64, 65, 127, 129, 255, 256, 257, 505, 511, 512, 513, 1000, 1023, 1024, 1025, 1535, 2048]
WIDTHS += [2049, 3001, 4095, 4096, 4097, 4098, 4099]


def everything(graph: RankOne, rows: int, dtype: torch.dtype, offset: int = 0) -> dict[str, Tensor]:
    """Every operator's result; the log-scores start `offset` elements behind where torch would put them."""
    x_t, x_0, sigma = random_rows(graph, rows, seed=graph.dim)
    values = random_log_score((offset + rows * graph.dim,), dtype)
    log_score = values.requires_grad_()[offset:].view(rows, graph.dim)
    loss = score_entropy_loss(log_score, x_t, x_0, sigma, graph)
    (gradient,) = torch.autograd.grad(loss.sum(), log_score)
    fixed, size = log_score.detach(), 0.2 * sigma

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    return {
        "loss": loss.detach(),
        "gradient": gradient,
        "tweedie_probs": tweedie_probs(fixed, x_t, size, graph),
        "euler_probs": euler_probs(fixed, x_t, size, graph),
        "tweedie_sample": tweedie_sample(fixed, x_t, size, graph, generator=generator()),
        "euler_sample": euler_sample(fixed, x_t, size, graph, generator=generator()),
        "column": transition_column(x_0, sigma.to(loss.dtype), graph),
        "row": transition_row(x_t, sigma.to(loss.dtype), graph),
        "sample": sample_transition(x_0, sigma, graph, generator=generator()),
    }


def check_like_the_cpu(graph: RankOne, rows: int, dtype: torch.dtype, offset: int = 0) -> None:
    """What is a number agrees to the dtype's rounding of sums in another order; tokens are the same."""
    result = everything(graph, rows, dtype, offset)
    with running_on(CPU):
        expected = everything(graph, rows, dtype, offset)
    digits = 1e-12 if dtype == torch.float64 else 2e-6
    stored = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, digits)
    for name, value in result.items():
        true = expected[name]
        assert value.dtype == true.dtype
        if value.dtype == torch.int64:
            assert torch.equal(value, true), name
        elif name == "loss":
            # as large as the terms that cancel in it: some N e^ℓ
            torch.testing.assert_close(value, true, rtol=digits, atol=10 * digits * graph.dim)
        else:
            size = true.double().abs().amax(-1, keepdim=True) if true.numel() else true.double()
            relative = stored if name == "gradient" else digits
            error = (value.double() - true.double()).abs()
            assert (error <= relative * true.double().abs() + digits * size + (name == "gradient") * 2**-25).all(), name


@pytest.mark.every_variant
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(process: Callable[[int], RankOne], dtype: torch.dtype, rows: int) -> None:
    for n in WIDTHS:
        if n > 1 or process is PROCESSES["uniform"]:
            check_like_the_cpu(process(n), rows, dtype)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment(process: Callable[[int], RankOne], dtype: torch.dtype, offset: int) -> None:
    """Rows of an odd length start on every boundary in turn; a view starts where the gradient's memory does not."""
    for n in (2, 5, 131, 1029, 4099):
        check_like_the_cpu(process(n), 17, dtype, offset)


@pytest.mark.parametrize("n", [50257, 50258])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_vocabulary(process: Callable[[int], RankOne], dtype: torch.dtype, n: int) -> None:
    check_like_the_cpu(process(n), 5, dtype)


@pytest.mark.parametrize("name", ["tweedie", "euler"])
@pytest.mark.parametrize(("n", "draws"), [(27, 50_000), (1000, 8_000), (50_258, 400)])
def test_the_cpu_draws_the_same_tokens(process: Callable[[int], RankOne], name: str, n: int, draws: int) -> None:
    """From the same seed. A sum's order moves a boundary between tokens by 1e-7 of the axis: what falls there differs.

    Over all processes 292,000 draws a sampler. One in 10,000 may differ; pytest -rP shows how many do.
    """
    graph = process(n)
    sampler = tweedie_sample if name == "tweedie" else euler_sample
    x_t, log_score = random_rows(graph, draws).x_t, random_log_score((draws, n), torch.float32)
    if graph.process == "absorbing":  # a perfect model's scores at this noise; else every MASK would go
        log_score -= log_score.logsumexp(-1, keepdim=True)
    tokens = sampler(log_score, x_t, 0.5, graph, generator=torch.Generator().manual_seed(3))
    with running_on(CPU):
        expected = sampler(log_score, x_t, 0.5, graph, generator=torch.Generator().manual_seed(3))
    differing = int((tokens != expected).sum())
    print(f"{differing} of {draws} tokens differ")
    assert differing <= draws // 10_000
    assert (tokens != x_t).any()


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    """1,024 rows, whose first pass is split over blocks, and 1,025, where each block does its own: the same bits."""
    graph = Hybrid(5000, 0.3)
    x_t, log_score = random_rows(graph, 1025).x_t, random_log_score((1025, 5001), torch.bfloat16)
    many, few = (tweedie_probs(log_score[:rows], x_t[:rows], 0.4, graph) for rows in (1025, 1024))
    assert torch.equal(many[:1024], few)


@pytest.mark.every_variant
def test_the_same_bits_from_run_to_run(process: Callable[[int], RankOne]) -> None:
    first, second = (everything(process(3001), 5, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("n", "size"), [(2049, 82.0), (11, -92.0)])
def test_totals_beyond_float32(n: int, size: float) -> None:
    """2,049 scores of e^82 add up to more than float32 has, and so does the inverse of ten of e^-92."""
    for graph in (Absorbing(n - 1), Uniform(n)):
        log_score, x_t = torch.full((2, n), size), torch.full((2,), n - 1)
        log_score[0, 7] += 2
        probs = euler_probs(log_score, x_t, 1.0, graph, denoise=True)
        exact = reference.euler_probs(log_score.double(), x_t, 1.0, graph, denoise=True)
        torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.operators("emulated")
def test_the_runtimes_errors_have_the_operators_name() -> None:
    """A row too wide for a block's shared memory, and a device that is not there, in the emulation."""
    with running_on(BACKENDS["emulated"][0]):
        log_score = torch.zeros(1, 7_000_000)
        with pytest.raises(RuntimeError, match=r"^reverse_sample: CUDA: rows too wide"):
            tweedie_sample(log_score, torch.zeros(1).long(), 0.5, Uniform(7_000_000))
    out = torch.empty(3, dtype=torch.int64)
    arguments = (out.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 3, 7, 0, 0)
    assert emulated_kernels().sample_transition_cuda(*arguments, 0, 0, 99) is not None


def test_an_error_of_the_runtime_becomes_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        sample_transition_workspace = staticmethod(lambda *_: 0)
        sample_transition_cuda = staticmethod(lambda *_: "an illegal memory access was encountered")

    monkeypatch.setitem(
        _dispatch.LAUNCHERS,
        "cpu",
        lambda *arguments: _dispatch.launch_cuda(*arguments, kernels=Broken, stream=0),
    )
    with (
        running_on(CPU._replace(kind="as it is")),
        pytest.raises(RuntimeError, match=r"^sample_transition: CUDA: an"),
    ):
        sample_transition(torch.zeros(3).long(), 0.5, Uniform(7))
