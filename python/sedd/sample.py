"""Sampling and infilling: from noise to text in any number of reverse steps, found by name in :data:`SAMPLERS`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedd.model import ScoreModel, device_of
from sedd.progress import track
from sedd.schedule import Schedule
from sedd_ext import RankOne, euler_sample, linear_euler_sample, linear_tweedie_sample, tweedie_sample

__all__ = ["SAMPLERS", "Positions", "euler", "sample", "tweedie"]

T_END = 1e-5
"""Where the reverse steps end and the denoising step starts, as in the released code."""


@dataclass(frozen=True)
class Positions:
    """The positions to draw in one step, and how to draw them.

    Attributes:
        model: whose head makes the log-scores, unless it is linear and given as
        linear_head: its weight and bias, to draw without log-scores of the whole vocabulary; or None.
        hidden: states before the head [R, d].
        x_t: tokens [R].
        shift: what is taken off their log-scores, a tensor [1], or None.
        process: the process.
        options: temperature, top_p and generator.
    """

    model: ScoreModel
    linear_head: tuple[Tensor, Tensor | None] | None
    hidden: Tensor
    x_t: Tensor
    shift: Tensor | None
    process: RankOne
    options: dict[str, Any]

    def tweedie(self, dsigma: float, denoise: bool = False) -> Tensor:
        """Tokens [R] after a Tweedie step of :func:`sedd_ext.tweedie_sample`."""
        return self._draw(linear_tweedie_sample, tweedie_sample, dsigma, denoise)

    def euler(self, step: float) -> Tensor:
        """Tokens [R] after an Euler step of :func:`sedd_ext.euler_sample`."""
        return self._draw(linear_euler_sample, euler_sample, step, False)

    def _draw(self, linear: Callable[..., Tensor], plain: Callable[..., Tensor], size: float, denoise: bool) -> Tensor:
        options = {"log_score_shift": self.shift, "denoise": denoise, **self.options}
        if self.linear_head is not None:
            return linear(self.hidden, *self.linear_head, self.x_t, size, self.process, **options)
        return plain(self.model.head(self.hidden), self.x_t, size, self.process, **options)


def tweedie(positions: Positions, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """One reverse step t → t_next of the Tweedie τ-leaping denoiser (equation 19 of the SEDD paper).

    Args:
        positions: what to draw.
        t: the time, a float64 scalar.
        t_next: the earlier time to go to, a float64 scalar.
        schedule: the noise schedule.

    Returns:
        Tokens at time t_next [R].
    """
    return positions.tweedie(float(schedule.total(t) - schedule.total(t_next)))


def euler(positions: Positions, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """One reverse step t → t_next of Euler's method (equation 17 of the SEDD paper). Arguments as :func:`tweedie`."""
    return positions.euler(float((t - t_next) * schedule.rate(t)))


Sampler = Callable[[Positions, Tensor, Tensor, Schedule], Tensor]

SAMPLERS: dict[str, Sampler] = {"tweedie": tweedie, "euler": euler}
"""Every reverse step by its name. To add one: write a function with the signature of :func:`tweedie`, name it here."""


def sample(
    model: ScoreModel,
    process: RankOne,
    schedule: Schedule,
    *,
    batch: int,
    length: int,
    steps: int,
    sampler: str = "tweedie",
    denoise: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    fused: bool = True,
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
    head and sampler: those not fixed and, for an absorbing process, still masked. A sequence without any leaves the
    batch, and a network that is not told the time sees a sequence again only after one of its tokens has changed.

    Args:
        model: the score model. Used in evaluation mode and left in the mode it was in.
        process: the forward process the model was trained for.
        schedule: its noise schedule.
        batch: number of sequences B.
        length: tokens in each, L.
        steps: number of reverse steps, at least 1. Fewer are faster, more are better.
        sampler: a key of :data:`SAMPLERS`.
        denoise: take the final step from t = 1e-5 to 0. Without it, an absorbing process may leave MASK tokens.
        temperature: sharpens (below 1) or flattens which token a position changes to, see
            :func:`sedd_ext.tweedie_sample`. 1 is the papers' law.
        top_p: a position changes to one of the fewest, most probable tokens that hold this much of the probability.
        fused: draw from a linear head tile by tile, without log-scores of the whole vocabulary.
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
    x = process.sample_limit((batch, length), generator=generator, device=device)
    free = torch.ones_like(x, dtype=torch.bool)
    if fixed is not None:
        tokens, is_fixed = _checked(fixed, process, batch, length)
        x = torch.where(is_fixed.to(device), tokens.to(device), x).contiguous()
        free = ~is_fixed.to(device)

    times = torch.linspace(1.0, T_END, steps + 1, dtype=torch.float64)
    total = steps + int(denoise)
    options = {"temperature": temperature, "top_p": top_p, "generator": generator}
    states = _States(model)
    head = model.head_parameters() if fused else None
    if head is not None and autocast_dtype is not None:  # once, not in every step
        weight, bias = (None if tensor is None else tensor.detach().to(autocast_dtype) for tensor in head)
        assert weight is not None
        head = weight, bias
    training = model.training
    model.train(False)
    # around all steps, as autocast keeps the weights that it has cast; in inference mode it would keep none
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None))
        for i in track(range(total), "sampling", progress):
            changing = free & (x == process.mask_id) if process.family == "absorbing" else free
            if bool(changing.any()):
                sigma = schedule.total(times[i : i + 1]).to(device)
                with torch.no_grad():
                    hidden, x_t = states(x, sigma, changing), x[changing]
                    shift = model.log_score_shift(sigma, x_t)
                    positions = Positions(model, head, hidden, x_t, shift, process, options)
                    if i < steps:
                        tokens = SAMPLERS[sampler](positions, times[i], times[i + 1], schedule)
                    else:
                        tokens = positions.tweedie(float(sigma), denoise=True)
                x = x.masked_scatter(changing, tokens)
            if on_step is not None:
                on_step(i + 1, total, x.clone())
    return x


class _States:
    """States before the head of the positions that change, with as few calls of the network as will do."""

    def __init__(self, model: ScoreModel) -> None:
        self.model = model
        self.seen: Tensor | None = None  # [B, L], what the network has seen of each sequence last, and
        self.kept: Tensor | None = None  # [B, L, d], what it gave: kept if the time does not matter

    def __call__(self, x: Tensor, sigma: Tensor, changing: Tensor) -> Tensor:
        """States [R, d] of the positions [B, L] that change."""
        active = changing.any(1)
        if self.model.time_conditioning:
            return self.model.hidden(x[active], sigma)[changing[active]]
        if self.seen is None or self.kept is None:
            self.seen, self.kept = x.clone(), self.model.hidden(x, sigma)
        else:
            stale = active & (x != self.seen).any(1)
            if bool(stale.any()):
                self.seen[stale] = x[stale]
                self.kept[stale] = self.model.hidden(x[stale], sigma)
        return self.kept[changing]


def _checked(fixed: tuple[Tensor, Tensor], process: RankOne, batch: int, length: int) -> tuple[Tensor, Tensor]:
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
    if bool(((given < 0) | (given >= process.dim)).any()):
        raise ValueError(
            f"fixed: expected tokens in [0, {process.dim}), got values from {int(given.min())} to {int(given.max())}"
        )
    if process.mask_id is not None and bool((given == process.mask_id).any()):
        raise ValueError(
            f"fixed: the MASK token {process.mask_id} is no text; leave its position unfixed to have it filled"
        )
    if bool(is_fixed.all()):
        raise ValueError("fixed: every position is given, nothing is left to sample")
    return tokens, is_fixed
