"""The head fused with the loss of generalised masked diffusion: losses and all gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import Backend, linear_generalized_masked_loss, to_device
from explicit import bad_rows, random_log_score
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sedd_ext.linear_generalized_masked as module
from sedd_ext import fused_loss as machinery
from sedd_ext import reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the fused error may exceed that of plain PyTorch in the same dtype by, for every tile, in units of the result's
# norm: a tile's 16-bit products are rounded once before they are added up.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 1e-13}


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    power: Tensor


class Rows(NamedTuple):
    x_t: Tensor
    x_0: Tensor
    t: Tensor


def random_head(count: int, n: int, dtype: torch.dtype, d: int = 6, bias: bool = True) -> Head:
    shapes = [(count, d), (n, d), (n,)]
    hidden, weight, b = (random_log_score(shape, dtype, seed, 0.6) for seed, shape in enumerate(shapes))
    power = 0.2 + torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Head(
        hidden, weight, b if bias else None, power.to(torch.float64 if dtype == torch.float64 else torch.float32)
    )


def random_rows(count: int, n: int) -> Rows:
    """Two of three rows are masked."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(n - 1, (count,), generator=generator)
    t = 10 ** (-2 * torch.rand(count, generator=generator, dtype=torch.float64))
    return Rows(torch.where(torch.arange(count) % 3 != 1, n - 1, x_0), x_0, t)


