"""Tokens and statistics from hidden states: values, distributions, memory, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import Backend, linear_unmask, to_device, unmask
from explicit import chi_square, largest_error, random_log_score, rare_or_not, rare_tokens
from torch import Tensor
from waiting import NeverWaits, WaitError

import sedd_ext
from sedd_ext import Absorbing, Tweedie, Unmasked, reference
from sedd_ext.unmask import STATISTICS

pytestmark = pytest.mark.operators

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-13}
OPTIONS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (0.0, 1.0)]
"""temperature and top_p."""
NARROW = 1 << 17
"""A buffer with room for tiles of 2,048 entries alone."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_head(rows: int, n: int, dtype: torch.dtype, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(rows, width), (n, width), (n,)]
    hidden, weight, bias = (random_log_score(shape, dtype, seed, 0.7) for seed, shape in enumerate(shapes))
    return hidden, weight, bias


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask_id: int | None = None) -> Tensor:
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    if mask_id is not None:
        logits[..., mask_id] = -math.inf
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 27, 2048, 2049, 5000])
def test_values(n: int, dtype: torch.dtype) -> None:
    for mask_id in [None] if n == 1 else [None, 0, n - 1]:
        hidden, weight, bias = random_head(9, n, dtype)
        for b in (bias, None):
            for temperature, top_p in OPTIONS:
                options = {"temperature": temperature, "top_p": top_p, "buffer_bytes": NARROW}
                found = linear_unmask(hidden, weight, b, mask_id=mask_id, **options)
                log_probs = logits_of(hidden, weight, b, mask_id).log_softmax(-1)
                wanted = reference.unmask(log_probs)
                own = log_probs.gather(-1, found.token[:, None])[:, 0]
                for name in STATISTICS:
                    right = own if name == "log_prob" else getattr(wanted, name)
                    error = largest_error(getattr(found, name), right, right.abs().clamp(min=1.0))
                    assert error <= 3 * BOUND[dtype], (name, mask_id, temperature, top_p)
                # another token may be the most probable one if products are rounded
                best = log_probs.gather(-1, found.argmax[:, None])[:, 0]
                assert bool((best >= log_probs.amax(-1) - 3 * BOUND[dtype]).all())
                if temperature == 0:
                    assert torch.equal(found.token, found.argmax)


def test_several_tiles_find_the_first_of_equal_logits() -> None:
    hidden, weight = torch.ones(3, 2), torch.zeros(5000, 2)
    found = linear_unmask(hidden, weight, None, buffer_bytes=NARROW)
    assert found.argmax.tolist() == [0, 0, 0]
    weight[[2047, 2048, 4999]] = 1.0
    found = linear_unmask(hidden, weight, None, buffer_bytes=NARROW)
    assert found.argmax.tolist() == [2047] * 3
    assert found.margin.tolist() == [0.0] * 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_distribution(temperature: float, top_p: float, backend: Backend) -> None:
    """Over three tiles; tokens of each are drawn."""
    hidden, weight, bias = random_head(1, 5000, torch.float32)
    bias[2100:2120] += 5.0
    draws = backend.draws(20_000)
    found = linear_unmask(
        hidden.expand(draws, -1),
        weight,
        bias,
        mask_id=17,
        temperature=temperature,
        top_p=top_p,
        statistics=(),
        generator=seeded(),
        buffer_bytes=NARROW,
    )
    probs = (logits_of(hidden, weight, bias, 17)[0] / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    before = torch.empty_like(probs).scatter(0, order, probs[order].cumsum(0) - probs[order])
    probs = torch.where(before < top_p - 1e-6, probs, 0.0)
    counts = torch.bincount(found.token, minlength=5000)
    assert int(counts[17]) == 0
    if top_p < 1:  # the last of the nucleus may be out by rounding
        assert int(counts[probs == 0].sum()) <= draws * 1e-3
        counts = torch.where(probs == 0, 0, counts)
    assert chi_square(counts, probs) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rare_tokens(dtype: torch.dtype, backend: Backend) -> None:
    """In the first and the second tile, before a MASK in the third with a larger logit."""
    bias, draws = rare_tokens().log().to(dtype), backend.draws(8000)
    mask_id = len(bias) - 1
    hidden, weight = torch.zeros(draws, 2, dtype=dtype), torch.zeros(len(bias), 2, dtype=dtype)
    options: dict[str, Any] = {"mask_id": mask_id, "statistics": (), "buffer_bytes": NARROW}
    found = linear_unmask(hidden, weight, bias, generator=seeded(), **options)
    counts = torch.bincount(found.token, minlength=len(bias))
    assert chi_square(rare_or_not(counts), rare_or_not(bias.double()[:mask_id].softmax(-1))) > 1e-4


def same(found: Unmasked, wanted: Unmasked, rows: list[int]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs[rows])


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("temperature", "top_p"), OPTIONS)
@pytest.mark.parametrize("buffer_bytes", [NARROW, 1 << 26])
def test_a_row_does_not_depend_on_its_batch(
    temperature: float, top_p: float, dtype: torch.dtype, buffer_bytes: int
) -> None:
    """The same bits alone, at another place, and among any number of others."""
    hidden, weight, bias = random_head(300, 5000, dtype, width=96)
    ids = torch.arange(300)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "buffer_bytes": buffer_bytes}
    whole = linear_unmask(hidden, weight, bias, row_ids=ids, generator=seeded(), **options)
    assert len(whole.token.unique()) > 20
    for rows in ([0], [299], [64], [299, 63, 64, 1], list(range(7, 120)), list(range(299, -1, -1))):
        part = linear_unmask(hidden[rows], weight, bias, row_ids=ids[rows], generator=seeded(), **options)
        same(part, whole, rows)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float64, 22), (torch.float32, 2)], ids=str)
