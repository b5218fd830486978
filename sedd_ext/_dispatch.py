"""Shared by all operators: checks of arguments, calls of kernels, and errors that kernels report."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _C
from .process import RankOne

__all__: list[str] = []

DTYPES = {getattr(torch, name): code for name, code in _C.dtypes.items()}
"""The codes of dtypes in kernel calls. Those of families and steps are ``FAMILIES`` and ``STEPS``; and so on."""
FAMILIES, STEPS = _C.families, _C.steps
MEAN_STEPS, STAGES = _C.mean_steps, _C.stages
# torch calls AMD's devices "cuda" too
CUDA = ("cuda",) if _C.cuda and torch.version.hip is None else ()
_HUGE_BYTES = 1 << 24
_FAULTS = {code: name for name, code in _C.faults.items()}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels compute with log-scores of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind_of(value: object) -> str:
    """The name of a value's type in an error message."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_process(process: object) -> RankOne:
    """Checks that ``process`` is a process."""
    if not isinstance(process, RankOne):
        raise TypeError(
            f"process: expected a process (Absorbing, Uniform, Hybrid or RankOne of sedd_ext), got {kind_of(process)}"
        )
    return process


def check_tokens(name: str, value: object, shape: torch.Size | None = None, of: str = "log_score") -> Tensor:
    """Checks that ``value`` is an int64 tensor of the given shape on a device that has kernels."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {kind_of(value)}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, {of}'s but for its last axis, got {list(value.shape)}")
    check_device(name, value)
    return value


def check_log_score(value: object, process: RankOne, name: str = "log_score") -> Tensor:
    """Checks that ``value`` is a tensor of log-scores or logits [*B, N] for the N of the process."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(value)}")
    if value.dim() == 0 or value.shape[-1] != process.dim:
        raise ValueError(f"{name}: expected shape [*B, {process.dim}] for {process}, got {list(value.shape)}")
    check_device(name, value)
    return value


def check_device(name: str, value: Tensor) -> None:
    """Checks that there are kernels for the device of ``value``."""
    # these properties are cheap; device.type takes 0.6 µs
    if not (value.is_cpu or (value.is_cuda and CUDA) or value.is_meta):
        expected = "a CUDA device or the CPU" if CUDA else "the CPU"
        raise NotImplementedError(
            f"{name}: expected a tensor on {expected}, for which this build has kernels, got one on {value.device}; "
            "sedd_ext.reference takes tensors on any device"
        )


def check_reduction(value: object) -> None:
    """Checks that ``value`` is the name of a reduction."""
    if value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {value!r}")


def check_same_device(**tensors: Tensor) -> None:
    """Checks that all tensors are on the device of the first one."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} as {first_name} is, got one on {tensor.device}"
            )


def per_row(name: str, value: object, batch: torch.Size, device: torch.device) -> Tensor:
    """``value``, a number or numbers that broadcast to the batch, as a contiguous float64 tensor [*B]."""
    if (
        isinstance(value, Tensor)
        and value.dtype is torch.float64
        and value.shape == batch
        and value.device == device
        and not value.requires_grad
    ):
        return value.contiguous()  # the usual case, without the calls below
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full(batch, float(value), dtype=torch.float64, device=device)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {kind_of(value)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected no requires_grad, since it gets no gradient; detach() it")
    if value.device != device and (value.dim() > 0 or value.is_meta):
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    value = value.double() if value.device == device else value.to(device=device, dtype=torch.float64)
    if value.shape == batch:  # expand takes 2 µs
        return value.contiguous()
    try:
        rows = value.expand(batch)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(batch)}, got {list(value.shape)}"
        ) from error
    return rows.contiguous()


def stationary_for(process: RankOne, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """π for the kernels: a vector of the compute dtype, or None if the family alone determines it."""
    return process._copy("stationary", compute_dtype(dtype), device) if process.family == "rank_one" else None


def may_wait(tensor: Tensor, capacity: int | None) -> bool:
    """Whether an operator may read numbers of the tensor: always on the CPU, and on a GPU only without a capacity.

    There it waits until the numbers are computed, which nothing may do while the current stream is being captured.
    """
    return tensor.is_cpu or (capacity is None and not torch.cuda.is_current_stream_capturing())


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """63 random bits from the generator, int64 [1]. They seed the random numbers of all rows."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {kind_of(generator)}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type} as the tokens are, got one on {generator.device}")
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def fresh(tensor: Tensor) -> Tensor:
    """Asks for huge pages for a large new tensor, which must not have been written yet. Returns the tensor.

    Page faults of 4 KiB pages take longer than the computation of what is written.
    """
    size = tensor.numel() * tensor.element_size()
    if size >= _HUGE_BYTES and tensor.is_cpu:
        _C.advise_huge_pages(tensor.data_ptr(), size)
    return tensor


