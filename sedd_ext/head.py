"""The output head, fused with the kernel that consumes its log-scores.

A tensor of size rows × N never exists. A matrix product computes a tile of log-scores, of some rows and some entries of
the vocabulary, into a buffer; a kernel reads it, adds it to the state of its rows and, for a gradient, overwrites it
with the gradient of the log-scores. Then the next tile uses the same buffer.

A fused operator selects the rows that need the head (:class:`Rows`), loops over the tiles of a :class:`Head`, launches
its kernel for each, and hands the tile to :class:`Gradients` where gradients are needed. An operator that takes a
second sweep over the vocabulary loops a second time. A softmax has to be normalised before its gradient is known; there
a tile holds whole rows, and the kernels without a fused head work on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._dispatch import DTYPES, check_device, compute_dtype, fresh, kind_of, may_wait, raise_fault
from .split import Share, Sums, check_split

__all__: list[str] = []

_TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
_ROW_BYTES = 64


def buffer_size(buffer_bytes: object, device: torch.device, whole_rows: bool) -> int:
    """The memory for a tile: what the caller asks for, or a default.

    64 MiB by default. On a GPU, a tile with a part of the vocabulary gets 32 MiB, so that it stays in the L2 cache from
    one product to the next. Smaller tiles would take less time than the launches of their kernels.
    """
    if buffer_bytes is None:
        return 1 << 26 if whole_rows or device.type == "cpu" else 1 << 25
    if not isinstance(buffer_bytes, int) or isinstance(buffer_bytes, bool) or buffer_bytes < 1:
        raise ValueError(f"buffer_bytes: expected a positive int or None, got {buffer_bytes!r}")
    return buffer_bytes


class Rows:
    """The rows that go through the head: those with π_x > 0, and bad ones, which the kernel reports.

    The shape of a matrix product depends on the number of rows. Without a capacity they are counted, which waits for
    the device unless the process is uniform. With a capacity there are always as many rows: first those that need the
    head, in order, then others, whose loss and gradient are 0, and whose token stays.

    Args:
        x_t: the tokens [*B].
        noise: the noise of the rows, one number per token.
        stationary: π [N], or None.
        family: the family of the process.
        dim: N.
        others: more tensors of tokens [*B] that must be valid.
        capacity: the most rows; None to count them, or for all rows while the current stream is being captured.

    Attributes:
        index: the indices of these rows in the flattened batch, or None for all rows.
        needed: which of these rows need the head [R], bool, or None if all of them do.
        left_out: the rows of the flattened batch that need the head but exceed the capacity, bool, or None for none.
        may_wait: see :func:`sedd_ext._dispatch.may_wait`.

    Raises:
        ValueError: on the CPU, more rows need the head than ``capacity``.
    """

    def __init__(
        self,
        x_t: Tensor,
        noise: Tensor,
        stationary: Tensor | None,
        family: str,
        dim: int,
        *others: Tensor,
        capacity: int | None = None,
    ) -> None:
        self.batch_dims, self.dim = x_t.dim(), dim
        self.index: Tensor | None = None
        self.needed: Tensor | None = None
        self.left_out: Tensor | None = None
        self.may_wait = may_wait(x_t, capacity)
        x = x_t.reshape(-1)
        if capacity is None and not self.may_wait:
            capacity = x.numel()
        if family == "uniform" and (capacity is None or capacity >= x.numel()):
            return
        if family == "uniform":
            needs = torch.ones_like(x, dtype=torch.bool)
        else:
            good = is_token(x, dim) & is_noise(noise.reshape(-1))
            for tokens in others:
                good = good & is_token(tokens.reshape(-1), dim)
            moves = x == dim - 1 if stationary is None else stationary[x.clamp(0, dim - 1)] > 0
            needs = moves | ~good
        if capacity is None:
            index = needs.nonzero().squeeze(1)
            self.index = None if index.numel() == x.numel() else index
        elif capacity >= x.numel():
            self.needed = needs
        else:
            self._fill(needs, capacity)

    def _fill(self, needs: Tensor, capacity: int) -> None:
        """Selects ``capacity`` rows without waiting for the device."""
        if self.may_wait:  # on the CPU
            count = int(needs.sum())
            if count > capacity:
                raise ValueError(f"capacity: expected at least {count} for the positions that need it, got {capacity}")
        else:
            self.left_out = needs & (needs.cumsum(0) > capacity)
        self.index = needs.argsort(descending=True, stable=True)[:capacity]
        self.needed = needs[self.index]

    def indices(self, x_t: Tensor) -> Tensor:
        """The indices of these rows in the flattened batch [R]."""
        return torch.arange(x_t.numel(), device=x_t.device) if self.index is None else self.index

    def select(self, values: Tensor) -> Tensor:
        """The values [*B, ...] of these rows, [R, ...]."""
        values = values.reshape(-1, *values.shape[self.batch_dims :])
        return values.contiguous() if self.index is None else values[self.index]

    def select_or_zero(self, values: Tensor) -> Tensor:
        """The values [*B, ...] of these rows, [R, ...], but 0 for rows that do not need the head.

        Whatever the states of these rows are, they then do not change a gradient or its unit.
        """
        values = self.select(values)
        if self.needed is None:
            return values
        return values.masked_fill(~self.needed.view(-1, *[1] * (values.dim() - 1)), 0)

    def restore(self, values: Tensor, out: Tensor) -> Tensor:
        """The values [R, ...] as [*B, ...], with 0 for all other rows, and NaN for those that are left out.

        May write them to ``out``, of that shape.
        """
        if self.index is None:
            return values.view(out.shape)
        rows = out.zero_().view(-1, *values.shape[1:])
        rows[self.index] = values
        if self.left_out is not None:
            rows.masked_fill_(self.left_out.view(-1, *[1] * (rows.dim() - 1)), torch.nan)
        return out

    def restore_tokens(self, tokens: Tensor, out: Tensor) -> None:
        """Writes the tokens of these rows [R] to ``out``, those of the flattened batch, and -1 for rows left out."""
        out[self.indices(out)] = tokens
        if self.left_out is not None:
            out.masked_fill_(self.left_out, -1)

    def raise_fault(
        self,
        status: tuple[int, int],
        tokens: dict[str, Tensor],
        noise: tuple[str, Tensor],
        sigma_s: Tensor | None = None,
    ) -> None:
        """:func:`sedd_ext._dispatch.raise_fault` for a status whose row is an index into these rows."""
        fault, row = status
        row = row if self.index is None else int(self.index[row])
        raise_fault((fault, row), tokens, self.dim, noise, sigma_s=sigma_s)


class Tile(NamedTuple):
    """Log-scores of some rows and some entries of the vocabulary, in the head's buffer.

    Attributes:
        log_score: [r, v], with rows that start at multiples of 64 bytes; a kernel may overwrite it with its gradient.
        hidden: the hidden states of the rows [r, d].
        weight: the weights of the entries [v, d], in the dtype of the products.
        bias: the biases of the entries [v], likewise, or None.
        rows: the slice of the rows.
        entries: the slice of the head's weight.
        first: the first entry of the tile, as a token.
        is_last_chunk: whether the tile contains the last rows of these entries.
        is_last: whether it contains the last entries of these rows that this process has.
    """

    log_score: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: slice
    entries: slice
    first: int
    is_last_chunk: bool
    is_last: bool

    def arguments(self, dim: int) -> dict[str, Any]:
        """The arguments that describe the tile to a kernel."""
        rows, width = self.log_score.shape
        return {
            "log_score": self.log_score,
            "rows": rows,
            "width": width,
            "stride": self.log_score.stride(0),
            "first": self.first,
            "dim": dim,
            "dtype": DTYPES[self.log_score.dtype],
        }


class Head(NamedTuple):
    """The output head over the rows that need it.

    Attributes:
        hidden: hidden states [R, d], in the dtype of the products.
        weight: [n, d], in any dtype, where n is N or the part of it that this process has.
        bias: [n], or None.
        buffer_bytes: memory for a tile.
        whole_rows: a tile holds all n entries, for as many rows as fit into the buffer, but at least one.
        first: the first of the n entries, as a token.
        most: the largest n of the processes, so that all of them divide the rows in the same way; None for n.
        on_grid: tiles have the rows and the boundaries that they have in a process with the whole vocabulary, of which
            ``most`` is then the size. The first and the last tile may lie in part in those of other processes.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    buffer_bytes: int
    whole_rows: bool = False
    first: int = 0
    most: int | None = None
    on_grid: bool = False

    def tiles(self, computed: bool = True) -> Iterator[Tile]:
        """Computes the log-scores, tile by tile: the first entries of all rows, then the next entries of all rows.

        A tile must be used before the next one is computed.

        Args:
            computed: False if the caller computes the product itself; the memory of a tile has no values then.
        """
        dtype, rows, count, device = self.hidden.dtype, self.hidden.shape[0], self.weight.shape[0], self.hidden.device
        chunk, width = tile_shape(rows, self.most or count, dtype, device, self.buffer_bytes, self.whole_rows)
        buffer = self.hidden.new_empty(min(chunk, rows) * row_stride(min(width, count), dtype))
        for start in range(-(self.first % width) if self.on_grid else 0, count, width):
            entries = slice(max(start, 0), start + width)
            weight = self.weight[entries].to(dtype)
            bias = None if self.bias is None else self.bias[entries].to(dtype)
            for begin in range(0, rows, chunk):
                at = slice(begin, begin + chunk)
                hidden = self.hidden[at]
                log_score = product(hidden, weight, bias, buffer) if computed else _room(hidden, weight, buffer)
                last = begin + chunk >= rows, start + width >= count
                yield Tile(log_score, hidden, weight, bias, at, entries, self.first + entries.start, *last)


