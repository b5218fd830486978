"""A prototype: the output head's product computes score entropy in its own epilogue, in Triton.

By default, a matrix product writes a tile of log-scores, and a kernel reads it and overwrites it with the gradient.
Here one kernel does both. A block of log-scores stays in registers, in float32; the kernel adds it up and writes its
gradient once. See "The head's epilogue" in docs/kernels.md.

``with epilogue():`` makes :func:`sedd_ext.linear_score_entropy_loss` use it. Nothing else in the package imports this
module. It needs the package triton, which the CUDA wheels of PyTorch for Linux bring along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "sedd_ext.triton_head: expected the package triton, which is not installed; pip install sedd_ext[triton]"
    ) from error

from . import linear_score_entropy as operator
from ._dispatch import FAMILIES, Status, launch
from .fused_loss import FusedLoss
from .head import Tile

__all__ = ["epilogue"]


class Blocks(NamedTuple):
    """How the kernel divides its work: a program has ``rows`` × ``entries`` log-scores, ``depth`` of d at a time."""

    rows: int
    entries: int
    depth: int
    warps: int = 8
    stages: int = 3
    registers: int | None = None  # of a thread, at most


# With 128 registers, two programs fit a multiprocessor: the epilogue of one runs beside the product of the other.
BLOCKS = {torch.bfloat16: Blocks(128, 128, 64, registers=128), torch.float32: Blocks(128, 64, 32)}


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [rows, d]
    weight,  # [width, d]
    bias,  # [width] or None
    x_t,  # [rows]
    x_0,  # [rows]
    shift,  # [rows] float64, or None
    stationary,  # [dim] for a vector π, else None
    grad_loss,  # [rows] float64, or None: no gradient
    sweeps,  # [rows, sweep_numbers] float64: the kernel reads the numbers of the rows and writes ℓ_{x0}
    sums,  # [1 or 2, blocks of entries, rows]: receives Σ s_y and, unless absorbing, Σ π_y ℓ_y (Σ ℓ_y for a constant π)
    gradient,  # [rows, width], with rows at distances of `stride`: receives the gradient
    rows,
    width,
    stride,
    first,
    dim,
    sweep_numbers,
    D: tl.constexpr,
    IS_UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of the product hidden · weightᵀ + bias, its sums for the loss, and its gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    k = tl.arange(0, DEPTH)
    is_row, is_entry = row < rows, entry < width
    log_score = tl.zeros((ROWS, ENTRIES), tl.float32)
    for start in range(0, D, DEPTH):
        is_k = start + k < D
        a = tl.load(hidden + row[:, None] * D + (start + k)[None, :], is_row[:, None] & is_k[None, :], 0.0)
        b = tl.load(weight + entry[None, :] * D + (start + k)[:, None], is_entry[None, :] & is_k[:, None], 0.0)
        log_score = tl.dot(a, b, log_score, input_precision="tf32x3")  # products of float32 keep their digits
    if bias is not None:
        log_score += tl.load(bias + entry, is_entry, 0.0).to(tl.float32)[None, :]
    if shift is not None:
        log_score -= tl.load(shift + row, is_row, 0.0).to(tl.float32)[:, None]

    noised, clean = tl.load(x_t + row, is_row, 0) - first, tl.load(x_0 + row, is_row, 0) - first
    is_other = is_entry[None, :] & (entry[None, :] != noised.to(tl.int32)[:, None])
    is_x_0 = entry[None, :] == clean.to(tl.int32)[:, None]
    begin = tl.program_id(1) * ENTRIES
    has_x_0 = is_row & (clean >= begin) & (clean < tl.minimum(begin + ENTRIES, width))
    sweep = sweeps + row * sweep_numbers
    tl.store(sweep + 6, tl.sum(tl.where(is_x_0, log_score, 0.0), 1).to(tl.float64), has_x_0)
    at = sums + tl.program_id(1) * rows + row
    if IS_UNIFORM:
        tl.store(at + tl.num_programs(1) * rows, tl.sum(tl.where(is_other, log_score, 0.0), 1), is_row)
    if stationary is not None:
        pi = tl.load(stationary + first + entry, is_entry, 0.0)[None, :]
        dot = tl.sum(tl.where(is_other & (pi != 0.0), pi * log_score, 0.0), 1)  # avoids 0 · ∞
        tl.store(at + tl.num_programs(1) * rows, dot, is_row)
    s = tl.exp(tl.where(is_other, log_score, float("-inf")))
    tl.store(at, tl.sum(s, 1), is_row)

    if grad_loss is not None:
        upstream = tl.load(grad_loss + row, is_row, 0.0)
        slope = upstream * tl.load(sweep + 1, is_row, 0.0)
        special = upstream * tl.load(sweep + 2, is_row, 0.0)  # what entry x_0 gets less than the others
        g = s * (upstream * tl.load(sweep, is_row, 0.0)).to(tl.float32)[:, None]
        if IS_UNIFORM:
            g -= tl.where(is_other, (slope / dim).to(tl.float32)[:, None], 0.0)
        if stationary is not None:
            g -= tl.where(is_other, slope.to(tl.float32)[:, None] * pi, 0.0)
        g -= tl.where(is_x_0, special.to(tl.float32)[:, None], 0.0)  # 0 where x_0 is x
        is_here = is_row[:, None] & is_entry[None, :]
        tl.store(gradient + row[:, None] * stride + entry[None, :], g.to(gradient.dtype.element_ty), is_here)


def tile_epilogue(tile: Tile, given: dict[str, Any]) -> Status:
    """Computes a tile: its product, its sums and ℓ_{x0} for the state of its rows, and its gradient.

    Args:
        tile: the tile; its log-scores have no values yet, and become the gradient.
        given: the arguments of the kernel ``score_entropy_tile``.

    Returns:
        The first bad row, as :func:`sedd_ext._dispatch.launch`.
    """
    rows, width = tile.log_score.shape
    sweeps = given["sweeps"]
    if tile.first == given["begin"]:
        # the kernel prepares the rows when it gets their first tile; one entry is enough, and its sums are dropped
        one = {"log_score": tile.log_score.new_zeros(rows, 1), "width": 1, "stride": 1, "gradient": None}
        status = launch("score_entropy_tile", **given | one)
        if status[0]:
            return status
        sweeps[:, 4:6] = 0.0
    b = BLOCKS[tile.log_score.dtype]
    grid = triton.cdiv(rows, b.rows), triton.cdiv(width, b.entries)
    count = 1 if given["family"] == FAMILIES["absorbing"] else 2
    sums = sweeps.new_empty(count, grid[1], rows, dtype=torch.float32)
    with torch.cuda.device_of(sweeps):  # Triton launches on the current device
        tile_kernel[grid](
            tile.hidden,
            tile.weight.contiguous(),
            tile.bias if tile.bias is None else tile.bias.contiguous(),
            given["x_t"],
            given["x_0"],
            given["shift"],
            given["stationary"],
            given["grad_loss"],
            sweeps,
            sums,
            tile.log_score,
            rows,
            width,
            tile.log_score.stride(0),
            tile.first,
            given["dim"],
            sweeps.shape[1],
            tile.hidden.shape[1],
            given["family"] == FAMILIES["uniform"],
            b.rows,
            b.entries,
            b.depth,
            num_warps=b.warps,
            num_stages=b.stages,
            maxnreg=b.registers,
        )
    sweeps[:, 4 : 4 + count] += sums.sum(1, dtype=torch.float64).T
    return 0, -1


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = operator.Arguments(*arguments)
    if a.dtype not in BLOCKS:
        # the unit of a float16 tile is chosen after its product, see sedd_ext.head.float16_unit
        raise TypeError(f"hidden: expected products in float32 or bfloat16 within epilogue(), got {a.dtype}")
    if not a.hidden.is_cuda and isinstance(tile_kernel, triton.JITFunction):
        raise NotImplementedError(f"hidden: expected a CUDA tensor within epilogue(), got one on {a.hidden.device}")
    return operator._forward(*arguments, epilogue=tile_epilogue)


_loss = FusedLoss("linear_score_entropy_triton", operator.Arguments, _forward)


@contextmanager
def epilogue() -> Iterator[None]:
    """Within the block, :func:`sedd_ext.linear_score_entropy_loss` computes tiles by one kernel, in all threads.

    Backward passes may run after the block. The operator raises a TypeError for products in float16 or float64, and a
    NotImplementedError on the CPU, unless TRITON_INTERPRET=1 was set before triton was imported.
    """
    before, operator._loss = operator._loss, _loss
    try:
        yield
    finally:
        operator._loss = before