def row_stride_of(rows: Tensor) -> int:
    """The elements from a row to the next, of contiguous rows [*B, N] or of a matrix with any distance of rows."""
    return rows.stride(0) if rows.dim() == 2 else rows.size(-1)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor.contiguous()``, or None."""
    return None if tensor is None else tensor.contiguous()


Status = tuple[int, int]
"""(fault, row): the code of a fault and the first bad row, or (0, -1)."""


def _launch_cpu(kernel: str, arguments: dict[str, Any]) -> Status:
    arguments["threads"] = torch.get_num_threads()
    status: Status = getattr(_C, kernel)(arguments)
    return status


def launch_cuda(kernel: str, arguments: dict[str, Any], kernels: Any = _C, stream: int | None = None) -> Status:
    """Starts a kernel on the current stream of the output's device and does not wait. Bad rows appear in the output.

    The current device of the caller does not change, and no context is created on it.

    Args:
        kernel: its name in the extension, without the device.
        arguments: as for :func:`launch`.
        kernels: the module that holds the kernels.
        stream: a cudaStream_t, in place of the current one.

    Raises:
        RuntimeError: the CUDA runtime reports an error.
    """
    out = arguments["out"]
    device = out.device.index or 0
    arguments["workspace"] = out.new_empty(getattr(kernels, f"{kernel}_workspace")(arguments), dtype=torch.uint8)
    arguments["device"] = device
    guard: AbstractContextManager[Any] = nullcontext()
    if stream is None:
        # the code of torch.compile calls this too; torch.cuda.current_stream takes microseconds to create an object
        stream = torch._C._cuda_getCurrentRawStream(device)
        if device != torch.cuda.current_device():
            guard = torch.cuda.device(device)
    arguments["stream"] = stream
    with guard:
        error = getattr(kernels, f"{kernel}_cuda")(arguments)
    if error is not None:
        raise RuntimeError(f"{kernel}: CUDA: {error}")
    return 0, -1


def empty_beside(log_score: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of ``log_score``'s shape; on a GPU it starts at the same offset from a 16-byte boundary.

    The CUDA kernels read aligned vectors of 16 bytes. They can write such vectors only if the boundaries of the output
    are at the same entries. A view such as ``log_score[1:]`` may start between two boundaries.
    """
    if log_score.is_cpu or not log_score.is_contiguous():  # a copy to contiguous memory starts at a boundary
        return torch.empty_like(log_score, dtype=dtype, memory_format=torch.contiguous_format)
    before = log_score.storage_offset() % (16 // dtype.itemsize)
    return log_score.new_empty(before + log_score.numel(), dtype=dtype)[before:].view(log_score.shape)


LAUNCHERS: dict[str, Callable[[str, dict[str, Any]], Status]] = {"cpu": _launch_cpu, "cuda": launch_cuda}


def launch(kernel: str, **arguments: Any) -> Status:
    """Runs a kernel on the device of the tensor ``out``.

    Args:
        kernel: its name in the extension, without the device.
        arguments: all arguments of the kernel by name, as ``_C.arguments`` lists them, except for threads, workspace,
            stream and device, which this function adds. Values are tensors, which the call keeps alive, None, numbers
            and codes. Tensors are contiguous, except for rows with a ``stride``.

    Returns:
        The first bad row; on a GPU (0, -1), as the call does not wait.

    Raises:
        TypeError: an argument is missing, or the kernel has no argument of this name.
    """
    return LAUNCHERS["cpu" if arguments["out"].is_cpu else "cuda"](kernel, arguments)


def raise_fault(
    status: Status,
    tokens: dict[str, Tensor],
    dim: int,
    sigma: tuple[str, Tensor],
    scores: str = "log_score",
    sigma_s: Tensor | None = None,
    most: float = math.inf,
) -> None:
    """Raises a ValueError for a fault of a kernel. It names the argument, the first bad row and its value.

    Args:
        status: the result of the kernel.
        tokens: the token arguments by name, in the order of the kernel's faults (x_t, then x_0).
        dim: N.
        sigma: name and values of the noise argument.
        scores: name of the argument that determines the scores.
        sigma_s: total noise at an earlier time, if the kernel takes it.
        most: the largest number that the noise argument may have.
    """
    code, row = status
    if code == 0:
        return
    fault, shape = _FAULTS[code], sigma[1].shape
    where = f"at index {_index(row, shape)}" if shape else "as its value"
    if fault in ("x_t", "x_0"):
        name, values = list(tokens.items())[-1 if fault == "x_0" else 0]
        raise ValueError(f"{name}: expected tokens in [0, {dim}), got {int(values.reshape(-1)[row])} {where}")
    if fault == "sigma":
        name, values = sigma
        value = float(values.reshape(-1)[row])
        wanted = "finite numbers above 0" if most == math.inf else f"numbers in (0, {most:g}]"
        if 0 < value < _C.least_noise:
            wanted = f"numbers of at least {_C.least_noise}"
        raise ValueError(f"{name}: expected {wanted}, got {value} {where}")
    if fault == "sigma_s":
        assert sigma_s is not None
        later, earlier = float(sigma[1].reshape(-1)[row]), float(sigma_s.reshape(-1)[row])
        raise ValueError(f"sigma_s: expected numbers in [0, sigma), got {earlier} {where}, where sigma is {later}")
    raise ValueError(
        f"{scores}: expected scores whose probabilities have a finite sum above 0, got a row ({where}) with NaN, a "
        "log-score above 88, or no token other than MASK at a step that must not return MASK"
    )


def _index(row: int, shape: torch.Size) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, row % size)
        row //= size
    return index
