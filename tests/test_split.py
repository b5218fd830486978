"""The vocabulary split over processes: the results of one process, and what the processes exchange for them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from backends import (
    Backend,
    linear_generalized_masked_loss,
    linear_mean_prediction_loss,
    linear_reverse_sample,
    linear_score_entropy_loss,
    linear_unmask,
)
from explicit import PROCESSES, Rows, bad_rows, chi_square, random_log_score, random_rows, rare_or_not, rare_tokens
from split import groups, in_threads
from torch import Tensor

import sedd_ext
import sedd_ext.split as module
from sedd_ext import Absorbing, Euler, GeneralizedMasked, Hybrid, RankOne, Tweedie, Uniform, Unmasked, reference
from sedd_ext.unmask import STATISTICS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-13}
"""How far results may be from those of one process, relative to the largest: for 16 bits, a unit in the last place."""
ROWS, WIDTH = 9, 6


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def part(self, rank: int, size: int) -> Head:
        """What a process passes."""
        return Head(
            self.hidden, self.weight.chunk(size)[rank], None if self.bias is None else self.bias.chunk(size)[rank]
        )


def random_head(n: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Head:
    shapes = [(ROWS, WIDTH), (n, WIDTH), (n,)]
    hidden, weight, b = (random_log_score(shape, dtype, seed, 0.6) for seed, shape in enumerate(shapes))
    return Head(hidden, weight, b if bias else None)


def results(loss: Callable[[Any], Tensor], head: Any, upstream: Tensor) -> list[Tensor]:
    """The loss and the gradients of the head's parts."""
    leaves = type(head)(*(None if value is None else value.detach().clone().requires_grad_() for value in head))
    value = loss(leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [value.detach(), *torch.autograd.grad(value, wanted, upstream.to(value.dtype))]


def together(loss: Callable[..., Tensor], head: Any, size: int, upstream: Tensor) -> list[list[Tensor]]:
    """What each process of a group finds."""
    with groups(size) as group:

        def work(rank: int) -> list[Tensor]:
            return results(lambda leaves: loss(leaves, group[rank]), head.part(rank, size), upstream)

        return in_threads(size, work)


def check_equal(found: list[list[Tensor]], wanted: list[Tensor], bound: float, least: float = 0.0) -> None:
    """Loss and hidden's gradient are those of one process in each one; the others are divided as the head is.

    Up to ``bound`` times the largest number, or times ``least``.
    """
    for process in found:
        for value, one in zip(process[:2], wanted[:2], strict=True):
            assert value.dtype == one.dtype
            assert (value - one).abs().max() <= bound * one.abs().max().clamp(min=least)
    for i, one in enumerate(wanted[2:], 2):
        whole = torch.cat([process[i] for process in found])
        assert whole.shape == one.shape
        assert whole.dtype == one.dtype
        assert (whole - one).abs().max() <= bound * one.abs().max().clamp(min=least)


@pytest.mark.operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("size", "n"), [(2, 37), (3, 41), (4, 5000)])
def test_score_entropy(name: str, size: int, n: int, dtype: torch.dtype) -> None:
    process = PROCESSES[name](n)
    head, rows = random_head(n, dtype, bias=size != 3), random_rows(process, ROWS)
    options: dict[str, Any] = {"log_score_shift": torch.linspace(-1, 1, ROWS), "loss_weight": torch.rand(ROWS)}
    if size == 2:
        options["buffer_bytes"] = 3 * n * dtype.itemsize // 2  # several tiles of rows
    upstream = torch.rand(ROWS) if size == 2 else torch.ones(ROWS)

    def loss(leaves: Head, group: Any = None) -> Tensor:
        return linear_score_entropy_loss(*leaves, *rows, process, group=group, **options)

    wanted = results(loss, head, upstream)
    check_equal(together(loss, head, size, upstream), wanted, BOUND[dtype])


@pytest.mark.operators
def test_score_entropy_is_that_of_the_reference() -> None:
    process = PROCESSES["hybrid"](41)
    head, rows = random_head(41, torch.float64), random_rows(process, ROWS)

    def one(leaves: Head) -> Tensor:
        logits = torch.nn.functional.linear(leaves.hidden, leaves.weight, leaves.bias)
        return reference.score_entropy_loss(logits, *rows, process)

    def split(leaves: Head, group: Any) -> Tensor:
        return linear_score_entropy_loss(*leaves, *rows, process, group=group)

    upstream = torch.ones(ROWS)
    check_equal(together(split, head, 3, upstream), results(one, head, upstream), 1e-12)


