"""The head fused with score entropy: losses and all gradients against float64, and what it costs to ask for less."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from backends import linear_score_entropy_loss, to_device
from explicit import PROCESSES, Rows, random_log_score, random_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sedd_ext.linear_score_entropy as module
from sedd_ext import Absorbing, RankOne, Uniform, fused_loss, reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the fused error may exceed that of plain PyTorch in the same dtype by, for every tile, in units of the result's
# norm: a tile's 16-bit products are rounded once before they are added up.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 1e-13}
PART = 5000  # bytes of a buffer: less than a row of a tile, so that rows come one by one


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def random_head(count: int, n: int, dtype: torch.dtype, d: int = 6, bias: bool = True) -> Head:
    shapes = [(count, d), (n, d), (n,)]
    hidden, weight, b = (random_log_score(shape, dtype, seed, 0.6) for seed, shape in enumerate(shapes))
    return Head(hidden, weight, b if bias else None)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **options: Any) -> Tensor:
    """What the operator is to be: the head by itself, then the reference."""
    factor = options.pop("loss_weight", 1.0)
    loss = reference.score_entropy_loss(F.linear(hidden, weight, bias), *rest, **options)
    return loss * factor


def results(function: Callable[..., Tensor], head: Head, *rest: Any, upstream: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of the head's parts, for what comes down from above."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in head]
    loss = function(*leaves, *rest, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


def distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm()) if exact.norm() > 0 else float(value.norm())


def check_accuracy(head: Head, rows: Rows, process: RankOne, upstream: Tensor, **options: Any) -> None:
    exact_head = Head(*(None if tensor is None else tensor.double() for tensor in head))
    exact = results(plain, exact_head, *rows, process, upstream=upstream, **options)
    same_dtype = results(plain, head, *rows, process, upstream=upstream, **options)
    fused = results(linear_score_entropy_loss, head, *rows, process, upstream=upstream, buffer_bytes=PART, **options)
    assert fused[0].dtype == (torch.float64 if head.hidden.dtype == torch.float64 else torch.float32)
    for gradient, tensor in zip(fused[1:], (t for t in head if t is not None), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
    allowed = BOUND[head.hidden.dtype] * math.ceil(process.dim / 2048)
    for value, other, true in zip(fused, same_dtype, exact, strict=True):
        assert distance(value, true) <= distance(other, true) + allowed


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 27, 2048, 2049, 5003])
def test_losses_and_gradients(process_of: Process, n: int, dtype: torch.dtype) -> None:
    """N on both sides of a tile's width, with one number for all rows from above, and with different ones."""
    process, rows = process_of(n), random_rows(process_of(n), 14)
    head = random_head(14, n, dtype)
    for upstream in (torch.full((14,), 0.25), torch.linspace(-1.0, 2.0, 14)):
        check_accuracy(head, rows, process, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_weight_and_no_bias(process_of: Process, dtype: torch.dtype) -> None:
    process, rows = process_of(2100), random_rows(process_of(2100), 14)
    shift, factor = random_log_score((14,), torch.float64, seed=7), torch.linspace(0.1, 3.0, 14).double()
    for upstream in (torch.ones(14), torch.linspace(-1.0, 2.0, 14)):
        head = random_head(14, 2100, dtype, bias=False)
        check_accuracy(head, rows, process, upstream, log_score_shift=shift, loss_weight=factor)


@pytest.mark.parametrize("largest", [8.0, 12.0])
def test_float16_means_are_finite(process_of: Process, largest: float) -> None:
    """e^12 is beyond float16, and a fourteenth of it is not: what the mean of the unfused loss has as its gradient."""
    process, rows = process_of(2100), random_rows(process_of(2100), 14)._replace(sigma=torch.full((14,), 0.3).double())
    rows = rows._replace(x_t=torch.full((14,), 2099), x_0=torch.full((14,), 7))
    head = random_head(14, 2100, torch.float16)
    head.hidden[:, 0], head.weight[:, 0] = 0.0, 0.0
    head.hidden[3, 0] = head.weight[5, 0] = largest**0.5
    assert head.bias is not None
    head.bias[2099] = 60000.0  # not in any gradient: entry x
    exact_head = Head(*(None if tensor is None else tensor.double() for tensor in head))
    arguments = {"upstream": torch.ones(()), "reduction": "mean"}
    exact = results(plain, exact_head, *rows, process, **arguments)
    same_dtype = results(plain, head, *rows, process, **arguments)
    fused = results(linear_score_entropy_loss, head, *rows, process, **arguments)
    for value, other, true in zip(fused, same_dtype, exact, strict=True):
        assert bool(other.isfinite().all())
        assert distance(value, true) <= distance(other, true) + 2 * BOUND[torch.float16]


def test_one_buffer_or_many_rows_at_once(process_of: Process) -> None:
    process, rows = process_of(2100), random_rows(process_of(2100), 30)
    head, up = random_head(30, 2100, torch.float64), torch.linspace(0.0, 1.0, 30).double()
    sizes = [1, 8 * 2048 * 7, 1 << 26]
    several = [
        results(linear_score_entropy_loss, head, *rows, process, upstream=up, buffer_bytes=size) for size in sizes
    ]
    for one, *others in zip(*several, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_reductions(process_of: Process) -> None:
    process, rows = process_of(27), random_rows(process_of(27), 14)
    head = random_head(14, 27, torch.float64)
    none = results(linear_score_entropy_loss, head, *rows, process, upstream=torch.ones(14))
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 14)):
        fused = results(
            linear_score_entropy_loss, head, *rows, process, upstream=torch.tensor(3.0), reduction=reduction
        )
        torch.testing.assert_close(fused[0], none[0].sum() * scale)
        for one, other in zip(fused[1:], none[1:], strict=True):
            torch.testing.assert_close(one, other * 3.0 * scale)


