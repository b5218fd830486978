"""A capacity of the head: the same results, and a GPU that nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from backends import (
    Backend,
    linear_generalized_masked_loss,
    linear_mean_prediction_loss,
    linear_reverse_sample,
    linear_score_entropy_loss,
)
from explicit import PROCESSES, random_log_score, random_rows
from torch import Tensor
from waiting import ABSENT, NeverWaits, WaitError, absent_gpu, as_on_a_gpu, needs_no_cuda

import sedd_ext
from sedd_ext import Absorbing, Euler, GeneralizedMasked, RankOne, Tweedie, Uniform, _dispatch

pytestmark = pytest.mark.operators

LOSSES: dict[str, Callable[..., Tensor]] = {
    "score_entropy": linear_score_entropy_loss,
    "mean_prediction": linear_mean_prediction_loss,
    "generalized_masked": linear_generalized_masked_loss,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
BATCH, N = (2, 7), 27


def of_processes(names: Iterable[str], argument: str, kinds: Iterable[str] = PROCESSES) -> Any:
    """Each name with each process that it takes."""
    pairs = [(name, kind) for name in names for kind in kinds if "generalized" not in name or kind == "absorbing"]
    return pytest.mark.parametrize((argument, "kind"), pairs, ids=["-".join(pair) for pair in pairs])


def inputs(name: str, process: RankOne, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
    """What gets a gradient: hidden, weight, bias and maybe the powers; and the other arguments."""
    n, rows = process.dim, random_rows(process, math.prod(BATCH))
    x_0 = rows.x_0 if process.mask_id is None else rows.x_0 % (n - 1)
    x_t, x_0, sigma = (value.view(BATCH) for value in (rows.x_t, x_0, rows.sigma.clamp(0.01, 3.0)))
    leaves = [random_log_score(shape, dtype, seed, 0.6) for seed, shape in enumerate([(*BATCH, 6), (n, 6), (n,)])]
    factors = torch.linspace(0.5, 2.0, math.prod(BATCH), dtype=torch.float64).view(BATCH)
    options = {"x_t": x_t, "x_0": x_0, "loss_weight": factors}
    if name == "generalized_masked":
        leaves.append(torch.linspace(0.5, 2.0, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
        return leaves, {**options, "t": sigma / 3}
    return leaves, {**options, "sigma": sigma, "process": process}


def results(name: str, leaves: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    """The loss and all gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = call(LOSSES[name], leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))]


def call(operator: Callable[..., Tensor], leaves: list[Tensor], **options: Any) -> Tensor:
    power = {"power": leaves[3]} if len(leaves) > 3 else {}
    return operator(*leaves[:3], **options, **power)


def needs_head(process: RankOne, x_t: Tensor) -> Tensor:
    return process.stationary[x_t] > 0


GPU: list[Callable[[], AbstractContextManager[None]]] = [nullcontext, as_on_a_gpu]
either_path = pytest.mark.parametrize("path", GPU, ids=["", "gpu"])


# ---- losses ----


@either_path
@of_processes(LOSSES, "name")
def test_losses_and_gradients(name: str, kind: str, path: Callable[[], Any]) -> None:
    """Whatever the states and weights of the rows that only fill up are."""
    process = PROCESSES[kind](N)
    leaves, options = inputs(name, process)
    needed = needs_head(process, options["x_t"])
    leaves[0][~needed] = torch.nan
    options["loss_weight"][~needed] = torch.inf
    for upstream in (torch.ones(()).expand(BATCH), torch.linspace(-1.0, 2.0, 14).view(BATCH)):
        wanted = results(name, leaves, upstream, **options)
        assert all(bool(value.isfinite().all()) for value in wanted)
        for capacity in {int(needed.sum()), min(14, int(needed.sum()) + 2), 14, 20}:
            with path():
                found = results(name, leaves, upstream, **options, capacity=capacity)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
            assert bool((found[0][~needed] == 0).all())
            assert bool((found[1][~needed] == 0).all())


@pytest.mark.operators("cpu", "emulated")
@of_processes(LOSSES, "name")
def test_as_many_as_needed_are_the_same_rows(name: str, kind: str) -> None:
    process = PROCESSES[kind](N)
    leaves, options = inputs(name, process, torch.float32)
    upstream, count = torch.linspace(-1.0, 2.0, 14).view(BATCH), int(needs_head(process, options["x_t"]).sum())
    both = [results(name, leaves, upstream, **options, capacity=capacity) for capacity in (None, count)]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mean_prediction", "generalized_masked"])