def test_table_of_exchanges() -> None:
    """The script prints the table of the documentation."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(root / "benchmarks" / "exchanges.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert "\n".join(table) in (root / "docs" / "distributed.md").read_text(encoding="utf-8")


@pytest.mark.operators
def test_processes_divide_the_rows_alike() -> None:
    """By the largest number of entries: with 21 of 41 a tile takes one row, with 20 it could take two."""
    process = Uniform(41)
    head, rows = random_head(41), random_rows(process, ROWS)

    def loss(leaves: Head, group: Any = None) -> Tensor:
        return linear_score_entropy_loss(*leaves, *rows, process, group=group, buffer_bytes=90)

    upstream = torch.ones(ROWS)
    check_equal(together(loss, head, 2, upstream), results(loss, head, upstream), 3e-6)


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.dtype]]:
    """The tensors that all processes give to collectives."""
    found: list[tuple[torch.Size, torch.dtype]] = []
    for name in ("all_reduce", "all_gather"):
        collective = getattr(torch.distributed, name)

        def record(*tensors: Any, collective: Any = collective, **options: Any) -> Any:
            found.append((tensors[-1].shape, tensors[-1].dtype))
            return collective(*tensors, **options)

        monkeypatch.setattr(module.torch.distributed, name, record)
    return found


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_score_entropy_exchanges_one_number_a_row(exchanges: Any, needs_gradient: bool) -> None:
    """And the gradient of the hidden state in float32: nothing for rows that do not need the head."""
    process = Absorbing(40)
    head, rows = random_head(41, torch.bfloat16), random_rows(process, ROWS)
    masked = int((rows.x_t == 40).sum())
    assert 0 < masked < ROWS

    def loss(leaves: Head, group: Any) -> Tensor:
        with torch.set_grad_enabled(needs_gradient):
            value = linear_score_entropy_loss(*leaves, *rows, process, group=group)
        return value if needs_gradient else value + 0 * sum(leaf.sum() for leaf in leaves if leaf is not None)

    together(loss, head, 2, torch.ones(ROWS))
    wanted = [((masked,), torch.float64)] * 2 + [((masked, WIDTH), torch.float32)] * 2 * needs_gradient
    assert sorted(exchanges, key=str) == sorted(wanted, key=str)


@pytest.mark.operators
def test_no_row_needs_the_head(exchanges: Any) -> None:
    process = Absorbing(40)
    head, tokens = random_head(41), torch.zeros(ROWS, dtype=torch.int64)

    def loss(leaves: Head, group: Any) -> Tensor:
        return linear_score_entropy_loss(*leaves, tokens, tokens, 0.5, process, group=group)

    for process_results in together(loss, head, 2, torch.ones(ROWS)):
        assert all((value == 0).all() for value in process_results)
    assert not exchanges
    linear_score_entropy_loss(*head, tokens + 40, tokens, 0.5, process)  # runs a kernel


class TestBadInput:
    def call(self, rank: int, size: int, n: int = 10, **changed: Any) -> Tensor:
        process: RankOne = Uniform(n)
        with groups(size) as group:
            head = random_head(n).part(rank, size)
            given = {"weight": head.weight, "bias": head.bias, "group": group[rank], **changed}
            tokens = torch.zeros(ROWS, dtype=torch.int64)
            return sedd_ext.linear_score_entropy_loss(
                head.hidden, given["weight"], given["bias"], tokens, tokens, 0.5, process, group=given["group"]
            )

    def test_the_rows_of_another_process(self) -> None:
        match = r"weight: expected shape \[2, d\], the rows from 8 on of 10 for process 2 of 3, as .*chunk\(3\)\[2\]"
        with pytest.raises(ValueError, match=match):
            self.call(2, 3, weight=torch.ones(4, WIDTH), bias=torch.ones(4))

    def test_the_whole_head(self) -> None:
        with pytest.raises(ValueError, match=r"weight: expected shape \[5, d\], the rows from 0 on of 10"):
            self.call(0, 2, weight=torch.ones(10, WIDTH), bias=torch.ones(10))

    def test_more_processes_than_rows(self) -> None:
        with pytest.raises(ValueError, match=r"group: expected at least one row .* for each process, got 4 for 5"):
            self.call(0, 4, n=5)

    def test_no_group(self) -> None:
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup or None, got str"):
            self.call(0, 2, group="vocabulary")

    def test_a_part_without_a_group(self) -> None:
        with pytest.raises(ValueError, match=r"weight: expected shape \[10, d\]"):
            self.call(0, 2, group=None)


@pytest.mark.operators
def test_a_group_of_one_process() -> None:
    process = Uniform(41)
    head, rows = random_head(41), random_rows(process, ROWS)

    def loss(leaves: Head, group: Any = None) -> Tensor:
        return linear_score_entropy_loss(*leaves, *rows, process, group=group)

    upstream = torch.ones(ROWS)
    for value, one in zip(together(loss, head, 1, upstream)[0], results(loss, head, upstream), strict=True):
        assert torch.equal(value, one)


# ------------------------------------------------------------------------------------------- losses with a softmax
# a process's part of a vocabulary may have one or two tokens, and its softmax all of x, x_0 and MASK, or none of them

# The gradient of a softmax has the sum 0, so that the parts that the processes add up cancel, and in a small vocabulary
# those of the rows.
SOFTMAX_BOUND = {dtype: 8 * BOUND[dtype] for dtype in DTYPES}
WEIGHTS = torch.linspace(0.1, 1.0, ROWS)
SIZES = [(2, 37), (3, 41), (4, 5000), (2, 3), (3, 3), (4, 7)]


def clean_rows(process: RankOne, count: int = ROWS) -> Rows:
    """Rows whose clean tokens are not MASK."""
    rows = random_rows(process, count)
    rows = rows._replace(sigma=rows.sigma.clamp(min=0.01))
    return rows if process.mask_id is None else rows._replace(x_0=rows.x_0 % (process.dim - 1))


@pytest.mark.operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("size", "n"), SIZES)
def test_mean_prediction(name: str, size: int, n: int, dtype: torch.dtype, step: bool) -> None:
    process = PROCESSES[name](n)
    head, rows = random_head(n, dtype, bias=size != 3), clean_rows(process)
    options: dict[str, Any] = {"loss_weight": WEIGHTS, "sigma_s": 0.4 * rows.sigma if step else None}
    if size == 2:
        options["buffer_bytes"] = 3 * n * dtype.itemsize // 2  # several tiles of rows
    upstream = WEIGHTS if size == 2 else torch.ones(ROWS)

    def loss(leaves: Head, group: Any = None) -> Tensor:
        return linear_mean_prediction_loss(*leaves, *rows, process, group=group, **options)

    check_equal(together(loss, head, size, upstream), results(loss, head, upstream), SOFTMAX_BOUND[dtype], least=0.1)


@pytest.mark.operators
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_mean_prediction_is_that_of_the_reference(name: str, step: bool, scale: float) -> None:
    """Also for predictions that are all but certain, right or wrong, where the reference has no digits: one process."""
    process = PROCESSES[name](41)
    head, rows = random_head(41, torch.float64), clean_rows(process)
    head = head._replace(hidden=head.hidden * scale)
    sigma_s = 0.4 * rows.sigma if step else None

    def one(leaves: Head) -> Tensor:
        logits = torch.nn.functional.linear(leaves.hidden, leaves.weight, leaves.bias)
        return reference.mean_prediction_loss(logits, *rows, process, sigma_s=sigma_s)

    def split(leaves: Head, group: Any = None) -> Tensor:
        return linear_mean_prediction_loss(*leaves, *rows, process, sigma_s=sigma_s, group=group)

    upstream = torch.ones(ROWS)
    wanted = results(one if scale < 100 else split, head, upstream)
    check_equal(together(split, head, 3, upstream), wanted, 1e-11, least=0.01)


@pytest.mark.operators
def test_losses_near_their_minimum_keep_their_digits() -> None:
    """With μ_{x_0} = 1 - 1e-20, in float64: the rest of the softmax is in the other process."""
    head = random_head(8, torch.float64)
    head = head._replace(hidden=0 * head.hidden, bias=torch.tensor([46.0, 0, 0, 0, 0, 0, 0, 46.0]).double())
    x_t, x_0, power = torch.full((ROWS,), 7), torch.zeros(ROWS, dtype=torch.int64), torch.ones(8).double()
    rest = 6 * torch.tensor(-46.0).double().exp()

    def absorbing(leaves: Head, group: Any = None) -> Tensor:
        return linear_mean_prediction_loss(*leaves, x_t, x_0, 0.5, Absorbing(7), group=group)

    def generalized(leaves: Head, group: Any = None) -> Tensor:
        return linear_generalized_masked_loss(*leaves, x_t, x_0, 0.5, power, group=group)

    for loss, factor in ((absorbing, 1 / torch.expm1(torch.tensor(0.5).double())), (generalized, 2.0)):
        for value, *_ in together(loss, head, 2, torch.ones(ROWS)):
            torch.testing.assert_close(value, (rest * factor).expand(ROWS), rtol=1e-12, atol=0)


def random_power(n: int, dtype: torch.dtype) -> Tensor:
    power = 0.2 + torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return power if dtype == torch.float64 else power.float()


def masked_rows(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, x_0 and t; two of three rows are masked."""
    x_0 = torch.randint(n - 1, (ROWS,), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(ROWS) % 3 != 1, n - 1, x_0), x_0, torch.linspace(0.1, 1.0, ROWS).double()