def by_head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` with the arguments in the order of Head and Rows."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, power: Tensor, *rows: Any, **options: Any) -> Tensor:
        return function(hidden, weight, bias, *rows, power, **options)

    return call


@by_head
def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **options: Any) -> Tensor:
    """What the operator is to be: the head by itself, then the reference."""
    reduction, factor = options.get("reduction", "none"), options.get("loss_weight", 1.0)
    loss = reference.generalized_masked_loss(F.linear(hidden, weight, bias), *rest) * factor
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


fused_loss = by_head(linear_generalized_masked_loss)


def results(function: Callable[..., Tensor], head: Head, *rest: Any, upstream: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of the head's parts and of the power, for what comes down from above."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in head]
    loss = function(*leaves, *rest, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


def distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm()) if exact.norm() > 0 else float(value.norm())


def check_accuracy(head: Head, rows: Rows, upstream: Tensor, buffer_bytes: int = 5000, **options: Any) -> None:
    exact_head = Head(*(None if tensor is None else tensor.double() for tensor in head))
    exact = results(plain, exact_head, *rows, upstream=upstream, **options)
    same_dtype = results(plain, head, *rows, upstream=upstream, **options)
    fused = results(fused_loss, head, *rows, upstream=upstream, buffer_bytes=buffer_bytes, **options)
    assert fused[0].dtype == (torch.float64 if head.hidden.dtype == torch.float64 else torch.float32)
    for gradient, tensor in zip(fused[1:], (v for v in head if v is not None), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
    tile_rows = max(1, buffer_bytes // (head.weight.shape[0] * head.hidden.dtype.itemsize))
    allowed = BOUND[head.hidden.dtype] * math.ceil(len(head.hidden) / tile_rows)
    for value, other, true in zip(fused, same_dtype, exact, strict=True):
        assert distance(value, true) <= distance(other, true) + allowed


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 27, 1000, 5003])
def test_losses_and_gradients(n: int, dtype: torch.dtype) -> None:
    """One number for all rows from above, and different ones."""
    for upstream in (torch.full((14,), 0.25), torch.linspace(-1.0, 2.0, 14)):
        check_accuracy(random_head(14, n, dtype), random_rows(14, n), upstream)


def test_a_large_vocabulary() -> None:
    check_accuracy(random_head(4, 262_145, torch.float32), random_rows(4, 262_145), torch.ones(4), 1 << 21)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_no_bias(dtype: torch.dtype) -> None:
    head, rows, factor = random_head(14, 2100, dtype, bias=False), random_rows(14, 2100), torch.linspace(-0.5, 3.0, 14)
    for upstream in (torch.ones(14), torch.linspace(-1.0, 2.0, 14)):
        check_accuracy(head, rows, upstream, loss_weight=factor.double())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_are_finite(reduction: str) -> None:
    """At t = 1e-5, 2 w/t is beyond float16, and the mean of the weighted loss is not."""
    rows = random_rows(14, 2100)._replace(x_t=torch.full((14,), 2099), t=torch.full((14,), 1e-5).double())
    head, weight = random_head(14, 2100, torch.float16), torch.full((14,), 1e-3).double()
    check_accuracy(head, rows, torch.ones(()), reduction=reduction, loss_weight=weight)


def test_one_buffer_or_many_rows_at_once() -> None:
    head, rows, up = random_head(30, 2100, torch.float64), random_rows(30, 2100), torch.linspace(0.0, 1.0, 30).double()
    several = [results(fused_loss, head, *rows, upstream=up, buffer_bytes=size) for size in (1, 8 * 2100 * 7, 1 << 26)]
    for one, *others in zip(*several, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_reductions() -> None:
    head, rows = random_head(14, 27, torch.float64), random_rows(14, 27)
    none = results(fused_loss, head, *rows, upstream=torch.ones(14))
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 14)):
        fused = results(fused_loss, head, *rows, upstream=torch.tensor(3.0), reduction=reduction)
        torch.testing.assert_close(fused[0], none[0].sum() * scale)
        for one, other in zip(fused[1:], none[1:], strict=True):
            torch.testing.assert_close(one, other * 3.0 * scale)


def test_gradcheck() -> None:
    rows = random_rows(9, 7)._replace(t=torch.linspace(0.1, 1.0, 9).double())
    leaves = [v.requires_grad_() for v in random_head(9, 7, torch.float64, d=3) if v is not None]
    assert torch.autograd.gradcheck(lambda *v: fused_loss(*v, *rows, loss_weight=rows.t), leaves, atol=1e-6, rtol=1e-5)


def test_batches() -> None:
    for shape in [(0,), (3, 0), (), (2, 3)]:
        count = torch.Size(shape).numel()
        flat, rows = random_head(count, 11, torch.float32), random_rows(count, 11)
        head = flat._replace(hidden=flat.hidden.view(*shape, 6))
        got = results(fused_loss, head, *(v.view(shape) for v in rows), upstream=torch.ones(shape))
        expected = results(fused_loss, flat, *rows, upstream=torch.ones(count))
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.flatten(), other.flatten())
            assert count > 0 or not one.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_has_nothing_to_learn(dtype: torch.dtype) -> None:
    for result in results(fused_loss, random_head(14, 2, dtype), *random_rows(14, 2), upstream=torch.ones(14)):
        assert not result.any()


def test_strided_inputs() -> None:
    head, rows = random_head(14, 27, torch.float32), random_rows(14, 27)
    strided = Head(*(None if v is None else torch.stack([v, v], -1)[..., 0] for v in head))
    wide = [torch.stack([v, v], -1)[..., 0] for v in rows]
    assert not strided.weight.is_contiguous()
    for upstream in (torch.ones(()).expand(14), torch.rand(14, 2)[:, 0]):
        one = results(fused_loss, head, *rows, upstream=upstream)
        for a, b in zip(one, results(fused_loss, strided, *wide, upstream=upstream), strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------- what is not done


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kernel, rows) of every launch."""
    seen: list[tuple[str, int]] = []
    launch = module.launch

    def recorded(kernel: str, **arguments: Any) -> Any:
        seen.append((kernel.removeprefix("generalized_masked"), arguments["rows"]))
        return launch(kernel, **arguments)

    monkeypatch.setattr(module, "launch", recorded)
    return seen


def test_other_rows_do_not_reach_the_head(launches: list[tuple[str, int]]) -> None:
    x_t, head = torch.tensor([26, 1, 26, 2, 3]), random_head(5, 27, torch.float32)
    head.hidden[[1, 3, 4]] = float("nan")
    loss, *gradients = results(fused_loss, head, x_t, x_t.clamp(max=25), torch.ones(5).double(), upstream=torch.ones(5))
    assert launches == [("", 2), ("_power", 2), ("_backward", 2)]
    assert (loss[[1, 3, 4]] == 0).all()
    assert (gradients[0][[1, 3, 4]] == 0).all()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_only_what_is_wanted(launches: list[tuple[str, int]]) -> None:
    """A frozen head, the power alone, and no gradient at all."""
    rows, head = random_rows(6, 27), random_head(6, 27, torch.float32)
    every = results(fused_loss, head, *rows, upstream=torch.ones(6))
    for index, kernel in ((0, "_backward"), (1, "_backward"), (2, "_backward"), (3, "_power")):
        launches.clear()
        leaf = head[index]
        assert leaf is not None
        leaves = [leaf.clone().requires_grad_() if i == index else tensor for i, tensor in enumerate(head)]
        (gradient,) = torch.autograd.grad(
            fused_loss(*leaves, *rows).sum(), [v for i, v in enumerate(leaves) if i == index]
        )
        assert torch.equal(gradient, every[1 + index])
        assert launches == [("", 4), (kernel, 4)]
    launches.clear()
    assert torch.equal(fused_loss(*head, *rows), every[0])
    assert launches == [("", 4)]


def test_one_number_from_above_costs_no_second_product(launches: list[tuple[str, int]]) -> None:
    rows, head = random_rows(6, 27), random_head(6, 27, torch.float32)
    for upstream in (torch.ones(6), torch.full((6,), 0.3), torch.tensor(2.0).expand(6)):
        results(fused_loss, head, *rows, upstream=upstream)
    assert len(launches) == 9
    results(fused_loss, head, *rows, upstream=torch.rand(6))
    assert len(launches) == 15


def test_a_frozen_head_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, head, upstream = random_rows(6, 27), random_head(6, 27, torch.float64), torch.rand(6).double()
    exact = results(plain, head, *rows, upstream=upstream)
    hidden = head.hidden.clone().requires_grad_()
    loss = linear_generalized_masked_loss(hidden, head.weight, head.bias, *rows, head.power)
    monkeypatch.setattr(machinery, "common_gradient", lambda *_: pytest.fail("looked"))
    torch.testing.assert_close(torch.autograd.grad(loss, hidden, upstream)[0], exact[1])


# --------------------------------------------------------------------------------------------------------- manners

ROW = [("x_t", 7), ("x_t", -1), ("x_0", 7), ("x_0", 6), ("t", 0.0), ("t", 1.5), ("t", float("nan"))]


@pytest.mark.parametrize("x_t", [6, 2])
@pytest.mark.parametrize(("name", "value"), ROW)
def test_bad_rows(backend: Backend, name: str, value: Any, x_t: int) -> None:
    """As without the head, of masked rows and of others, of which a clean MASK alone is no fault."""
    head = random_head(3, 7, torch.float32)
    rows = {"x_t": torch.tensor([1, x_t, 6]), "x_0": torch.tensor([1, 2, 3]), "t": torch.ones(3).double()}
    rows[name][1] = value
    if (name, value, x_t) == ("x_0", 6, 2):
        assert bad_rows(fused_loss(*head, *rows.values())) == []
    elif backend.names_bad_rows:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value} at index \[1\]"):
            fused_loss(*head, *rows.values())
    else:
        assert bad_rows(fused_loss(*head, *rows.values())) == [1]


@pytest.mark.parametrize(
    ("name", "value", "error", "given"),
    [
        ("weight", torch.zeros(7), ValueError, r"\[N, d\], got \[7\]"),
        ("bias", torch.zeros(8), ValueError, r"\[7\], got \[8\]"),
        ("power", torch.ones(8), ValueError, r"\[7\].*\[8\]"),
        ("power", torch.ones(7).half(), TypeError, r"torch\.float16"),
        ("t", torch.ones(2), ValueError, r"\[2\]"),
        ("loss_weight", "1", TypeError, "str"),
        ("reduction", "avg", ValueError, "avg"),
        ("buffer_bytes", 0, ValueError, "0"),
    ],
)
def test_wrong_calls(name: str, value: Any, error: type[Exception], given: str) -> None:
    right = {**random_head(3, 7, torch.float32)._asdict(), **random_rows(3, 7)._asdict()}
    linear_generalized_masked_loss(**right)
    with pytest.raises(error, match=f"^{name}: expected .*{given}"):
        linear_generalized_masked_loss(**{**right, name: value})


def test_second_derivatives_are_refused() -> None:
    rows = random_rows(6, 27)
    leaves = [v.requires_grad_() for v in random_head(6, 27, torch.float64) if v is not None]
    loss = fused_loss(*leaves, *rows)
    for leaf in leaves:
        (gradient,) = torch.autograd.grad((loss**2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"linear_generalized_masked_loss: .*once"):
            ((loss**2).sum() + (gradient**2).sum()).backward()


def test_inputs_are_left_alone() -> None:
    head, rows = random_head(14, 27, torch.float32), random_rows(14, 27)
    before = [v.clone() for v in (*head, *rows) if v is not None]
    results(fused_loss, head, *rows, upstream=torch.rand(14))
    for now, then in zip((v for v in (*head, *rows) if v is not None), before, strict=True):
        assert torch.equal(now, then)


def test_autocast() -> None:
    """The products in bfloat16, of float32 weights whose gradients stay float32."""
    head, rows, upstream = random_head(14, 2100, torch.float32), random_rows(14, 2100), torch.full((14,), 0.5)

    def under_autocast(function: Callable[..., Tensor]) -> list[Tensor]:
        def call(*arguments: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return results(call, head, *rows, upstream=upstream)

    exact = results(plain, Head(*(None if v is None else v.double() for v in head)), *rows, upstream=upstream.double())
    for fused, other, true in zip(*map(under_autocast, (fused_loss, plain)), exact, strict=True):
        assert fused.dtype == torch.float32
        assert 1e-6 < distance(fused, true) <= distance(other, true) + 2 * BOUND[torch.bfloat16]


@pytest.mark.operators("cpu", "emulated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    head, rows = random_head(14, 27, torch.float32), random_rows(14, 27)
    whole = results(fused_loss, head, *rows, upstream=torch.ones(14))

    def in_part(*arguments: Tensor) -> Tensor:
        loss: Tensor = checkpoint(fused_loss, *arguments, use_reentrant=use_reentrant)
        return loss

    leaves = [v.clone().requires_grad_() for v in head if v is not None]
    in_part(*leaves, *rows).sum().backward()
    for leaf, gradient in zip(leaves, whole[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.operators("cpu", "cuda")  # the emulation is no device of torch
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    torch.compiler.reset()
    head, rows = random_head(24, 27, torch.float32), random_rows(24, 27)

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor, power: Tensor, *rows: Tensor) -> Tensor:
        return fused_loss(torch.tanh(hidden), weight, bias, F.softplus(power), *rows)

    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    for upstream in (torch.full((24,), 0.1), torch.rand(24)):
        both = [results(function, head, *rows, upstream=upstream) for function in (loss_of, compiled)]
        for one, other in zip(*both, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * float(one.abs().max()))


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("capacity", [None, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, capacity: int | None) -> None:
    head, rows = random_head(14, 27, dtype), random_rows(14, 27)
    arguments = (*head, *rows, torch.rand(14).double(), 27, 0, "", dtype, 1 << 20, capacity)
    for flags in ((True,) * 4, (True, False, False, False), (False, False, False, True)):
        torch.library.opcheck(torch.ops.sedd_ext.linear_generalized_masked, to_device((*arguments, *flags)))
    gradients = [torch.zeros_like(v) for v in head if v is not None]
    for upstream in (torch.ones(14), torch.rand(14)):
        given = to_device((upstream, *gradients, *arguments, *(True,) * 4))
        torch.library.opcheck(torch.ops.sedd_ext.linear_generalized_masked_backward, given)
