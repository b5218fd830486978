"""Tokens for masked positions, and the numbers by which samplers choose among positions, from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from . import _C
from ._dispatch import (
    DTYPES,
    _index,
    check_device,
    check_tokens,
    compute_dtype,
    contiguous,
    draw_seed,
    kind_of,
    launch,
)
from ._operators import OPERATORS, define, schema

__all__ = ["Unmasked", "unmask"]

STATISTICS = ("log_prob", "max_prob", "margin", "entropy")


class Unmasked(NamedTuple):
    """What :func:`unmask` finds for every position: tensors [*B]. Statistics that were not asked for are None.

    Attributes:
        token: a token drawn from softmax(logits / temperature) within ``top_p``, int64.
        argmax: the most probable token, int64; the first one if several have the largest logit.
        log_prob: the logarithm of the probability of ``token``.
        max_prob: the probability of ``argmax``.
        margin: ``max_prob`` minus the second largest probability.
        entropy: the entropy in nats.
    """

    token: Tensor
    argmax: Tensor
    # who asks for one need not check that it is there
    log_prob: Tensor = None  # type: ignore[assignment]
    max_prob: Tensor = None  # type: ignore[assignment]
    margin: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]


class Draw(NamedTuple):
    """The arguments of the operators that say how tokens are drawn, and whether there are statistics."""

    row_ids: Tensor | None
    mask: int
    temperature: float
    top_p: float
    statistics: bool


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_draw(
    mask_id: object,
    dim: int,
    temperature: object,
    top_p: object,
    statistics: Sequence[str],
    row_ids: object,
    batch: torch.Size,
    of: str,
) -> Draw:
    """Checks the options of a draw."""
    if mask_id is not None and (not isinstance(mask_id, int) or isinstance(mask_id, bool) or not 0 <= mask_id < dim):
        raise ValueError(f"mask_id: expected a token in [0, {dim}) or None, got {mask_id!r}")
    if not _is_number(temperature) or not 0.0 <= float(temperature) < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if not _is_number(top_p) or not 0.0 < float(top_p) <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if isinstance(statistics, str) or not set(statistics) <= set(STATISTICS):
        raise ValueError(f"statistics: expected some of {', '.join(STATISTICS)}, got {statistics!r}")
    ids = None if row_ids is None else check_tokens("row_ids", row_ids, batch, of)
    mask = -1 if mask_id is None else mask_id
    return Draw(ids, mask, float(temperature), float(top_p), bool(statistics))


class Results(NamedTuple):
    """The memory for the results of rows, and for their state between two tiles."""

    out: Tensor
    argmax: Tensor
    numbers: Tensor | None
    states: Tensor

    @staticmethod
    def empty(rows: int, statistics: bool, like: Tensor) -> Results:
        """Uninitialised memory on the device of ``like``."""
        tokens = torch.empty(2, rows, dtype=torch.int64, device=like.device)
        numbers = like.new_empty(rows, _C.unmask_numbers, dtype=torch.float64) if statistics else None
        states = like.new_empty(rows, _C.unmask_state_numbers, dtype=torch.float64)
        return Results(tokens[0], tokens[1], numbers, states)

    def launch(self, draw: Draw, seed: Tensor, at: slice = slice(None), **tile: Any) -> int:
        """Runs the kernel for a tile of the rows ``at``. Returns the first bad row, or -1."""
        ids = draw.row_ids
        fault, row = launch(
            "unmask",
            **tile,
            states=self.states[at],
            out=self.out[at],
            argmax=self.argmax[at],
            numbers=None if self.numbers is None else self.numbers[at],
            seed=seed,
            row_ids=None if ids is None else ids[at],
            mask=draw.mask,
            temperature=draw.temperature,
            top_p=draw.top_p,
        )
        return (at.start or 0) + row if fault else -1

    def tensors(self, batch: torch.Size) -> tuple[Tensor, Tensor]:
        """The results of the operators: tokens [2, *B] and numbers [4, *B], or [0]."""
        tokens = torch.stack((self.out, self.argmax)).view(2, *batch)
        if self.numbers is None:
            return tokens, self.states.new_empty(0)
        return tokens, self.numbers.T.contiguous().view(_C.unmask_numbers, *batch)


def raise_bad_row(name: str, row: int, batch: torch.Size) -> NoReturn:
    """Raises a ValueError for a row whose logits have no softmax."""
    raise ValueError(
        f"{name}: expected rows with a softmax, got NaN, +inf or nothing but -inf at index {_index(row, batch)}"
    )


def fake_results(batch: torch.Size, statistics: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes of :meth:`Results.tensors`."""
    numbers = (_C.unmask_numbers, *batch) if statistics else (0,)
    return like.new_empty(2, *batch, dtype=torch.int64), like.new_empty(numbers, dtype=torch.float64)


