"""Reverse steps from hidden states to tokens: the output head and the draw in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedd_ext import _C
from sedd_ext._dispatch import (
    DTYPES,
    FAMILIES,
    STEPS,
    addresses,
    check_process,
    check_same_device,
    check_tokens,
    draw_seed,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from sedd_ext._operators import define
from sedd_ext.linear import (
    BUFFER_BYTES,
    check_linear,
    is_noise,
    is_token,
    live_rows,
    log_score_tile,
    tile_shape,
)
from sedd_ext.process import RankOne
from sedd_ext.reverse import STEP_NAME, check_tempering, draw_tempered

__all__ = ["linear_euler_sample", "linear_tweedie_sample"]

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor x_t, Tensor step, Tensor? log_score_shift, "
    "Tensor? stationary, str family, str kind, int forbidden, ScalarType dtype, int buffer_bytes, Tensor seed"
)
_SWEEP_AGAIN = -2


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.no_grad()
def _sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    step: Tensor,
    log_score_shift: Tensor | None,
    stationary: Tensor | None,
    family: str,
    kind: str,
    forbidden: int,
    dtype: torch.dtype,
    buffer_bytes: int,
    seed: Tensor,
) -> Tensor:
    dim, d = weight.shape
    stationary = None if stationary is None else stationary.contiguous()
    h, tokens, steps = hidden.reshape(-1, d), x_t.reshape(-1), step.reshape(-1)
    shift = None if log_score_shift is None else log_score_shift.reshape(-1)
    codes = (DTYPES[dtype], FAMILIES[family], STEPS[kind])

    def draw(rows: Tensor, draws: Tensor, sweep: int) -> Tensor:
        """Tokens of the rows, which are indices into the flattened x_t."""
        states, here, steps_here = h[rows].to(dtype), tokens[rows], steps[rows]
        shifts = None if shift is None else shift[rows]
        out = torch.empty_like(rows)
        part, width = tile_shape(len(rows), dim, dtype, h.device, buffer_bytes)
        buffer = states.new_empty(min(part, len(rows)) * width)
        for first in range(0, dim, width):
            w = weight[first : first + width].to(dtype)
            b = None if bias is None else bias[first : first + width].to(dtype)
            for begin in range(0, len(rows), part):
                at = slice(begin, begin + part)
                tile = log_score_tile(states[at], w, b, buffer)
                tensors = addresses(
                    tile,
                    here[at],
                    steps_here[at],
                    None if shifts is None else shifts[at],
                    stationary,
                    draws[at],
                    out[at],
                    seed,
                    rows[at],
                )
                numbers = (*tile.shape, first, dim, forbidden, *codes, sweep)
                sizes = (tile.shape[0], tile.shape[1], DTYPES[dtype])
                fault, row = launch("reverse_tile", out, (*tensors, *numbers), sizes)
                if fault:
                    found = (fault, int(rows[begin + row]))
                    raise_fault(found, {"x_t": x_t}, dim, (STEP_NAME[kind], step), scores="hidden")
        return out

    rows = live_rows(tokens, ~(is_token(tokens, dim) & is_noise(steps)), stationary, family, dim)
    if rows is None:
        rows = torch.arange(len(tokens), device=tokens.device)
    out = tokens.clone()
    draws = steps.new_empty(len(rows), _C.reverse_draw_numbers)
    drawn = draw(rows, draws, 0)
    if family != "absorbing" and (kind == "tweedie" or forbidden >= 0):
        again = (drawn == _SWEEP_AGAIN).nonzero().squeeze(1)
        if len(again):
            drawn[again] = draw(rows[again], draws[again], 1)
    out[rows] = drawn
    return out.view(x_t.shape)


define(f"linear_reverse_sample({_ARGUMENTS}) -> Tensor", _sample, _fake)


def _tempered(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    step: Tensor,
    log_score_shift: Tensor | None,
    stationary: Tensor | None,
    family: str,
    kind: str,
    forbidden: int,
    dtype: torch.dtype,
    buffer_bytes: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The same from tempered probabilities, which need the whole row: as many rows at once as the buffer takes."""
    dim, d = weight.shape
    h, out = hidden.reshape(-1, d), x_t.reshape(-1).clone()
    steps = step.reshape(-1)
    shifts = None if log_score_shift is None else log_score_shift.reshape(-1)
    rows = live_rows(out, ~(is_token(out, dim) & is_noise(steps)), stationary, family, dim)
    if rows is None:
        rows = torch.arange(len(out), device=out.device)
    draw_seed(generator, out.device)  # looks at the generator
    # for every row, whichever are live
    uniforms = torch.rand(2, len(out), dtype=torch.float64, device=out.device, generator=generator)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    for at in rows.split(max(1, buffer_bytes // (dim * 16))):  # log-scores, probabilities, and these in float64
        x = out[at]
        tile = log_score_tile(h[at].to(dtype), w, b, w.new_empty(len(at) * dim))
        shift = None if shifts is None else shifts[at]
        probs = torch.ops.sedd_ext.reverse_probs(tile, x, steps[at], shift, stationary, family, kind, forbidden)
        out[at] = draw_tempered(probs, x, temperature, top_p, uniforms[:, at])
    return out.view(x_t.shape)


def _step(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    step: Tensor | float,
    process: RankOne,
    log_score_shift: Tensor | float | None,
    denoise: bool,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
    buffer_bytes: int,
) -> Tensor:
    process = check_process(process)
    hidden, weight, bias, dtype = check_linear(hidden, weight, bias, process, buffer_bytes)
    batch, device = hidden.shape[:-1], hidden.device
    x_t = check_tokens("x_t", x_t, batch, "hidden")
    check_same_device(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}), x_t=x_t)
    tempered = check_tempering(temperature, top_p)
    arguments = (
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        x_t,
        per_row(STEP_NAME[kind], step, batch, device),
        None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary_for(process, dtype, device),
        process.family,
        kind,
        process.mask_id if denoise and process.mask_id is not None else -1,
        dtype,
        buffer_bytes,
    )
    if device.type == "meta":
        return x_t.new_empty(x_t.shape)
    with torch.autocast(device.type, enabled=False):
        if tempered:
            return _tempered(*arguments, temperature, top_p, generator)
        result: Tensor = torch.ops.sedd_ext.linear_reverse_sample(*arguments, draw_seed(generator, device))
        return result