class Part(NamedTuple):
    """A head with powers, which all processes have."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    power: Tensor

    def part(self, rank: int, size: int) -> Part:
        return Part(*Head(*self[:3]).part(rank, size), self.power)


def generalized(function: Callable[..., Tensor], *rows: Tensor, **options: Any) -> Callable[..., Tensor]:
    def loss(leaves: Part, group: Any = None) -> Tensor:
        *head, power = leaves
        chosen = options if group is None else {**options, "group": group}
        return function(*head, *rows, power, **chosen)

    return loss


def check_power(found: list[list[Tensor]], wanted: list[Tensor], bound: float, least: float = 0.0) -> None:
    """:func:`check_equal`; the last gradient is whole in all processes."""
    for process in found:
        assert process[-1].dtype == wanted[-1].dtype
        assert (process[-1] - wanted[-1]).abs().max() <= bound * wanted[-1].abs().max().clamp(min=least)
    check_equal([process[:-1] for process in found], wanted[:-1], bound, least)


@pytest.mark.operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "n"), SIZES)
def test_generalized_masked(size: int, n: int, dtype: torch.dtype) -> None:
    head = Part(*random_head(n, dtype, bias=size != 3), random_power(n, dtype))
    options: dict[str, Any] = {"loss_weight": WEIGHTS}
    if size == 2:
        options["buffer_bytes"] = 3 * n * dtype.itemsize // 2
    upstream = WEIGHTS if size == 2 else torch.ones(ROWS)
    loss = generalized(linear_generalized_masked_loss, *masked_rows(n), **options)
    check_power(together(loss, head, size, upstream), results(loss, head, upstream), SOFTMAX_BOUND[dtype], least=0.1)


@pytest.mark.operators
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_generalized_masked_is_that_of_the_reference(scale: float) -> None:
    head = Part(*random_head(41, torch.float64), random_power(41, torch.float64))
    head = head._replace(hidden=head.hidden * scale)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return reference.generalized_masked_loss(torch.nn.functional.linear(hidden, weight, bias), *rest)

    upstream, rows = torch.ones(ROWS), masked_rows(41)
    found = together(generalized(linear_generalized_masked_loss, *rows), head, 3, upstream)
    check_power(found, results(generalized(plain, *rows), head, upstream), 1e-11, least=0.01)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("operator", ["mean", "generalized"])
def test_processes_divide_the_rows_of_a_softmax_alike(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 21 of 41 entries a tile takes one row, with 20 it could take two. Each process by itself."""
    head, power, rows = random_head(41), random_power(41, torch.float32), masked_rows(41)
    shapes: list[torch.Size] = []

    def all_gather(out: list[Tensor], value: Tensor, group: Any) -> None:
        shapes.append(value.shape)
        for one in out:
            one.copy_(value)

    def all_reduce(value: Tensor, **_: Any) -> Any:
        shapes.append(value.shape)
        return mock.Mock()

    monkeypatch.setattr(module.torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(module.torch.distributed, "all_reduce", all_reduce)
    seen = []
    with groups(2) as group:
        for rank in range(2):
            part = head.part(rank, 2)
            if operator == "mean":
                linear_mean_prediction_loss(*part, *rows, Uniform(41), group=group[rank], buffer_bytes=90)
            else:
                linear_generalized_masked_loss(*part, *rows, power, group=group[rank], buffer_bytes=90)
            seen.append(shapes.copy())
            shapes.clear()
    assert seen[0] == seen[1]
    assert len(seen[0]) >= int((rows[0] == 40).sum())  # one row at a time


@pytest.mark.operators
def test_impossible_tokens() -> None:
    """All logits of a process are -inf but for the ones that its softmax leaves out."""
    head = random_head(9, torch.float32)
    assert head.bias is not None
    bias = head.bias.clone()
    bias[:5] = -torch.inf
    bias[2], bias[8] = 1.0, -torch.inf  # x_0 and MASK
    head = head._replace(bias=bias)
    x_t, x_0, power = torch.full((ROWS,), 8), torch.full((ROWS,), 2), random_power(9, torch.float32)
    for process in (Absorbing(8), Uniform(9), PROCESSES["hybrid"](9)):

        def mean(leaves: Head, group: Any = None, process: RankOne = process) -> Tensor:
            return linear_mean_prediction_loss(*leaves, x_t, x_0, 0.5, process, group=group)

        wanted = results(mean, head, torch.ones(ROWS))
        assert all(value.isfinite().all() for value in wanted)
        check_equal(together(mean, head, 2, torch.ones(ROWS)), wanted, 3e-6)
    loss = generalized(linear_generalized_masked_loss, x_t, x_0, torch.full((ROWS,), 0.5).double())
    wanted = results(loss, Part(*head, power), torch.ones(ROWS))
    assert all(value.isfinite().all() for value in wanted)
    check_power(together(loss, Part(*head, power), 2, torch.ones(ROWS)), wanted, 3e-6)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_mean_prediction_exchanges_the_softmax_first(exchanges: Any, name: str, needs_gradient: bool) -> None:
    """Then, unless the process is absorbing, three sums, and the gradient of the hidden state."""
    process = PROCESSES[name](41)
    head, rows = random_head(41, torch.bfloat16), clean_rows(process)
    count = int((rows.x_t == 40).sum()) if name == "absorbing" else ROWS

    def loss(leaves: Head, group: Any) -> Tensor:
        with torch.set_grad_enabled(needs_gradient):
            value = linear_mean_prediction_loss(*leaves, *rows, process, group=group)
        return value if needs_gradient else value + 0 * sum(leaf.sum() for leaf in leaves if leaf is not None)

    together(loss, head, 2, torch.ones(ROWS))
    wanted = [((count, 4), torch.float64)] + [((count, 3), torch.float64)] * (name == "uniform")
    wanted += [((count, WIDTH), torch.float32)] * needs_gradient
    assert sorted(exchanges, key=str) == sorted(wanted * 2, key=str)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("wanted", [("hidden", "power"), ("hidden",), ("power",), ()])
def test_generalized_masked_exchanges_four_numbers_a_row(exchanges: Any, wanted: tuple[str, ...]) -> None:
    head = Part(*random_head(41, torch.bfloat16), random_power(41, torch.bfloat16))
    rows = masked_rows(41)
    masked = int((rows[0] == 40).sum())
    assert 0 < masked < ROWS

    def work(group: Any, part: Part) -> None:
        leaves = part._replace(**{name: getattr(part, name).clone().requires_grad_() for name in wanted})
        generalized(linear_generalized_masked_loss, *rows)(leaves, group)

    with groups(2) as group:
        in_threads(2, lambda rank: work(group[rank], head.part(rank, 2)))
    sent = [((masked, 4), torch.float64)]
    sent += [((masked, WIDTH), torch.float32)] * ("hidden" in wanted) + [((41,), torch.float64)] * ("power" in wanted)
    assert sorted(exchanges, key=str) == sorted(sent * 2, key=str)


@pytest.mark.operators
def test_no_row_needs_the_softmax(exchanges: Any) -> None:
    tokens = torch.zeros(ROWS, dtype=torch.int64)
    head, power = random_head(41), random_power(41, torch.float32)

    def mean(leaves: Head, group: Any = None) -> Tensor:
        return linear_mean_prediction_loss(*leaves, tokens, tokens, 0.5, Absorbing(40), group=group)

    masked = generalized(linear_generalized_masked_loss, tokens, tokens, torch.ones(ROWS).double())
    for found in (
        together(mean, head, 2, torch.ones(ROWS)),
        together(masked, Part(*head, power), 2, torch.ones(ROWS)),
    ):
        assert all((value == 0).all() for process in found for value in process)
    assert not exchanges
    linear_mean_prediction_loss(*head, tokens + 40, tokens, 0.5, Absorbing(40))  # runs a kernel


@pytest.mark.operators("cpu")
def test_all_processes_report_the_bad_row(exchanges: Any) -> None:
    x_t = torch.full((ROWS,), 40)
    x_t[3] = 41
    head, power = random_head(41), random_power(41, torch.float32)
    calls: list[Callable[..., Tensor]] = [
        lambda *head, group: linear_mean_prediction_loss(*head, x_t, x_t % 7, 0.5, Absorbing(40), group=group),
        lambda *head, group: linear_generalized_masked_loss(*head, x_t, x_t % 7, 0.5, power, group=group),
    ]

    def work(rank: int, call: Callable[..., Tensor], group: Any) -> str:
        with pytest.raises(ValueError, match="x_t") as caught:
            call(*head.part(rank, 2), group=group[rank])
        return str(caught.value)

    for call in calls:
        with groups(2) as group:
            said = in_threads(2, lambda rank, call=call, group=group: work(rank, call, group))  # type: ignore[misc]
        assert said == ["x_t: expected tokens in [0, 41), got 41 at index [3]"] * 2
    assert not exchanges
    linear_mean_prediction_loss(*head, x_t.clamp(max=40), x_t % 7, 0.5, Absorbing(40))


@pytest.mark.operators
@pytest.mark.parametrize("size", [1, 2])
def test_an_autoregressive_loss(size: int) -> None:
    """An absorbing process at σ̄ = log 2 gives -log μ; nothing is masked but all rows are."""
    head, tokens = random_head(41), torch.arange(ROWS)
    sigma = torch.tensor(2.0).double().log()

    def loss(leaves: Head, group: Any = None) -> Tensor:
        return linear_mean_prediction_loss(
            *leaves, torch.full_like(tokens, 40), tokens, sigma, Absorbing(40), group=group
        )

    def plain(leaves: Head) -> Tensor:
        logits = torch.nn.functional.linear(leaves.hidden, leaves.weight, leaves.bias)[:, :40]
        return torch.nn.functional.cross_entropy(logits, tokens, reduction="none")

    check_equal(together(loss, head, size, torch.ones(ROWS)), results(plain, head, torch.ones(ROWS)), 3e-6)


class TestBadParts:
    """Of the losses with a softmax."""

    def call(self, operator: str, weight: Tensor, n: int = 10, power: int | None = None, **options: Any) -> Tensor:
        hidden, tokens = torch.ones(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64)
        if operator == "mean":
            return sedd_ext.linear_mean_prediction_loss(
                hidden, weight, None, tokens, tokens, 0.5, Uniform(n), **options
            )
        given = torch.ones(n if power is None else power)
        return sedd_ext.linear_generalized_masked_loss(hidden, weight, None, tokens, tokens, 0.5, given, **options)

    @pytest.mark.parametrize("operator", ["mean", "generalized"])
    def test_the_rows_of_another_process(self, operator: str) -> None:
        match = r"weight: expected shape \[2, d\], the rows from 8 on of 10 for process 2 of 3, as .*chunk\(3\)\[2\]"
        with groups(3) as group, pytest.raises(ValueError, match=match):
            self.call(operator, torch.ones(4, WIDTH), group=group[2])

    @pytest.mark.parametrize("operator", ["mean", "generalized"])
    def test_no_group(self, operator: str) -> None:
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup or None, got str"):
            self.call(operator, torch.ones(5, WIDTH), group="vocabulary")

    def test_a_part_without_a_group(self) -> None:
        with pytest.raises(ValueError, match=r"weight: expected shape \[10, d\]"):
            self.call("mean", torch.ones(5, WIDTH))
        with pytest.raises(ValueError, match=r"power: expected shape \[5\]"):
            self.call("generalized", torch.ones(5, WIDTH))

    def test_powers_of_a_part(self) -> None:
        with groups(2) as group, pytest.raises(ValueError, match=r"weight: expected shape \[3, d\], .* of 5 for"):
            self.call("generalized", torch.ones(5, WIDTH), power=5, group=group[0])


def test_the_rows_of_a_dtensor() -> None:
    """Without N, which the powers of generalised masked diffusion do not tell of a DTensor: that of all rows."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        part = torch.ones(2, WIDTH)
        weight = DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, WIDTH)), stride=(6, 1)
        )
        local, _, share = module.check_split(weight, None, None, None)
        assert torch.equal(local, part)
        assert share == (5, 3, mesh.get_group().group_name)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ reverse steps

both_steps = pytest.mark.parametrize("step", [Tweedie, Euler], ids=["tweedie", "euler"])
StepOf = Callable[[Any], "Tweedie | Euler"]


def many_rows(n: int, dtype: torch.dtype, rows: int) -> Head:
    """A head and so many hidden states."""
    return random_head(n, dtype)._replace(hidden=random_log_score((rows, WIDTH), dtype, 7, 0.6))


def draw_together(size: int, head: Head, *arguments: Any, seed: int = 3, **options: Any) -> list[Tensor]:
    """The tokens of each process."""
    with groups(size) as group:

        def work(rank: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            part = head.part(rank, size)
            return linear_reverse_sample(*part, *arguments, generator=generator, group=group[rank], **options)

        return in_threads(size, work)


def check_tokens(size: int, head: Head, *arguments: Any, **options: Any) -> Tensor:
    """The tokens of one process, which those of a group must equal."""
    generator = torch.Generator().manual_seed(3)
    one = linear_reverse_sample(*head, *arguments, generator=generator, **options)
    for tokens in draw_together(size, head, *arguments, **options):
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, one)
    return one


@pytest.mark.operators
@both_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("size", "n"), [(2, 37), (3, 37), (4, 5000)])
def test_tokens(name: str, size: int, n: int, dtype: torch.dtype, step: StepOf) -> None:
    """Those of one process, in each process, where tiles straddle two or three of them."""
    process, rows = PROCESSES[name](n), 300
    head, x = many_rows(n, dtype, rows), random_rows(process, rows).x_t
    options = {"denoise": size != 3, "log_score_shift": torch.linspace(-1, 1, rows)}
    if size == 2:
        options["buffer_bytes"] = 50 * n * dtype.itemsize  # several tiles of rows
    tokens = check_tokens(size, head, x, step(torch.linspace(0.05, 2.0, rows)), process, **options)
    assert (tokens != x).sum() > 20


@pytest.mark.operators
@pytest.mark.parametrize(("size", "n"), [(3, 9001), (2, 4096), (2, 20_000)])
def test_tokens_of_many_tiles(size: int, n: int) -> None:
    """Tiles of processes that end with a boundary, and that do not, on a device with narrow and with wide tiles."""
    process, rows = Hybrid(n - 1, 0.4), 100
    head, x = many_rows(n, torch.float32, rows), random_rows(process, rows).x_t
    tokens = check_tokens(size, head, x, Tweedie(1.0), process)
    owners = tokens[tokens != x] // -(-n // size)
    assert set(owners.tolist()) == set(range(size))


@pytest.mark.operators
def test_wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's width, with which a tile has parts of three processes."""
    process, rows = Hybrid(8999, 0.4), 100
    monkeypatch.setattr(sedd_ext.linear_reverse, "tile_shape", lambda rows, *_: (rows, 8192))
    monkeypatch.setattr(sedd_ext.head, "tile_shape", lambda rows, *_: (rows, 8192))
    head, x = many_rows(9000, torch.float32, rows), random_rows(process, rows).x_t
    check_tokens(4, head, x, Tweedie(1.0), process)


@pytest.mark.operators
@pytest.mark.parametrize("name", ["uniform", "hybrid"])
@pytest.mark.parametrize(("size", "n"), [(3, 41), (4, 5000)])
def test_refused_rows_are_drawn_again_together(name: str, size: int, n: int, exchanges: Any) -> None:
    process, rows = PROCESSES[name](n), 300
    head, x = many_rows(n, torch.float32, rows), random_rows(process, rows).x_t
    check_tokens(size, head, x, Tweedie(4.0), process)
    parts = 1 if n < 2048 else 2
    first, second, *again = exchanges[::size]
    assert (first, second) == (((parts, rows), torch.float64), ((rows, 2), torch.int64))
    count = again[0][0][1]
    assert 30 < count < rows
    assert again == [((parts, count), torch.float64), ((count, 2), torch.int64)]


@pytest.mark.operators("cpu")
def test_what_a_reverse_step_exchanges(exchanges: Any) -> None:
    """A float64 for each tile, the token and its score: nothing for rows that do not need the head."""
    process = Absorbing(4999)
    x = torch.tensor([4999, 3, 4999, 4999, 5])
    draw_together(4, many_rows(5000, torch.bfloat16, 5), x, Tweedie(0.5), process)
    assert sorted(exchanges, key=str) == sorted([((2, 3), torch.float64), ((3, 2), torch.int64)] * 4, key=str)
    exchanges.clear()
    tokens = draw_together(4, many_rows(5000, torch.bfloat16, 5), torch.zeros(5).long(), Tweedie(0.5), process)
    assert all((token == 0).all() for token in tokens)
    assert not exchanges


@pytest.mark.operators("cpu", "cuda")
@both_steps
def test_rare_tokens_get_their_share_of_a_split_draw(step: StepOf) -> None:
    process, size, wanted = Absorbing(4096), 0.002, rare_tokens()
    bias = (wanted / (math.expm1(size) if step is Tweedie else size)).log().float()
    probs = reference.reverse_probs(bias.double(), torch.tensor(4096), step(size), process)
    counts = torch.zeros(4097, dtype=torch.int64)
    head, x = Head(torch.zeros(20_000, 1), torch.zeros(4097, 1), bias), torch.full((20_000,), 4096)
    for seed in range(15):
        counts += draw_together(3, head, x, step(size), process, seed=seed)[0].bincount(minlength=4097)
    assert chi_square(counts, probs) > 0.01
    assert chi_square(rare_or_not(counts), rare_or_not(probs)) > 0.01


@pytest.mark.operators
@both_steps
def test_a_bad_hidden_state_is_refused_by_all(backend: Backend, step: StepOf) -> None:
    """And bad numbers in the head of one process."""
    process = Hybrid(40, 0.3)
    good = many_rows(41, torch.float32, 4)
    hidden, weight = good.hidden.clone(), good.weight.clone()
    hidden[2] = torch.nan
    weight[30] = torch.inf
    for head, wrong in ((good._replace(hidden=hidden), [2]), (good._replace(weight=weight), [0, 1, 2, 3])):
        with groups(3) as group:

            def work(rank: int, head: Head = head, group: Any = group) -> Tensor | str:
                arguments = torch.full((4,), 40), step(0.5), process
                options = {"generator": torch.Generator().manual_seed(0), "group": group[rank]}
                try:
                    return linear_reverse_sample(*head.part(rank, 3), *arguments, **options)
                except ValueError as error:
                    return str(error)

            for result in in_threads(3, work):
                if backend.names_bad_rows:
                    assert isinstance(result, str)
                    assert result.startswith("hidden: expected scores")
                    assert f"index [{wrong[0]}]" in result
                else:
                    assert bad_rows(result) == wrong


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.5), ("top_p", 0.9)])
def test_tempered_draws_need_the_whole_vocabulary(option: str, value: float) -> None:
    head, x = random_head(10), torch.zeros(ROWS, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{option}: expected 1 with a group, got {value}"):
        draw_together(2, head, x, Tweedie(0.5), Uniform(10), **{option: value})


@pytest.mark.operators
@both_steps
def test_tokens_of_a_group_of_one_process(step: StepOf) -> None:
    check_tokens(1, random_head(41), random_rows(Uniform(41), ROWS).x_t, step(0.5), Uniform(41))


# ----------------------------------------------------------------------------- reverse steps from a mean prediction


@pytest.mark.operators
@both_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("size", "n"), [(2, 37), (3, 41), (4, 5000)])
def test_mean_tokens(name: str, size: int, n: int, dtype: torch.dtype, step: StepOf) -> None:
    process, rows = PROCESSES[name](n), 300
    head, x = many_rows(n, dtype, rows), random_rows(process, rows).x_t
    sigma = torch.linspace(0.1, 3.0, rows)
    options = {"denoise": size != 3, "parameterization": "mean", "sigma": sigma}
    if size == 2:
        options["buffer_bytes"] = 50 * n * dtype.itemsize  # several tiles of rows
    tokens = check_tokens(size, head, x, step(sigma * torch.linspace(0.1, 1.0, rows)), process, **options)
    assert (tokens != x).sum() > 20