def unmasked(results: tuple[Tensor, Tensor], statistics: Sequence[str], dtype: torch.dtype) -> Unmasked:
    """The results of an operator as an object."""
    tokens, numbers = results
    fields: dict[str, Any] = {}
    if statistics:
        numbers = numbers.to(compute_dtype(dtype))
        fields = {name: numbers[i] for i, name in enumerate(STATISTICS) if name in statistics}
    return Unmasked(tokens[0], tokens[1], **fields)


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, _ = rest
    return fake_results(logits.shape[:-1], Draw(*given).statistics, logits)


def _unmask(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, seed = rest
    draw, dim, batch = Draw(*given), logits.shape[-1], logits.shape[:-1]
    draw = draw._replace(row_ids=contiguous(draw.row_ids))
    rows = batch.numel()
    results = Results.empty(rows, draw.statistics, logits)
    bad = results.launch(
        draw,
        seed,
        logits=logits.contiguous(),
        rows=rows,
        width=dim,
        stride=dim,
        first=0,
        dim=dim,
        dtype=DTYPES[logits.dtype],
    )
    if bad >= 0:
        raise_bad_row("logits", bad, batch)
    return results.tensors(batch)


define(f"unmask(Tensor logits, {schema(Draw)}, Tensor seed) -> (Tensor, Tensor)", _unmask, _fake)


@torch.no_grad()
def unmask(
    logits: Tensor,
    *,
    mask_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    statistics: Sequence[str] = STATISTICS,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Unmasked:
    """Draws a token for every position from softmax(logits), with what a sampler needs to choose among positions.

    One pass over the logits finds the drawn token, the most probable one, and the statistics, without any other tensor
    [*B, N]. The distribution is exact to float64 sums, also for rare tokens. The results of a row do not depend on the
    other rows.

    The statistics describe softmax(logits) itself, without ``temperature`` and ``top_p``, so that they do not change
    with the way of drawing. For those of the tempered distribution, pass ``logits / temperature``.

    Args:
        logits: [*B, N], float32, bfloat16, float16 or float64. For an absorbing process, log-scores give the same
            tokens.
        mask_id: MASK, whose logit is ignored; None if all tokens can be drawn.
        temperature: the token is drawn from softmax(logits / temperature). With 0 it is ``argmax``.
        top_p: the token is drawn from the most probable ones: those for which all more probable tokens together have
            less than this probability, after ``temperature``. Equally probable tokens are in or out together.
        statistics: which ones to compute, some of ``"log_prob"``, ``"max_prob"``, ``"margin"`` and ``"entropy"``.
        row_ids: a number for each row [*B], int64, that selects its random numbers; the index of the row if None. A row
            with the same number and generator state gets the same token in any batch.
        generator: random number generator on the tensors' device; torch's default one if None.

    Returns:
        Tokens and statistics [*B]; the statistics in float32 (float64 for float64 logits). On a GPU, a row whose logits
        have no softmax (NaN, +inf, or nothing but -inf) gets token -1 and statistics NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, an option is out of its range, or, on the CPU, a row has no softmax.

    Source: FlashInfer (Ye et al. 2025) for drawing from a nucleus by rejection.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected a float32, bfloat16, float16 or float64 tensor, got {kind_of(logits)}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [*B, N], got {list(logits.shape)}")
    check_device("logits", logits)
    batch, dim = logits.shape[:-1], logits.shape[-1]
    draw = check_draw(mask_id, dim, temperature, top_p, statistics, row_ids, batch, "logits")
    results = OPERATORS.unmask(logits, *draw, draw_seed(generator, logits.device))
    return unmasked(results, statistics, logits.dtype)
