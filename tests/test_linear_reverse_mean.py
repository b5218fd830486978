"""The head fused with reverse steps from a mean prediction: the law of the unfused ones, in chunks of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import Backend, linear_reverse_sample, reverse_sample, to_device
from explicit import PROCESSES, chi_square, random_log_score, random_rows
from torch import Tensor

import sedd_ext.reverse_mean as module
from sedd_ext import Absorbing, Euler, GeneralizedMasked, RankOne, Tweedie, reference
from sedd_ext.reverse_mean import mean_numbers
from sedd_ext.step import MeanStep

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STEPS: dict[str, Callable[[Tensor], MeanStep]] = {
    "tweedie": lambda sigma: Tweedie(0.3 * sigma),
    "euler": lambda sigma: Euler(0.2 * sigma),
}
both_steps = pytest.mark.parametrize("kind", STEPS)


def random_head(n: int, dtype: torch.dtype, d: int = 4) -> tuple[Tensor, Tensor]:
    weight, bias = random_log_score((n, d), dtype, 1, 0.7), random_log_score((n,), dtype, 2, 0.7)
    return weight, bias


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@both_steps
@pytest.mark.parametrize(("dtype", "denoise"), list(zip(DTYPES, [False, True, True, False], strict=True)), ids=str)
def test_samples_follow_the_probabilities(
    backend: Backend, process_of: Process, kind: str, dtype: torch.dtype, denoise: bool
) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    hidden, (weight, bias) = random_log_score((4,), dtype), random_head(27, dtype)
    logits, sigma = F.linear(hidden, weight, bias).double(), torch.tensor(0.9, dtype=torch.float64)
    options = {"denoise": denoise, "parameterization": "mean", "sigma": sigma}
    for x in (4, 26):
        drawn = linear_reverse_sample(
            hidden.expand(draws, 4),
            weight,
            bias,
            torch.full((draws,), x),
            STEPS[kind](sigma),
            process,
            generator=seeded(x),
            buffer_bytes=1 << 16,
            **options,
        )
        probs = reference.reverse_probs(logits, torch.tensor(x), STEPS[kind](sigma), process, **options)
        counts = drawn.bincount(minlength=27)
        if (probs == 1).any():
            assert int(counts[probs == 1]) == draws
        else:
            assert chi_square(counts, probs) > 1e-3


@every_variant
@pytest.mark.parametrize("kind", [*STEPS, "generalized"])
def test_tokens_are_those_of_the_unfused_operator(
    process_of: Process, kind: str, threads: Callable[[int], None]
) -> None:
    """Whatever the number of threads, and however many rows fit into the buffer. Float64 products are all alike."""
    process = process_of(2500)
    rows = random_rows(process, 60)
    hidden, (weight, bias) = random_log_score((60, 4), torch.float64), random_head(2500, torch.float64)
    step, sigma = STEPS.get(kind, Tweedie)(rows.sigma), rows.sigma
    if kind == "generalized":
        process, step, sigma = Absorbing(2499), GeneralizedMasked(0.2, 0.9, torch.arange(2500.0) + 1), None
        rows = rows._replace(x_t=torch.where(torch.arange(60) % 2 == 0, 2499, rows.x_t))
    options: dict[str, Any] = {"parameterization": "mean", "sigma": sigma}
    logits = F.linear(hidden, weight, bias)
    expected = reverse_sample(logits, rows.x_t, step, process, generator=seeded(3), **options)
    for count, buffer_bytes in ((1, 1 << 26), (2, 1), (2, 7 * 8 * 2500)):
        threads(count)
        options["buffer_bytes"] = buffer_bytes
        drawn = linear_reverse_sample(hidden, weight, bias, rows.x_t, step, process, generator=seeded(3), **options)
        assert torch.equal(drawn, expected)


def test_rows_that_cannot_move_do_not_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    process, x = Absorbing(26), torch.tensor([26, 1, 26, 2, 3])
    seen: list[int] = []
    launch = module.launch

    def recorded(kernel: str, **arguments: Any) -> Any:
        seen.append(arguments["rows"])
        return launch(kernel, **arguments)

    monkeypatch.setattr(module, "launch", recorded)
    weight, bias = random_head(27, torch.float32)
    states = torch.zeros(5, 4)
    states[[1, 3, 4]] = float("nan")
    for step, sigma in ((Tweedie(0.5), 0.5), (GeneralizedMasked(0.0, 0.5, torch.ones(27)), None)):
        seen.clear()
        options: dict[str, Any] = {"parameterization": "mean", "sigma": sigma, "denoise": True}
        drawn = linear_reverse_sample(states, weight, bias, x, step, process, **options)
        assert seen == [2]
        tempered = linear_reverse_sample(states, weight, bias, x, step, process, temperature=0.5, **options)
        assert seen == [2, 2]
        for tokens in (drawn, tempered):
            assert tokens[[1, 3, 4]].tolist() == [1, 2, 3]
            assert (tokens != 26).all()


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (0.8, 0.9)])
def test_temperature_and_top_p(backend: Backend, process_of: Process, temperature: float, top_p: float) -> None:
    process, draws, x = process_of(27), backend.draws(20_000), torch.tensor(26)
    hidden, (weight, bias) = random_log_score((4,), torch.float32), random_head(27, torch.float32)
    options: dict[str, Any] = {"parameterization": "mean", "sigma": 0.9}
    drawn = linear_reverse_sample(
        hidden.expand(draws, 4),
        weight,
        bias,
        x.repeat(draws),
        Tweedie(0.4),
        process,
        generator=seeded(5),
        temperature=temperature,
        top_p=top_p,
        buffer_bytes=27 * 16 * 1000,
        **options,
    )
    logits = F.linear(hidden, weight, bias).double()
    probs = reference.reverse_probs(logits, x, Tweedie(0.4), process, **options)
    law = reference._tempered(probs, x, temperature, top_p)
    if (law == 1).any():
        assert (drawn == 26).all()
    else:
        assert chi_square(drawn.bincount(minlength=27), law) > 1e-3


@both_steps
def test_shapes(process_of: Process, kind: str) -> None:
    process = process_of(27)
    rows, (weight, bias) = random_rows(process, 24), random_head(27, torch.float32)
    hidden = random_log_score((24, 4), torch.float32)

    def call(hidden: Tensor, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        return linear_reverse_sample(
            hidden,
            weight,
            bias,
            x,
            STEPS[kind](sigma),
            process,
            generator=seeded(),
            parameterization="mean",
            sigma=sigma,
            **options,
        )

    flat = call(hidden, rows.x_t, rows.sigma)
    shaped = call(hidden.view(4, 6, 4), rows.x_t.view(4, 6), rows.sigma.view(4, 6))
    assert torch.equal(shaped.flatten(), flat)
    for options in ({}, {"temperature": 0.5}):
        assert call(hidden[0], rows.x_t[0], rows.sigma[0], **options).shape == ()
        assert call(hidden[:0], rows.x_t[:0], rows.sigma[:0], **options).shape == (0,)


@both_steps
def test_autocast(process_of: Process, kind: str) -> None:
    process = process_of(27)
    rows, head = random_rows(process, 200), random_head(27, torch.float32)
    hidden, options = random_log_score((200, 4), torch.float32), {"parameterization": "mean", "sigma": 0.7}
    step, results = STEPS[kind](torch.tensor(0.7)), []
    rounded = [v.bfloat16() for v in (hidden, *head)]
    results.append(linear_reverse_sample(*rounded, rows.x_t, step, process, generator=seeded(), **options))
    with torch.autocast("cpu", torch.bfloat16):
        results.append(linear_reverse_sample(hidden, *head, rows.x_t, step, process, generator=seeded(), **options))
    assert torch.equal(*results)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("option", [{}, {"temperature": 0.5}])
def test_meta_tensors(option: dict[str, float]) -> None:
    hidden, weight, x = (torch.zeros(s, device="meta") for s in ((3, 4), (7, 4), (3,)))
    linear_reverse_sample(torch.zeros(1, 1), torch.zeros(2, 1), None, torch.ones(1).long(), Tweedie(0.1), Absorbing(1))
    result = linear_reverse_sample(
        hidden, weight, None, x.long(), Tweedie(0.1), Absorbing(6), parameterization="mean", sigma=0.5, **option
    )
    assert result.is_meta
    assert result.shape == (3,)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("kind", [*STEPS, "generalized"])
def test_opcheck(process_of: Process, kind: str, capacity: int | None) -> None:
    process = process_of(27)
    rows, head = random_rows(process, 24), random_head(27, torch.float32)
    step, sigma = STEPS.get(kind, Tweedie)(rows.sigma), rows.sigma
    if kind == "generalized":
        process, step, sigma = Absorbing(26), GeneralizedMasked(0.2, 0.9, torch.ones(27)), None
    numbers = mean_numbers(rows.x_t, step, process, sigma, None, True, torch.float32)
    hidden = random_log_score((24, 4), torch.float32)
    arguments = (hidden, *head, *numbers, 27, 0, "", torch.float32, 1 << 20, capacity, torch.tensor([3]))
    torch.library.opcheck(torch.ops.sedd_ext.linear_reverse_mean_sample, to_device(arguments))


@pytest.mark.operators("cpu", "cuda")
@both_steps
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(kind: str, name: str) -> None:
    torch.compiler.reset()
    process = PROCESSES[name](27)
    rows, (weight, bias) = random_rows(process, 24), random_head(27, torch.float32)
    hidden = random_log_score((24, 4), torch.float32)

    def call(hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        step = STEPS[kind](sigma)
        return linear_reverse_sample(2 * hidden, weight, bias, x, step, process, parameterization="mean", sigma=sigma)

    results = []
    with torch.random.fork_rng():
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            results.append(function(hidden, rows.x_t, rows.sigma))
    assert torch.equal(*results)
