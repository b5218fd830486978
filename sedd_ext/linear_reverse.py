"""Reverse steps from hidden states to tokens: the output head and the draw in one pass over the vocabulary."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import _C
from ._dispatch import (
    DTYPES,
    FAMILIES,
    STEPS,
    check_process,
    check_same_device,
    check_tokens,
    contiguous,
    draw_seed,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from ._operators import OPERATORS, define, schema
from .head import Head, Rows, buffer_size, check_head, tile_shape
from .linear_reverse_mean import Output, Product, sample_tempered
from .process import RankOne
from .reverse import check_tempering, draw_tempered
from .reverse_mean import Numbers, check_score, mean_numbers
from .split import Share, Sums, gather, most_rows
from .step import NOISE_NAME, MeanStep, check_step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_reverse_sample"]


class Arguments(NamedTuple):
    """The arguments of the operator and of the tempered draw, without the seed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    x_t: Tensor
    noise: Tensor
    log_score_shift: Tensor | None
    stationary: Tensor | None
    family: str
    step: str
    forbidden: int
    dim: int
    first: int
    group: str
    dtype: torch.dtype
    buffer_bytes: int
    capacity: int | None

    @property
    def may_reject(self) -> bool:
        """Whether a draw from the scores may be rejected, so that a second sweep draws from the weights."""
        return self.family != "absorbing" and (self.step == "tweedie" or self.forbidden >= 0)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.no_grad()
def _sample(*arguments: Any) -> Tensor:
    *others, seed = arguments
    a = Arguments(*others)
    a = a._replace(stationary=contiguous(a.stationary))
    out = a.x_t.reshape(-1).clone()
    live = _live_rows(a)
    rows = live.indices(a.x_t)
    draws = a.noise.new_empty(rows.shape[0], _C.reverse_draw_numbers)
    sweep_over = _sweep_split if a.group else _sweep
    drawn = sweep_over(a, rows, draws, seed, 0)
    if a.may_reject:
        rejected = drawn == _C.sweep_again
        if live.may_wait:
            again = rejected.nonzero().squeeze(1)
            if len(again):
                drawn[again] = sweep_over(a, rows[again], draws[again], seed, 1)
        else:
            drawn = torch.where(rejected, sweep_over(a, rows, draws, seed, 1), drawn)
    live.restore_tokens(drawn, out)
    return out.view(a.x_t.shape)


class _Sweep:
    """A sweep over the vocabulary for some rows of the flattened batch.

    Args:
        a: the operator's arguments.
        rows: the indices of the rows in the flattened batch [R].
        draws: the state of the rows [R, ...].
        seed: the seed of the random numbers.
        sweep: 0, or 1 for the second sweep.
    """

    def __init__(self, a: Arguments, rows: Tensor, draws: Tensor, seed: Tensor, sweep: int) -> None:
        self.a, self.rows, self.draws, self.seed, self.sweep = a, rows, draws, seed, sweep
        self.hidden = a.hidden.reshape(-1, a.hidden.shape[-1])[rows].to(a.dtype)
        self.x_t, self.noise = a.x_t.reshape(-1)[rows], a.noise.reshape(-1)[rows]
        self.shift = None if a.log_score_shift is None else a.log_score_shift.reshape(-1)[rows]
        self.out = torch.empty_like(rows)

    def select(self, rows: Tensor) -> _Sweep:
        """The sweep of some of its rows, with a copy of their state."""
        return _Sweep(self.a, self.rows[rows], self.draws[rows], self.seed, self.sweep)

    def launch(self, at: slice, sums: Tensor | None = None, targets: Tensor | None = None, **tile: Any) -> None:
        """Runs the kernel for a tile of the rows ``at``."""
        a, shift = self.a, self.shift
        fault, row = launch(
            "reverse_tile",
            **tile,
            x_t=self.x_t[at],
            noise=self.noise[at],
            shift=None if shift is None else shift[at],
            stationary=a.stationary,
            draws=self.draws[at],
            sums=sums,
            targets=targets,
            out=self.out[at],
            seed=self.seed,
            row_ids=self.rows[at],
            forbidden=a.forbidden,
            family=FAMILIES[a.family],
            step=STEPS[a.step],
            sweep=self.sweep,
        )
        if fault:
            status = fault, int(self.rows[at.start + row])
            raise_fault(status, {"x_t": a.x_t}, a.dim, (NOISE_NAME[a.step], a.noise), scores="hidden")