def test_gradcheck(process_of: Process) -> None:
    process = process_of(7)
    rows = random_rows(process, 9)._replace(sigma=torch.linspace(0.1, 2.0, 9, dtype=torch.float64))
    head = [tensor.requires_grad_() for tensor in random_head(9, 7, torch.float64, d=3)]
    assert torch.autograd.gradcheck(
        lambda *v: linear_score_entropy_loss(*v, *rows, process, log_score_shift=0.3, loss_weight=rows.sigma),
        head,
        atol=1e-6,
        rtol=1e-5,
    )


def test_batches() -> None:
    process = Uniform(11)
    for shape in [(0,), (3, 0), (), (2, 3)]:
        count = torch.Size(shape).numel()
        flat, rows = random_head(count, 11, torch.float32), random_rows(process, count)
        head = flat._replace(hidden=flat.hidden.view(*shape, 6))
        got = results(
            linear_score_entropy_loss,
            head,
            *(v.view(shape) for v in rows),
            process,
            upstream=torch.ones(shape).double(),
        )
        expected = results(linear_score_entropy_loss, flat, *rows, process, upstream=torch.ones(count))
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.flatten(), other.flatten())


def test_strided_inputs(process_of: Process) -> None:
    process, rows = process_of(27), random_rows(process_of(27), 14)
    head = random_head(14, 27, torch.float32)
    strided = Head(*(torch.stack([v, v], -1)[..., 0] for v in head))
    assert not strided.weight.is_contiguous()
    wide = [torch.stack([v, v], -1)[..., 0] for v in rows]
    for upstream in (torch.ones(()).expand(14), torch.rand(14, 2)[:, 0]):
        results_of = [
            results(linear_score_entropy_loss, h, *r, process, upstream=upstream)
            for h, r in ((head, rows), (strided, wide))
        ]
        for one, other in zip(*results_of, strict=True):
            torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------- what is not done


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(rows, with gradient) of every tile that reaches the kernel."""
    seen: list[tuple[int, bool]] = []
    launch = module.launch

    def recorded(kernel: str, **arguments: Any) -> Any:
        seen.append((arguments["rows"], arguments["grad_loss"] is not None))
        return launch(kernel, **arguments)

    monkeypatch.setattr(module, "launch", recorded)
    return seen


def test_rows_that_cannot_move_do_not_reach_the_head(launches: list[tuple[int, bool]]) -> None:
    process = Absorbing(26)
    x_t = torch.tensor([26, 1, 26, 2, 3])
    head = random_head(5, 27, torch.float32)
    head.hidden[[1, 3, 4]] = float("nan")
    sigma = torch.full((5,), 0.5).double()
    loss, *gradients = results(
        linear_score_entropy_loss, head, x_t, x_t.clamp(max=25), sigma, process, upstream=torch.ones(5)
    )
    assert launches == [(2, True)]
    assert (loss[[1, 3, 4]] == 0).all()
    assert (gradients[0][[1, 3, 4]] == 0).all()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_only_what_is_wanted(launches: list[tuple[int, bool]]) -> None:
    """A frozen head, and no gradient at all."""
    process, rows = Uniform(27), random_rows(Uniform(27), 5)
    head = random_head(5, 27, torch.float32)
    every = results(linear_score_entropy_loss, head, *rows, process, upstream=torch.ones(5))
    head.hidden.requires_grad_()
    loss = linear_score_entropy_loss(*head, *rows, process)
    (gradient,) = torch.autograd.grad(loss.sum(), head.hidden)
    assert torch.equal(gradient, every[1])
    with torch.no_grad():
        assert torch.equal(linear_score_entropy_loss(*head, *rows, process), every[0])
    assert not linear_score_entropy_loss(*(v.detach() for v in head), *rows, process).requires_grad
    assert [with_gradient for _, with_gradient in launches] == [True, True, False, False]


def test_one_number_from_above_costs_no_second_product(launches: list[tuple[int, bool]]) -> None:
    process, rows = Uniform(27), random_rows(Uniform(27), 6)
    head = random_head(6, 27, torch.float32)
    for upstream in (torch.ones(6), torch.full((6,), 0.3), torch.tensor(2.0).expand(6)):
        results(linear_score_entropy_loss, head, *rows, process, upstream=upstream)
    assert len(launches) == 3
    results(linear_score_entropy_loss, head, *rows, process, upstream=torch.rand(6))
    assert len(launches) == 5


@pytest.mark.parametrize("reduce", [torch.sum, lambda v: v.sum(-1).sum() / 6, "mean", "sum"])
def test_sums_and_means_do_not_look_at_what_comes_down(monkeypatch: pytest.MonkeyPatch, reduce: Any) -> None:
    """To look at numbers waits for a GPU."""
    process, rows = Uniform(27), random_rows(Uniform(27), 6)
    head = [v.requires_grad_() for v in random_head(6, 27, torch.float32)]
    reduction = reduce if isinstance(reduce, str) else "none"
    loss = linear_score_entropy_loss(
        head[0].view(2, 3, -1), *head[1:], *(v.view(2, 3) for v in rows), process, reduction=reduction
    )
    looked = []
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: looked.append(tensor) or bool(tensor.item()))
    monkeypatch.setattr(module._loss.gradient, "forward", forward_as_on_a_gpu)
    torch.autograd.grad(loss if isinstance(reduce, str) else reduce(loss), head)
    assert looked == []


def forward_as_on_a_gpu(ctx: Any, grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Without the CPU's look at whether all numbers are 1, which costs nothing there."""
    result: tuple[Tensor, ...] = torch.ops.sedd_ext.linear_score_entropy_backward(grad_loss, *arguments)
    return result


