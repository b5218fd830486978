"""Reverse steps, Tweedie and Euler: their probabilities, and samples from them in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedd_ext._dispatch import (
    DTYPES,
    FAMILIES,
    STEPS,
    addresses,
    check_log_score,
    check_process,
    check_tokens,
    compute_dtype,
    draw_seed,
    empty_beside,
    fresh,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from sedd_ext._operators import define
from sedd_ext.process import RankOne

__all__ = ["euler_probs", "euler_sample", "tweedie_probs", "tweedie_sample"]

_ARGUMENTS = (
    "Tensor log_score, Tensor x_t, Tensor step, Tensor? log_score_shift, Tensor? stationary, "
    "str family, str kind, int forbidden"
)
STEP_NAME = {"tweedie": "dsigma", "euler": "step"}
"""What the noise of a step is called."""


def _launch(
    kernel: str,
    out: Tensor,
    seed: Tensor | None,
    log_score: Tensor,
    x_t: Tensor,
    step: Tensor,
    log_score_shift: Tensor | None,
    stationary: Tensor | None,
    family: str,
    kind: str,
    forbidden: int,
) -> Tensor:
    log_score, x_t, step = log_score.contiguous(), x_t.contiguous(), step.contiguous()
    shift = None if log_score_shift is None else log_score_shift.contiguous()
    stationary = None if stationary is None else stationary.contiguous()
    rows, dim, dtype = sizes = (x_t.numel(), log_score.shape[-1], DTYPES[log_score.dtype])
    tensors = addresses(log_score, x_t, step, shift, stationary, out, seed)
    codes = (dtype, FAMILIES[family], STEPS[kind])
    status = launch(kernel, out, (*tensors, rows, dim, forbidden, *codes), sizes)
    raise_fault(status, {"x_t": x_t}, log_score.shape[-1], (STEP_NAME[kind], step))
    return out


def _probs_fake(log_score: Tensor, *_: Any) -> Tensor:
    return empty_beside(log_score, compute_dtype(log_score.dtype))


def _probs(log_score: Tensor, *rest: Any) -> Tensor:
    return _launch("reverse_probs", fresh(_probs_fake(log_score)), None, log_score, *rest)


def _sample_fake(log_score: Tensor, x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


def _sample(log_score: Tensor, x_t: Tensor, *rest: Any) -> Tensor:
    *arguments, seed = rest
    return _launch("reverse_sample", _sample_fake(log_score, x_t), seed, log_score, x_t, *arguments)


define(f"reverse_probs({_ARGUMENTS}) -> Tensor", _probs, _probs_fake)
define(f"reverse_sample({_ARGUMENTS}, Tensor seed) -> Tensor", _sample, _sample_fake)


def check_tempering(temperature: object, top_p: object) -> bool:
    """The two are in their ranges; whether they change anything."""
    if not isinstance(temperature, (int, float)) or not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature!r}")
    if not isinstance(top_p, (int, float)) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    return temperature != 1.0 or top_p != 1.0


def draw_tempered(probs: Tensor, x_t: Tensor, temperature: float, top_p: float, uniforms: Tensor) -> Tensor:
    """Draws from probabilities [R, N] with the jumps tempered, see :func:`tweedie_sample`.

    Args:
        probs: of the rows.
        x_t: their tokens [R].
        temperature: above 0.
        top_p: in (0, 1].
        uniforms: two numbers a row in [0, 1), float64 [2, R]: does it jump, and where to.
    """
    bad = probs.isnan().any(dim=1)  # as CUDA kernels mark rows without a distribution
    at_x = x_t.clamp(0, probs.shape[1] - 1)[:, None]
    jump = probs.double()
    stay = jump.gather(1, at_x).squeeze(1)
    jump = jump.scatter(1, at_x, 0.0)
    jump = (jump / jump.amax(dim=1, keepdim=True)).pow(1.0 / temperature)
    entries = None
    if top_p < 1.0:
        jump, entries = jump.sort(dim=1, descending=True, stable=True)
    ends = jump.cumsum(dim=1)
    if top_p < 1.0:  # the fewest entries that hold so much: those that start below it
        ends = torch.where(ends - jump < top_p * ends[:, -1:], ends, 0.0).cummax(dim=1).values
    total = ends[:, -1:].contiguous()
    # rounding may put the target on the end: the last entry with any weight
    place = torch.searchsorted(ends, uniforms[1][:, None] * total, right=True).minimum(torch.searchsorted(ends, total))
    token = (place if entries is None else entries.gather(1, place)).squeeze(1)
    return torch.where(bad, -1, torch.where(uniforms[0] >= stay, token, x_t))


def _draw(arguments: tuple[Any, ...], temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    log_score, x_t = arguments[:2]
    if not check_tempering(temperature, top_p):
        result: Tensor = torch.ops.sedd_ext.reverse_sample(*arguments, draw_seed(generator, x_t.device))
        return result
    draw_seed(generator, x_t.device)  # looks at the generator
    probs = torch.ops.sedd_ext.reverse_probs(*arguments).view(-1, log_score.shape[-1])
    uniforms = torch.rand(2, x_t.numel(), dtype=torch.float64, device=x_t.device, generator=generator)
    return draw_tempered(probs, x_t.reshape(-1), temperature, top_p, uniforms).view(x_t.shape)


def _arguments(
    kind: str,
    log_score: Tensor,
    x_t: Tensor,
    step: Tensor | float,
    process: RankOne,
    log_score_shift: Tensor | float | None,
    denoise: bool,
) -> tuple[Any, ...]:
    process = check_process(process)
    log_score = check_log_score(log_score, process)
    batch, device = log_score.shape[:-1], log_score.device
    x_t = check_tokens("x_t", x_t, batch)
    return (
        log_score.detach(),
        x_t,
        per_row(STEP_NAME[kind], step, batch, device),
        None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary_for(process, log_score.dtype, device),
        process.family,
        kind,
        process.mask_id if denoise and process.mask_id is not None else -1,
    )


def tweedie_probs(
    log_score: Tensor,
    x_t: Tensor,
    dsigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
) -> Tensor:
    """Probabilities of one Tweedie τ-leaping step, the optimal one for positions taken independently.

    With s = exp(log_score), s_x = 1, S = Σ_z s_z and Δ = σ̄(t) - σ̄(t - Δt)::

        p(y) ∝ max(0, e^Δ s_y + (1 - e^Δ) π_y S) · (e^{-Δ} [y = x] + (1 - e^{-Δ}) π_x)

    Args:
        log_score: log s_y, [*B, N], float32, bfloat16, float16 or float64. Entry y = x_t is ignored, whatever it holds.
        x_t: the current tokens, [*B], int64, in [0, N).
        dsigma: Δ > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        denoise: the last step (Δ = σ̄(ε)): MASK, where the process has one, gets probability 0.

    Returns:
        Normalised probabilities [*B, N], float32 (float64 for float64 log-scores). Without gradient. A token with
        π_x = 0 (unmasked, absorbing) stays with probability 1.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), Δ is NaN, infinite or not above 0, or a row's
            probabilities have no finite sum above 0 (NaN or overflowing log-scores).

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 4.2, eq. 19; clamped at 0 and normalised.
    """
    arguments = _arguments("tweedie", log_score, x_t, dsigma, process, log_score_shift, denoise)
    result: Tensor = torch.ops.sedd_ext.reverse_probs(*arguments)
    return result


def tweedie_sample(
    log_score: Tensor,
    x_t: Tensor,
    dsigma: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a position from :func:`tweedie_probs`, without making the probabilities.

    One pass over the log-scores gives sums of blocks; one random number of 53 bits a row picks a block, and a second
    look at that block alone the token: exact to float64 sums, however rare the token. Where the clamp at 0 takes
    something from the token picked, another random number decides whether it stands; a row where it does not is read
    once more. The same generator state gives the same tokens, whatever the number of threads.

    Args:
        log_score: as for :func:`tweedie_probs`.
        x_t: as for :func:`tweedie_probs`.
        dsigma: as for :func:`tweedie_probs`.
        process: as for :func:`tweedie_probs`.
        log_score_shift: as for :func:`tweedie_probs`.
        denoise: as for :func:`tweedie_probs`.
        temperature: makes the choice among tokens sharper (below 1) or flatter: where a position goes to if it jumps,
            p(y | y ≠ x)^(1/temperature), normalised. Whether it jumps is left as it is, and with it the schedule. 1 is
            the papers' law.
        top_p: a position that jumps goes to one of the fewest, most probable tokens that hold this much of it. Unless
            both are 1, the probabilities are made after all.
        generator: random number generator on the tensors' device; torch's default one if None.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError, ValueError: as :func:`tweedie_probs`; ``temperature`` or ``top_p`` is out of its range.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 19.
    """
    arguments = _arguments("tweedie", log_score, x_t, dsigma, process, log_score_shift, denoise)
    return _draw(arguments, temperature, top_p, generator)


