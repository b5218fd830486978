"""The vocabulary split over processes: the results of one process, and what the processes exchange for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from backends import linear_score_entropy_loss
from explicit import PROCESSES, random_log_score, random_rows
from split import groups, in_threads
from torch import Tensor

import sedd_ext
import sedd_ext.split as module
from sedd_ext import Absorbing, RankOne, Uniform, reference

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


def results(loss: Callable[[Head], Tensor], head: Head, upstream: Tensor) -> list[Tensor]:
    """The loss and the gradients of the head's parts."""
    leaves = Head(*(None if value is None else value.detach().clone().requires_grad_() for value in head))
    value = loss(leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [value.detach(), *torch.autograd.grad(value, wanted, upstream.to(value.dtype))]


def together(loss: Callable[..., Tensor], head: Head, size: int, upstream: Tensor) -> list[list[Tensor]]:
    """What each process of a group finds."""
    with groups(size) as group:

        def work(rank: int) -> list[Tensor]:
            return results(lambda leaves: loss(leaves, group[rank]), head.part(rank, size), upstream)

        return in_threads(size, work)


def check_equal(found: list[list[Tensor]], wanted: list[Tensor], bound: float) -> None:
    """Loss and hidden's gradient are those of one process in each one; the others are divided as the head is."""
    for process in found:
        for value, one in zip(process[:2], wanted[:2], strict=True):
            assert value.dtype == one.dtype
            assert (value - one).abs().max() <= bound * one.abs().max()
    for i, one in enumerate(wanted[2:], 2):
        whole = torch.cat([process[i] for process in found])
        assert whole.shape == one.shape
        assert whole.dtype == one.dtype
        assert (whole - one).abs().max() <= bound * one.abs().max()


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
    for name in ("all_reduce", "all_gather_into_tensor"):
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