@pytest.mark.operators
@pytest.mark.parametrize(("size", "n"), [(3, 37), (2, 4099)])
def test_tokens_of_powers(size: int, n: int) -> None:
    process, rows = Absorbing(n - 1), 300
    head, x = many_rows(n, torch.float32, rows), random_rows(process, rows).x_t
    power = random_log_score((n,), torch.float32, 5, 0.5).exp()
    for step in (GeneralizedMasked(0.4, 0.7, power), GeneralizedMasked(0.0, 0.2, power)):
        check_tokens(size, head, x, step, process, parameterization="mean", denoise=step.s == 0)


@pytest.mark.operators
def test_large_logits() -> None:
    """Sums of processes whose largest logits differ by more than a float's range; one has none but -inf."""
    process, rows = Hybrid(8, 0.3), 300
    head = Head(torch.ones(rows, 1), torch.zeros(9, 1), torch.tensor([-800.0, 1, 2, 700, 701, 702, 0, 0, 0]))
    head.bias[6:] = -torch.inf
    x = random_rows(process, rows).x_t.where(torch.arange(rows) % 2 == 0, torch.tensor(8))
    tokens = check_tokens(3, head, x, Tweedie(1.0), process, parameterization="mean", sigma=1.0, denoise=True)
    assert {3, 4, 5} <= set(tokens.tolist())