def test_rows_that_fill_up_do_not_set_the_unit_of_float16(name: str) -> None:
    """The gradient of a row at σ̄ = 1e-10 would be 1e10 times as large as those of the others."""
    process = Absorbing(N - 1)
    leaves, options = inputs(name, process, torch.float16)
    noise = options["sigma" if name == "mean_prediction" else "t"]
    noise[:] = torch.where(needs_head(process, options["x_t"]), 0.9, 1e-10)
    options["loss_weight"] = 1e-3
    exact = results(name, [leaf.double() for leaf in leaves], torch.ones(BATCH), **options)
    plain, found = (results(name, leaves, torch.ones(BATCH), **options, capacity=size) for size in (None, 14))
    for one, other, true in zip(found, plain, exact, strict=True):
        error, allowed = (float((value.double() - true).norm() / true.norm()) for value in (one, other))
        assert error <= allowed + 2**-12


@of_processes(LOSSES, "name")
def test_positions_beyond_the_capacity(name: str, kind: str) -> None:
    process = PROCESSES[kind](N)
    leaves, options = inputs(name, process)
    needed = needs_head(process, options["x_t"])
    count = int(needed.sum())
    with pytest.raises(ValueError, match=rf"^capacity: expected at least {count} for .*, got {count - 1}$"):
        results(name, leaves, torch.ones(BATCH), **options, capacity=count - 1)
    wanted = results(name, leaves, torch.ones(BATCH), **options)
    left_out = needed & (needed.flatten().cumsum(0).view(BATCH) > count - 2)
    assert int(left_out.sum()) == 2
    with as_on_a_gpu():
        found = results(name, leaves, torch.ones(BATCH), **options, capacity=count - 2)
        total = call(LOSSES[name], leaves, **options, capacity=0, reduction="sum")
    assert total.isnan()
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert bool(one[left_out].isnan().all())
        torch.testing.assert_close(one[~left_out], other[~left_out], rtol=1e-11, atol=1e-13)


@every_loss
def test_no_row_at_all(name: str) -> None:
    process = Absorbing(N - 1)
    leaves, options = inputs(name, process)
    options["x_t"] = options["x_0"]
    results(name, leaves, torch.ones(BATCH), **options, capacity=1)  # a kernel must run in a test of a backend
    for capacity in (0, None):
        for value in results(name, leaves, torch.ones(BATCH), **options, capacity=capacity):
            assert bool((value == 0).all())
    empty = {key: value[:0] if isinstance(value, Tensor) else value for key, value in options.items()}
    for capacity in (0, 5, None):
        found = results(name, [leaves[0][:0], *leaves[1:]], torch.ones(0, 7), **empty, capacity=capacity)
        assert found[0].shape == (0, 7)
        assert all(bool((value == 0).all()) for value in found[1:])


def test_bad_rows_come_first(backend: Backend) -> None:
    """A row that no kernel accepts needs the head, so that it is reported."""
    leaves, options = inputs("score_entropy", Absorbing(N - 1))
    options["x_t"] = options["x_0"].clone()
    options["x_t"][1, 3] = -1
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=r"^x_t: expected tokens in \[0, 27\), got -1 at index \[1, 3\]"):
            call(linear_score_entropy_loss, leaves, **options, capacity=1)
        return
    loss = call(linear_score_entropy_loss, leaves, **options, capacity=1)
    assert loss.isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.operators("cpu", "emulated")
@every_loss
def test_gradcheck(name: str) -> None:
    process = Absorbing(5)
    leaves, options = inputs(name, process)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with as_on_a_gpu():
        assert torch.autograd.gradcheck(
            lambda *leaves: call(LOSSES[name], list(leaves), **options, capacity=13), leaves, fast_mode=True
        )


@pytest.mark.operators("cpu")
@every_loss
def test_compiled(name: str) -> None:
    leaves, options = inputs(name, Absorbing(N - 1))
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loss(*leaves: Tensor) -> Tensor:
        return call(LOSSES[name], list(leaves), **options, capacity=12).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for one, other in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)), strict=True):
        assert torch.equal(one, other)