def test_a_frozen_head_does_not_look_either(launches: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a row's hidden state is what comes down for it times what has been made."""
    process, rows = Uniform(27), random_rows(Uniform(27), 6)
    head, upstream = random_head(6, 27, torch.float64), torch.rand(6).double()
    exact = results(plain, head, *rows, process, upstream=upstream)
    launches.clear()
    hidden = head.hidden.clone().requires_grad_()
    loss = linear_score_entropy_loss(hidden, head.weight, head.bias, *rows, process)
    monkeypatch.setattr(fused_loss, "common_gradient", lambda *_: pytest.fail("looked"))
    (gradient,) = torch.autograd.grad(loss, hidden, upstream)
    torch.testing.assert_close(gradient, exact[1])
    assert len(launches) == 1


@pytest.mark.operators("cpu")
def test_products_into_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies 16-bit numbers into float32, as on a GPU, no product is rounded before it is added."""
    process, rows = Uniform(5000), random_rows(Uniform(5000), 40)
    head = random_head(40, 5000, torch.bfloat16)
    mm, addmm, seen = torch.mm, torch.addmm, []

    def into(out: Tensor, start: Tensor | float, a: Tensor, b: Tensor) -> Tensor:
        seen.append(type(start))
        return out.copy_(start + mm(a.double(), b.double()))

    def multiplied(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return mm(a, b, out=out) if out_dtype is None else into(out, 0.0, a, b)

    def added(c: Tensor, a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return addmm(c, a, b, out=out) if out_dtype is None else into(out, c.clone(), a, b)

    upstream = torch.ones(40)
    exact = results(plain, Head(*(v.double() for v in head)), *rows, process, upstream=upstream.double())
    rounded = results(linear_score_entropy_loss, head, *rows, process, upstream=upstream)
    monkeypatch.setattr("sedd_ext.head._multiplies_into_float32", lambda a: a.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", multiplied)
    monkeypatch.setattr(torch, "addmm", added)
    whole = results(
        functools.partial(linear_score_entropy_loss, buffer_bytes=2048 * 2 * 20),  # two parts of the rows
        head,
        *rows,
        process,
        upstream=upstream,
    )
    assert {float, Tensor} == set(seen)
    for once, often, true in zip(whole[1:], rounded[1:], exact[1:], strict=True):
        assert distance(once, true) <= distance(often, true)


# --------------------------------------------------------------------------------------------------------- manners


def test_autocast(process_of: Process) -> None:
    """The products in bfloat16, of float32 weights whose gradients stay float32."""
    process, rows = process_of(2100), random_rows(process_of(2100), 14)
    head = random_head(14, 2100, torch.float32)

    def under_autocast(function: Callable[..., Tensor]) -> list[Tensor]:
        def call(*arguments: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return results(call, head, *rows, process, upstream=torch.full((14,), 0.5))

    exact = results(plain, Head(*(v.double() for v in head)), *rows, process, upstream=torch.full((14,), 0.5).double())
    for fused, other, true in zip(*map(under_autocast, (linear_score_entropy_loss, plain)), exact, strict=True):
        assert fused.dtype == torch.float32
        assert 1e-5 < distance(fused, true) <= distance(other, true) + 2 * BOUND[torch.bfloat16]


def test_backward_twice_through_a_kept_graph() -> None:
    process, rows = Uniform(27), random_rows(Uniform(27), 6)
    head = [v.requires_grad_() for v in random_head(6, 27, torch.float64)]
    loss = linear_score_entropy_loss(*head, *rows, process)
    ones, threes = (
        torch.autograd.grad(loss, head, torch.full((6,), scale).double(), retain_graph=True) for scale in (1.0, 3.0)
    )
    (again,) = torch.autograd.grad(loss[2], head[:1], retain_graph=True)
    for one, three in zip(ones, threes, strict=True):
        torch.testing.assert_close(3 * one, three)
    torch.testing.assert_close(again[2], ones[0][2])
    assert not again[[0, 1, 3, 4, 5]].any()
    for leaf, gradient in zip(head, ones, strict=True):
        assert torch.equal(torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0], gradient)


def test_second_derivatives_are_refused() -> None:
    process, rows = Uniform(27), random_rows(Uniform(27), 6)
    head = [v.requires_grad_() for v in random_head(6, 27, torch.float64)]
    loss = linear_score_entropy_loss(*head, *rows, process)
    for function in (loss.sum(), (loss**2).sum()):
        (gradient,) = torch.autograd.grad(function, head[0], create_graph=True)
        with pytest.raises(RuntimeError, match=r"linear_score_entropy_loss: .*once"):
            (function + (gradient**2).sum()).backward()


def test_inputs_are_left_alone(process_of: Process) -> None:
    process, rows = process_of(27), random_rows(process_of(27), 14)
    head = random_head(14, 27, torch.float32)
    before = [v.clone() for v in (*head, *rows)]
    results(linear_score_entropy_loss, head, *rows, process, upstream=torch.rand(14))
    for now, then in zip((*head, *rows), before, strict=True):
        assert torch.equal(now, then)


class Model(nn.Module):
    """A model with the fused loss as its end."""

    def __init__(self, process: RankOne) -> None:
        super().__init__()
        self.process = process
        with torch.random.fork_rng():
            torch.manual_seed(3)
            # the compiled gradient of nn.Embedding is wrong for repeated tokens with torch 2.6 on the CPU
            self.embedding, self.mlp = nn.Linear(process.dim, 8, bias=False), nn.Linear(8, 8)
            self.head = nn.Linear(8, process.dim)

    def forward(self, x_t: Tensor, x_0: Tensor, sigma: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(x_t, self.process.dim).to(self.head.weight.dtype)
        hidden = torch.tanh(self.mlp(self.embedding(one_hot)))
        return linear_score_entropy_loss(hidden, self.head.weight, self.head.bias, x_t, x_0, sigma, self.process)


def gradients_of(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    call().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.operators("cpu", "emulated")  # the models stay on the CPU
@pytest.mark.parametrize("name", ["absorbing", "hybrid"])
class TestInAModel:
    def test_accumulation(self, name: str) -> None:
        model, rows = Model(PROCESSES[name](27)), random_rows(PROCESSES[name](27), 24)
        whole = gradients_of(model, lambda: model(*rows).mean())
        parts = gradients_of(model, lambda: sum(model(*(v[i::3] for v in rows)).mean() / 3 for i in range(3)))
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing(self, name: str, use_reentrant: bool) -> None:
        model, rows = Model(PROCESSES[name](27)), random_rows(PROCESSES[name](27), 24)
        whole = gradients_of(model, lambda: model(*rows).mean())
        dummy = torch.zeros(1, requires_grad=True)

        def part(dummy: Tensor, *values: Tensor) -> Tensor:
            return model(*values) + 0 * dummy

        again = gradients_of(model, lambda: checkpoint(part, dummy, *rows, use_reentrant=use_reentrant).mean())
        for one, other in zip(whole, again, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.operators("cpu", "cuda")  # the emulation is no device of torch
    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, name: str, compiler: str) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        model, rows = Model(PROCESSES[name](27)), random_rows(PROCESSES[name](27), 24)
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        for weights in (torch.full((24,), 0.1), torch.rand(24)):
            whole = gradients_of(model, lambda weights=weights: (weights * model(*rows)).sum())
            again = gradients_of(model, lambda weights=weights: (weights * compiled(*rows)).sum())
            for one, other in zip(whole, again, strict=True):
                # sums in another order: errors of the size of the largest terms
                torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6 * float(one.abs().max()))


def data_parallel(rank: int, folder: str) -> None:
    """One of two processes that share a batch; the first writes what gradients came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    process = Absorbing(26)
    model = nn.parallel.DistributedDataParallel(Model(process))
    model(*(v[rank::2] for v in random_rows(process, 24))).mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.operators("cpu")  # the two processes have a backend of their own
def test_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(data_parallel, (str(tmp_path),), nprocs=2)
    process = Absorbing(26)
    model = Model(process)
    whole = gradients_of(model, lambda: model(*random_rows(process, 24)).mean())
    for one, other in zip(whole, torch.load(tmp_path / "gradients.pt", weights_only=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("capacity", [None, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(process_of: Process, dtype: torch.dtype, capacity: int | None) -> None:
    process, rows = process_of(27), random_rows(process_of(27), 14)
    head = random_head(14, 27, dtype)
    arguments = (
        *head,
        *rows,
        random_log_score((14,), torch.float64),
        torch.rand(14).double(),
        process.stationary.float() if process.family == "rank_one" else None,
        process.family,
        process.neg_entropy,
        27,
        0,
        "",
        dtype,
        1 << 20,
        capacity,
    )
    for flags in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(torch.ops.sedd_ext.linear_score_entropy, to_device((*arguments, *flags)))
    gradients = [torch.zeros_like(v) for v in head]
    for upstream in (torch.ones(14), torch.rand(14)):
        given = to_device((upstream, *gradients, *arguments, True, True, True))
        torch.library.opcheck(torch.ops.sedd_ext.linear_score_entropy_backward, given)