def _sweep(a: Arguments, rows: Tensor, draws: Tensor, seed: Tensor, sweep: int) -> Tensor:
    """One sweep over the vocabulary: draws tokens for rows of the flattened batch, given by their indices [R]."""
    s = _Sweep(a, rows, draws, seed, sweep)
    for tile in Head(s.hidden, a.weight, a.bias, a.buffer_bytes).tiles():
        s.launch(tile.rows, **tile.arguments(a.dim))
    return s.out


def _sweep_split(a: Arguments, rows: Tensor, draws: Tensor, seed: Tensor, sweep: int) -> Tensor:
    """A sweep over a vocabulary that is split over processes: draws the tokens that one process would draw.

    Tiles have the boundaries that they have in one process, so the first and the last tile of a process may be parts.
    The processes exchange the sums of their tiles. Then all of them know which tile each token comes from, and the
    process that has the tile computes its log-scores again, for these rows alone, to draw the tokens.
    """
    s = _Sweep(a, rows, draws, seed, sweep)
    if not len(rows):
        return s.out
    count, most = a.weight.shape[0], most_rows(a.weight.shape[0], a.dim, a.group)
    _, width = tile_shape(len(rows), a.dim, a.dtype, rows.device, a.buffer_bytes)
    begins = range(0, a.dim, most)
    parts = max(_tiles_between(begin, min(begin + most, a.dim), width) for begin in begins)
    before = a.first // width  # tiles
    sums = draws.new_zeros(parts, len(rows))
    for tile in Head(s.hidden, a.weight, a.bias, a.buffer_bytes, first=a.first, most=a.dim, on_grid=True).tiles():
        s.launch(tile.rows, sums=sums[tile.first // width - before, tile.rows], **tile.arguments(a.dim))
    targets, chosen = draws.new_empty(len(rows)), torch.empty_like(rows)
    launch(
        "reverse_choose",
        sums=gather(sums, a.group),
        draws=draws,
        targets=targets,
        out=chosen,
        seed=seed,
        row_ids=rows,
        rows=len(rows),
        parts=parts,
        width=width,
        most=most,
        dim=a.dim,
        sweep=sweep,
    )
    # the drawn entries and their scores, as the bits of int64: the processes that draw nothing add 0
    drawn = rows.new_zeros(len(rows), 2)
    chosen -= a.first // most * parts
    order = chosen.argsort(stable=True)
    ends = torch.searchsorted(chosen[order], torch.arange(parts + 1, device=rows.device)).tolist()
    for part, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin == end:
            continue
        own = order[begin:end]
        few = s.select(own)
        start = (before + part) * width - a.first
        entries = slice(max(start, 0), min(start + width, count))
        bias = None if a.bias is None else a.bias[entries]
        head = Head(few.hidden, a.weight[entries], bias, a.buffer_bytes, first=a.first + entries.start)
        for tile in head.tiles():
            few.launch(tile.rows, targets=targets[own[tile.rows]], **tile.arguments(a.dim))
        drawn[own] = few.draws[:, -2:].view(torch.int64)
    exchange = Sums(a.group)
    exchange.start(drawn)
    exchange.wait()
    draws[:, -2:] = drawn.view(torch.float64)
    end = {"log_score": s.hidden.new_empty(0), "rows": len(rows), "width": 0, "stride": 0, "first": a.dim}
    s.launch(slice(0, None), **end, dim=a.dim, dtype=DTYPES[a.dtype])
    return s.out


def _tiles_between(begin: int, end: int, width: int) -> int:
    """The number of tiles, of those that start at multiples of the width, with entries in [begin, end)."""
    return (end - 1) // width - begin // width + 1


def _live_rows(a: Arguments) -> Rows:
    """The rows that go through the head."""
    return Rows(a.x_t, a.noise, a.stationary, a.family, a.dim, capacity=a.capacity)


define(f"linear_reverse_sample({schema(Arguments)}, Tensor seed) -> Tensor", _sample, _fake)


def _sample_tempered(a: Arguments, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draws from tempered probabilities, which need whole rows: as many rows at once as the buffer takes."""
    dim, hidden = a.weight.shape[0], a.hidden.reshape(-1, a.hidden.shape[-1])
    out, noise = a.x_t.reshape(-1).clone(), a.noise.reshape(-1)
    shifts = None if a.log_score_shift is None else a.log_score_shift.reshape(-1)
    draw_seed(generator, out.device)  # checks the generator
    # for every row, so that the numbers of a row do not depend on which rows are live
    uniforms = torch.rand(2, len(out), dtype=torch.float64, device=out.device, generator=generator)
    w, b = a.weight.to(a.dtype), None if a.bias is None else a.bias.to(a.dtype)
    # 16 bytes per entry: log-scores, probabilities, and the probabilities in float64
    live = _live_rows(a)
    rows = live.indices(out)
    drawn = torch.empty_like(rows)
    chunk = max(1, a.buffer_bytes // (dim * 16))
    for at, here in zip(rows.split(chunk), drawn.split(chunk), strict=True):
        x = out[at]
        log_score = linear(hidden[at].to(a.dtype), w, b)
        shift = None if shifts is None else shifts[at]
        probs = OPERATORS.reverse_probs(log_score, x, noise[at], shift, a.stationary, a.family, a.step, a.forbidden)
        here.copy_(draw_tempered(probs, x, temperature, top_p, uniforms[:, at]))
    live.restore_tokens(drawn, out)
    return out.view(a.x_t.shape)


def _sample_mean(
    head: Output,
    numbers: Numbers,
    share: Share,
    products: Product,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws from a mean prediction."""
    x_t = numbers.x_t
    if x_t.is_meta:
        return x_t.new_empty(x_t.shape)
    with torch.autocast(x_t.device.type, enabled=False):
        if check_tempering(temperature, top_p):

            def draw(probs: Tensor, x: Tensor, uniforms: Tensor) -> Tensor:
                return draw_tempered(probs, x, temperature, top_p, uniforms)

            return sample_tempered(head, numbers, products, draw, generator)
        result: Tensor = OPERATORS.linear_reverse_mean_sample(
            *head, *numbers, *share, *products, draw_seed(generator, x_t.device)
        )
        return result


def linear_reverse_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    parameterization: Literal["score", "mean"] = "score",
    sigma: Tensor | float | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    buffer_bytes: int | None = None,
    capacity: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The output head and :func:`reverse_sample` in one operator: hidden states in, tokens out, no tensor [*B, N].

    The head is multiplied with the hidden states one tile of the vocabulary at a time. A kernel adds the sum of the
    tile to the total of the row. With probability sum / total, it replaces the drawn token by one drawn from the tile.
    This gives the distribution of :func:`reverse_probs`, exact to float64 sums, in one pass. Where the clamp at 0
    depends on the total (Tweedie with a π that is spread out), the token is drawn without the clamp and then accepted
    or rejected; the few rejected rows take a second pass. Rows with π_x = 0 (unmasked tokens of absorbing diffusion)
    keep their token and skip the head.

    Args:
        hidden: states before the head, [*B, d], float32, bfloat16, float16 or float64.
        weight: the head's weight, [N, d], of the same dtype (any, under autocast).
        bias: the head's bias [N], or None.
        x_t: the current tokens, [*B], int64, in [0, N).
        step: as for :func:`reverse_probs`.
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        denoise: for the last step: MASK, if the process has one, gets probability 0.
        parameterization: as for :func:`reverse_probs`. With ``"mean"`` the head computes logits.
        sigma: as for :func:`reverse_probs`.
        temperature: as for :func:`reverse_sample`.
        top_p: as for :func:`reverse_sample`.
        generator: random number generator on the tensors' device; torch's default one if None.
        buffer_bytes: memory for a tile of log-scores; None for 64 MiB (32 MiB on a GPU). A tile has 2,048 entries of
            the vocabulary (8,192 on a GPU) and as many rows as fit. With a ``temperature`` or ``top_p`` other than 1,
            or a mean prediction, a tile has whole rows, and the default is 64 MiB.
        capacity: the most positions that go through the head, so that a GPU need not count those that need it, or the
            rejected ones: all take the second pass. Positions that need the head come first, in order, and others fill
            up. If more need the head, the call raises on the CPU, and on a GPU the token of those left out is -1. None:
            they are counted; or, while a CUDA graph is captured, all positions go through the head.
        group: processes over which the vocabulary is split. Process r of P passes the rows ``weight.chunk(P)[r]`` and
            ``bias.chunk(P)[r]``; all other arguments and the generator's state must be the same in all of them. All
            get the tokens that one process draws, but for the rounding of sums. For each position that needs the head,
            the processes exchange one float64 for each tile that a process has, in whole or in part, and then the
            token and its score; of a mean prediction, four float64 for each process, and then the token.
            ``temperature`` and ``top_p`` must be 1, as they need whole rows in one process. If weight and bias are
            DTensors with the placement ``Shard(0)``, the group is that of their mesh.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), the noise of the step (``dsigma`` or ``step``) is
            NaN, infinite or not above 0, a row's probabilities have no finite sum above 0, an option is out of its
            range, or the weight does not have the rows that ``group`` asks for.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 17 (Euler) or eq. 19 (Tweedie).
    """
    process = check_process(process)
    hidden, weight, bias, dtype, share = check_head(hidden, weight, bias, process.dim, group, capacity)
    batch, device = hidden.shape[:-1], hidden.device
    x_t = check_tokens("x_t", x_t, batch, "hidden")
    check_same_device(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}), x_t=x_t)
    tempered = check_tempering(temperature, top_p)
    if tempered and share.group:
        name, value = ("temperature", temperature) if temperature != 1.0 else ("top_p", top_p)
        raise ValueError(f"{name}: expected 1 with a group, got {value}")
    buffer_bytes = buffer_size(buffer_bytes, device, tempered or parameterization == "mean")
    if parameterization == "mean":
        numbers = mean_numbers(x_t, step, process, sigma, log_score_shift, denoise, dtype)
        head = Output(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        return _sample_mean(head, numbers, share, Product(dtype, buffer_bytes, capacity), temperature, top_p, generator)
    check_score(parameterization, sigma)
    step = check_step(step)
    arguments = Arguments(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        x_t=x_t,
        noise=per_row(NOISE_NAME[step.name], step.noise, batch, device),
        log_score_shift=None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary=stationary_for(process, dtype, device),
        family=process.family,
        step=step.name,
        forbidden=process.mask_id if denoise and process.mask_id is not None else -1,
        dim=share.dim,
        first=share.first,
        group=share.group,
        dtype=dtype,
        buffer_bytes=buffer_bytes,
        capacity=capacity,
    )
    if device.type == "meta":
        return x_t.new_empty(x_t.shape)
    with torch.autocast(device.type, enabled=False):
        if tempered:
            return _sample_tempered(arguments, temperature, top_p, generator)
        result: Tensor = OPERATORS.linear_reverse_sample(*arguments, draw_seed(generator, device))
        return result
