"""Where a model runs and in which precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from sedd_ext import has_cuda_kernels

__all__ = ["autocast_dtype", "device_of", "resolve_device"]


class _HasParameters(Protocol):
    def parameters(self) -> Iterator[nn.Parameter]: ...


def device_of(module: _HasParameters) -> torch.device:
    """Returns the device of a module's first parameter; the CPU if it has none."""
    parameter = next(iter(module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def resolve_device(name: str) -> torch.device:
    """Returns the device of that name; ``"auto"`` is the GPU if there are one and kernels for it, else the CPU.

    Warns if ``"auto"`` is the CPU although there is a GPU.

    Raises:
        ValueError: no such device on this machine, or no kernels for it in this build.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not has_cuda_kernels:
            warnings.warn(
                "device: there is a GPU, but this build of sedd_ext has no CUDA kernels; using the CPU. To build them, "
                "install nvcc and reinstall, see docs/operators.md",
                stacklevel=2,
            )
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N (the kernels have no other); got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and not has_cuda_kernels:
        raise ValueError(f"device: {name!r} asked for, but this build of sedd_ext has no CUDA kernels; use cpu")
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast on ``device`` for auto, bf16 or fp32; None for float32 without autocast."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    # without its own instructions a CPU takes longer for bfloat16 than for float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None
