"""Tokens for masked positions, and the numbers by which samplers choose among positions, from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ._dispatch import DTYPES, check_same_device, draw_seed, row_stride_of
from ._operators import OPERATORS, define, schema
from .head import buffer_size, check_head, product, row_stride
from .split import Share, gather
from .unmask import STATISTICS, Draw, Results, Unmasked, check_draw, fake_results, raise_bad_row, unmasked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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


def _split(rest: tuple[Any, ...]) -> tuple[Product, Share, Draw, Tensor]:
    middle, end = len(Product._fields), len(Product._fields) + len(Share._fields)
    share, draw = Share(*rest[middle:end]), Draw(*rest[end:-1])
    if share.group and draw.top_p < 1.0:
        raise ValueError(f"top_p: expected 1 with a group, got {draw.top_p}")
    return Product(*rest[:middle]), share, draw, rest[-1]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a, _, draw, _ = _split(arguments)
    return fake_results(a.hidden.shape[:-1], draw.statistics, a.hidden)


def _tile_shape(dim: int, whole_rows: bool, a: Product) -> tuple[int, int]:
    """The number of rows, and of entries of the vocabulary, of a tile; they do not depend on the number of rows."""
    rows = ROWS["cpu" if a.hidden.device.type == "cpu" else "cuda"]
    entries = a.buffer_bytes // a.dtype.itemsize
    width = dim if whole_rows else min(dim, max(2048, min(8192, entries // rows)))
    # of a number of rows that four does not divide, the last ones may be rounded in another way
    return max(1, min(rows, entries // width) // 4 * 4), width


@torch.no_grad()
def _unmask(*arguments: Any) -> tuple[Tensor, Tensor]:
    a, share, draw, seed = _split(arguments)
    batch, count = a.hidden.shape[:-1], a.weight.shape[0]
    rows = batch.numel()
    row_ids = torch.arange(rows, device=a.hidden.device) if draw.row_ids is None else draw.row_ids.reshape(-1)
    draw = draw._replace(row_ids=row_ids.contiguous())
    chunk, width = _tile_shape(count, draw.top_p < 1.0, a)
    hidden = pad(a.hidden.reshape(rows, a.hidden.shape[-1]).to(a.dtype), (0, 0, 0, -rows % chunk))
    buffer = hidden.new_empty(chunk * row_stride(width, a.dtype))
    results = Results.empty(rows, draw.statistics, a.hidden)

    def launch(logits: Tensor, at: slice, **tile: int) -> None:
        bad = results.launch(
            draw,
            seed,
            at,
            logits=logits,
            rows=at.stop - at.start,
            stride=row_stride_of(logits),
            dtype=DTYPES[a.dtype],
            **tile,
        )
        if bad >= 0:
            raise_bad_row("hidden", bad, batch)

    everything, nothing = slice(0, rows), hidden.new_empty(0)
    if share.group:  # the tiles of a process need not have the first or the last entries of the rows
        launch(nothing, everything, width=0, first=0, dim=share.dim)
    for start in range(0, count, width):
        weight = a.weight[start : start + width].to(a.dtype)
        bias = None if a.bias is None else a.bias[start : start + width].to(a.dtype)
        for begin in range(0, rows, chunk):
            at = slice(begin, min(begin + chunk, rows))
            logits = product(hidden[begin : begin + chunk], weight, bias, buffer)
            # with a group, no tile is the last
            dim = -1 if share.group else share.dim
            launch(logits, at, width=len(weight), first=share.first + start, dim=dim)
    if share.group:
        results.states.copy_(_merged(gather(results.states, share.group), draw, seed))
        launch(nothing, everything, width=0, first=share.dim, dim=share.dim)
    return results.tensors(batch)


def _merged(parts: Tensor, draw: Draw, seed: Tensor) -> Tensor:
    """The states of rows [R, S] after all tiles, from those of the parts of the vocabulary [P, R, S].

    Each part has a drawn token. One more draw chooses the part whose token is taken: with the kernel, for which the
    parts are a vocabulary. A state has the order of ``UnmaskState`` in ``csrc/unmask.h``.
    """
    count, rows, _ = parts.shape
    tops, second, exps, weighted, draws = parts[..., :5].unbind(-1)
    top, next_top = torch.cat([tops, second]).topk(2, dim=0).values
    by = torch.where(tops == -torch.inf, 0.0, tops - top)
    scale, factor = by.exp(), 1.0 if draw.temperature == 0.0 else min(max(1.0 / draw.temperature, 1e-30), 1e30)
    choice = Results.empty(rows, False, parts)
    choice.launch(
        draw._replace(mask=-1, temperature=1.0),
        seed + 1,  # the random numbers of ``seed`` are those of the tiles
        logits=(draws.log() + by * factor).T.contiguous(),
        rows=rows,
        width=count,
        stride=count,
        first=0,
        dim=count,
        dtype=DTYPES[parts.dtype],
    )
    at, rows_at = choice.out.clamp(min=0), torch.arange(rows, device=parts.device)  # -1 in a bad row
    merged = parts[at, rows_at]
    sums = exps * scale, (weighted + by * exps) * scale, draws * (by * factor).exp()
    # one after the other: sum() has another order in another batch
    merged[:, :5] = torch.stack([top, next_top, *(reduce(torch.add, values.unbind()) for values in sums)], 1)
    merged[:, 7] = parts[tops.argmax(0), rows_at, 7]
    return merged


define(
    f"linear_unmask({schema(Product)}, {schema(Share)}, {schema(Draw)}, Tensor seed) -> (Tensor, Tensor)",
    _unmask,
    _fake,
)


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
    buffer_bytes: int | None = None,
    dim: int | None = None,
    group: ProcessGroup | None = None,
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
        buffer_bytes: memory for a tile of logits; None for 64 MiB (32 MiB on a GPU). A tile has 64 rows (1,024 on a
            GPU) and up to 8,192 entries of the vocabulary, as many as fit; of rows, a multiple of four, or one. With
            ``top_p`` below 1, a tile has whole rows, and the default is 64 MiB.
        dim: N; None for the number of rows of ``weight``. Needed with a ``group``, unless ``weight`` is a DTensor.
        group: processes over which the vocabulary is split. Process r of P passes the rows ``weight.chunk(P)[r]`` and
            ``bias.chunk(P)[r]``; all other arguments and the generator's state must be the same in all of them. All
            get the same results: the statistics of one process, but for the rounding of sums, and tokens of the same
            distribution. With the same generator state, the tokens of another number of processes are others, unless
            ``temperature`` is 0. For each position, the processes exchange eight float64. ``top_p`` must be 1, as it
            needs whole rows in one process. If weight and bias are DTensors with the placement ``Shard(0)``, the group
            is that of their mesh.

    Returns:
        As :func:`unmask`. The tokens are drawn with other random numbers than those of :func:`unmask`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, an option is out of its range, the weight does not have the rows that
            ``group`` asks for, or, on the CPU, a row has no softmax.
    """
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        raise ValueError(f"dim: expected a positive int or None, got {dim!r}")
    if dim is None and group is not None and type(weight) in (Tensor, nn.Parameter):
        raise ValueError("dim: expected the number of tokens, of which a process of a group has a part, got None")
    hidden, weight, bias, dtype, share = check_head(hidden, weight, bias, dim, group)
    buffer_bytes = buffer_size(buffer_bytes, hidden.device, top_p < 1.0)
    check_same_device(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    draw = check_draw(mask_id, share.dim, temperature, top_p, statistics, row_ids, hidden.shape[:-1], "hidden")
    head = Product(hidden, weight, bias, dtype, buffer_bytes)
    seed = draw_seed(generator, hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        results = OPERATORS.linear_unmask(*head, *share, *draw, seed)
    return unmasked(results, statistics, dtype)