@pytest.mark.operators("cpu")
def test_what_a_step_from_a_mean_prediction_exchanges(exchanges: Any) -> None:
    """Four float64 and the token, for each tile of rows."""
    process = Absorbing(40)
    x = torch.tensor([40, 3, 40, 40, 5])
    options = {"parameterization": "mean", "sigma": 1.0, "buffer_bytes": 2 * 14 * 4}
    draw_together(3, many_rows(41, torch.float32, 5), x, Tweedie(0.5), process, **options)
    chunks = [((r, 4), torch.float64) for r in (2, 1)] + [((r,), torch.int64) for r in (2, 1)]
    assert sorted(exchanges, key=str) == sorted(chunks * 3, key=str)


@pytest.mark.operators("cpu", "cuda")
def test_the_law_of_a_split_draw_from_a_mean_prediction() -> None:
    process, logits = Absorbing(99), torch.linspace(-7, 4, 100)
    head, x = Head(torch.zeros(40_000, 1), torch.zeros(100, 1), logits), torch.full((40_000,), 99)
    options = {"parameterization": "mean", "sigma": 1.0}
    probs = reference.reverse_probs(logits.double(), torch.tensor(99), Tweedie(0.6), process, **options)
    tokens = draw_together(3, head, x, Tweedie(0.6), process, **options)[0]
    assert chi_square(tokens.bincount(minlength=100), probs) > 1e-3


