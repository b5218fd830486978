"""What every operator shares: checks of its arguments, their form for the kernels, and the errors that come back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sedd_ext import _C
from sedd_ext.process import RankOne

__all__: list[str] = []

# As in csrc/common/types.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FAMILIES = {"absorbing": 0, "uniform": 1, "rank_one": 2}
STEPS = {"euler": 0, "tweedie": 1}
_HUGE_BYTES = 1 << 24
# torch calls AMD's devices "cuda" too
CUDA = ("cuda",) if _C.cuda and torch.version.hip is None else ()
_FAULT_X_T, _FAULT_X_0, _FAULT_SIGMA, _FAULT_TOTAL = 1, 2, 3, 4


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that log-scores of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind_of(value: object) -> str:
    """What an error message calls a value."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_process(process: object) -> RankOne:
    """``process`` is a process."""
    if not isinstance(process, RankOne):
        raise TypeError(
            f"process: expected a process (Absorbing, Uniform, Hybrid or RankOne of sedd_ext), got {kind_of(process)}"
        )
    return process


def check_tokens(name: str, value: object, shape: torch.Size | None = None, of: str = "log_score") -> Tensor:
    """``value`` is an int64 tensor on a device that has kernels, and of the given shape."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {kind_of(value)}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, {of}'s but for its last axis, got {list(value.shape)}")
    check_device(name, value.device)
    return value


def check_log_score(value: object, process: RankOne) -> Tensor:
    """``value`` holds log-scores [*B, N] for the process's N."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise TypeError(f"log_score: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(value)}")
    if value.dim() == 0 or value.shape[-1] != process.dim:
        raise ValueError(f"log_score: expected shape [*B, {process.dim}] for {process}, got {list(value.shape)}")
    check_device("log_score", value.device)
    return value


def check_device(name: str, device: torch.device) -> None:
    """There are kernels for the device."""
    if device.type not in ("cpu", "meta", *CUDA):
        kinds = "CUDA devices and the CPU" if CUDA else "the CPU"
        raise NotImplementedError(
            f"{name}: this build has kernels for {kinds} only, got a tensor on {device}; "
            "sedd_ext.reference computes the same on any device"
        )


def check_reduction(value: object) -> None:
    """``value`` is the name of a reduction."""
    if value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {value!r}")


def check_same_device(**tensors: Tensor) -> None:
    """All tensors lie on the first one's device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} as {first_name} is, got one on {tensor.device}"
            )


def per_row(name: str, value: object, batch: torch.Size, device: torch.device) -> Tensor:
    """A number, or numbers that broadcast to the batch, as float64 [*B]."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full(batch, float(value), dtype=torch.float64, device=device)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {kind_of(value)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected no requires_grad, since it gets no gradient; detach() it")
    if value.device != device and (value.dim() > 0 or value.is_meta):
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    try:
        rows = value.to(device=device, dtype=torch.float64).expand(batch)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(batch)}, got {list(value.shape)}"
        ) from error
    return rows.contiguous()