def euler_probs(
    log_score: Tensor,
    x_t: Tensor,
    step: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
) -> Tensor:
    """Probabilities of one Euler (τ-leaping) step.

    With s = exp(log_score)::

        p(y) = Δt σ(t) π_x s_y for y ≠ x,   p(x) = max(0, 1 - Σ_{y≠x} p(y)),   then normalised

    Args:
        log_score: log s_y, [*B, N], float32, bfloat16, float16 or float64. Entry y = x_t is ignored, whatever it holds.
        x_t: the current tokens, [*B], int64, in [0, N).
        step: Δt σ(t) > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        denoise: the last step: MASK, where the process has one, gets probability 0.

    Returns:
        Normalised probabilities [*B, N], float32 (float64 for float64 log-scores). Without gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), the step is NaN, infinite or not above 0, or a
            row's probabilities have no finite sum above 0 (NaN or overflowing log-scores).

    Source: SEDD (Lou, Meng & Ermon 2024), eq. 17; clamped at 0 and normalised.
    """
    arguments = _arguments("euler", log_score, x_t, step, process, log_score_shift, denoise)
    result: Tensor = torch.ops.sedd_ext.reverse_probs(*arguments)
    return result


def euler_sample(
    log_score: Tensor,
    x_t: Tensor,
    step: Tensor | float,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a position from :func:`euler_probs`, without making the probabilities.

    As exact, and as reproducible, as :func:`tweedie_sample`.

    Args:
        log_score: as for :func:`euler_probs`.
        x_t: as for :func:`euler_probs`.
        step: as for :func:`euler_probs`.
        process: as for :func:`euler_probs`.
        log_score_shift: as for :func:`euler_probs`.
        denoise: as for :func:`euler_probs`.
        temperature: as for :func:`tweedie_sample`.
        top_p: as for :func:`tweedie_sample`.
        generator: random number generator on the tensors' device; torch's default one if None.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError, ValueError: as :func:`euler_probs`.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2 with eq. 17.
    """
    arguments = _arguments("euler", log_score, x_t, step, process, log_score_shift, denoise)
    return _draw(arguments, temperature, top_p, generator)
