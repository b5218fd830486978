"""Tokens and statistics of positions: values, distributions, and independence of the other rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, running_on, to_device, unmask
from explicit import chi_square, largest_error, random_log_score, rare_or_not, rare_tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sedd_ext
from sedd_ext import Unmasked, reference
from sedd_ext.unmask import STATISTICS

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-14}
SIZES = [1, 2, 7, 511, 512, 513, 2048, 5000]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(n: int) -> list[int | None]:
    return [None] if n == 1 else [None, 0, n // 2, n - 1]


def exact(logits: Tensor, mask_id: int | None) -> Tensor:
    """The logarithms of the probabilities in float64."""
    logits = logits.double().clone()
    if mask_id is not None:
        logits[..., mask_id] = -math.inf
    return logits.log_softmax(-1)


def check(logits: Tensor, mask_id: int | None, **options: Any) -> Unmasked:
    """Every number, against float64: no farther off than plain PyTorch of the dtype, plus a bound."""
    found = unmask(logits, mask_id=mask_id, generator=seeded(), **options)
    wanted = reference.unmask(logits.double(), mask_id=mask_id)
    plain = reference.unmask(logits, mask_id=mask_id)
    log_probs = exact(logits, mask_id)
    assert torch.equal(found.argmax, wanted.argmax)
    own = log_probs.gather(-1, found.token[..., None])[..., 0]
    assert bool((own > -math.inf).all())  # a token that can be drawn
    right = wanted._replace(log_prob=own)._asdict()
    for name in STATISTICS:
        value, scale = getattr(found, name), right[name].abs().clamp(min=1.0)
        assert value.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        slack = 0.0 if name == "log_prob" else largest_error(getattr(plain, name), right[name], scale)
        assert largest_error(value, right[name], scale) <= slack + BOUND[logits.dtype], name
    return found


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_values(n: int, dtype: torch.dtype) -> None:
    for mask_id in masks(n):
        for temperature in (1.0, 0.6):
            check(random_log_score((5, n), dtype, spread=4.0), mask_id, temperature=temperature)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_rows(dtype: torch.dtype) -> None:
    """Views that start anywhere; -inf; equal logits; one peak; large and far apart."""
    base = random_log_score((7, 1003), dtype)
    check(base[1:, 3:], None)
    gaps = base.clone()
    gaps[:, ::3] = -math.inf
    gaps[2, :700] = -math.inf
    gaps[3, :] = -math.inf
    gaps[3, 900] = 1.0
    check(gaps, None)
    check(gaps, 1)
    equal = torch.zeros(3, 1003, dtype=dtype)
    assert check(equal, None).argmax.tolist() == [0, 0, 0]
    assert check(equal, 0).argmax.tolist() == [1, 1, 1]
    ties = base.clone()
    ties[:, [5, 17, 600, 1002]] = 30.0
    found = check(ties, None)
    assert found.argmax.tolist() == [5] * 7
    assert torch.equal(found.margin, torch.zeros(7, dtype=found.margin.dtype))
    peak = base.clone()
    peak[:, 777] = 80.0
    assert check(peak, None).token.tolist() == [777] * 7
    check(base * 300, None)


@every_variant
def test_shapes() -> None:
    logits = random_log_score((2, 3, 50), torch.float32)
    found = unmask(logits, generator=seeded())
    assert all(value.shape == (2, 3) for value in found if value is not None)
    flat = unmask(logits.view(6, 50), generator=seeded())
    assert torch.equal(found.token.view(6), flat.token)
    assert unmask(logits[0, 0]).token.shape == ()


@pytest.mark.operators("cpu", "cuda")
def test_no_rows() -> None:
    assert sedd_ext.unmask(torch.zeros(0, 5)).token.shape == (0,)
    logits = torch.zeros(1, 5)
    unmask(logits)  # a kernel must run in a test of a backend


@every_variant
def test_only_the_statistics_asked_for() -> None:
    logits = random_log_score((4, 700), torch.float32)
    whole = unmask(logits, generator=seeded())
    for names in ((), ("entropy",), ("margin", "log_prob")):
        some = unmask(logits, statistics=names, generator=seeded())
        assert torch.equal(some.argmax, whole.argmax)
        assert torch.equal(some.token, whole.token)
        for name in ("log_prob", "max_prob", "margin", "entropy"):
            value = getattr(some, name)
            assert value is None if name not in names else torch.equal(value, getattr(whole, name))


@every_variant
@pytest.mark.parametrize("statistics", [(), ("entropy",)])
def test_zero_temperature_takes_the_most_probable_token(statistics: tuple[str, ...]) -> None:
    logits = random_log_score((50, 700), torch.float32)
    found = unmask(logits, temperature=0.0, mask_id=3, statistics=statistics)
    assert torch.equal(found.token, found.argmax)
    assert torch.equal(found.argmax, exact(logits, 3).argmax(-1))


def test_statistics_do_not_depend_on_the_way_of_drawing() -> None:
    logits = random_log_score((9, 1500), torch.float32)
    plain = unmask(logits)
    for options in ({"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 2.0, "top_p": 0.4}):
        other = unmask(logits, **options)
        for name in ("max_prob", "margin", "entropy"):
            torch.testing.assert_close(getattr(other, name), getattr(plain, name), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ distributions


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The probabilities of draws, by the definition."""
    probs = (logits.double() / temperature).softmax(-1)
    before = torch.stack([probs[probs > p].sum() for p in probs])
    kept = torch.where(before < top_p, probs, 0.0)
    return kept / kept.sum()