def stationary_for(process: RankOne, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """π as the kernels read it: a vector of the compute type, or None where its shape says it all."""
    return process._copy("stationary", compute_dtype(dtype), device) if process.family == "rank_one" else None


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """63 random bits from the generator, int64 [1]: the key of all the rows' random numbers."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {kind_of(generator)}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type} as the tokens are, got one on {generator.device}")
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def fresh(tensor: Tensor) -> Tensor:
    """A new tensor, before its first use: a large one is put on huge pages, if the system has them for the asking.

    To fault in 4 KiB pages takes longer than to compute what goes into them.
    """
    size = tensor.numel() * tensor.element_size()
    if size >= _HUGE_BYTES and tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor.data_ptr(), size)
    return tensor


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's data lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """:func:`address` of each."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


Status = tuple[int, int]
"""(fault, row) as in csrc/common/types.h: the first bad row, or (0, -1)."""


def _launch_cpu(kernel: str, out: Tensor, arguments: tuple[Any, ...], sizes: tuple[int, int, int]) -> Status:
    status: Status = getattr(_C, kernel)(*arguments, torch.get_num_threads())
    return status


def launch_cuda(
    kernel: str,
    out: Tensor,
    arguments: tuple[Any, ...],
    sizes: tuple[int, int, int],
    kernels: Any = _C,
    stream: int | None = None,
) -> Status:
    """Starts a kernel on the current stream of ``out``'s device and does not wait: bad rows show in ``out``.

    The caller's current device is the same afterwards, and has no context that it did not have before.

    Args:
        kernel: its name in the extension, without the device.
        out: the tensor that the kernel writes.
        arguments: the kernel's, but for the last ones.
        sizes: rows, dim and the code of the dtype, which say how much scratch memory it takes.
        kernels: the module that holds the kernels.
        stream: a cudaStream_t, in place of the current one.
    """
    workspace = out.new_empty(getattr(kernels, f"{kernel}_workspace")(*sizes), dtype=torch.uint8)
    device = out.device.index or 0
    guard: AbstractContextManager[Any] = nullcontext()
    if stream is None:
        # what torch.compile's code calls: torch.cuda.current_stream takes microseconds to make an object
        stream = torch._C._cuda_getCurrentRawStream(device)
        if device != torch.cuda.current_device():
            guard = torch.cuda.device(device)
    with guard:
        error = getattr(kernels, f"{kernel}_cuda")(*arguments, address(workspace), stream, device)
    if error is not None:
        raise RuntimeError(f"{kernel}: CUDA: {error}")
    return 0, -1


def empty_beside(log_score: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of ``log_score``'s shape; on a GPU it starts as far behind a 16-byte boundary as ``log_score`` does.

    The CUDA kernels read a row in vectors of 16 bytes from boundary to boundary, and write it in vectors only where the
    output's boundaries are at the same entries. A view such as ``log_score[1:]`` may start between two.
    """
    if log_score.device.type == "cpu" or not log_score.is_contiguous():  # another layout is copied, to a boundary
        return log_score.new_empty(log_score.shape, dtype=dtype)
    before = log_score.storage_offset() % (16 // dtype.itemsize)
    return log_score.new_empty(before + log_score.numel(), dtype=dtype)[before:].view(log_score.shape)


LAUNCHERS: dict[str, Callable[[str, Tensor, tuple[Any, ...], tuple[int, int, int]], Status]] = {
    "cpu": _launch_cpu,
    "cuda": launch_cuda,
}


def launch(kernel: str, out: Tensor, arguments: tuple[Any, ...], sizes: tuple[int, int, int]) -> Status:
    """Runs a kernel where ``out`` lies; see :func:`launch_cuda`."""
    return LAUNCHERS[out.device.type](kernel, out, arguments, sizes)


def raise_fault(
    status: Status, tokens: dict[str, Tensor], dim: int, sigma: tuple[str, Tensor], scores: str = "log_score"
) -> None:
    """Turns what a kernel returned into a ValueError that names the argument, the first bad row and its value.

    Args:
        status: what the kernel returned.
        tokens: the token arguments by name, in the order of the kernel's faults (x_t, then x_0).
        dim: N.
        sigma: the noise argument's name and values.
        scores: the argument that the scores come from.
    """
    fault, row = status
    if fault == 0:
        return
    shape = sigma[1].shape
    where = f"at index {_index(row, shape)}" if shape else "as its value"
    if fault in (_FAULT_X_T, _FAULT_X_0):
        name, values = list(tokens.items())[-1 if fault == _FAULT_X_0 else 0]
        raise ValueError(f"{name}: expected tokens in [0, {dim}), got {int(values.reshape(-1)[row])} {where}")
    if fault == _FAULT_SIGMA:
        name, values = sigma
        value = float(values.reshape(-1)[row])
        wanted = f"numbers of at least {_C.least_noise}" if 0 < value < _C.least_noise else "finite numbers above 0"
        raise ValueError(f"{name}: expected {wanted}, got {value} {where}")
    assert fault == _FAULT_TOTAL
    raise ValueError(
        f"{scores}: expected scores whose probabilities have a finite sum above 0, got a row without "
        f"({where}): NaN, a log-score above 88, or nothing but zeros at a step that may not return MASK"
    )


def _index(row: int, shape: torch.Size) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, row % size)
        row //= size
    return index