class Gradients:
    """Accumulates the gradients of a head, tile by tile, in float32 (float64 for float64).

    Args:
        head: the head.
        weight: receives the gradient of the weight, [N, d]; empty if it is not needed.
        bias: receives the gradient of the bias, [N]; empty if it is not needed.
        needs_hidden: whether the gradient of the hidden states is needed.
        sums: if the vocabulary is split over processes, adds up the gradient of the hidden states over them, while the
            products of the weight are computed; see :mod:`sedd_ext.split`.

    Attributes:
        hidden: the gradient of the head's hidden states so far; empty if it is not needed.
    """

    def __init__(self, head: Head, weight: Tensor, bias: Tensor, needs_hidden: bool, sums: Sums | None = None) -> None:
        states = head.hidden
        self.dtype = compute_dtype(states.dtype)
        self.hidden = states.new_zeros(states.shape if needs_hidden else (0,), dtype=self.dtype)
        self.weight, self.bias = weight, bias
        for gradient in (weight, bias):
            fresh(gradient) if states.shape[0] else gradient.zero_()
        self._sums = sums
        self._totals: list[Tensor] = []
        self._ones: Tensor | None = None

    def add(self, tile: Tile, unit: Tensor | None = None) -> None:
        """Adds the contribution of a tile. The kernel has overwritten its log-scores with their gradient.

        Args:
            tile: the tile.
            unit: the unit of its gradients, a float64 number on the device; None for 1.
        """
        gradient, (is_first_tile, is_first_chunk) = tile.log_score, (tile.entries.start == 0, tile.rows.start == 0)
        outputs = (self.weight, self.bias)
        if is_first_chunk:
            # a view if it has the dtype, or if there is nothing to add up
            alone = tile.is_last_chunk and unit is None and gradient.dtype == self.weight.dtype == self.bias.dtype
            dtype = self.weight.dtype if alone else self.dtype
            self._totals = [output[tile.entries].to(dtype) for output in outputs]
        weight, bias = self._totals
        if self.hidden.numel():
            _add_product(self.hidden[tile.rows], gradient, tile.weight, is_first_tile, unit)
            if tile.is_last and self._sums is not None:
                self._sums.start(self.hidden[tile.rows])
        if self.weight.numel():
            _add_product(weight, gradient.T, tile.hidden, is_first_chunk, unit)
        if self.bias.numel():
            if self._ones is None:  # no chunk has more rows than the first
                self._ones = gradient.new_ones(1, gradient.shape[0])
            _add_product(bias.unsqueeze(0), self._ones[:, : gradient.shape[0]], gradient, is_first_chunk, unit)
        if tile.is_last_chunk:
            for output, total in zip(outputs, self._totals, strict=True):
                if output.dtype != total.dtype:
                    output[tile.entries] = total


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool, unit: Tensor | None) -> None:
    """``total = a @ b`` for the first product, ``total += a @ b`` for the others; adds 16-bit products in float32.

    ``unit`` multiplies the product.
    """
    if total.dtype != a.dtype and unit is None and _multiplies_into_float32(a):
        # neither rounds the product to 16 bits nor stores it
        if is_first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif total.dtype != a.dtype:
        product = torch.mm(a, b)
        if unit is not None:
            product = product.to(total.dtype) * unit
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:  # addmm with beta = 0 takes 1.4 times as long
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _multiplies_into_float32(a: Tensor) -> bool:
    """Whether torch can add a product of 16-bit numbers to one of float32: on CUDA devices, from torch 2.10 on."""
    return a.is_cuda and torch.version.cuda is not None and _TORCH >= (2, 10)


