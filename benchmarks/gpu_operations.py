"""The operators as gpu_steps.py calls them, and what each is measured against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from bench_linear import head
from bench_reverse import dense_step
from bench_transition import dense_probabilities
from cases import COLUMN, EULER, FORWARD, MEAN_TWEEDIE, ROW, SAMPLE, TWEEDIE, Case, Inputs, Run, compiled, plain_read
from peers import dense_score_entropy
from torch import Tensor

import sedd_ext
from sedd_ext import Euler, RankOne, Tweedie, reference
from sedd_ext.step import Step

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Limit:
    """What memory traffic alone costs; and the least bytes that a row moves, given N and an element's size."""

    run: Callable[[Inputs], Run]
    row_bytes: Callable[[int, int], int]


@dataclass(frozen=True)
class Operation:
    """An operator: its name in sedd_ext and in the reference, how it is called, and what it is measured against."""

    name: str
    function: str
    call: Callable[[Function, Inputs], Tensor]
    limit: Limit
    dense: Function | None = None  # what torch.compile gets; absorbing and uniform only
    unfused: Function | None = None  # the rival of an operator that has the head in it, in place of the reference
    waits: bool = False  # for the device, to learn a shape: no CUDA graph can hold that
    triton: bool = False  # sedd_ext.triton_head is another rival
    only: str = ""  # the only process it is for, if not all of them

    def suits(self, case: Case) -> bool:
        """Whether it is for this process, and has a dtype to vary: not if it takes tokens only."""
        return self.only in ("", case.process) and (self.limit not in (WRITE, TOKENS) or case.dtype == "float32")

    @property
    def rival(self) -> str:
        return "unfused" if self.unfused else "eager"

    def contestant(self, name: str, case: Case) -> Run:
        if name == "limit":
            return self.limit.run(case.inputs)
        if name == "compile":
            assert self.dense is not None
            return functools.partial(self.call, compiled(self.dense, case), case.inputs)
        if name == "unfused":
            assert self.unfused is not None
            return functools.partial(self.call, self.unfused, case.inputs)
        if name == "triton":
            return functools.partial(_with_epilogue, self.call, getattr(sedd_ext, self.function), case.inputs)
        module = {"kernel": sedd_ext, "eager": reference}[name]
        return functools.partial(self.call, getattr(module, self.function), case.inputs)


