"""Reverse steps from hidden states to tokens: the output head and the draw in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sedd_ext import _C
from sedd_ext._dispatch import (
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
from sedd_ext._operators import define, schema
from sedd_ext.head import BUFFER_BYTES, Head, Rows, check_head, product
from sedd_ext.linear_reverse_mean import Output, Product, sample_tempered
from sedd_ext.process import RankOne
from sedd_ext.reverse import check_tempering, draw_tempered
from sedd_ext.reverse_mean import Numbers, check_score, mean_numbers
from sedd_ext.step import NOISE_NAME, MeanStep, check_step

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
    dtype: torch.dtype
    buffer_bytes: int

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
    rows = _live_rows(a)
    draws = a.noise.new_empty(rows.shape[0], _C.reverse_draw_numbers)
    drawn = _sweep(a, rows, draws, seed, 0)
    if a.may_reject:
        again = (drawn == _C.sweep_again).nonzero().squeeze(1)
        if len(again):
            drawn[again] = _sweep(a, rows[again], draws[again], seed, 1)
    out[rows] = drawn
    return out.view(a.x_t.shape)


def _sweep(a: Arguments, rows: Tensor, draws: Tensor, seed: Tensor, sweep: int) -> Tensor:
    """One sweep over the vocabulary: draws tokens for rows of the flattened batch, given by their indices [R]."""
    dim = a.weight.shape[0]
    hidden = a.hidden.reshape(-1, a.hidden.shape[-1])[rows].to(a.dtype)
    x_t, noise = a.x_t.reshape(-1)[rows], a.noise.reshape(-1)[rows]
    shift = None if a.log_score_shift is None else a.log_score_shift.reshape(-1)[rows]
    out = torch.empty_like(rows)
    for tile in Head(hidden, a.weight, a.bias, a.buffer_bytes).tiles():
        at = tile.rows
        fault, row = launch(
            "reverse_tile",
            **tile.arguments(dim),
            x_t=x_t[at],
            noise=noise[at],
            shift=None if shift is None else shift[at],
            stationary=a.stationary,
            draws=draws[at],
            out=out[at],
            seed=seed,
            row_ids=rows[at],
            forbidden=a.forbidden,
            family=FAMILIES[a.family],
            step=STEPS[a.step],
            sweep=sweep,
        )
        if fault:
            status = fault, int(rows[at.start + row])
            raise_fault(status, {"x_t": a.x_t}, dim, (NOISE_NAME[a.step], a.noise), scores="hidden")
    return out


def _live_rows(a: Arguments) -> Tensor:
    """Indices of the rows that go through the head, in the flattened batch."""
    index = Rows(a.x_t, a.noise, a.stationary, a.family, a.weight.shape[0]).index
    return torch.arange(a.x_t.numel(), device=a.x_t.device) if index is None else index


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
    for at in _live_rows(a).split(max(1, a.buffer_bytes // (dim * 16))):
        x = out[at]
        log_score = product(hidden[at].to(a.dtype), w, b, w.new_empty(len(at) * dim))
        shift = None if shifts is None else shifts[at]
        probs = torch.ops.sedd_ext.reverse_probs(
            log_score, x, noise[at], shift, a.stationary, a.family, a.step, a.forbidden
        )
        out[at] = draw_tempered(probs, x, temperature, top_p, uniforms[:, at])
    return out.view(a.x_t.shape)


def _sample_mean(
    head: Output,
    numbers: Numbers,
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
        result: Tensor = torch.ops.sedd_ext.linear_reverse_mean_sample(
            *head, *numbers, *products, draw_seed(generator, x_t.device)
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
    buffer_bytes: int = BUFFER_BYTES,
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
        buffer_bytes: memory for a tile of log-scores. A tile has 2,048 entries of the vocabulary (8,192 on a GPU) and
            as many rows as fit. With a ``temperature`` or ``top_p`` other than 1, or a mean prediction, a tile has
            whole rows.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), the noise of the step (``dsigma`` or ``step``) is
            NaN, infinite or not above 0, a row's probabilities have no finite sum above 0, or an option is out of its
            range.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 17 (Euler) or eq. 19 (Tweedie).
    """
    process = check_process(process)
    hidden, weight, bias, dtype, _ = check_head(hidden, weight, bias, process.dim, buffer_bytes)
    batch, device = hidden.shape[:-1], hidden.device
    x_t = check_tokens("x_t", x_t, batch, "hidden")
    check_same_device(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}), x_t=x_t)
    tempered = check_tempering(temperature, top_p)
    if parameterization == "mean":
        numbers = mean_numbers(x_t, step, process, sigma, log_score_shift, denoise, dtype)
        head = Output(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        return _sample_mean(head, numbers, Product(dtype, buffer_bytes), temperature, top_p, generator)
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
        dtype=dtype,
        buffer_bytes=buffer_bytes,
    )
    if device.type == "meta":
        return x_t.new_empty(x_t.shape)
    with torch.autocast(device.type, enabled=False):
        if tempered:
            return _sample_tempered(arguments, temperature, top_p, generator)
        result: Tensor = torch.ops.sedd_ext.linear_reverse_sample(*arguments, draw_seed(generator, device))
        return result