@every_variant
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.9), (1.0, 0.5), (2.0, 0.6), (1.0, 1e-9)]
)
@pytest.mark.parametrize("statistics", [(), ("entropy",)])
def test_distribution(temperature: float, top_p: float, statistics: tuple[str, ...], backend: Backend) -> None:
    draws = backend.draws(40_000)
    logits = random_log_score((1, 23), torch.float32, seed=4, spread=1.2)
    logits[0, 5] = logits[0, 6]  # in or out together
    logits[0, 4] = -math.inf
    found = unmask(
        logits.expand(draws, -1).contiguous(),
        mask_id=7,
        temperature=temperature,
        top_p=top_p,
        statistics=statistics,
        generator=seeded(),
    )
    without = logits[0].clone()
    without[7] = -math.inf
    probs = nucleus(without, temperature, top_p)
    counts = torch.bincount(found.token, minlength=23)
    assert int(counts[probs == 0].sum()) == 0
    assert top_p == 1e-9 or chi_square(counts, probs) > 1e-4


def test_another_distribution_is_noticed() -> None:
    logits = random_log_score((1, 23), torch.float32, seed=4, spread=1.2)
    counts = torch.bincount(unmask(logits.expand(20_000, -1).contiguous(), generator=seeded()).token, minlength=23)
    assert chi_square(counts, (logits[0].double() * 1.05).softmax(-1)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_rare_tokens(temperature: float, dtype: torch.dtype, backend: Backend) -> None:
    """Tokens of 3e-6, beside which MASK has a logit that is much larger."""
    logits, draws = (rare_tokens().log() * temperature).to(dtype), backend.draws(8000)
    mask_id = len(logits) - 1
    found = unmask(
        logits.expand(draws, -1).contiguous(),
        mask_id=mask_id,
        temperature=temperature,
        statistics=(),
        generator=seeded(),
    )
    probs = (logits.double() / temperature)[:mask_id].softmax(-1)
    counts = torch.bincount(found.token, minlength=len(logits))
    assert counts[mask_id] == 0
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) > 1e-4


@given(n=st.integers(1, 700), mask=st.integers(-1, 699), top_p=st.floats(1e-6, 1.0), temperature=st.floats(0.0, 50.0))
def test_any_options(n: int, mask: int, top_p: float, temperature: float) -> None:
    mask_id = None if mask < 0 or n == 1 else mask % n
    logits = random_log_score((3, n), torch.float32, seed=n)
    found = unmask(logits, mask_id=mask_id, top_p=top_p, temperature=temperature)
    log_probs = exact(logits, mask_id)
    assert torch.equal(found.argmax, log_probs.argmax(-1))
    assert bool((log_probs.gather(-1, found.token[:, None]) > -math.inf).all())


@every_variant
@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_log_score((20, 40), torch.float32)
    logits[:, 3] = -math.inf
    found = unmask(logits, temperature=temperature, statistics=())
    assert bool((found.token != 3).all())
    if temperature < 1:
        assert torch.equal(found.token, found.argmax)


# ------------------------------------------------------------------------------------------------- independence of rows


@every_variant
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
def test_a_row_does_not_depend_on_the_others(temperature: float, top_p: float) -> None:
    logits, ids = random_log_score((40, 3000), torch.float32), torch.arange(100, 140)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    whole = unmask(logits, row_ids=ids, generator=seeded(), **options)
    assert len(whole.token.unique()) > 10
    for rows in ([3], [39, 0, 17], list(range(10, 30))):
        part = unmask(logits[rows].clone(), row_ids=ids[rows], generator=seeded(), **options)
        for mine, theirs in zip(part, whole, strict=True):
            assert torch.equal(mine, theirs[rows])
    other = unmask(logits, row_ids=ids + 1, generator=seeded(), **options)
    assert not torch.equal(other.token, whole.token)
    assert torch.equal(other.entropy, whole.entropy)