def _with_epilogue(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    from sedd_ext.triton_head import epilogue

    with epilogue():
        return call(*arguments)


def _copy(i: Inputs, dtype: torch.dtype) -> Run:
    out = torch.empty_like(i.log_score, dtype=dtype)
    return lambda: out.copy_(i.log_score)


def _read_and_copy(i: Inputs) -> Run:
    read, copy = plain_read(i.log_score), _copy(i, i.dtype)
    return lambda: (read(), copy())


def _read_twice_and_copy(i: Inputs) -> Run:
    read, copy = plain_read(i.log_score), _copy(i, i.dtype)
    return lambda: (read(), read(), copy())


def _write(i: Inputs) -> Run:
    out = torch.empty(len(i.x_0), i.process.dim, device=i.x_0.device)
    return lambda: out.fill_(0.5)


READ = Limit(lambda i: plain_read(i.log_score), lambda n, size: n * size + 28)
READ_TWICE_AND_WRITE = Limit(_read_and_copy, lambda n, size: 3 * n * size + 56)
READ_THRICE_AND_WRITE = Limit(_read_twice_and_copy, lambda n, size: 4 * n * size + 68)
READ_AND_WRITE_FLOAT32 = Limit(lambda i: _copy(i, torch.float32), lambda n, size: n * (size + 4) + 16)
WRITE = Limit(_write, lambda n, _: 4 * n + 16)
TOKENS = Limit(lambda i: i.x_0.clone, lambda *_: 24)


def _loss(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, i.x_0, i.sigma, i.process)


def _gradient(function: Function, i: Inputs) -> Tensor:
    x = i.log_score.detach().requires_grad_()
    return torch.autograd.grad(function(x, i.x_t, i.x_0, i.sigma, i.process).sum(), x)[0]


def _tweedie(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, Tweedie(i.step["tweedie"]), i.process)


def _euler(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, Euler(i.step["euler"]), i.process)


def _mean_tweedie(function: Function, i: Inputs) -> Tensor:
    # as logits; any numbers are
    return function(i.log_score, i.x_t, Tweedie(0.5 * i.sigma), i.process, parameterization="mean", sigma=i.sigma)


def _generalized_masked(function: Function, i: Inputs) -> Tensor:
    """Gradients in the powers, which take a read of their own, and in the logits."""
    x = i.log_score.detach().requires_grad_()
    power = torch.linspace(0.5, 1.5, i.process.dim, device=x.device).requires_grad_()
    loss = function(x, i.x_t, i.x_0, -torch.expm1(-i.sigma.double()), power)
    return torch.autograd.grad(loss.sum(), (power, x))[0]


def _noise(function: Function, i: Inputs) -> Tensor:
    return function(i.x_0, i.sigma, i.process)


def _dense_step(log_score: Tensor, x_t: Tensor, step: Step, process: RankOne) -> Tensor:
    return dense_step(log_score.float(), x_t, step.noise, process, step.name)


# The output head and what comes behind it: of a model's width on a GPU, of a small one where that is rehearsed.


@functools.lru_cache(maxsize=2)
def _head(rows: int, n: int, dtype: str, device: str) -> list[Tensor]:
    return [tensor.to(device) for tensor in head(768 if device == "cuda" else 16, rows, n, dtype)]


def _head_of(i: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias; the bias makes the scores add up to about 1, where that is usual."""
    dtype = str(i.dtype).removeprefix("torch.")
    hidden, weight, bias = _head(len(i.x_0), i.process.dim, dtype, i.x_0.device.type)
    return hidden, weight, None if i.process.family == "uniform" else bias


def _linear_gradient(function: Function, i: Inputs) -> Tensor:
    hidden, weight, bias = _head_of(i)
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves, bias, i.x_t, i.x_0, i.sigma, i.process)
    return torch.autograd.grad(loss.sum(), leaves)[1]


def _linear_tweedie(function: Function, i: Inputs) -> Tensor:
    return function(*_head_of(i), i.x_t, Tweedie(i.step["tweedie"]), i.process)


def _unfused_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return sedd_ext.score_entropy_loss(F.linear(hidden, weight, bias), *rest)


def _unfused_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return sedd_ext.mean_prediction_loss(F.linear(hidden, weight, bias), *rest)


def _unfused_tweedie(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return sedd_ext.reverse_sample(F.linear(hidden, weight, bias), *rest)


def _products(i: Inputs, *, backward: bool) -> Run:
    hidden, weight, _ = _head_of(i)

    def run() -> None:
        log_score = hidden @ weight.T
        if backward:
            log_score @ weight
            log_score.T @ hidden

    return run


# The matrix products alone; the weight is shared by all rows, so that a row's bytes are next to none.
PRODUCT = Limit(functools.partial(_products, backward=False), lambda *_: 24)
PRODUCTS = Limit(functools.partial(_products, backward=True), lambda *_: 28)
_dense_loss, _partial = dense_score_entropy, functools.partial
OPERATIONS = (
    Operation(FORWARD, "score_entropy_loss", _loss, READ, _dense_loss),
    Operation(FORWARD + " + backward", "score_entropy_loss", _gradient, READ_TWICE_AND_WRITE, _dense_loss),
    Operation(TWEEDIE, "reverse_sample", _tweedie, READ, _dense_step),
    Operation(EULER, "reverse_sample", _euler, READ, _dense_step),
    Operation("tweedie probs", "reverse_probs", _tweedie, READ_AND_WRITE_FLOAT32),
    Operation("euler probs", "reverse_probs", _euler, READ_AND_WRITE_FLOAT32),
    Operation("mean prediction forward", "mean_prediction_loss", _loss, READ),
    Operation("mean prediction forward + backward", "mean_prediction_loss", _gradient, READ_TWICE_AND_WRITE),
    Operation(
        "generalized masked forward + backward",
        "generalized_masked_loss",
        _generalized_masked,
        READ_THRICE_AND_WRITE,
        only="absorbing",
    ),
    Operation(MEAN_TWEEDIE, "reverse_sample", _mean_tweedie, READ),
    Operation("tweedie probs, mean prediction", "reverse_probs", _mean_tweedie, READ_AND_WRITE_FLOAT32),
    Operation(COLUMN, "transition_column", _noise, WRITE, _partial(dense_probabilities, column=True)),
    Operation(ROW, "transition_row", _noise, WRITE, _partial(dense_probabilities, column=False)),
    Operation(SAMPLE, "sample_transition", _noise, TOKENS),
    Operation(
        "linear score entropy forward + backward",
        "linear_score_entropy_loss",
        _linear_gradient,
        PRODUCTS,
        unfused=_unfused_loss,
        waits=True,
        triton=True,
    ),
    Operation(
        "linear mean prediction forward + backward",
        "linear_mean_prediction_loss",
        _linear_gradient,
        PRODUCTS,
        unfused=_unfused_mean,
        waits=True,
    ),
    Operation(
        "linear tweedie sample", "linear_reverse_sample", _linear_tweedie, PRODUCT, unfused=_unfused_tweedie, waits=True
    ),
)