def test_a_buffer_with_room_for_an_odd_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    """The last rows of a matrix product may be added up in another order than the others."""
    hidden, weight, bias = random_head(130, 715, dtype, width=6)
    ids, buffer_bytes = torch.arange(130), rows * 715 * dtype.itemsize
    for top_p in (1.0, 0.5):
        options: dict[str, Any] = {"top_p": top_p, "buffer_bytes": buffer_bytes}
        whole = linear_unmask(hidden, weight, bias, row_ids=ids, generator=seeded(), **options)
        for at in ([129], list(range(7, 80)), list(range(129, -1, -1))):
            part = linear_unmask(hidden[at], weight, bias, row_ids=ids[at], generator=seeded(), **options)
            same(part, whole, at)


def test_shapes_and_row_ids() -> None:
    hidden, weight, bias = random_head(6, 3000, torch.float32)
    flat = linear_unmask(hidden, weight, bias, generator=seeded())
    ids = torch.arange(6).view(2, 3)
    found = linear_unmask(hidden.view(2, 3, -1), weight, bias, row_ids=ids, generator=seeded())
    for mine, theirs in zip(found, flat, strict=True):
        assert torch.equal(mine.view(6), theirs)
    assert linear_unmask(hidden[:0], weight, bias).token.shape == (0,)


@pytest.mark.parametrize(("temperature", "top_p"), OPTIONS)
@pytest.mark.parametrize("buffer_bytes", [1, NARROW])
def test_buffers_do_not_matter(temperature: float, top_p: float, buffer_bytes: int) -> None:
    """Except for the random numbers of tokens, and the rounding of products."""
    hidden, weight, bias = random_head(70, 5000, torch.float32)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    usual = linear_unmask(hidden, weight, bias, **options)
    small = linear_unmask(hidden, weight, bias, buffer_bytes=buffer_bytes, **options)
    assert torch.equal(small.argmax, usual.argmax)
    for name in ("max_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(small, name), getattr(usual, name), rtol=1e-5, atol=1e-5)


@pytest.mark.operators("cpu", "cuda")
def test_autocast() -> None:
    hidden, weight, bias = random_head(9, 3000, torch.float32)
    kind = "cpu"
    with torch.autocast(kind, torch.bfloat16):
        found = sedd_ext.linear_unmask(hidden, weight, bias, generator=seeded())
    rounded = (tensor.bfloat16() for tensor in (hidden, weight, bias))
    wanted = sedd_ext.linear_unmask(*rounded, generator=seeded())
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    linear_unmask(hidden, weight, bias)  # a kernel must run in a test of a backend


@pytest.mark.operators("emulated", "cuda")
@pytest.mark.parametrize(("temperature", "top_p"), OPTIONS)
def test_nobody_waits_for_the_device(temperature: float, top_p: float) -> None:
    hidden, weight, bias = to_device(random_head(70, 3000, torch.float32))
    generator = torch.Generator(hidden.device).manual_seed(0)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "mask_id": 3, "generator": generator}
    with NeverWaits():
        sedd_ext.linear_unmask(hidden, weight, bias, **options)
        sedd_ext.unmask(hidden @ weight.T, **options)


