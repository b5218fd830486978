"""The head fused with the loss of a mean prediction: as the head by itself and the reference, but without rows × N."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import linear_mean_prediction_loss, to_device
from explicit import Rows, random_log_score, random_rows
from torch import Tensor

import sedd_ext.linear_mean_prediction as module
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

Process = Callable[[int], RankOne]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the fused error may exceed that of plain PyTorch in the same dtype by, in units of the result's norm: logits are
# rounded once, and 16-bit products of a chunk of rows before they are added up.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}
PART = 5000  # bytes of a buffer: at N = 131, some rows at once; at N = 5003, one


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def random_head(count: int, n: int, dtype: torch.dtype, d: int = 6, bias: bool = True) -> Head:
    shapes = [(count, d), (n, d), (n,)]
    hidden, weight, b = (random_log_score(shape, dtype, seed, 0.6) for seed, shape in enumerate(shapes))
    return Head(hidden, weight, b if bias else None)


def clean_rows(process: RankOne, count: int) -> Rows:
    """Rows with at least σ̄ = 0.01 and without MASK among the clean tokens."""
    rows = random_rows(process, count)
    rows = rows._replace(sigma=rows.sigma.clamp(min=0.01))
    return rows if process.mask_id is None else rows._replace(x_0=rows.x_0 % (process.dim - 1))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **options: Any) -> Tensor:
    return reference.mean_prediction_loss(F.linear(hidden, weight, bias), *rest, **options)


def results(function: Callable[..., Tensor], head: Head, *rest: Any, upstream: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of the head's parts, for an upstream gradient."""
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
    fused = results(linear_mean_prediction_loss, head, *rows, process, upstream=upstream, buffer_bytes=PART, **options)
    assert fused[0].dtype == (torch.float64 if head.hidden.dtype == torch.float64 else torch.float32)
    for gradient, tensor in zip(fused[1:], (t for t in head if t is not None), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
    for value, other, true in zip(fused, same_dtype, exact, strict=True):
        assert distance(value, true) <= distance(other, true) + BOUND[head.hidden.dtype]


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 27, 131, 5003])
def test_losses_and_gradients(process_of: Process, n: int, dtype: torch.dtype) -> None:
    """With one upstream gradient for all rows, and with different ones."""
    process, head = process_of(n), random_head(14, n, dtype)
    for upstream in (torch.full((14,), 0.25), torch.linspace(-1.0, 2.0, 14)):
        check_accuracy(head, clean_rows(process, 14), process, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_discrete_steps_weights_and_no_bias(process_of: Process, dtype: torch.dtype) -> None:
    process, rows = process_of(131), clean_rows(process_of(131), 14)
    options = {"sigma_s": 0.3 * rows.sigma, "loss_weight": torch.linspace(0.1, 3.0, 14).double()}
    head = random_head(14, 131, dtype, bias=False)
    for upstream in (torch.ones(14), torch.linspace(-1.0, 2.0, 14)):
        check_accuracy(head, rows, process, upstream, **options)


def test_means_keep_small_float16_gradients(process_of: Process) -> None:
    """Of 4,096 rows, the gradient of one is below float16's smallest number where μ is small."""
    process, rows = process_of(131), clean_rows(process_of(131), 4096)
    head = random_head(4096, 131, torch.float16)
    exact_head = Head(*(None if tensor is None else tensor.double() for tensor in head))
    arguments = {"upstream": torch.ones(()), "reduction": "mean"}
    exact = results(plain, exact_head, *rows, process, **arguments)
    fused = results(linear_mean_prediction_loss, head, *rows, process, **arguments)
    for value, true in zip(fused[2:], exact[2:], strict=True):
        assert distance(value, true) < 2e-3


def test_reductions(process_of: Process) -> None:
    process, rows, head = process_of(27), clean_rows(process_of(27), 14), random_head(14, 27, torch.float64)
    loss = linear_mean_prediction_loss(*head, *rows, process)
    for reduction in ("mean", "sum"):
        reduced = linear_mean_prediction_loss(*head, *rows, process, reduction=reduction)
        torch.testing.assert_close(reduced, getattr(loss, reduction)())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kernel, rows) of every launch."""
    seen: list[tuple[str, int]] = []
    launch = module.launch_mean_prediction

    def recorded(kernel: str, logits: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((kernel, logits.shape[0]))
        return launch(kernel, logits, *rest, **options)

    monkeypatch.setattr(module, "launch_mean_prediction", recorded)
    return seen


def test_only_masked_rows_reach_the_head(launches: list[tuple[str, int]]) -> None:
    process, rows, head = Absorbing(26), clean_rows(Absorbing(26), 30), random_head(30, 27, torch.float32)
    results(linear_mean_prediction_loss, head, *rows, process, upstream=torch.ones(30))
    masked = int((rows.x_t == 26).sum())
    assert 0 < masked < 30
    assert launches == [("mean_prediction", masked), ("mean_prediction_backward", masked)]


def test_gradients_are_not_computed_where_none_is_needed(launches: list[tuple[str, int]]) -> None:
    linear_mean_prediction_loss(*random_head(6, 27, torch.float32), *clean_rows(Uniform(27), 6), Uniform(27))
    assert [kernel for kernel, _ in launches] == ["mean_prediction"]


def test_the_buffer_holds_whole_rows(launches: list[tuple[str, int]]) -> None:
    rows, head = clean_rows(Uniform(27), 10), random_head(10, 27, torch.float32)
    for buffer_bytes, expected in ((1, [1] * 10), (32 * 4 * 5, [5, 5]), (1 << 26, [10])):
        launches.clear()
        linear_mean_prediction_loss(*head, *rows, Uniform(27), buffer_bytes=buffer_bytes)
        assert [count for _, count in launches] == expected


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    tokens, head = torch.zeros(shape, dtype=torch.int64), random_head(1, 27, torch.float32)
    weight = head.weight.clone().requires_grad_()
    one = linear_mean_prediction_loss(*head, tokens.new_zeros(1), tokens.new_zeros(1), 0.5, Uniform(27))
    assert one.shape == (1,)
    loss = linear_mean_prediction_loss(torch.zeros(*shape, 6), weight, head.bias, tokens, tokens, 0.5, Uniform(27))
    assert loss.shape == shape
    loss.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_masked_row_at_all() -> None:
    head, tokens = random_head(4, 27, torch.float32), torch.zeros(4, dtype=torch.int64)
    loss, *gradients = results(
        linear_mean_prediction_loss, head, tokens, tokens, 0.5, Absorbing(26), upstream=torch.ones(4)
    )
    assert not loss.any()
    assert not any(gradient.any() for gradient in gradients)
    assert linear_mean_prediction_loss(*head, torch.full((4,), 26), tokens, 0.5, Absorbing(26)).all()


def test_gradcheck(process_of: Process) -> None:
    process, rows = process_of(7), clean_rows(process_of(7), 8)
    head = [tensor.requires_grad_() for tensor in random_head(8, 7, torch.float64, d=3) if tensor is not None]
    weights = torch.linspace(0.5, 2.0, 8).double()

    def loss(*parts: Tensor) -> Tensor:
        return linear_mean_prediction_loss(*parts, *rows, process) * weights

    assert torch.autograd.gradcheck(loss, head)


def test_a_second_derivative_raises() -> None:
    head = [tensor.requires_grad_() for tensor in random_head(6, 27, torch.float64) if tensor is not None]
    loss = linear_mean_prediction_loss(*head, *clean_rows(Uniform(27), 6), Uniform(27))
    (gradient,) = torch.autograd.grad(loss.sum(), head[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_mean_prediction_loss: differentiable once"):
        gradient.sum().backward()


@pytest.mark.operators("cpu", "cuda")
def test_autocast() -> None:
    process, rows, head = Hybrid(130, 0.2), clean_rows(Hybrid(130, 0.2), 14), random_head(14, 131, torch.float32)
    with torch.autocast(backend_device(), dtype=torch.bfloat16):
        cast = results(linear_mean_prediction_loss, head, *rows, process, upstream=torch.ones(14))
    exact = results(plain, Head(*(v.double() for v in head if v is not None)), *rows, process, upstream=torch.ones(14))
    for value, true in zip(cast, exact, strict=True):
        assert value.dtype == torch.float32
        assert distance(value, true) < 2e-2


def backend_device() -> str:
    return str(to_device(torch.zeros(1)).device.type)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("capacity", [None, 8])
def test_opcheck(process_of: Process, capacity: int | None) -> None:
    process, rows, head = process_of(27), clean_rows(process_of(27), 8), random_head(8, 27, torch.float32)
    stationary = process.stationary.float() if process.family == "rank_one" else None
    mask = -1 if process.mask_id is None else process.mask_id
    arguments = (*head, *rows, 0.5 * rows.sigma, torch.rand(8).double(), stationary, process.family, mask)
    arguments = (*arguments, 27, 0, "", torch.float32, 1 << 20, capacity)
    for flags in ((True, True, True), (False, False, False)):
        torch.library.opcheck(torch.ops.sedd_ext.linear_mean_prediction, to_device((*arguments, *flags)))
    gradients = [torch.zeros_like(v) for v in head if v is not None]
    given = to_device((torch.rand(8), *gradients, *arguments, True, True, True))
    torch.library.opcheck(torch.ops.sedd_ext.linear_mean_prediction_backward, given)


@pytest.mark.operators("cpu", "cuda")
def test_compile(process_of: Process) -> None:
    process, rows = process_of(27), clean_rows(process_of(27), 8)

    def loss(*head: Tensor) -> Tensor:
        return linear_mean_prediction_loss(*head, *rows, process).square().sum()

    torch.compiler.reset()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        head = [tensor.requires_grad_() for tensor in random_head(8, 27, torch.float64) if tensor is not None]
        found.append(torch.autograd.grad(function(*head), head))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bad_rows_are_named_by_their_place_in_the_batch() -> None:
    head, tokens = random_head(6, 27, torch.float32), torch.full((6,), 26)
    tokens[0], bad = 3, tokens.clone()
    bad[4] = 27
    loss = None
    try:
        loss = linear_mean_prediction_loss(*head, bad, tokens % 26, 0.5, Absorbing(26))
    except ValueError as error:
        assert "x_t: expected tokens in [0, 27), got 27 at index [4]" in str(error)  # noqa: PT017 - a GPU does not raise
    if loss is not None:
        assert loss.isnan().tolist() == [False] * 4 + [True, False]
    assert math.isfinite(float(linear_mean_prediction_loss(*head, tokens, tokens % 26, 0.5, Absorbing(26)).sum()))