@pytest.mark.operators
def test_bad_logits_are_refused_by_all(backend: Backend) -> None:
    process, head = Hybrid(40, 0.3), many_rows(41, torch.float32, 4)
    head.hidden[2] = torch.nan
    with groups(3) as group:

        def work(rank: int) -> Tensor | str:
            options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "group": group[rank]}
            options |= {"parameterization": "mean", "sigma": 1.0}
            try:
                return linear_reverse_sample(
                    *head.part(rank, 3), torch.full((4,), 40), Tweedie(0.5), process, **options
                )
            except ValueError as error:
                return str(error)

        for result in in_threads(3, work):
            if backend.names_bad_rows:
                assert isinstance(result, str)
                assert result.startswith("hidden: expected scores")
                assert "index [2]" in result
            else:
                assert bad_rows(result) == [2]


# ---------------------------------------------------------------------------------------------------------- unmasking

NARROW = 1 << 17
"""A buffer with room for tiles of 2,048 entries alone."""


def unmask_together(size: int, head: Head, *, seed: int = 3, **options: Any) -> Unmasked:
    """What each process finds: the same bits in all of them."""
    options = {"dim": len(head.weight), **options}
    with groups(size) as group:

        def work(rank: int) -> Unmasked:
            generator = torch.Generator().manual_seed(seed)
            return linear_unmask(*head.part(rank, size), generator=generator, group=group[rank], **options)

        first, *others = in_threads(size, work)
    for other in others:
        check_same(other, first)
    return first


