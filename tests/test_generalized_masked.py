"""The loss of generalised masked diffusion: value and gradients against float64, and its manners as an operator."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import Backend, generalized_masked_loss, to_device
from explicit import bad_rows, largest_error, random_log_score
from torch import Tensor

from sedd_ext import reference

pytestmark = pytest.mark.operators
every_variant = pytest.mark.every_variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What a kernel's error may exceed that of plain PyTorch in the same dtype by, in units of the terms that are summed.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}


class Rows(NamedTuple):
    x_t: Tensor
    x_0: Tensor
    t: Tensor  # float64
    power: Tensor  # float64


def random_rows(count: int, n: int, seed: int = 0) -> Rows:
    """Two of three rows are masked; t log-uniform in [1e-3, 1], w in [0.1, 4], and 1e30 for MASK."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(n - 1, (count,), generator=generator)
    x_t = torch.where(torch.arange(count) % 3 != 1, n - 1, x_0)
    t = 10 ** (-3 * torch.rand(count, generator=generator, dtype=torch.float64))
    power = 0.1 + 3.9 * torch.rand(n, generator=generator, dtype=torch.float64) ** 2
    power[-1] = 1e30
    return Rows(x_t, x_0, t, power)


def results(
    function: Callable[..., Tensor], logits: Tensor, rows: Rows, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in the logits and in the power."""
    leaf, power = logits.detach().clone().requires_grad_(), rows.power.clone().requires_grad_()
    loss = function(leaf, *rows[:3], power)
    handed = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    in_logits, in_power = torch.autograd.grad(loss, (leaf, power), handed)
    return loss.detach(), in_logits, in_power


def scales(logits: Tensor, rows: Rows, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """How large the terms are that each result is summed from."""
    x_t, x_0, t, power = rows
    n = logits.shape[-1]
    live = (x_t == n - 1).double() / t
    handed = live if upstream is None else live * upstream.abs()
    w, v = power[:-1], x_0[:, None]
    log_mu = logits.double()[:, :-1].log_softmax(-1)
    mu, cost = log_mu.exp(), -log_mu.gather(-1, v)[:, 0]
    mean = (mu * w).sum(-1)
    gradient = mu * (w + mean[:, None] + w[v])
    gradient.scatter_add_(-1, v, w[v])
    in_power = handed[:, None] * mu
    in_power.scatter_add_(-1, v, (handed * (1 + cost))[:, None])
    return (
        live * (mean + w[x_0] * (1 + cost)),
        F.pad(handed[:, None] * gradient, (0, 1)),
        F.pad(in_power.sum(0), (0, 1)),
    )


def check_accuracy(logits: Tensor, rows: Rows, upstream: Tensor | None = None) -> None:
    """The errors against float64 are no larger than plain PyTorch's in the same dtype, plus a small bound."""
    exact = results(reference.generalized_masked_loss, logits.double(), rows, upstream)
    plain = results(reference.generalized_masked_loss, logits, rows, upstream)
    result = results(generalized_masked_loss, logits, rows, upstream)
    assert result[0].dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert result[1].dtype == logits.dtype
    assert (result[0] >= 0).all()
    assert (result[1][:, -1] == 0).all()
    assert result[2][-1] == 0
    info = torch.finfo(result[0].dtype)
    # The factor 1/t, up to 1,000, may lift what exp gave as a subnormal number, or as 0 (CUDA kernels, 16-bit types).
    least = info.tiny / info.eps if logits.dtype.itemsize > 2 else 1e3 * info.tiny / BOUND[logits.dtype]
    for got, other, true, scale in zip(result, plain, exact, scales(logits, rows, upstream), strict=True):
        scale = torch.where(scale > 0, scale.clamp(min=least), 0.0)
        assert largest_error(got, true, scale) <= largest_error(other, true, scale) + BOUND[logits.dtype]


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 17, 27, 1000, 4099])
def test_value_and_gradients(n: int, dtype: torch.dtype) -> None:
    check_accuracy(random_log_score((24, n), dtype), random_rows(24, n), torch.linspace(-1.0, 2.0, 24).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_vocabulary(dtype: torch.dtype) -> None:
    check_accuracy(random_log_score((3, 262_145), dtype), random_rows(3, 262_145))


@every_variant
@pytest.mark.parametrize("spread", [80.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaky_logits(dtype: torch.dtype, spread: float) -> None:
    logits = spread * (2 * torch.rand(24, 1025, generator=torch.Generator().manual_seed(4)) - 1)
    check_accuracy(logits.to(dtype), random_rows(24, 1025))


@pytest.mark.parametrize("n", [3, 2500])
def test_many_rows(n: int) -> None:
    """More rows than are added in float32 before float64, for the gradient in the power."""
    check_accuracy(random_log_score((300, n), torch.float32), random_rows(300, n))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_minimum_is_accurate(dtype: torch.dtype) -> None:
    """Relative to the result itself, where 1 - μ_v goes from 1e-35 to 1, with numbers of 60 digits."""
    margins = torch.linspace(0.0, 80.0, 41)
    logits = torch.stack([margins, *torch.linspace(-1.0, 0.5, 5).expand(41, 5).T, torch.zeros(41)], -1).to(dtype)
    power = torch.tensor([0.5, 2.0, 1e-12, 1e-9, 3.0, 1e-10, 1.0]).double()
    for w in (power, power.flip(0)):
        rows = Rows(torch.full((41,), 6), torch.zeros(41).long(), torch.full((41,), 0.5).double(), w)
        with localcontext() as context:
            context.prec = 60
            exact = torch.tensor([by_digits(row.tolist(), 0, 0.5, w.tolist()) for row in logits], dtype=torch.float64)
        loss, gradient, _ = results(generalized_masked_loss, logits, rows)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(loss.double(), exact[:, 0], rtol=tolerance, atol=0)
        torch.testing.assert_close(gradient[:, 0].double(), exact[:, 1], rtol=tolerance, atol=0)


def by_digits(logits: list[float], v: int, t: float, power: list[float]) -> list[float]:
    """The loss, and its gradient in logit v."""
    e, w = [Decimal(logit).exp() for logit in logits[:-1]], [Decimal(value) for value in power[:-1]]
    mu = [value / sum(e) for value in e]
    mean = sum((a * b for a, b in zip(mu, w, strict=True)), Decimal())
    loss, gradient = mean - w[v] - w[v] * mu[v].ln(), mu[v] * (w[v] - mean) - w[v] * (1 - mu[v])
    return [float(loss) / t, float(gradient) / t]


def test_equal_powers_give_weighted_cross_entropy() -> None:
    rows = random_rows(24, 27)._replace(power=torch.full((27,), 1.7).double())
    logits = random_log_score((24, 27), torch.float64).requires_grad_()
    masked = rows.x_t == 26
    cost = F.cross_entropy(logits[:, :-1], rows.x_0, reduction="none") * 1.7 / rows.t * masked
    loss = generalized_masked_loss(logits, *rows)
    torch.testing.assert_close(loss, cost)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (loss, cost)]
    torch.testing.assert_close(*gradients)


def test_the_limit_of_discrete_time() -> None:
    """KL(q(x_s | x_t, x_0) ‖ Σ_k μ_k q(x_s | x_t, x_0 = k)) over t - s, for α_k(t) = 1 - t^{w_k}."""
    rows = random_rows(24, 11)
    logits, masked, step = random_log_score((24, 11), torch.float64), rows.x_t == 10, 1e-6
    w, mu = rows.power[:-1], logits[:, :-1].softmax(-1)
    stay = torch.exp(w * torch.log1p(-step * torch.ones(24, 1).double()))  # (s/t)^w for s = t (1 - step)
    leave = -torch.expm1(w * torch.log1p(-step * torch.ones(24, 1).double()))
    q_leave, q_stay = leave.gather(-1, rows.x_0[:, None])[:, 0], stay.gather(-1, rows.x_0[:, None])[:, 0]
    mu_v = mu.gather(-1, rows.x_0[:, None])[:, 0]
    p_gone = (mu * leave).sum(-1)
    divergence = -q_leave * mu_v.log() + q_stay * (torch.log1p(-q_leave) - torch.log1p(-p_gone))
    limit = torch.where(masked, divergence / (step * rows.t), 0.0)
    torch.testing.assert_close(generalized_masked_loss(logits, *rows), limit, rtol=1e-5, atol=1e-6)


@every_variant
@pytest.mark.parametrize("n", [5, 150])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_goes_through(dtype: torch.dtype, value: float, n: int) -> None:
    """Row i has the value at entry i, so that every place of a vector loop has it once."""
    logits = random_log_score((n, n), dtype)
    logits.fill_diagonal_(value)
    rows = random_rows(n, n)._replace(x_t=torch.full((n,), n - 1), t=torch.full((n,), 0.5).double())
    exact = results(reference.generalized_masked_loss, logits.double(), rows)
    result = results(generalized_masked_loss, logits, rows)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for got, true in zip(result, exact, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("v", [0, 1])
def test_a_token_that_cannot_be(v: int) -> None:
    """μ_v = 0 costs infinity, with an infinite gradient in w_v and a finite one in the logits; a row of -∞ is NaN."""
    infinity = float("inf")
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.0], [-infinity] * 4])
    logits[0, v] = -infinity
    rows = Rows(torch.tensor([3, 3]), torch.tensor([v, v]), torch.ones(2).double(), torch.ones(4).double())
    loss, gradient, _ = results(generalized_masked_loss, logits, rows)
    assert loss[0] == infinity
    assert bool(gradient[0].isfinite().all())
    assert bool(loss[1].isnan())
    one = Rows(rows.x_t[:1], rows.x_0[:1], rows.t[:1], rows.power)
    _, _, power = results(generalized_masked_loss, logits[:1], one)
    assert power[v] == infinity
    assert bool(power.isfinite().sum() == 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_stands_at_mask_does_not_matter(value: float) -> None:
    rows, clean = random_rows(24, 37), random_log_score((24, 37), torch.float32)
    dirty = clean.clone()
    dirty[:, -1] = value
    other = rows._replace(power=torch.cat([rows.power[:-1], torch.tensor([value]).double()]))
    for one, two in zip(*(results(generalized_masked_loss, *v) for v in ((clean, rows), (dirty, other))), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("filling", [1.0, float("nan"), float("inf")])
def test_other_rows_are_exactly_zero(filling: float) -> None:
    rows = random_rows(6, 38)
    rows = rows._replace(x_t=rows.x_0)
    for result in results(generalized_masked_loss, torch.full((6, 38), filling), rows):
        assert (result == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    tokens, logits = torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 11, requires_grad=True)
    power = torch.ones(11, requires_grad=True)
    loss = generalized_masked_loss(logits, tokens, tokens, 0.5, power)
    assert loss.shape == shape
    loss.sum().backward()
    assert logits.grad is not None
    assert power.grad is not None
    assert logits.grad.shape == (*shape, 11)
    assert (power.grad == 0).all()


def test_batches_broadcasting_and_reductions() -> None:
    rows, logits = random_rows(24, 11), random_log_score((4, 6, 11), torch.float32)
    x_t, x_0, t = rows.x_t.view(4, 6), rows.x_0.view(4, 6), rows.t[:4, None]
    loss = generalized_masked_loss(logits, x_t, x_0, t, rows.power)
    assert loss.shape == (4, 6)
    assert torch.equal(loss[2, 3], generalized_masked_loss(logits[2, 3], x_t[2, 3], x_0[2, 3], t[2, 0], rows.power))
    for reduction in ("mean", "sum"):
        got = generalized_masked_loss(logits, x_t, x_0, t, rows.power, reduction=reduction)
        torch.testing.assert_close(got, getattr(loss, reduction)())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    rows, logits = random_rows(24, 27), random_log_score((27, 24), dtype).T
    wide = Rows(*(torch.stack([v, v.flip(0)], -1)[..., 0] for v in rows))
    assert not logits.is_contiguous()
    assert not wide.power.is_contiguous()
    upstream = torch.stack([torch.rand(24), torch.zeros(24)], -1)[:, 0]
    strided = results(generalized_masked_loss, logits, wide, upstream)
    for one, two in zip(strided, results(generalized_masked_loss, logits.contiguous(), rows, upstream), strict=True):
        assert torch.equal(one, two)


def test_gradients_handed_down() -> None:
    """Stride 0 from .sum() is the same as ones, for each gradient alone and for both."""
    rows, logits = random_rows(24, 27), random_log_score((24, 27), torch.float64).requires_grad_()
    power = rows.power.clone().requires_grad_()
    loss = generalized_masked_loss(logits, *rows[:3], power)
    ones = torch.autograd.grad(loss, (logits, power), torch.ones(24).double(), retain_graph=True)
    for leaf, one in zip((logits, power), ones, strict=True):
        assert torch.equal(torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0], one)
    alone = generalized_masked_loss(logits.detach(), *rows[:3], power)
    assert torch.equal(torch.autograd.grad(alone.sum(), power)[0], ones[1])
    frozen = generalized_masked_loss(logits, *rows)
    assert torch.equal(torch.autograd.grad(frozen.sum(), logits)[0], ones[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_power_has_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    rows, logits = random_rows(24, 27), random_log_score((24, 27), torch.float64)
    power = rows.power.clamp(max=9.0).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(generalized_masked_loss(logits, *rows[:3], power).sum(), power)
    assert gradient.dtype == dtype
    exact = results(reference.generalized_masked_loss, logits, rows._replace(power=power.detach().double()))
    torch.testing.assert_close(gradient.double(), exact[2], rtol=1e-6, atol=1e-6)


def test_inputs_are_left_alone() -> None:
    rows, logits = random_rows(24, 27), random_log_score((24, 27), torch.float32)
    before = [v.clone() for v in (logits, *rows)]
    results(generalized_masked_loss, logits, rows)
    for now, then in zip((logits, *rows), before, strict=True):
        assert torch.equal(now, then)


# ------------------------------------------------------------------------------------------------------ wrong calls

RIGHT: dict[str, Any] = {
    "logits": torch.zeros(3, 7),
    "x_t": torch.tensor([6, 6, 1]),
    "x_0": torch.tensor([0, 1, 1]),
    "t": torch.tensor([0.5, 1.0, 0.5]),
    "power": torch.ones(7),
}
ROW = [  # bad values of the middle row, and what the message says
    ("x_t", 7, r"\[0, 7\), got 7 at index \[1\]"),
    ("x_t", -1, "got -1"),
    ("x_0", 7, r"\[0, 7\), got 7"),
    ("x_0", 6, r"\[0, 6\), got 6"),
    ("x_0", -(2**40), f"got {-(2**40)}"),
    ("t", 0.0, r"\(0, 1\], got 0\.0 at index \[1\]"),
    ("t", 1.5, r"\(0, 1\], got 1\.5"),
    ("t", -0.5, r"got -0\.5"),
    ("t", float("nan"), "got nan"),
]


@pytest.mark.parametrize(("name", "value", "given"), ROW)
def test_bad_rows(backend: Backend, name: str, value: Any, given: str) -> None:
    """An error, or NaN in the row and nowhere else; in the gradient of the power everywhere but at MASK."""
    wrong = {**RIGHT, name: RIGHT[name].clone()}
    wrong[name][1] = value
    logits, power = torch.zeros(3, 7, requires_grad=True), torch.ones(7, requires_grad=True)
    arguments = {**wrong, "logits": logits, "power": power}
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=f"^{name}: expected .*{given}"):
            generalized_masked_loss(**arguments)
        return
    loss = generalized_masked_loss(**arguments)
    assert bad_rows(loss.detach()) == [1]
    loss.sum().backward()
    assert logits.grad is not None
    assert power.grad is not None
    assert bad_rows(logits.grad) == [1]
    assert bool(power.grad[:-1].isnan().all())
    assert power.grad[-1] == 0


@pytest.mark.parametrize(
    ("name", "value", "error", "given"),
    [
        ("logits", [[0.0] * 7] * 3, TypeError, "list"),
        ("logits", torch.zeros(3, 7).long(), TypeError, r"torch\.int64"),
        ("logits", torch.tensor(0.0), ValueError, r"\[\]"),
        ("x_t", torch.zeros(3), TypeError, r"torch\.float32"),
        ("x_0", torch.zeros(2).long(), ValueError, r"\[3\], logits's .*\[2\]"),
        ("t", "0.5", TypeError, "str"),
        ("t", torch.ones(2), ValueError, r"\[2\]"),
        ("t", torch.ones(3, requires_grad=True), ValueError, "requires_grad"),
        ("power", 1.0, TypeError, "float"),
        ("power", torch.ones(7).bfloat16(), TypeError, r"torch\.bfloat16"),
        ("power", torch.ones(6), ValueError, r"\[7\].*\[6\]"),
        ("reduction", "avg", ValueError, "avg"),
    ],
)
def test_wrong_calls(name: str, value: Any, error: type[Exception], given: str) -> None:
    generalized_masked_loss(**RIGHT)
    with pytest.raises(error, match=f"^{name}: expected .*{given}"):
        generalized_masked_loss(**{**RIGHT, name: value})


@pytest.mark.operators("cpu", "emulated")
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_powers_above_zero(value: float) -> None:
    generalized_masked_loss(**RIGHT)
    with pytest.raises(ValueError, match=rf"^power: expected finite numbers above 0, got {value} at index \[3\]"):
        generalized_masked_loss(**{**RIGHT, "power": torch.ones(7).index_fill(0, torch.tensor([3]), value)})


@pytest.mark.operators("cpu")
def test_meta_tensors() -> None:
    result = generalized_masked_loss(**{name: value.to("meta") for name, value in RIGHT.items()})
    assert result.is_meta
    assert result.shape == generalized_masked_loss(**RIGHT).shape
    with pytest.raises(ValueError, match="expected a tensor on"):
        generalized_masked_loss(**{**RIGHT, "power": RIGHT["power"].to("meta")})


# --------------------------------------------------------------------------------------------------------- operator


def test_gradcheck() -> None:
    rows = random_rows(9, 7)._replace(t=torch.linspace(0.1, 1.0, 9).double())
    power = rows.power.clamp(max=4.0).requires_grad_()
    logits = random_log_score((9, 7), torch.float64, spread=1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w: generalized_masked_loss(v, *rows[:3], w), (logits, power), atol=1e-6, rtol=1e-5
    )


def test_second_derivatives_are_refused() -> None:
    rows = random_rows(9, 7)
    leaves = random_log_score((9, 7), torch.float64).requires_grad_(), rows.power.clone().requires_grad_()
    loss = generalized_masked_loss(leaves[0], *rows[:3], leaves[1])
    for function in (loss, loss**2):
        for leaf in leaves:
            (gradient,) = torch.autograd.grad(function.sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match=r"generalized_masked_loss: .*once"):
                (function.sum() + (gradient**2).sum()).backward()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    rows, logits = random_rows(97, 3001), random_log_score((97, 3001), dtype)
    several = []
    for count in (2, 1):
        threads(count)
        several.append(results(generalized_masked_loss, logits, rows))
    for one, two in zip(*several, strict=True):
        assert torch.equal(one, two)


@pytest.mark.operators("cpu", "cuda")  # the emulation is no device of torch
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    torch.compiler.reset()
    rows = random_rows(24, 27)._replace(power=torch.linspace(-1.0, 1.0, 27).double())

    def loss_of(logits: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        return generalized_masked_loss(2 * logits, x_t, x_0, t, F.softplus(raw), reduction="mean")

    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    logits = random_log_score((24, 27), torch.float32)
    both = [results(function, logits, rows, torch.ones(())) for function in (loss_of, compiled)]
    torch.testing.assert_close(*both)


@pytest.mark.operators("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    rows, operators = random_rows(24, 27), torch.ops.sedd_ext
    power = rows.power.to(torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = to_device((random_log_score((24, 27), dtype), *rows[:3], power))
    torch.library.opcheck(operators.generalized_masked, arguments)
    _, numbers = operators.generalized_masked(*arguments)
    for operator in (operators.generalized_masked_backward, operators.generalized_masked_power):
        torch.library.opcheck(operator, (to_device(torch.rand(24)), numbers, *arguments))
