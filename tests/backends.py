"""Where the operators run in a test: the CPU's kernels, the CUDA kernels emulated on the CPU, or a GPU.

Tests of the operators import them from here. They are those of sedd_ext, but that tensors travel to the device of the
backend that the test has been given, and results come back: a test sees CPU tensors whatever the backend.
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from cuda_on_cpu import build
from torch import Tensor
from torch.utils import _pytree as pytree

import sedd_ext
from sedd_ext import _C, Euler, GeneralizedMasked, Tweedie, _dispatch

SCHEDULES = ["forward", "reverse", "greedy", "random"]


class Backend(NamedTuple):
    """One way to run the operators.

    ``variant`` is an instruction set of the CPU's kernels, or the schedule of the emulation.
    """

    kind: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.kind}-{self.variant}" if self.variant else self.kind

    @property
    def device(self) -> str:
        return "cuda" if self.kind == "cuda" else "cpu"

    @property
    def names_bad_rows(self) -> bool:
        """Whether bad values raise; CUDA kernels, which nobody waits for, leave NaN, or the token -1, in their rows."""
        return self.kind == "cpu"

    def draws(self, count: int) -> int:
        """How many random draws a test takes: the emulation's threads run one after the other."""
        return count // 4 if self.kind == "emulated" else count


BACKENDS: dict[str, list[Backend]] = {
    "cpu": [Backend("cpu", isa) for isa in _C.available_isas()],
    "emulated": [Backend("emulated", schedule) for schedule in SCHEDULES],
    "cuda": [Backend("cuda")] if sedd_ext.has_cuda_kernels and torch.cuda.is_available() else [],
}
"""All that this machine has, by kind, the default first."""

current = BACKENDS["cpu"][0]
"""Where the operators have been told to run."""


class Launch(NamedTuple):
    """A kernel that ran: where, as the kernels' own module says, and where it had been told to."""

    kernel: str
    ran_on: Backend
    told: Backend


launches: list[Launch] = []
"""All kernels that ran since the list was cleared; :mod:`conftest` checks it after each test."""


@functools.cache
def emulated_kernels() -> Any:
    """The module of the CUDA kernels, compiled for the CPU (built anew where a source has changed)."""
    root = build.ROOT
    library = build.shared_library(
        "emulated",
        [
            *sorted(root.glob("csrc/cuda/*.cu")),
            root / "csrc/cuda/bindings.cpp",
            root / "tests/cuda_on_cpu/module.cpp",
        ],
        flags=["-O2", "-fvisibility=hidden"],
        include=[sysconfig.get_path("include")],
    )
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_launches(label: Backend, told: Backend) -> None:
    """Raises AssertionError unless a test ran where its name says.

    Args:
        label: the backend in the test's name.
        told: where the operators had been told to run when the test began.

    The test may also run operators elsewhere, in a ``with running_on(...)`` of its own.
    """
    assert told == label, f"the test is called {label}, but its operators were told to run on {told}"
    stray = next((launch for launch in launches if launch.ran_on != launch.told), None)
    assert stray is None, f"{stray.kernel} was told to run on {stray.told}, but ran on {stray.ran_on}"
    assert any(launch.ran_on == label for launch in launches), f"the test is called {label}, but ran no kernel there"


def _recorded(launcher: Callable[..., Any], ran_on: Callable[[], Backend]) -> Callable[..., Any]:
    def launch(kernel: str, arguments: dict[str, Any]) -> Any:
        launches.append(Launch(kernel, ran_on(), current))
        return launcher(kernel, arguments)

    return launch


CPU_LAUNCHER = _recorded(_dispatch.LAUNCHERS["cpu"], lambda: Backend("cpu", _C.isa()))
_dispatch.LAUNCHERS.update(cpu=CPU_LAUNCHER, cuda=_recorded(_dispatch.LAUNCHERS["cuda"], lambda: Backend("cuda")))


@functools.cache
def _emulated_launcher() -> Callable[..., Any]:
    kernels, one_at_a_time = emulated_kernels(), threading.Lock()

    def launch(kernel: str, arguments: dict[str, Any]) -> Any:
        with one_at_a_time:
            return _dispatch.launch_cuda(kernel, arguments, kernels=kernels, stream=0)

    return _recorded(launch, lambda: Backend("emulated", kernels.schedule()))


@contextmanager
def running_on(backend: Backend) -> Iterator[Backend]:
    """The operators of this module run there, and so do sedd_ext's own on CPU tensors, until the end of the block."""
    global current
    before, isa, launcher = current, _C.isa(), _dispatch.LAUNCHERS["cpu"]
    schedule = before.variant if before.kind == "emulated" else None
    try:
        if backend.kind == "cpu":
            _C.select_isa(backend.variant)
        if backend.kind == "emulated":
            emulated_kernels().set_schedule(backend.variant, 0)
        _dispatch.LAUNCHERS["cpu"] = _emulated_launcher() if backend.kind == "emulated" else CPU_LAUNCHER
        current = backend
        yield backend
    finally:
        current, _dispatch.LAUNCHERS["cpu"] = before, launcher
        _C.select_isa(isa)
        if schedule is not None:
            emulated_kernels().set_schedule(schedule, 0)


def to_device(values: Any) -> Any:
    """Tensors, and generators, where the backend's kernels can take them; all else as it is."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            # its next number seeds one over there, so that every call draws anew
            seed = int(torch.randint(2**62, (1,), generator=value))
            return torch.Generator(current.device).manual_seed(seed)
        if isinstance(value, (Euler, Tweedie)):
            return type(value)(move(value.noise))
        if isinstance(value, GeneralizedMasked):
            return GeneralizedMasked(move(value.s), move(value.t), move(value.power))
        return value.to(current.device) if isinstance(value, Tensor) else value

    return values if current.device == "cpu" else pytree.tree_map(move, values)


def _there_and_back(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def call(*arguments: Any, **options: Any) -> Any:
        if current.device == "cpu":
            return operator(*arguments, **options)
        result = operator(*to_device(arguments), **to_device(options))
        return pytree.tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, result)

    return call


generalized_masked_loss = _there_and_back(sedd_ext.generalized_masked_loss)
linear_generalized_masked_loss = _there_and_back(sedd_ext.linear_generalized_masked_loss)
linear_mean_prediction_loss = _there_and_back(sedd_ext.linear_mean_prediction_loss)
linear_reverse_sample = _there_and_back(sedd_ext.linear_reverse_sample)
linear_unmask = _there_and_back(sedd_ext.linear_unmask)
linear_score_entropy_loss = _there_and_back(sedd_ext.linear_score_entropy_loss)
mean_prediction_loss = _there_and_back(sedd_ext.mean_prediction_loss)
reverse_probs = _there_and_back(sedd_ext.reverse_probs)
reverse_sample = _there_and_back(sedd_ext.reverse_sample)
sample_transition = _there_and_back(sedd_ext.sample_transition)
score_entropy_loss = _there_and_back(sedd_ext.score_entropy_loss)
transition_column = _there_and_back(sedd_ext.transition_column)
transition_row = _there_and_back(sedd_ext.transition_row)
unmask = _there_and_back(sedd_ext.unmask)