def test_row_ids_are_indices_unless_given() -> None:
    logits = random_log_score((2, 3, 90), torch.float32)
    ids = torch.arange(6).view(2, 3)
    given = unmask(logits, row_ids=ids, generator=seeded()).token
    assert torch.equal(given, unmask(logits, generator=seeded()).token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
def test_the_cpu_draws_the_same_tokens(temperature: float, top_p: float, dtype: torch.dtype) -> None:
    logits = random_log_score((60, 4000), dtype)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "mask_id": 9}
    here = unmask(logits, generator=seeded(), **options)
    for isa in BACKENDS["cpu"]:
        with running_on(isa):
            there = unmask(logits, generator=seeded(), **options)
        assert torch.equal(here.token, there.token)
        assert torch.equal(here.argmax, there.argmax)


@pytest.mark.operators("cpu")
def test_threads_do_not_matter(threads: Any) -> None:
    """With rows unlike each other, and work enough that two threads run at the same time."""
    tilts = torch.linspace(-10, 10, 9000) * (torch.arange(2000) % 5 - 2)[:, None]
    logits = random_log_score((2000, 9000), torch.float32) + tilts
    threads(1)
    one = unmask(logits, generator=seeded())
    threads(2)
    for _ in range(8):
        for mine, theirs in zip(unmask(logits, generator=seeded()), one, strict=True):
            assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck(statistics: bool) -> None:
    logits, ids = random_log_score((2, 3, 27), torch.float32), torch.arange(6).view(2, 3)
    arguments = (logits, ids, 3, 0.7, 0.9, statistics, torch.tensor([3]))
    torch.library.opcheck(torch.ops.sedd_ext.unmask, to_device(arguments))


@pytest.mark.operators("cpu", "cuda")
def test_compile() -> None:
    torch.compiler.reset()

    def call(logits: Tensor) -> Unmasked:
        return unmask(2 * logits, mask_id=3, top_p=0.9)

    results = []
    with torch.random.fork_rng():
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            results.append(function(random_log_score((4, 50), torch.float32)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.operators("cpu")
def test_meta() -> None:
    unmask(torch.zeros(3, 7))
    found = sedd_ext.unmask(torch.zeros(2, 3, 7, device="meta"))
    assert all(value is not None and value.is_meta and value.shape == (2, 3) for value in found)


# ----------------------------------------------------------------------------------------------------------- bad input


@every_variant
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"statistics": ()}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.5}],
    ids=["plain", "no statistics", "greedy", "tempered", "nucleus"],
)
def test_rows_without_a_softmax(value: float, options: dict[str, Any], backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_log_score((4, 600), dtype)
        logits[1, 333] = value
        logits[3, :] = -math.inf
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match=r"^logits: expected rows with a softmax, got .* at index \[1\]"):
                unmask(logits, **options)
            continue
        found = unmask(logits, **options)
        for row in (1, 3):
            assert found.token[row] == found.argmax[row] == -1
            for numbers in found[2:]:
                assert numbers is None or bool(numbers[row].isnan())
        assert bool((found.token[[0, 2]] >= 0).all())


@pytest.mark.operators("cpu", "cuda")
def test_the_mask_may_be_anything() -> None:
    """Its logit is not read."""
    logits = random_log_score((4, 600), torch.float32)
    options: dict[str, Any] = {"mask_id": 2, "generator": None}
    entropy = unmask(logits, **options).entropy
    for value in (math.nan, math.inf, -math.inf):
        logits[:, 2] = value
        assert torch.equal(unmask(logits, **options).entropy, entropy)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [0.0]}, TypeError, "logits: expected a float32, .* tensor, got list"),
        ({"logits": torch.zeros(3, 4).long()}, TypeError, r"logits: .* got a torch\.int64 tensor"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \[\*B, N\], got \[\]"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits: expected shape \[\*B, N\], got \[3, 0\]"),
        ({"mask_id": 4}, ValueError, r"mask_id: expected a token in \[0, 4\) or None, got 4"),
        ({"mask_id": -1}, ValueError, "mask_id: .* got -1"),
        ({"mask_id": 1.0}, ValueError, r"mask_id: .* got 1\.0"),
        ({"temperature": -0.1}, ValueError, r"temperature: expected a finite number of at least 0, got -0\.1"),
        ({"temperature": math.inf}, ValueError, "temperature: .* got inf"),
        ({"temperature": None}, ValueError, "temperature: .* got None"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, ValueError, r"top_p: .* got 1\.1"),
        ({"statistics": "entropy"}, ValueError, "statistics: expected some of log_prob, .* got 'entropy'"),
        ({"statistics": ("perplexity",)}, ValueError, "statistics: .* got .*perplexity"),
        ({"row_ids": torch.zeros(2).long()}, ValueError, r"row_ids: expected shape \[3\], .* got \[2\]"),
        ({"row_ids": torch.zeros(3)}, TypeError, "row_ids: expected an int64 tensor"),
        ({"generator": 1}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    unmask(torch.zeros(3, 4))
    with pytest.raises(error, match=message):
        unmask(**{"logits": torch.zeros(3, 4), **arguments})