def tile_shape(
    rows: int, dim: int, dtype: torch.dtype, device: torch.device, buffer_bytes: int, whole_rows: bool = False
) -> tuple[int, int]:
    """The number of rows, and of entries of the vocabulary, of a tile.

    On the CPU a tile has 2,048 entries: the cache then holds a tile of some hundred rows between two matrix products,
    and a product is faster than over the whole vocabulary. On a GPU, where launches cost more, it has 8,192 entries.
    The rows are divided into the fewest equal parts that fit into the buffer.
    """
    width = dim if whole_rows else min(dim, 2048 if device.type == "cpu" else 8192)
    parts = max(1, -(-rows * row_stride(width, dtype) * dtype.itemsize // buffer_bytes))
    return max(1, -(-rows // parts)), width


def row_stride(width: int, dtype: torch.dtype) -> int:
    """The entries from a row of a tile to the next, of which ``width`` are used: a multiple of 64 bytes.

    A GPU's fast matrix products need rows that start at multiples of 16 bytes, and 50,258 bfloat16 are not one. On the
    CPU, MKL multiplies into rows that start at cache lines 1.4 times as fast as into others.
    """
    entries = _ROW_BYTES // dtype.itemsize
    return -(-width // entries) * entries


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """The log-scores hidden · weightᵀ + bias [rows, entries], in the memory of the buffer."""
    out = _room(hidden, weight, buffer)
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _room(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    rows, width = hidden.shape[0], weight.shape[0]
    stride = row_stride(width, hidden.dtype)
    return buffer[: rows * stride].view(rows, stride)[:, :width]


def float16_unit(bound: Tensor, tile: Tile) -> Tensor:
    """The unit of the gradients of a float16 tile: a power of two, as a float64 number on the device.

    With it, neither a gradient nor a product of gradients with the weight or the hidden states overflows float16, and
    small ones lose as few digits as possible.

    Args:
        bound: for each row, a number that no gradient of its log-scores exceeds in magnitude [r], float64.
        tile: the tile.
    """
    rows, width = tile.log_score.shape
    bound = torch.where(bound < 1e38, bound, 0.0)  # a larger gradient overflows float32 too
    room = 2.0**14 / torch.maximum(width * _largest(tile.weight), rows * _largest(tile.hidden).clamp(min=1.0))
    return (_largest(bound) / room.clamp(max=2.0**14)).log2().ceil().exp2()


def _largest(values: Tensor) -> Tensor:
    """The largest finite magnitude, at least 1e-30."""
    finite = torch.where(values.isfinite(), values, 0.0).abs()
    return torch.cat([finite.double().flatten(), finite.new_full((1,), 1e-30, dtype=torch.float64)]).amax()


def is_token(x: Tensor, dim: int) -> Tensor:
    """Whether tokens lie in [0, dim)."""
    return (x >= 0) & (x < dim)


def is_noise(sigma: Tensor) -> Tensor:
    """Whether the kernels accept the noise."""
    return (sigma >= _C.least_noise) & sigma.isfinite()


def check_head(
    hidden: object,
    weight: object,
    bias: object,
    dim: int | None,
    group: object = None,
    capacity: object = None,
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype, Share]:
    """Checks the arguments of the head.

    Args:
        hidden: the hidden states.
        weight: the weight.
        bias: the bias, or None.
        dim: N; None for the number of rows of the weight.
        group: the processes over which the vocabulary is split, or None, see :mod:`sedd_ext.split`.
        capacity: the most rows that go through the head, or None.

    Returns:
        ``hidden``; this process's rows of ``weight`` and ``bias``; the dtype of the matrix products: autocast's if it
        is on, else their own; and which rows they are.
    """
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(value)}")
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    weight, bias, share = check_split(weight, bias, dim, group)
    check_device("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape [*B, {weight.shape[1]}], as weight is {list(weight.shape)}, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 0):
        raise ValueError(f"capacity: expected an int of at least 0, or None, got {capacity!r}")
    dtype, device = weight.dtype, hidden.device.type
    # torch.compile of torch 2.6 and 2.11 cannot trace is_autocast_available
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return hidden, weight, bias, torch.get_autocast_dtype(device), share
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as weight has, outside autocast, got {tensor.dtype}")
    return hidden, weight, bias, dtype, share