def check_same(found: Unmasked, wanted: Unmasked, rows: Any = slice(None)) -> None:
    """The same bits."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs[rows])


@pytest.mark.operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("size", "n"), [(2, 3), (3, 3), (2, 37), (3, 41), (4, 5000)])
def test_unmasking(size: int, n: int, temperature: float, dtype: torch.dtype) -> None:
    """The statistics of one process; with n = 3 a process has MASK alone, or one token beside it."""
    head = random_head(n, dtype, bias=size != 3)
    logits = head.hidden.double() @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double())
    for mask_id in (None, 0, n - 1):
        options: dict[str, Any] = {"mask_id": mask_id, "temperature": temperature, "buffer_bytes": NARROW}
        found, one = unmask_together(size, head, **options), linear_unmask(*head, **options)
        for name in ("max_prob", "margin", "entropy"):
            mine, theirs = getattr(found, name), getattr(one, name)
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=BOUND[dtype], atol=BOUND[dtype])
        log_probs = logits.index_fill(1, torch.tensor([] if mask_id is None else [mask_id]).long(), -math.inf)
        log_probs = log_probs.log_softmax(-1)
        own, best = (log_probs.gather(1, token[:, None])[:, 0] for token in (found.token, found.argmax))
        torch.testing.assert_close(found.log_prob.double(), own, rtol=BOUND[dtype], atol=3 * BOUND[dtype])
        assert bool((best >= log_probs.amax(1) - 3 * BOUND[dtype]).all())
        if temperature == 0:
            assert torch.equal(found.token, found.argmax)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize(("size", "n"), [(3, 100), (2, 9001)])
def test_the_law_of_split_unmasking(size: int, n: int, temperature: float) -> None:
    """Processes with unequal shares of the probability; with n = 9,001 each has three tiles."""
    bias = torch.linspace(-3, 4, n)
    head = Head(torch.zeros(40_000, 1), torch.zeros(n, 1), bias)
    options: dict[str, Any] = {"mask_id": n - 5, "temperature": temperature, "statistics": (), "buffer_bytes": NARROW}
    tokens = unmask_together(size, head, **options).token
    probs = bias.double().div(temperature).index_fill(0, torch.tensor(n - 5), -math.inf).softmax(0)
    assert chi_square(tokens.bincount(minlength=n), probs) > 1e-3
    most = -(-n // size)
    owners = torch.stack([part.sum() for part in probs.split(most)])
    assert chi_square((tokens // most).bincount(minlength=size), owners) > 1e-3


@pytest.mark.operators("cpu", "cuda")
def test_rare_tokens_get_their_share_of_split_unmasking() -> None:
    wanted = rare_tokens()
    head, counts = Head(torch.zeros(20_000, 1), torch.zeros(4097, 1), wanted.log().float()), torch.zeros(4097).long()
    for seed in range(5):
        found = unmask_together(3, head, mask_id=4096, statistics=(), seed=seed)
        counts += found.token.bincount(minlength=4097)
    probs = torch.cat([wanted[:4096], torch.zeros(1)]).double()
    assert chi_square(rare_or_not(counts), rare_or_not(probs / probs.sum())) > 1e-3


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_split_unmasking_does_not_depend_on_the_batch(temperature: float, dtype: torch.dtype) -> None:
    """With so many processes that torch adds up their sums in another order in another batch."""
    head, ids = many_rows(5000, dtype, 130), torch.arange(130)
    options: dict[str, Any] = {"temperature": temperature, "buffer_bytes": NARROW}
    whole = unmask_together(7, head, row_ids=ids, **options)
    assert len(whole.token.unique()) > 20
    for rows in ([0], [129], [129, 63, 64, 1], list(range(7, 80)), list(range(129, -1, -1))):
        part = head._replace(hidden=head.hidden[rows])
        check_same(unmask_together(7, part, row_ids=ids[rows], **options), whole, rows)


@pytest.mark.operators
def test_the_first_of_equal_logits_of_two_processes() -> None:
    head = Head(torch.ones(3, 1), torch.zeros(50, 1), torch.zeros(50))
    assert head.bias is not None
    assert unmask_together(3, head).argmax.tolist() == [0] * 3
    head.bias[[20, 40]] = 2.0
    found = unmask_together(3, head)
    assert found.argmax.tolist() == [20] * 3
    assert found.margin.tolist() == [0.0] * 3
    head.bias[40] = 1.0
    torch.testing.assert_close(unmask_together(3, head).margin, linear_unmask(*head).margin, rtol=1e-6, atol=0)


@pytest.mark.operators
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 100.0])
def test_large_logits_of_split_unmasking(temperature: float) -> None:
    """Processes whose largest logits differ by more than a float's range; one has none but -inf."""
    bias = torch.tensor([-1800.0, -999, -998, -300, -299, -298, 0, 0, 0])
    bias[6:] = -torch.inf
    head = Head(torch.ones(300, 1), torch.zeros(9, 1), bias)
    found, one = (unmask_together(3, head, temperature=temperature), linear_unmask(*head, temperature=temperature))
    for name in ("argmax", "max_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(one, name), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.log_prob.double(), bias.double().log_softmax(0)[found.token], rtol=1e-6, atol=1e-6)
    if temperature >= 1:
        probs = (bias.double() / temperature).softmax(0)
        assert chi_square(found.token.bincount(minlength=9), probs) > 1e-3


@pytest.mark.operators
@pytest.mark.parametrize("statistics", [(), ("entropy",), ("margin", "log_prob")])
def test_statistics_of_split_unmasking(statistics: tuple[str, ...]) -> None:
    head = random_head(41)
    everything, found = unmask_together(2, head), unmask_together(2, head, statistics=statistics)
    assert torch.equal(found.token, everything.token)
    for name in STATISTICS:
        mine = getattr(found, name)
        assert (mine is not None) == (name in statistics)
        assert mine is None or torch.equal(mine, getattr(everything, name))


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("statistics", [STATISTICS, ()])
def test_what_unmasking_exchanges(exchanges: Any, statistics: tuple[str, ...]) -> None:
    """Eight float64 for each position, once."""
    unmask_together(3, random_head(41, torch.bfloat16), statistics=statistics, buffer_bytes=90)
    assert exchanges == [((ROWS, 8), torch.float64)] * 3


@pytest.mark.operators
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"statistics": ()}], ids=str)
def test_unmasking_refuses_bad_rows_in_all_processes(backend: Backend, options: dict[str, Any]) -> None:
    """A bad hidden state, bad numbers in the head of one process, and no token with a probability."""
    good = many_rows(41, torch.float32, 4)
    assert good.bias is not None
    hidden, weight = good.hidden.clone(), good.weight.clone()
    hidden[2], weight[30] = torch.nan, torch.inf
    bad = [
        (good._replace(hidden=hidden), [2]),
        (good._replace(weight=weight), [0, 1, 2, 3]),
        (good._replace(bias=torch.full_like(good.bias, -torch.inf)), [0, 1, 2, 3]),
    ]
    for head, wrong in bad:
        with groups(3) as group:

            def work(rank: int, head: Head = head, group: Any = group) -> Unmasked | str:
                try:
                    return linear_unmask(*head.part(rank, 3), dim=41, group=group[rank], **options)
                except ValueError as error:
                    return str(error)

            for result in in_threads(3, work):
                if backend.names_bad_rows:
                    assert isinstance(result, str)
                    assert result.startswith("hidden: expected rows with a softmax")
                    assert result.endswith(f"index [{wrong[0]}]")
                else:
                    assert isinstance(result, Unmasked)
                    assert bad_rows(result.token) == bad_rows(result.argmax) == wrong
                    assert result.entropy is None or result.entropy.isnan().nonzero()[:, 0].tolist() == wrong