# ---- samples ----

STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tweedie": (Tweedie(0.6), {}),
    "euler": (Euler(0.3), {}),
    "mean tweedie": (Tweedie(0.6), {"parameterization": "mean", "sigma": 0.9}),
    "mean euler": (Euler(0.3), {"parameterization": "mean", "sigma": 0.9}),
    "generalized": (GeneralizedMasked(0.3, 0.9, torch.ones(N).double()), {"parameterization": "mean"}),
    "tempered": (Tweedie(0.6), {"temperature": 0.7, "top_p": 0.9}),
    "mean tempered": (Tweedie(0.6), {"parameterization": "mean", "sigma": 0.9, "temperature": 0.7, "top_p": 0.9}),
}


def sample_inputs(process: RankOne, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """The head and the tokens, of which the process can produce most."""
    leaves = [random_log_score(shape, dtype, seed) for seed, shape in enumerate([(200, 4), (process.dim, 4), (N,)])]
    return leaves, torch.where(torch.arange(200) % 3 == 0, random_rows(process, 200).x_t, process.dim - 1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, sweep) of the tiles that a kernel draws from."""
    made: list[tuple[int, int]] = []
    for device in ("cpu", "cuda"):
        launcher = _dispatch.LAUNCHERS[device]

        def launch(kernel: str, arguments: dict[str, Any], launcher: Any = launcher) -> Any:
            if kernel == "reverse_tile":
                made.append((arguments["rows"], arguments["sweep"]))
            return launcher(kernel, arguments)

        monkeypatch.setitem(_dispatch.LAUNCHERS, device, launch)
    return made


@either_path
@of_processes(STEPS, "step_name")
@pytest.mark.parametrize("denoise", [False, True])
def test_samples(step_name: str, kind: str, denoise: bool, path: Callable[[], Any]) -> None:
    process = PROCESSES[kind](N)
    leaves, x_t = sample_inputs(process)
    step, options = STEPS[step_name]
    needed = needs_head(process, x_t)
    leaves[0][~needed] = torch.nan
    options = {**options, "denoise": denoise}
    wanted = linear_reverse_sample(*leaves, x_t, step, process, generator=seeded(), **options)
    assert not torch.equal(wanted, x_t)
    for capacity in {int(needed.sum()), 200, 300}:
        with path():
            found = linear_reverse_sample(*leaves, x_t, step, process, generator=seeded(), capacity=capacity, **options)
        assert torch.equal(found, wanted)


def test_rejected_draws(sweeps: list[tuple[int, int]]) -> None:
    """All rows take the second sweep, and the rejected ones get its tokens."""
    process = Uniform(N)
    leaves, x_t = sample_inputs(process)
    wanted = linear_reverse_sample(*leaves, x_t, Tweedie(2.0), process, generator=seeded())
    (first, _), (again, sweep) = sweeps
    assert (first, sweep) == (200, 1)
    assert 0 < again < 200
    sweeps.clear()
    with as_on_a_gpu():
        found = linear_reverse_sample(*leaves, x_t, Tweedie(2.0), process, generator=seeded(), capacity=200)
    assert torch.equal(found, wanted)
    assert sweeps == [(200, 0), (200, 1)]


@pytest.mark.parametrize("step_name", STEPS)
def test_samples_beyond_the_capacity(step_name: str) -> None:
    process = Absorbing(N - 1)
    leaves, x_t = sample_inputs(process)
    step, options = STEPS[step_name]
    needed = needs_head(process, x_t)
    count = int(needed.sum())
    with pytest.raises(ValueError, match=rf"^capacity: expected at least {count} .*, got 3$"):
        linear_reverse_sample(*leaves, x_t, step, process, capacity=3, **options)
    wanted = linear_reverse_sample(*leaves, x_t, step, process, generator=seeded(), **options)
    with as_on_a_gpu():
        found = linear_reverse_sample(*leaves, x_t, step, process, generator=seeded(), capacity=count - 2, **options)
    left_out = needed & (needed.cumsum(0) > count - 2)
    assert torch.equal(found, torch.where(left_out, -1, wanted))


def test_all_of_uniform_noise_needs_the_head() -> None:
    leaves, x_t = sample_inputs(Uniform(N))
    with pytest.raises(ValueError, match=r"^capacity: expected at least 200 .*, got 100$"):
        linear_reverse_sample(*leaves, x_t, Euler(0.3), Uniform(N), capacity=100)
    with as_on_a_gpu():
        found = linear_reverse_sample(*leaves, x_t, Euler(0.3), Uniform(N), capacity=100)
    assert ((found == -1) == (torch.arange(200) >= 100)).all()


def test_a_capture_takes_all_positions(sweeps: list[tuple[int, int]]) -> None:
    process = Absorbing(N - 1)
    leaves, x_t = sample_inputs(process)
    x_t[:100] = 5
    wanted = linear_reverse_sample(*leaves, x_t, Tweedie(0.6), process, generator=seeded())
    with as_on_a_gpu():
        linear_reverse_sample(*leaves, x_t, Tweedie(0.6), process, generator=seeded())
    with as_on_a_gpu(capturing=True):
        found = linear_reverse_sample(*leaves, x_t, Tweedie(0.6), process, generator=seeded())
    assert torch.equal(found, wanted)
    (counted, _), (again, _), (captured, _) = sweeps
    assert counted == again < captured == 200


# ---- a GPU that nobody waits for ----


def absent(value: Any) -> Any:
    """A tensor of the same shape on the absent device; all else as it is."""
    if isinstance(value, GeneralizedMasked):
        return GeneralizedMasked(value.s, value.t, absent(value.power))
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=ABSENT, requires_grad=value.requires_grad)


@needs_no_cuda
@of_processes(LOSSES, "name", ("absorbing", "uniform", "hybrid"))
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_losses_never_wait(name: str, kind: str, capturing: bool, dtype: torch.dtype) -> None:
    """With sums and means, upstream gradients that differ, and without some gradients."""
    process = PROCESSES[kind](N)
    leaves, options = inputs(name, process, dtype)
    call(LOSSES[name], leaves, **options)  # a kernel must run in a test of a backend
    operator = getattr(sedd_ext, LOSSES[name].__name__)
    for wanted in ([True] * len(leaves), [True, False, False, True], [False, True, True, False]):
        with absent_gpu(capturing=capturing) as launched:
            given = [absent(leaf).requires_grad_(one) for leaf, one in zip(leaves, wanted, strict=False)]
            here = {key: absent(value) for key, value in options.items()}
            for reduce in (torch.sum, torch.mean, lambda loss: (loss * loss.detach()).sum()):
                with NeverWaits(ABSENT):
                    loss = call(operator, given, **here, capacity=None if capturing else 12)
                    reduce(loss).backward()
            assert given[0].grad is not None or not wanted[0]
            with NeverWaits(ABSENT):
                call(operator, given, **here, capacity=12, reduction="mean").backward()
        assert launched


@needs_no_cuda
@of_processes(STEPS, "step_name", ("absorbing", "uniform", "hybrid"))
@pytest.mark.parametrize("capturing", [False, True])
def test_samples_never_wait(step_name: str, kind: str, capturing: bool) -> None:
    process = PROCESSES[kind](N)
    leaves, x_t = sample_inputs(process, torch.float32)
    step, options = STEPS[step_name]
    linear_reverse_sample(*leaves, x_t, step, process, **options)  # a kernel must run in a test of a backend
    with absent_gpu(capturing=capturing) as launched:
        here = absent(step) if step_name == "generalized" else step
        given = [absent(value) for value in (*leaves, x_t)]
        with NeverWaits(ABSENT):
            sedd_ext.linear_reverse_sample(
                *given, here, process, denoise=True, capacity=None if capturing else 150, **options
            )
    assert launched


@needs_no_cuda
@every_loss
def test_counting_waits(name: str) -> None:
    """What the two tests above would see."""
    leaves, options = inputs(name, Absorbing(N - 1))
    call(LOSSES[name], leaves, **options)  # a kernel must run in a test of a backend
    operator = getattr(sedd_ext, LOSSES[name].__name__)
    with absent_gpu():
        given, here = [absent(leaf) for leaf in leaves], {key: absent(value) for key, value in options.items()}
        with NeverWaits(ABSENT), pytest.raises(WaitError, match=r"^nonzero waits for the device$"):
            call(operator, given, **here)
