"""Reverse steps: their probabilities, and samples from them in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._dispatch import (
    DTYPES,
    FAMILIES,
    STEPS,
    check_log_score,
    check_process,
    check_same_device,
    check_tokens,
    compute_dtype,
    contiguous,
    draw_seed,
    empty_beside,
    fresh,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from ._operators import OPERATORS, define
from .process import RankOne
from .reverse_mean import check_score, mean_numbers
from .step import NOISE_NAME, MeanStep, check_step

__all__ = ["reverse_probs", "reverse_sample"]

_ARGUMENTS = (
    "Tensor log_score, Tensor x_t, Tensor noise, Tensor? log_score_shift, Tensor? stationary, "
    "str family, str step, int forbidden"
)


def _launch(
    kernel: str,
    out: Tensor,
    seed: Tensor | None,
    log_score: Tensor,
    x_t: Tensor,
    noise: Tensor,
    log_score_shift: Tensor | None,
    stationary: Tensor | None,
    family: str,
    step: str,
    forbidden: int,
) -> Tensor:
    status = launch(
        kernel,
        log_score=log_score.contiguous(),
        x_t=x_t.contiguous(),
        noise=noise.contiguous(),
        shift=contiguous(log_score_shift),
        stationary=contiguous(stationary),
        out=out,
        seed=seed,
        rows=x_t.numel(),
        dim=log_score.size(-1),
        forbidden=forbidden,
        dtype=DTYPES[log_score.dtype],
        family=FAMILIES[family],
        step=STEPS[step],
    )
    if status[0]:
        raise_fault(status, {"x_t": x_t}, log_score.size(-1), (NOISE_NAME[step], noise))
    return out


def _probs_fake(log_score: Tensor, *_: Any) -> Tensor:
    return empty_beside(log_score, compute_dtype(log_score.dtype))


def _probs(log_score: Tensor, *rest: Any) -> Tensor:
    return _launch("reverse_probs", fresh(_probs_fake(log_score)), None, log_score, *rest)


def _sample_fake(log_score: Tensor, x_t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_t, memory_format=torch.contiguous_format)


def _sample(log_score: Tensor, x_t: Tensor, *rest: Any) -> Tensor:
    *arguments, seed = rest
    return _launch("reverse_sample", _sample_fake(log_score, x_t), seed, log_score, x_t, *arguments)


define(f"reverse_probs({_ARGUMENTS}) -> Tensor", _probs, _probs_fake)
define(f"reverse_sample({_ARGUMENTS}, Tensor seed) -> Tensor", _sample, _sample_fake)


def check_tempering(temperature: object, top_p: object) -> bool:
    """Checks the two options. Returns whether one of them has an effect."""
    if not isinstance(temperature, (int, float)) or not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature!r}")
    if not isinstance(top_p, (int, float)) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    return temperature != 1.0 or top_p != 1.0


def draw_tempered(probs: Tensor, x_t: Tensor, temperature: float, top_p: float, uniforms: Tensor) -> Tensor:
    """Draws from probabilities [R, N] with ``temperature`` and ``top_p``, see :func:`reverse_sample`.

    Args:
        probs: the probabilities.
        x_t: the current tokens [R].
        temperature: above 0.
        top_p: in (0, 1].
        uniforms: two numbers per row in [0, 1), float64 [2, R]: the first decides whether the token changes, the second
            selects the new one.
    """
    bad = probs.isnan().any(dim=1)  # CUDA kernels mark rows without a distribution this way
    at_x = x_t.clamp(0, probs.shape[1] - 1)[:, None]
    jump = probs.double()
    stay = jump.gather(1, at_x).squeeze(1)
    jump = jump.scatter(1, at_x, 0.0)
    jump = (jump / jump.amax(dim=1, keepdim=True)).pow(1.0 / temperature)
    entries = None
    if top_p < 1.0:
        jump, entries = jump.sort(dim=1, descending=True, stable=True)
    ends = jump.cumsum(dim=1)
    if top_p < 1.0:  # the fewest entries that hold top_p of the total: those whose sum starts below it
        ends = torch.where(ends - jump < top_p * ends[:, -1:], ends, 0.0).cummax(dim=1).values
    total = ends[:, -1:].contiguous()
    # if rounding moves the target to the end: the last entry with a weight above 0
    place = torch.searchsorted(ends, uniforms[1][:, None] * total, right=True).minimum(torch.searchsorted(ends, total))
    token = (place if entries is None else entries.gather(1, place)).squeeze(1)
    return torch.where(bad, -1, torch.where(uniforms[0] >= stay, token, x_t))


def _mean_arguments(
    log_score: Tensor,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    log_score_shift: Tensor | float | None,
    denoise: bool,
    sigma: Tensor | float | None,
) -> tuple[Any, ...]:
    process = check_process(process)
    log_score = check_log_score(log_score, process)
    x_t = check_tokens("x_t", x_t, log_score.shape[:-1])
    check_same_device(log_score=log_score, x_t=x_t)
    return log_score.detach(), *mean_numbers(x_t, step, process, sigma, log_score_shift, denoise, log_score.dtype)


def _arguments(
    log_score: Tensor,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    log_score_shift: Tensor | float | None,
    denoise: bool,
) -> tuple[Any, ...]:
    process, step = check_process(process), check_step(step)
    log_score = check_log_score(log_score, process)
    batch, device = log_score.shape[:-1], log_score.device
    x_t = check_tokens("x_t", x_t, batch)
    return (
        log_score.detach(),
        x_t,
        per_row(NOISE_NAME[step.name], step.noise, batch, device),
        None if log_score_shift is None else per_row("log_score_shift", log_score_shift, batch, device),
        stationary_for(process, log_score.dtype, device),
        process.family,
        step.name,
        process.mask_id if denoise and process.mask_id is not None else -1,
    )


def reverse_probs(
    log_score: Tensor,
    x_t: Tensor,
    step: MeanStep,
    process: RankOne,
    *,
    log_score_shift: Tensor | float | None = None,
    denoise: bool = False,
    parameterization: Literal["score", "mean"] = "score",
    sigma: Tensor | float | None = None,
) -> Tensor:
    """Probabilities of one reverse step at every position.

    Args:
        log_score: log s_y, [*B, N], float32, bfloat16, float16 or float64. The entry y = x_t is ignored.
        x_t: the current tokens, [*B], int64, in [0, N).
        step: :class:`Tweedie(dsigma) <sedd_ext.Tweedie>` or :class:`Euler(step) <sedd_ext.Euler>`; their
            documentation has the formulas.
        process: the process; ``process.dim`` is N.
        log_score_shift: subtracted from every log-score of its row; a number or a floating-point tensor that broadcasts
            to [*B].
        denoise: for the last step: MASK, if the process has one, gets probability 0.
        parameterization: ``"score"`` or ``"mean"``. With ``"mean"`` the first argument holds logits, and μ =
            softmax(logits) over all tokens but MASK predicts the clean token. The step is then the posterior
            Σ_k μ_k q(x_s | x_t, x_0 = k) (Tweedie), the Euler step with the score that μ implies, or
            :class:`GeneralizedMasked(s, t, power) <sedd_ext.GeneralizedMasked>`.
        sigma: for ``"mean"``: the total noise σ̄ at the current time, a number or a floating-point tensor that
            broadcasts to [*B]; at least ``dsigma`` for Tweedie. None for ``"score"`` and for ``GeneralizedMasked``.

    Returns:
        Normalised probabilities [*B, N], float32 (float64 for float64 log-scores), without gradient. A token with
        π_x = 0 (an unmasked token of absorbing diffusion) stays with probability 1.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, a token lies outside [0, N), the noise of the step (``dsigma`` or ``step``) is
            NaN, infinite or not above 0, or a row's probabilities have no finite sum above 0 (NaN or overflowing
            log-scores).

    Source: SEDD (Lou, Meng & Ermon 2024), eq. 17 (Euler) and eq. 19 (Tweedie).
    """
    if parameterization == "mean":
        mean = _mean_arguments(log_score, x_t, step, process, log_score_shift, denoise, sigma)
        probs: Tensor = OPERATORS.reverse_mean_probs(*mean)
        return probs
    if parameterization != "score" or sigma is not None:
        check_score(parameterization, sigma)
    arguments = _arguments(log_score, x_t, step, process, log_score_shift, denoise)
    result: Tensor = OPERATORS.reverse_probs(*arguments)
    return result


def reverse_sample(
    log_score: Tensor,
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
) -> Tensor:
    """Draws a token for every position from :func:`reverse_probs`, without computing the probabilities.

    The kernel reads the log-scores once and keeps the sums of blocks. One random number of 53 bits per row selects a
    block, and only this block is read again to find the token. The distribution is exact to float64 sums, also for rare
    tokens. Where the clamp at 0 changes the weight of the drawn token, another random number accepts or rejects it, and
    a rejected row is read once more. The same generator state gives the same tokens, whatever the number of threads.

    Args:
        log_score: as for :func:`reverse_probs`.
        x_t: as for :func:`reverse_probs`.
        step: as for :func:`reverse_probs`.
        process: as for :func:`reverse_probs`.
        log_score_shift: as for :func:`reverse_probs`.
        denoise: as for :func:`reverse_probs`.
        parameterization: as for :func:`reverse_probs`. Draws from a mean prediction reject nothing.
        sigma: as for :func:`reverse_probs`.
        temperature: makes the distribution of a token that changes sharper (below 1) or flatter (above 1):
            p(y | y ≠ x)^(1/temperature), normalised. Whether a token changes does not depend on it. 1 is the papers'
            distribution.
        top_p: a token that changes becomes one of the fewest, most probable tokens that hold this share of the
            probability. If ``temperature`` or ``top_p`` is not 1, the probabilities are computed.
        generator: random number generator on the tensors' device; torch's default one if None.

    Returns:
        Tokens [*B], int64.

    Raises:
        TypeError, ValueError: as :func:`reverse_probs`; ``temperature`` or ``top_p`` is out of its range.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 2.
    """
    if parameterization == "mean":
        arguments = _mean_arguments(log_score, x_t, step, process, log_score_shift, denoise, sigma)
        if not check_tempering(temperature, top_p):
            drawn: Tensor = OPERATORS.reverse_mean_sample(*arguments, draw_seed(generator, x_t.device))
            return drawn
        operator = OPERATORS.reverse_mean_probs
    else:
        if parameterization != "score" or sigma is not None:
            check_score(parameterization, sigma)
        arguments = _arguments(log_score, x_t, step, process, log_score_shift, denoise)
        if not check_tempering(temperature, top_p):
            result: Tensor = OPERATORS.reverse_sample(*arguments, draw_seed(generator, x_t.device))
            return result
        operator = OPERATORS.reverse_probs
    draw_seed(generator, x_t.device)  # checks the generator
    probs = operator(*arguments).view(-1, log_score.shape[-1])
    uniforms = torch.rand(2, x_t.numel(), dtype=torch.float64, device=x_t.device, generator=generator)
    return draw_tempered(probs, x_t.reshape(-1), temperature, top_p, uniforms).view(x_t.shape)