@pytest.mark.operators
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_unmasking_in_a_group_of_one_process(temperature: float) -> None:
    head = many_rows(5000, torch.float32, 70)
    options: dict[str, Any] = {"temperature": temperature, "buffer_bytes": NARROW}
    one = linear_unmask(*head, generator=torch.Generator().manual_seed(3), **options)
    check_same(unmask_together(1, head, **options), one)


@pytest.mark.operators
def test_a_group_unmasks_no_rows() -> None:
    head = random_head(10)
    assert unmask_together(2, head._replace(hidden=head.hidden[:0])).token.shape == (0,)
    linear_unmask(*head)  # runs a kernel


class TestBadUnmasking:
    def call(self, rank: int, size: int, **changed: Any) -> Unmasked:
        with groups(size) as group:
            part = random_head(10).part(rank, size)
            given = {**part._asdict(), "dim": 10, "group": group[rank], **changed}
            return sedd_ext.linear_unmask(**given)

    def test_a_nucleus(self) -> None:
        with pytest.raises(ValueError, match=r"top_p: expected 1 with a group, got 0\.9"):
            self.call(0, 2, top_p=0.9)

    def test_no_size(self) -> None:
        with pytest.raises(ValueError, match=r"dim: expected the number of tokens, of which a process .*, got None"):
            self.call(0, 2, dim=None)

    @pytest.mark.parametrize("dim", [0, 2.0, True])
    def test_bad_size(self, dim: Any) -> None:
        with pytest.raises(ValueError, match=f"dim: expected a positive int or None, got {dim}"):
            self.call(0, 2, dim=dim)

    def test_the_rows_of_another_process(self) -> None:
        match = r"weight: expected shape \[2, d\], the rows from 8 on of 10 for process 2 of 3, as .*chunk\(3\)\[2\]"
        with pytest.raises(ValueError, match=match):
            self.call(2, 3, weight=torch.ones(4, WIDTH), bias=torch.ones(4))

    def test_a_part_without_a_group(self) -> None:
        with pytest.raises(ValueError, match=r"weight: expected shape \[10, d\]"):
            self.call(0, 2, group=None)

    def test_no_group(self) -> None:
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup or None, got str"):
            self.call(0, 2, group="vocabulary")

    def test_mask_is_a_token_of_all_processes(self) -> None:
        with pytest.raises(ValueError, match=r"mask_id: expected a token in \[0, 10\) or None, got 10"):
            self.call(0, 2, mask_id=10)