def test_waiting_is_noticed() -> None:
    hidden, weight, bias = random_head(9, 30, torch.float32)
    x_t = torch.tensor([29, 3] * 4 + [29])
    linear_unmask(hidden, weight, bias)
    with NeverWaits(), pytest.raises(WaitError, match="nonzero waits"):
        sedd_ext.linear_reverse_sample(hidden, weight, bias, x_t, Tweedie(0.5), Absorbing(29))
    for wait in (lambda: hidden[hidden > 0], lambda: float(hidden[0, 0]), lambda: hidden.to("cpu", copy=True)):
        with NeverWaits(), pytest.raises(WaitError):
            wait()


def test_the_logits_give_the_same_numbers() -> None:
    """Up to the rounding of products."""
    hidden, weight, bias = random_head(9, 5000, torch.float32)
    fused, plain = linear_unmask(hidden, weight, bias), unmask(torch.addmm(bias, hidden, weight.T))
    assert torch.equal(fused.argmax, plain.argmax)
    for name in ("max_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-4, atol=1e-5)


@pytest.mark.operators("cpu", "cuda")
def test_opcheck() -> None:
    head = random_head(6, 27, torch.float32)
    arguments = (*head, torch.float32, 1 << 20, 27, 0, "", torch.arange(6), 3, 0.7, 0.9, True, torch.tensor([3]))
    torch.library.opcheck(torch.ops.sedd_ext.linear_unmask, to_device(arguments))


@pytest.mark.operators("cpu", "cuda")
def test_compile() -> None:
    torch.compiler.reset()
    hidden, weight, bias = random_head(6, 3000, torch.float32)

    def call(hidden: Tensor) -> Unmasked:
        return linear_unmask(2 * hidden, weight, bias, mask_id=3)

    results = []
    with torch.random.fork_rng():
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            results.append(function(hidden))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_softmax(value: float, backend: Backend) -> None:
    hidden, weight, bias = random_head(70, 3000, torch.float32)
    hidden[66, 3] = value
    weight[2999, 3] = 1.0
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"statistics": ()}):
        if backend.names_bad_rows:
            with pytest.raises(ValueError, match=r"^hidden: expected rows with a softmax, got .* at index \[66\]"):
                linear_unmask(hidden, weight, bias, **options)
            continue
        found = linear_unmask(hidden, weight, bias, buffer_bytes=NARROW, **options)
        assert (found.token == -1).nonzero()[:, 0].tolist() == [66]
        assert found.argmax[66] == -1


@pytest.mark.operators("cpu")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, ValueError, r"hidden: expected shape \[\*B, 4\], .* got \[3, 5\]"),
        ({"hidden": torch.zeros(3, 4).double()}, TypeError, "hidden: expected torch.float32 as weight has"),
        ({"weight": torch.zeros(0, 4), "bias": None}, ValueError, r"weight: expected shape \[N, d\], got \[0, 4\]"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \[7\], got \[6\]"),
        ({"mask_id": 7}, ValueError, r"mask_id: expected a token in \[0, 7\) or None, got 7"),
        ({"temperature": -1}, ValueError, "temperature: expected a finite number of at least 0, got -1"),
        ({"top_p": 2}, ValueError, r"top_p: expected a number in \(0, 1\], got 2"),
        ({"statistics": ("x",)}, ValueError, "statistics: expected some of"),
        ({"row_ids": torch.zeros(4).long()}, ValueError, r"row_ids: expected shape \[3\]"),
        ({"buffer_bytes": 0}, ValueError, "buffer_bytes: expected a positive int or None, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7)}
    linear_unmask(**right)
    with pytest.raises(error, match=message):
        linear_unmask(**{**right, **arguments})
