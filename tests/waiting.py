"""Finds out whether code waits for the device: a GPU would have to finish its work before the CPU can go on.

:class:`NeverWaits` raises where it does. Without a GPU, the tensors of a program can lie on :data:`ABSENT`, a device
that stores and computes nothing. There the operators take the path that they take on a GPU, and only what the CPU knows
without waiting is known: shapes, but no number.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from sedd_ext import (
    RankOne,
    _dispatch,
    fused_loss,
    generalized_masked,
    head,
    linear_generalized_masked,
    linear_mean_prediction,
    linear_reverse,
    linear_reverse_mean,
    linear_score_entropy,
    mean_prediction,
    reverse,
    reverse_mean,
    score_entropy,
    transition,
)
from sedd_ext.linear_unmask import _unmask as _linear_unmask
from sedd_ext.unmask import _unmask

IMPLEMENTATIONS = {
    "generalized_masked": generalized_masked._forward,
    "generalized_masked_backward": generalized_masked._backward,
    "linear_generalized_masked": linear_generalized_masked._forward,
    "linear_generalized_masked_backward": linear_generalized_masked._loss._backward,
    "linear_mean_prediction": linear_mean_prediction._forward,
    "linear_mean_prediction_backward": linear_mean_prediction._loss._backward,
    "linear_reverse_mean_sample": linear_reverse_mean._sample,
    "linear_reverse_sample": linear_reverse._sample,
    "linear_score_entropy": linear_score_entropy._forward,
    "linear_score_entropy_backward": linear_score_entropy._loss._backward,
    "linear_unmask": _linear_unmask,
    "mean_prediction": mean_prediction._forward,
    "mean_prediction_backward": mean_prediction._backward,
    "reverse_mean_probs": reverse_mean._probs,
    "reverse_mean_sample": reverse_mean._sample,
    "reverse_probs": reverse._probs,
    "reverse_sample": reverse._sample,
    "sample_transition": transition._sample,
    "score_entropy": score_entropy._forward,
    "score_entropy_backward": score_entropy._backward,
    "score_entropy_sweep_backward": score_entropy._sweep_backward,
    "score_entropy_sweep": score_entropy._sweep,
    "unmask": _unmask,
}
"""The operators that are looked into."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero", "item"}
"""Operators whose result, or the shape of it, the CPU needs."""
ABSENT = "absent"
"""The name of the device that is not there."""


class WaitError(AssertionError):
    """The code waits for the device."""


class NeverWaits(TorchDispatchMode):
    """Raises :class:`WaitError` in its block at an operator that waits, or copies a tensor that is not from the CPU.

    Args:
        device: the device that nobody waits for, where not all tensors are on it. Those of the CPU may then be read,
            and no tensor may be copied between the two, but for one from pinned memory (``non_blocking``).
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        kwargs = kwargs or {}
        if func.namespace == "sedd_ext":
            if name not in IMPLEMENTATIONS:
                raise NotImplementedError(f"{name}: not in IMPLEMENTATIONS")
            with self:
                return IMPLEMENTATIONS[name](*args)
        if self._waits(name, args, kwargs):
            raise WaitError(f"{name} waits for the device")
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        here = [tensor.device.type == self.device for tensor in pytree.tree_leaves(args) if isinstance(tensor, Tensor)]
        if self.device is not None and not any(here) and name != "_to_copy":
            return False
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else []
        by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if self.device is None:
            # no operator of a program that runs on one device names a device for a tensor that it has
            moved = name == "_to_copy" and kwargs.get("device") is not None
        else:
            to = kwargs.get("device")
            moved = name == "_to_copy" and to is not None and (torch.device(to).type == self.device) != here[0]
            moved = moved and not (kwargs.get("non_blocking") and not here[0])  # from pinned memory
            moved = moved or (name == "copy_" and here[0] != here[1])
            moved = moved or any(isinstance(index, Tensor) and index.device.type != self.device for index in indices)
        return name in WAITS or by_mask or moved


class _Absent(TorchDispatchMode):
    """Computes the shapes of what is on :data:`ABSENT`, and all else as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == ABSENT:
            args = pytree.tree_map_only(Tensor, self._shape_of, args)
        elif not any(isinstance(value, FakeTensor) for value in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with self.shapes:
            return func(*args, **kwargs)

    def _shape_of(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.shapes.from_tensor(tensor)


class _Module(_DummyBackendModule):
    """What torch asks a device for, in tests that come later too."""

    def device_count(self) -> int:
        return 0

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(ABSENT, _Module())


needs_no_cuda = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch takes one GPU, present or absent")


@contextmanager
def absent_gpu(*, capturing: bool = False) -> Iterator[list[str]]:
    """In the block there is a GPU, :data:`ABSENT`, whose kernels do nothing. Gives the names of those that started.

    Args:
        capturing: a CUDA graph is being captured.
    """
    _register()
    launched: list[str] = []

    def vector(process: RankOne, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(process.dim, dtype=dtype, device=device)  # a copy from an earlier call

    def launch(kernel: str, arguments: dict[str, Any]) -> tuple[int, int]:
        launched.append(kernel)
        return 0, -1

    with (
        mock.patch.dict(_dispatch.LAUNCHERS, cuda=launch),
        mock.patch.object(_dispatch, "check_device", return_value=None),
        mock.patch.object(head, "check_device", return_value=None),
        mock.patch.object(sys.modules["sedd_ext.unmask"], "check_device", return_value=None),
        mock.patch.object(RankOne, "_copy", vector),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=capturing),
        torch.autograd.set_multithreading_enabled(False),
        _Absent(),
    ):
        yield launched


@contextmanager
def as_on_a_gpu(*, capturing: bool = False) -> Iterator[None]:
    """In the block the operators with a head take the path of a GPU for tensors on the CPU.

    Args:
        capturing: a CUDA graph is being captured.
    """

    def may_wait(tensor: Tensor, capacity: int | None) -> bool:
        return capacity is None and not capturing

    with (
        mock.patch.object(head, "may_wait", may_wait),
        mock.patch.object(fused_loss, "may_wait", may_wait),
    ):
        yield
