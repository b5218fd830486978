"""Tokens for masked positions, and the numbers by which samplers choose among positions, from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedd_ext._dispatch import DTYPES, check_same_device, draw_seed
from sedd_ext._operators import define, schema
from sedd_ext.head import BUFFER_BYTES, check_head, product
from sedd_ext.unmask import STATISTICS, Draw, Results, Unmasked, check_draw, fake_results, raise_bad_row, unmasked

__all__ = ["linear_unmask"]

ROWS = {"cpu": 64, "cuda": 1024}
"""The number of rows of a matrix product. It is always the same, since with another one a row may be rounded in another
way; missing rows are filled up."""


class Product(NamedTuple):
    """The output head, and how the operator computes the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    buffer_bytes: int


def _split(rest: tuple[Any, ...]) -> tuple[Product, Draw, Tensor]:
    count = len(Product._fields)
    return Product(*rest[:count]), Draw(*rest[count:-1]), rest[-1]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a, draw, _ = _split(arguments)
    return fake_results(a.hidden.shape[:-1], draw.statistics, a.hidden)


def _tile_shape(dim: int, whole_rows: bool, a: Product) -> tuple[int, int]:
    """The number of rows, and of entries of the vocabulary, of a tile; they do not depend on the number of rows."""
    rows = ROWS["cpu" if a.hidden.device.type == "cpu" else "cuda"]
    entries = a.buffer_bytes // a.dtype.itemsize
    width = dim if whole_rows else min(dim, max(2048, min(8192, entries // rows)))
    return max(1, min(rows, entries // width)), width


@torch.no_grad()
def _unmask(*arguments: Any) -> tuple[Tensor, Tensor]:
    a, draw, seed = _split(arguments)
    batch, dim = a.hidden.shape[:-1], a.weight.shape[0]
    rows = batch.numel()
    row_ids = torch.arange(rows, device=a.hidden.device) if draw.row_ids is None else draw.row_ids.reshape(-1)
    draw = draw._replace(row_ids=row_ids.contiguous())
    chunk, width = _tile_shape(dim, draw.top_p < 1.0, a)
    hidden = pad(a.hidden.reshape(rows, a.hidden.shape[-1]).to(a.dtype), (0, 0, 0, -rows % chunk))
    buffer = hidden.new_empty(chunk * width)
    results = Results.empty(rows, draw.statistics, a.hidden)
    for first in range(0, dim, width):
        weight = a.weight[first : first + width].to(a.dtype)
        bias = None if a.bias is None else a.bias[first : first + width].to(a.dtype)
        for begin in range(0, rows, chunk):
            at = slice(begin, min(begin + chunk, rows))
            logits = product(hidden[begin : begin + chunk], weight, bias, buffer)
            bad = results.launch(
                draw,
                seed,
                at,
                logits=logits,
                rows=at.stop - begin,
                width=len(weight),
                first=first,
                dim=dim,
                dtype=DTYPES[a.dtype],
            )
            if bad >= 0:
                raise_bad_row("hidden", bad, batch)
    return results.tensors(batch)


define(f"linear_unmask({schema(Product)}, {schema(Draw)}, Tensor seed) -> (Tensor, Tensor)", _unmask, _fake)


def linear_unmask(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mask_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    statistics: Sequence[str] = STATISTICS,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Unmasked:
    """The output head and :func:`unmask` in one operator: hidden states in, tokens and statistics out.

    The head is multiplied with the hidden states one tile of the vocabulary at a time. A kernel adds the tile to the
    sums of the row, and replaces the drawn token, with the probability of the tile among those so far, by one drawn
    from the tile. So one pass over the head gives everything, without a tensor [*B, N]. Each matrix product has the
    same number of rows, so that the results of a position do not depend on the batch it stands in.

    Args:
        hidden: states before the head, [*B, d], float32, bfloat16, float16 or float64.
        weight: the head's weight, [N, d], of the same dtype (any, under autocast).
        bias: the head's bias [N], or None.
        mask_id: as for :func:`unmask`.
        temperature: as for :func:`unmask`.
        top_p: as for :func:`unmask`. If it is below 1, a tile has whole rows.
        statistics: as for :func:`unmask`.
        row_ids: as for :func:`unmask`.
        generator: random number generator on the tensors' device; torch's default one if None.
        buffer_bytes: memory for a tile of logits. A tile has 64 rows (1,024 on a GPU) and up to 8,192 entries of the
            vocabulary, as many as fit.

    Returns:
        As :func:`unmask`. The tokens are drawn with other random numbers than those of :func:`unmask`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, an option is out of its range, or, on the CPU, a row has no softmax.
    """
    hidden, weight, bias, dtype, _ = check_head(hidden, weight, bias, None, buffer_bytes)
    check_same_device(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    draw = check_draw(mask_id, weight.shape[0], temperature, top_p, statistics, row_ids, hidden.shape[:-1], "hidden")
    head = Product(hidden, weight, bias, dtype, buffer_bytes)
    seed = draw_seed(generator, hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        results = torch.ops.sedd_ext.linear_unmask(*head, *draw, seed)
    return unmasked(results, statistics, dtype)
