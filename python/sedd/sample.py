"""Sampling and infilling: from noise to text in any number of reverse steps, found by name in :data:`SAMPLERS`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd.model import ScoreModel, device_of
from sedd.progress import track
from sedd.schedule import Schedule
from sedd_ext import RankOne, euler_sample, tweedie_sample

__all__ = ["SAMPLERS", "euler", "sample", "tweedie"]

T_END = 1e-5
"""Where the reverse steps end and the denoising step starts, as in the released code."""


def tweedie(
    log_score: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    graph: RankOne,
    schedule: Schedule,
    *,
    log_score_shift: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step t → t_next of the Tweedie τ-leaping denoiser (equation 19 of the SEDD paper).

    Args:
        log_score: log-scores of the positions to draw [R, N], not yet shifted.
        x_t: their tokens [R].
        t: the time, a float64 scalar.
        t_next: the earlier time to go to, a float64 scalar.
        graph: the process.
        schedule: its noise schedule.
        log_score_shift: subtracted from each row's log-scores [R].
        generator: random number generator.

    Returns:
        Tokens at time t_next [R].
    """
    dsigma = float(schedule.total(t) - schedule.total(t_next))
    return tweedie_sample(log_score, x_t, dsigma, graph, log_score_shift=log_score_shift, generator=generator)


def euler(
    log_score: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    graph: RankOne,
    schedule: Schedule,
    *,
    log_score_shift: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step t → t_next of Euler's method (equation 17 of the SEDD paper). Arguments as :func:`tweedie`."""
    step = float((t - t_next) * schedule.rate(t))
    return euler_sample(log_score, x_t, step, graph, log_score_shift=log_score_shift, generator=generator)


Sampler = Callable[..., Tensor]

SAMPLERS: dict[str, Sampler] = {"tweedie": tweedie, "euler": euler}
"""Every reverse step by its name. To add one: write a function with the signature of :func:`tweedie`, name it here."""


def sample(
    model: ScoreModel,
    graph: RankOne,
    schedule: Schedule,
    *,
    batch: int,
    length: int,
    steps: int,
    sampler: str = "tweedie",
    denoise: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    fixed: tuple[Tensor, Tensor] | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    progress: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws text from the model, around given tokens if there are any.

    Starts at t = 1 from the process's stationary distribution, takes ``steps`` reverse steps of equal size down to
    t = 1e-5 and one denoising step (Tweedie's, whatever the sampler). Only positions that can still change go through
    head and sampler: those not fixed and, for an absorbing process, still masked. When none is left the model rests.

    Args:
        model: the score model. Used in evaluation mode and left in the mode it was in.
        graph: the forward process the model was trained for.
        schedule: its noise schedule.
        batch: number of sequences B.
        length: tokens in each, L.
        steps: number of reverse steps, at least 1. Fewer are faster, more are better.
        sampler: a key of :data:`SAMPLERS`.
        denoise: take the final step from t = 1e-5 to 0. Without it, an absorbing process may leave MASK tokens.
        generator: random number generator, on the model's device; torch's default one if None.
        device: where to sample; the model's device if None.
        fixed: infilling: tokens ([L] or [B, L], int64) and where they are given ([L] or [B, L], bool). They hold their
            places in every step and in the result; the tokens elsewhere are ignored.
        on_step: called after each step with the number of steps done, their number in all (the denoising step counted)
            and the tokens so far [B, L].
        progress: show a progress bar.
        autocast_dtype: run the model under autocast in this dtype, e.g. torch.bfloat16.

    Returns:
        Tokens [B, L], int64.

    Raises:
        ValueError: a count below 1, an unknown sampler, or ``fixed`` that does not fit: wrong shape, a token that is
            not in the vocabulary, MASK as a given token, nothing left to sample.
        TypeError: ``fixed`` is not an int64 and a bool tensor.
        ImportError: ``progress`` without rich.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithms 2 and 3.
    """
    for name, value in (("batch", batch), ("length", length), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")
    device = torch.device(device) if device is not None else device_of(model)
    x = graph.sample_limit((batch, length), generator=generator, device=device)
    free = torch.ones_like(x, dtype=torch.bool)
    if fixed is not None:
        tokens, is_fixed = _checked(fixed, graph, batch, length)
        x = torch.where(is_fixed.to(device), tokens.to(device), x).contiguous()
        free = ~is_fixed.to(device)

    times = torch.linspace(1.0, T_END, steps + 1, dtype=torch.float64)
    total = steps + int(denoise)
    training = model.training
    model.train(False)
    try:
        for i in track(range(total), "sampling", progress):
            changing = free & (x == graph.mask_id) if graph.process == "absorbing" else free
            rows = changing.flatten().nonzero().squeeze(1)
            if rows.numel():
                with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                    x.view(-1)[rows] = _step(model, x, rows, times[i:], SAMPLERS[sampler], graph, schedule, generator)
            if on_step is not None:
                on_step(i + 1, total, x.clone())
    finally:
        model.train(training)
    return x


@torch.inference_mode()
def _step(
    model: ScoreModel,
    x: Tensor,
    rows: Tensor,
    times: Tensor,
    sampler: Sampler,
    graph: RankOne,
    schedule: Schedule,
    generator: torch.Generator | None,
) -> Tensor:
    """New tokens for the rows (indices into the flattened x) when going from times[0] to times[1], or to 0 if last."""
    sigma = schedule.total(times[0]).expand(x.shape[0]).to(x.device)
    shift = model.log_score_shift(sigma)
    if shift is not None:
        shift = shift[rows // x.shape[1]]
    log_score = model.head(model.hidden(x, sigma).flatten(0, 1)[rows])
    x_t = x.flatten()[rows]
    if len(times) > 1:
        return sampler(log_score, x_t, times[0], times[1], graph, schedule, log_score_shift=shift, generator=generator)
    return tweedie_sample(
        log_score, x_t, float(sigma[0]), graph, log_score_shift=shift, denoise=True, generator=generator
    )


def _checked(fixed: tuple[Tensor, Tensor], graph: RankOne, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Checks the given tokens of an infilling and expands them to [B, L]."""
    tokens, is_fixed = fixed
    for name, tensor, dtype in (("tokens", tokens, torch.int64), ("positions", is_fixed, torch.bool)):
        if tensor.dtype != dtype:
            raise TypeError(f"fixed: expected the {name} as a {dtype} tensor, got {tensor.dtype}")
        if tuple(tensor.shape) not in ((length,), (batch, length)):
            raise ValueError(
                f"fixed: expected the {name} as [{length}] or [{batch}, {length}], got {list(tensor.shape)}"
            )
    tokens, is_fixed = tokens.expand(batch, length), is_fixed.to(tokens.device).expand(batch, length)
    given = tokens[is_fixed]
    if bool(((given < 0) | (given >= graph.dim)).any()):
        raise ValueError(
            f"fixed: expected tokens in [0, {graph.dim}), got values from {int(given.min())} to {int(given.max())}"
        )
    if graph.mask_id is not None and bool((given == graph.mask_id).any()):
        raise ValueError(
            f"fixed: the MASK token {graph.mask_id} is no text; leave its position unfixed to have it filled"
        )
    if bool(is_fixed.all()):
        raise ValueError("fixed: every position is given, nothing is left to sample")
    return tokens, is_fixed
