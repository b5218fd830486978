"""Reverse steps from a mean prediction, from hidden states to tokens.

A softmax has to be normalised before a token can be drawn, so a tile of the head holds whole rows, and the kernel of
:mod:`sedd_ext.reverse_mean` works on it. If the vocabulary is split over processes, they exchange the sums of their
parts, and the process that has the random number's part of the sum draws the token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import _C
from ._dispatch import draw_seed
from ._operators import OPERATORS, define, schema
from .head import Head, Rows, is_noise
from .reverse_mean import Numbers, check_numbers, launch_mean, raise_mean_fault
from .split import Share, Sums, gather, most_rows

__all__: list[str] = []


class Output(NamedTuple):
    """The output head in the arguments of the operator."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Product(NamedTuple):
    """How the operator computes the logits."""

    dtype: torch.dtype
    buffer_bytes: int
    capacity: int | None


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.no_grad()
def _sample(*arguments: Any) -> Tensor:
    middle, end = len(Output._fields), len(Output._fields) + len(Numbers._fields)
    head, numbers, rest = Output(*arguments[:middle]), Numbers(*arguments[middle:end]), arguments[end:]
    share, (dtype, buffer_bytes, capacity, seed) = Share(*rest[:3]), rest[3:]
    check_numbers(numbers)
    out = numbers.x_t.reshape(-1).clone()
    live, most = live_rows(numbers, share.dim, capacity), most_rows(head.weight.shape[0], share.dim, share.group)
    rows = live.indices(out)
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])[rows].to(dtype)
    drawn = torch.empty_like(rows)
    draw = _draw_split if share.group else _draw
    tiles = Head(hidden, head.weight, head.bias, buffer_bytes, whole_rows=True, first=share.first, most=most).tiles()
    for tile in tiles:
        draw(drawn[tile.rows], tile.log_score, numbers, share, seed, rows[tile.rows])
    live.restore_tokens(drawn, out)
    return out.view(numbers.x_t.shape)


def _draw(drawn: Tensor, logits: Tensor, numbers: Numbers, share: Share, seed: Tensor, rows: Tensor) -> None:
    """Draws the tokens of these rows of the flattened batch."""
    fault, row = launch_mean("reverse_mean_sample", drawn, logits, select(numbers, rows), seed=seed, row_ids=rows)
    if fault:
        raise_mean_fault((fault, int(rows[row])), numbers, share.dim, scores="hidden")


def _draw_split(drawn: Tensor, logits: Tensor, numbers: Numbers, share: Share, seed: Tensor, rows: Tensor) -> None:
    """The same, from the logits that this process has. All processes get the tokens of one process."""
    most = most_rows(logits.shape[1], share.dim, share.group)
    here = select(numbers, rows)

    def run(kernel: str, out: Tensor, **others: Any) -> None:
        place = {"first": share.first, "most": most, "dim": share.dim}
        fault, row = launch_mean(kernel, out, logits, here, seed=seed, row_ids=rows, **place, **others)
        if fault:
            raise_mean_fault((fault, int(rows[row])), numbers, share.dim, scores="hidden")

    sums = numbers.noise.new_zeros(len(rows), _C.mean_sums_numbers)
    run("reverse_mean_sample", drawn, sums=sums)
    everything = gather(sums, share.group)
    targets = sums.new_empty(everything.shape[:2])
    run("reverse_mean_choose", drawn, sums=everything, targets=targets)
    own = torch.empty_like(drawn)
    run("reverse_mean_sample", own, targets=targets[share.first // most])
    exchange = Sums(share.group)
    exchange.start(own)
    exchange.wait()
    drawn += own


def live_rows(numbers: Numbers, dim: int, capacity: int | None) -> Rows:
    """The rows that go through the head: those that may move, and bad ones."""
    noise = numbers.noise if numbers.sigma is None else numbers.sigma
    good = noise < 0 if numbers.sigma is None else is_noise(numbers.noise) & is_noise(numbers.sigma)
    if numbers.mean_step == "tweedie":
        good = good & (numbers.noise <= noise)  # the kernel looks at those that are longer by rounding
    marked = torch.where(good, 1.0, torch.nan)
    return Rows(numbers.x_t, marked, numbers.stationary, numbers.family, dim, capacity=capacity)


def select(numbers: Numbers, rows: Tensor) -> Numbers:
    """The numbers of these rows of the flattened batch."""
    sigma = None if numbers.sigma is None else numbers.sigma.reshape(-1)[rows]
    return numbers._replace(x_t=numbers.x_t.reshape(-1)[rows], noise=numbers.noise.reshape(-1)[rows], sigma=sigma)


define(
    f"linear_reverse_mean_sample({schema(Output)}, {schema(Numbers)}, {schema(Share)}, {schema(Product)}, Tensor seed) "
    "-> Tensor",
    _sample,
    _fake,
)


def sample_tempered(
    head: Output,
    numbers: Numbers,
    products: Product,
    draw: Any,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws from tempered probabilities, as many rows at once as the buffer takes.

    Args:
        head: the output head.
        numbers: the step.
        products: how to compute the logits.
        draw: draws tokens from probabilities [R, N], given the tokens [R] and two uniform numbers per row [2, R].
        generator: the random number generator.
    """
    dim, hidden = head.weight.shape[0], head.hidden.reshape(-1, head.hidden.shape[-1])
    out = numbers.x_t.reshape(-1).clone()
    draw_seed(generator, out.device)  # checks the generator
    # for every row, so that the numbers of a row do not depend on which rows are live
    uniforms = torch.rand(2, len(out), dtype=torch.float64, device=out.device, generator=generator)
    w, b = head.weight.to(products.dtype), None if head.bias is None else head.bias.to(products.dtype)
    # 16 bytes per entry: logits, probabilities, and the probabilities in float64
    live = live_rows(numbers, dim, products.capacity)
    rows = live.indices(out)
    drawn = torch.empty_like(rows)
    chunk = max(1, products.buffer_bytes // (dim * 16))
    for at, here in zip(rows.split(chunk), drawn.split(chunk), strict=True):
        logits = linear(hidden[at].to(products.dtype), w, b)
        probs = OPERATORS.reverse_mean_probs(logits, *select(numbers, at))
        here.copy_(draw(probs, out[at], uniforms[:, at]))
    live.restore_tokens(drawn, out)
    return out.view(numbers.x_t.shape)
