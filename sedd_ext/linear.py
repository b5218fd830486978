"""What the operators share that fuse the output head with what comes behind it: tiles of the vocabulary.

Nothing of size rows × N is ever there. A tile of the vocabulary goes through the head's matrix product and at once into
a kernel that takes from it what the row needs: score entropy and its gradient are sums over the vocabulary without a
normaliser, and a sample is a running total with one entry that the next tile may replace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_ext import _C
from sedd_ext._dispatch import DTYPES, check_device, kind_of
from sedd_ext.process import RankOne

__all__: list[str] = []

BUFFER_BYTES = 1 << 26
"""Memory for one tile of log-scores, 64 MiB, unless the caller says otherwise."""


def tile_shape(rows: int, dim: int, dtype: torch.dtype, device: torch.device, buffer_bytes: int) -> tuple[int, int]:
    """How many rows, and how many entries of the vocabulary, go through the head at once.

    2,048 entries on the CPU, whose cache holds the tile of some hundred rows from one matrix product to the next, and
    whose matrix product is faster that way than over the whole vocabulary; 8,192 on a GPU, where launches cost more. As
    many rows as the buffer takes, in equal parts.
    """
    width = min(dim, 2048 if device.type == "cpu" else 8192)
    parts = max(1, -(-rows * width * dtype.itemsize // buffer_bytes))
    return max(1, -(-rows // parts)), width


def log_score_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """The log-scores hidden · weightᵀ + bias [rows, entries], in memory of the buffer."""
    shape = hidden.shape[0], weight.shape[0]
    out = buffer[: shape[0] * shape[1]].view(shape)
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def live_rows(x_t: Tensor, bad: Tensor, stationary: Tensor | None, family: str, dim: int) -> Tensor | None:
    """Indices of the rows that go through the head, of x_t [R]: those with π_x > 0, and bad ones, which kernels report.

    None for all of them. Waits for the device: a matrix product's shape depends on their number.
    """
    if family == "uniform":
        return None
    moves = x_t == dim - 1 if stationary is None else stationary[x_t.clamp(0, dim - 1)] > 0
    rows = (moves | bad).nonzero().squeeze(1)
    return None if rows.numel() == x_t.numel() else rows


def is_token(x: Tensor, dim: int) -> Tensor:
    """Where tokens lie in [0, dim)."""
    return (x >= 0) & (x < dim)


def is_noise(sigma: Tensor) -> Tensor:
    """Where noise is what the kernels take."""
    return (sigma >= _C.least_noise) & sigma.isfinite()


def check_linear(
    hidden: object, weight: object, bias: object, process: RankOne, buffer_bytes: object
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """The head's arguments, and the dtype of its matrix products: autocast's where it is on, else their own."""
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(value)}")
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if weight.dim() != 2 or weight.shape[0] != process.dim:
        raise ValueError(f"weight: expected shape [{process.dim}, d] for {process}, got {list(weight.shape)}")
    check_device("hidden", hidden.device)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape [*B, {weight.shape[1]}], as weight is {list(weight.shape)}, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{process.dim}], got {list(bias.shape)}")
    if not isinstance(buffer_bytes, int) or isinstance(buffer_bytes, bool) or buffer_bytes < 1:
        raise ValueError(f"buffer_bytes: expected a positive int, got {buffer_bytes!r}")
    dtype = weight.dtype
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        return hidden, weight, bias, torch.get_autocast_dtype(kind)
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as weight has, outside autocast, got {tensor.dtype}")
    return hidden, weight, bias, dtype