def linear_tweedie_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    dsigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Tensor:
    """The output head and :func:`tweedie_sample` in one: hidden states in, tokens out, and no log-scores in between.

    A tile of the vocabulary goes through the head's matrix product and adds to the row's running total; with the
    probability that the total gives it, an entry of the tile takes the place of the one drawn so far. That is the law
    of :func:`tweedie_probs`, exact to float64 sums, in one pass. Where the clamp at 0 needs the total first (π spread
    out), the entry is drawn without the clamp and taken with the probability that makes up for it; the few rows whose
    entry is refused go through a second pass. Rows with π_x = 0 (unmasked tokens of absorbing diffusion) stay, and do
    not go through the head.

    Args:
        hidden: states before the head, [*B, d], float32, bfloat16, float16 or float64.
        weight: the head's weight, [N, d], of the same dtype (any, under autocast).
        bias: the head's bias [N], or None.
        x_t: the current tokens, [*B], int64, in [0, N).
        dsigma: Δ > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        denoise: the last step (Δ = σ̄(ε)): MASK, where the process has one, gets probability 0.
        temperature: as for :func:`tweedie_sample`.
        top_p: as for :func:`tweedie_sample`.
        generator: random number generator on the tensors' device; torch's default one if None.
        buffer_bytes: memory for a tile of log-scores. A tile has 2,048 entries of the vocabulary (8,192 on a GPU) and
            as many rows as fit. A temperature or top_p other than 1 takes whole rows instead, as many as fit.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), Δ is NaN, infinite or not above 0, a row's
            probabilities have no finite sum above 0, or an option is out of its range.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 19.
    """
    return _step(
        "tweedie",
        hidden,
        weight,
        bias,
        x_t,
        dsigma,
        process,
        log_score_shift,
        denoise,
        temperature,
        top_p,
        generator,
        buffer_bytes,
    )


def linear_euler_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    step: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Tensor:
    """The output head and :func:`euler_sample` in one, as :func:`linear_tweedie_sample` is.

    Args:
        hidden: as for :func:`linear_tweedie_sample`.
        weight: as for :func:`linear_tweedie_sample`.
        bias: as for :func:`linear_tweedie_sample`.
        x_t: as for :func:`linear_tweedie_sample`.
        step: Δt σ(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: as for :func:`linear_tweedie_sample`.
        log_score_shift: as for :func:`linear_tweedie_sample`.
        denoise: as for :func:`linear_tweedie_sample`.
        temperature: as for :func:`linear_tweedie_sample`.
        top_p: as for :func:`linear_tweedie_sample`.
        generator: as for :func:`linear_tweedie_sample`.
        buffer_bytes: as for :func:`linear_tweedie_sample`.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError, ValueError: as :func:`linear_tweedie_sample`.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 17.
    """
    return _step(
        "euler",
        hidden,
        weight,
        bias,
        x_t,
        step,
        process,
        log_score_shift,
        denoise,
        temperature,
        top_p,
        generator,
        buffer_bytes,
    )
