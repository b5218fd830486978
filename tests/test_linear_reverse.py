"""The head fused with the reverse steps: the law of the unfused ones, however the vocabulary is cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import BACKENDS, Backend, linear_reverse_sample, running_on, to_device
from explicit import PROCESSES, bad_rows, chi_square, random_log_score, random_rows, rare_or_not, rare_tokens
from torch import Tensor

import sedd_ext.linear_reverse as module
from sedd_ext import Absorbing, Euler, Hybrid, RankOne, Tweedie, Uniform, reference
from sedd_ext.step import Step

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


StepOf = Callable[..., Tweedie | Euler]
"""A step from its noise."""
both_steps = pytest.mark.parametrize("step", [Tweedie, Euler], ids=["tweedie", "euler"])


def random_head(n: int, dtype: torch.dtype, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """One hidden state [d], weight and bias."""
    shapes = [(d,), (n, d), (n,)]
    hidden, weight, bias = (random_log_score(shape, dtype, seed, 0.7) for seed, shape in enumerate(shapes))
    return hidden, weight, bias


def log_score_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the operator's products give them: of 16-bit tensors, rounded to 16 bits."""
    return F.linear(hidden, weight, bias).double()


def draw(step: Step, hidden: Tensor, draws: int, x: int, *rest: Any, **options: Any) -> Tensor:
    """So many draws from one state; the rest is weight, bias and process."""
    weight, bias, process = rest
    x_t = torch.full((draws,), x)
    return linear_reverse_sample(hidden.expand(draws, -1), weight, bias, x_t, step, process, **options)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, sweep) of every tile that reaches the kernel."""
    seen: list[tuple[int, int]] = []
    launch = module.launch

    def recorded(kernel: str, **arguments: Any) -> Any:
        seen.append((arguments["rows"], arguments["sweep"]))
        return launch(kernel, **arguments)

    monkeypatch.setattr(module, "launch", recorded)
    return seen


# -------------------------------------------------------------------------------------------------------------- law


@both_steps
@pytest.mark.parametrize(("dtype", "denoise"), list(zip(DTYPES, [False, True, True, False], strict=True)), ids=str)
def test_samples_follow_the_probabilities(
    backend: Backend, process_of: Process, step: StepOf, dtype: torch.dtype, denoise: bool
) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    head = random_head(27, dtype)
    generator = torch.Generator().manual_seed(0)
    for x in (4, 26):  # of absorbing diffusion only the second can move
        options = {"denoise": denoise, "log_score_shift": 0.5}
        drawn = draw(step(0.2), head[0], draws, x, *head[1:], process, generator=generator, **options)
        probs = reference.reverse_probs(log_score_of(*head), torch.tensor(x), step(0.2), process, **options)
        counts = drawn.bincount(minlength=27)
        if (probs == 1).any():
            assert int(counts[probs == 1]) == draws
        else:
            assert chi_square(counts, probs) > 1e-3


@every_variant
@both_steps
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_samples_from_several_tiles(backend: Backend, process_of: Process, step: StepOf, size: float) -> None:
    """4,099 tokens in three tiles, whose frequencies fall like 1/rank, from small and large steps."""
    process, draws = process_of(4099), backend.draws(6000)
    x = int(process.stationary.nonzero()[-1])
    _, weight, _ = random_head(4099, torch.float32)
    ranks = torch.randperm(4099, generator=torch.Generator().manual_seed(0)) + 1.0
    hidden, bias = torch.zeros(4), -ranks.log()
    if process.family != "absorbing":
        bias -= process.stationary[x].log().float()
    drawn = draw(step(size), hidden, draws, x, weight, bias, process, generator=torch.Generator().manual_seed(2))
    probs = reference.reverse_probs(bias.double(), torch.tensor(x), step(size), process)
    assert chi_square(drawn.bincount(minlength=4099), probs) > 1e-3


def test_rows_that_are_refused_are_drawn_again(backend: Backend, sweeps: list[tuple[int, int]]) -> None:
    """At Δ = 5 the clamp takes most of the scores away: hardly an entry survives the first sweep, and the law holds."""
    process, draws = Uniform(2500), backend.draws(12_000)
    _, weight, _ = random_head(2500, torch.float32)
    bias = random_log_score((2500,), torch.float32, spread=0.3)
    drawn = draw(Tweedie(5.0), torch.zeros(4), draws, 7, weight, bias, process)
    probs = reference.reverse_probs(bias.double(), torch.tensor(7), Tweedie(5.0), process)
    assert (probs == 0).any()
    assert chi_square(drawn.bincount(minlength=2500), probs) > 1e-3
    again = [rows for rows, sweep in sweeps if sweep == 1]
    assert again[0] > 0.2 * draws


def test_samples_of_equal_scores(backend: Backend) -> None:
    """At Δ = 40 of 1 - e^{-Δ} nothing is left but 1 in float64, and every entry is refused in the first sweep."""
    process, draws = Uniform(2500), backend.draws(12_000)
    weight, bias = torch.zeros(2500, 4), torch.zeros(2500)
    drawn = draw(Tweedie(40.0), torch.zeros(4), draws, 7, weight, bias, process)
    assert chi_square((drawn // 25).bincount(minlength=100), torch.full((100,), 0.01)) > 1e-3


@both_steps
@pytest.mark.operators("cpu", "cuda")  # the emulation draws the CPU's tokens, see below
def test_rare_tokens_get_their_share(step: StepOf) -> None:
    """A small step from a MASK that mostly stays, over three tiles."""
    process, size, wanted = Absorbing(4096), 0.002, rare_tokens()
    bias = (wanted / (math.expm1(size) if step is Tweedie else size)).log().float()
    probs = reference.reverse_probs(bias.double(), torch.tensor(4096), step(size), process)
    counts = torch.zeros(4097, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        drawn = draw(step(size), torch.zeros(1), 4000, 4096, torch.zeros(4097, 1), bias, process, generator=generator)
        counts += drawn.bincount(minlength=4097)
    assert chi_square(counts, probs) > 0.01
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) > 0.01


def tempered(probs: Tensor, x: int, temperature: float, top_p: float) -> Tensor:
    """What temperature and top_p make of the probabilities of one row."""
    jump = probs.clone()
    jump[x] = 0.0
    jump = (jump / jump.max()) ** (1 / temperature)
    order = jump.argsort(descending=True, stable=True)
    held, kept = 0.0, torch.zeros_like(jump)
    for y in order.tolist():
        if held >= top_p * float(jump.sum()):
            break
        held += float(jump[y])
        kept[y] = jump[y]
    kept *= (1 - probs[x]) / kept.sum()
    kept[x] = probs[x]
    return kept


@pytest.mark.operators("cpu", "cuda")
@both_steps
@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.7, 1.0), (1.0, 0.6), (0.8, 0.9)])
def test_temperature_and_top_p(
    backend: Backend, process_of: Process, step: StepOf, temperature: float, top_p: float
) -> None:
    process, draws = process_of(27), backend.draws(20_000)
    head = random_head(27, torch.float32)
    options = {"temperature": temperature, "top_p": top_p, "buffer_bytes": 27 * 16 * 1000}
    drawn = draw(
        step(0.4), head[0], draws, 26, *head[1:], process, generator=torch.Generator().manual_seed(5), **options
    )
    probs = reference.reverse_probs(log_score_of(*head), torch.tensor(26), step(0.4), process)
    law = tempered(probs, 26, temperature, top_p)
    torch.testing.assert_close(reference._tempered(probs, torch.tensor(26), temperature, top_p), law)
    if (law == 1).any():
        assert (drawn == 26).all()
    else:
        assert chi_square(drawn.bincount(minlength=27), law) > 1e-3


@both_steps
@pytest.mark.parametrize("option", [{"temperature": 1e-3}, {"top_p": 1e-6}])
def test_greedy(step: StepOf, option: dict[str, float]) -> None:
    """Nearly nothing of either leaves the most probable token."""
    process, head = Absorbing(26), random_head(27, torch.float32)
    best = log_score_of(*head)[:26].argmax()
    drawn = draw(step(0.4), head[0], 200, 26, *head[1:], process, denoise=True, **option)
    assert (drawn == best).all()


# ------------------------------------------------------------------------------------------------- what is not done


@both_steps
def test_rows_that_cannot_move_do_not_reach_the_head(step: StepOf, sweeps: list[tuple[int, int]]) -> None:
    process, x = Absorbing(26), torch.tensor([26, 1, 26, 2, 3])
    hidden, weight, bias = random_head(27, torch.float32)
    states = hidden.repeat(5, 1)
    states[[1, 3, 4]] = float("nan")
    drawn = linear_reverse_sample(states, weight, bias, x, step(0.5), process, denoise=True)
    assert drawn[[1, 3, 4]].tolist() == [1, 2, 3]
    assert (drawn != 26).all()
    assert sweeps == [(2, 0)]
    tempered = linear_reverse_sample(states, weight, bias, x, step(0.5), process, denoise=True, temperature=0.5)
    assert tempered[[1, 3, 4]].tolist() == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- manners


@every_variant
@both_steps
def test_same_generator_same_tokens(process_of: Process, step: StepOf, threads: Callable[[int], None]) -> None:
    """Whatever the number of threads, and however many rows fit into the buffer."""
    process = process_of(4099)
    x = random_rows(process, 60).x_t
    _, weight, bias = random_head(4099, torch.float64)
    hidden = random_log_score((60, 4), torch.float64, seed=9)
    several = []
    for count, buffer_bytes in ((1, 1 << 26), (2, 1 << 26), (2, 1), (2, 7 * 8 * 2048)):
        threads(count)
        generator = torch.Generator().manual_seed(11)
        options = {"generator": generator, "buffer_bytes": buffer_bytes}
        several.append(
            [linear_reverse_sample(hidden, weight, bias, x, step(0.5), process, **options) for _ in range(2)]
        )
    for others in several[1:]:
        for one, other in zip(several[0], others, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(*several[0])


@pytest.mark.operators("emulated")
@both_steps
@pytest.mark.parametrize("n", [27, 5003])
def test_tokens_are_those_of_the_cpu(process_of: Process, step: StepOf, n: int) -> None:
    """Sums in another order move a boundary by 1e-7 of the axis: of these draws, none falls between."""
    process, rows = process_of(n), 2000 if n < 100 else 300
    x = random_rows(process, rows).x_t
    _, weight, bias = random_head(n, torch.float32)
    hidden = random_log_score((rows, 4), torch.float32, seed=9)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    emulated = linear_reverse_sample(hidden, weight, bias, x, step(0.7), process, generator=generators[0])
    with running_on(BACKENDS["cpu"][0]):
        assert torch.equal(
            linear_reverse_sample(hidden, weight, bias, x, step(0.7), process, generator=generators[1]), emulated
        )


@both_steps
def test_shapes_and_strides(process_of: Process, step: StepOf) -> None:
    process = process_of(27)
    x = random_rows(process, 24).x_t
    _, weight, bias = random_head(27, torch.float32)
    hidden = random_log_score((24, 4), torch.float32)
    size = torch.linspace(0.1, 2.0, 24).view(4, 6)

    def call(hidden: Tensor, weight: Tensor, x: Tensor, size: Tensor, **options: Any) -> Tensor:
        return linear_reverse_sample(
            hidden, weight, bias, x, step(size), process, generator=torch.Generator().manual_seed(0), **options
        )

    flat = call(hidden, weight, x, size.flatten())
    assert flat.shape == (24,)
    assert flat.dtype == torch.int64
    assert torch.equal(call(hidden.view(4, 6, 4), weight, x.view(4, 6), size).flatten(), flat)
    strided = [torch.stack([v, v], -1)[..., 0] for v in (hidden, weight, x, size.flatten())]
    assert torch.equal(call(*strided), flat)
    for options in ({}, {"temperature": 0.5}):
        assert call(hidden[0], weight, x[0], size[0, 0], **options).shape == ()
        assert call(hidden[:0], weight, x[:0], size.flatten()[:0], **options).shape == (0,)


@both_steps
def test_autocast(process_of: Process, step: StepOf) -> None:
    """The product in bfloat16: the tokens are those of tensors that are bfloat16."""
    process = process_of(27)
    x = random_rows(process, 200).x_t
    _, weight, bias = random_head(27, torch.float32)
    hidden = random_log_score((200, 4), torch.float32)
    rounded = linear_reverse_sample(
        *(v.bfloat16() for v in (hidden, weight, bias)),
        x,
        step(0.5),
        process,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.autocast("cpu", torch.bfloat16):
        drawn = linear_reverse_sample(
            hidden, weight, bias, x, step(0.5), process, generator=torch.Generator().manual_seed(0)
        )
    assert torch.equal(drawn, rounded)


@every_variant
@both_steps
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_rows_without_a_distribution_are_refused(
    backend: Backend, process_of: Process, step: StepOf, value: float
) -> None:
    process, x = process_of(38), torch.full((3,), 37)
    hidden, weight = torch.zeros(3, 1), torch.ones(38, 1)
    hidden[1] = value
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=r"^hidden: .*index \[1\]"):
            linear_reverse_sample(hidden, weight, None, x, step(0.3), process)
    else:
        assert bad_rows(linear_reverse_sample(hidden, weight, None, x, step(0.3), process)) == [1]


@both_steps
@pytest.mark.parametrize("process", [Absorbing(6), Hybrid(6, 0.3)], ids=["absorbing", "hybrid"])
def test_denoising_with_nothing_left_is_refused(backend: Backend, process: RankOne, step: StepOf) -> None:
    x, bias = torch.full((2,), 6), torch.full((7,), -math.inf)
    hidden, weight = torch.zeros(2, 1), torch.zeros(7, 1)
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match="hidden"):
            linear_reverse_sample(hidden, weight, bias, x, step(0.3), process, denoise=True)
    else:
        assert bad_rows(linear_reverse_sample(hidden, weight, bias, x, step(0.3), process, denoise=True)) == [0, 1]


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("kind", ["tweedie", "euler"])
def test_opcheck(process_of: Process, kind: str, capacity: int | None) -> None:
    process = process_of(27)
    rows = random_rows(process, 24)
    _, weight, bias = random_head(27, torch.float32)
    arguments = (
        random_log_score((24, 4), torch.float32),
        weight,
        bias,
        rows.x_t,
        rows.sigma,
        random_log_score((24,), torch.float64),
        process.stationary.float() if process.family == "rank_one" else None,
        process.family,
        kind,
        -1,
        27,
        0,
        "",
        torch.float32,
        1 << 20,
        capacity,
        torch.tensor([3]),
    )
    torch.library.opcheck(torch.ops.sedd_ext.linear_reverse_sample, to_device(arguments))


@pytest.mark.operators("cpu", "cuda")
@both_steps
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
def test_compile(step: StepOf, name: str) -> None:
    torch.compiler.reset()
    process = PROCESSES[name](27)
    rows = random_rows(process, 24)
    _, weight, bias = random_head(27, torch.float32)
    hidden = random_log_score((24, 4), torch.float32)

    def call(hidden: Tensor, x: Tensor, size: Tensor) -> Tensor:
        return linear_reverse_sample(2 * hidden, weight, bias, x, step(size), process) + 1

    results = []
    with torch.random.fork_rng():
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            results.append(function(hidden, rows.x_t, rows.sigma))
    assert torch.equal(*results)
