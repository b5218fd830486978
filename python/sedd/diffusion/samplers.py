"""Samplers: from noise to text, around given tokens if there are any. Found by name in :data:`SAMPLERS`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from sedd.diffusion.autoregressive import Reader
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.walk import AnyStep, Walk
from sedd.progress import track
from sedd_ext import Euler, RankOne

__all__ = [
    "SAMPLERS",
    "AutoregressiveSampler",
    "CosineTweedieSampler",
    "EulerSampler",
    "GreedySampler",
    "Sampler",
    "TweedieSampler",
    "find_sampler",
    "sample",
]

T_END = 1e-5
"""Time at which the reverse steps end and the denoising step starts, as in the released code."""


@dataclass(frozen=True)
class Sampler(ABC):
    """Moves sequences from noise to text. A subclass decides on positions, times and steps.

    Attributes:
        steps: number of reverse steps, at least 1. More steps take longer and give better samples.
        autoregressive: whether it is for autoregressive models, and not for diffusion models.
    """

    steps: int
    autoregressive: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """Yields the tokens [B, L] after each step."""

    def check(self, diffusion: Diffusion) -> None:  # noqa: B027 - any model, unless a subclass says otherwise
        """Raises a ValueError if the sampler does not suit the model."""

    def count(self, walk: Walk) -> int:
        """Number of steps that the walk takes, for progress."""
        return self.steps


@dataclass(frozen=True)
class _Steps(Sampler):
    """Reverse steps from t = 1 to t = 1e-5 at all open positions, of equal size, then a denoising Tweedie step.

    Attributes:
        steps: number of reverse steps.
        denoise: take the denoising step. Without it, absorbing processes may leave MASK tokens.
    """

    denoise: bool = True

    @abstractmethod
    def reverse_step(self, schedule: Schedule, t: Tensor, t_next: Tensor) -> AnyStep | None:
        """The step from t to the earlier time t_next, both float64 scalars. None if there is nothing to do."""

    def times(self) -> Tensor:
        """The times between the steps, from 1 to 1e-5, float64."""
        return torch.linspace(1.0, T_END, self.steps + 1, dtype=torch.float64)

    def count(self, walk: Walk) -> int:
        return self.steps + int(self.denoise)

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        times = self.times()
        for t, t_next in pairwise(times):
            step = self.reverse_step(walk.schedule, t, t_next)
            if step is not None:
                walk.step(t, step)
            yield walk.tokens
        if self.denoise:
            step = walk.schedule.reverse_step(times[-1], None)
            if step is not None:
                walk.step(times[-1], step, denoise=True)
            yield walk.tokens


class TweedieSampler(_Steps):
    """Tweedie τ-leaping: the best step that moves positions independently. Source: SEDD, equation 19."""

    def reverse_step(self, schedule: Schedule, t: Tensor, t_next: Tensor) -> AnyStep | None:
        """Δ = σ̄(t) - σ̄(t_next)."""
        return schedule.reverse_step(t, t_next)


class CosineTweedieSampler(TweedieSampler):
    """Tweedie steps between the times cos(π/2 (1 - i/T)): short ones near t = 1, where most tokens are noise.

    Source: the cosine grid of MD4 (Shi et al. 2024).
    """

    def times(self) -> Tensor:
        """See :meth:`_Steps.times`."""
        times = torch.sin(math.pi / 2 * torch.linspace(1.0, 0.0, self.steps + 1, dtype=torch.float64))
        return times.clamp(min=T_END)


class EulerSampler(_Steps):
    """Euler's method. Source: SEDD, equation 17."""

    def check(self, diffusion: Diffusion) -> None:
        """The schedule must have one rate for all tokens."""
        diffusion.schedule.rate(torch.ones(()))

    def reverse_step(self, schedule: Schedule, t: Tensor, t_next: Tensor) -> Euler:
        """Δt σ(t)."""
        return Euler(float((t - t_next) * schedule.rate(t)))


@dataclass(frozen=True)
class GreedySampler(Sampler):
    """Greedy decoding: each step fixes the most probable token at the positions where the model is surest.

    Every step computes the distribution of the clean token at all positions. n positions in k steps are fixed n/k at a
    time, at the times 1, 1 - 1/k, ..., 1/k; there are at most n steps. This suits absorbing noise. Where noise looks
    like text, a model near t = 1 takes given tokens for noise too.

    Source: Deschenaux & Gulcehre 2024, appendix A.2, for greedy decoding; they do not define the order, which is ours.
    """

    def count(self, walk: Walk) -> int:
        """At most one step for each free position."""
        return min(self.steps, int(walk.free.sum(1).max()))

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        steps, where = self.count(walk), walk.free
        size = where.sum(1)  # of each sequence
        for i in range(steps):
            t = 1 - i / steps
            step = walk.schedule.reverse_step(torch.tensor(t, dtype=torch.float64), None)
            assert step is not None
            best, token = walk.probs(where, t, step, denoise=True).max(-1)
            surest = torch.full(where.shape, -1.0, dtype=best.dtype, device=best.device).masked_scatter(where, best)
            surest = torch.where(walk.free, surest, -1.0)
            rank = surest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            wanted = size * (i + 1) // steps - size * i // steps
            fixed = walk.free & (rank < wanted[:, None])
            tokens = torch.zeros_like(walk.tokens).masked_scatter(where, token)
            walk.write(fixed, tokens[fixed])
            walk.free = walk.free & ~fixed
            yield walk.tokens


@dataclass(frozen=True)
class AutoregressiveSampler(Sampler):
    """Writes from left to right, each token from its distribution given those before it. For autoregressive models.

    Attributes:
        steps: of no effect: there is a step for each token.
        cached: keep the keys and values of what has been read.
    """

    cached: bool = True
    autoregressive: ClassVar[bool] = True

    def count(self, walk: Walk) -> int:
        """A step for each position after the shortest given beginning.

        Raises:
            ValueError: a token after a free position is given.
        """
        if bool((walk.free[:, :-1] & ~walk.free[:, 1:]).any()):
            raise ValueError(
                "fixed: expected given tokens at the beginning only, got some after a gap; an autoregressive model "
                "cannot fill gaps, it continues a text"
            )
        return int(walk.free.sum(1).max())

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        length = walk.tokens.shape[1]
        reader = Reader(walk.diffusion, length, cached=self.cached)
        for position in range(length - self.count(walk), length):
            where = walk.free & (torch.arange(length, device=walk.free.device) == position)
            walk.write(where, walk.choose(reader.logits(walk.tokens, position)[where.any(1)]))
            yield walk.tokens


SAMPLERS: dict[str, type[Sampler]] = {
    "tweedie": TweedieSampler,
    "tweedie_cosine": CosineTweedieSampler,
    "euler": EulerSampler,
    "greedy": GreedySampler,
    "autoregressive": AutoregressiveSampler,
}
"""All samplers by name. To add one, write a subclass of :class:`Sampler` and name it here."""


def find_sampler(diffusion: Diffusion, sampler: str | Sampler | None, steps: int) -> Sampler:
    """The sampler of that name for a model; by default ``tweedie``, or ``autoregressive`` for autoregressive models.

    Raises:
        ValueError: an unknown sampler, or one that does not suit the model.
    """
    autoregressive = diffusion.objective.autoregressive
    if sampler is None:
        sampler = "autoregressive" if autoregressive else "tweedie"
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")
    found = SAMPLERS[sampler](steps) if isinstance(sampler, str) else sampler
    if found.autoregressive != autoregressive:
        known = ", ".join(repr(name) for name, kind in SAMPLERS.items() if kind.autoregressive == autoregressive)
        kind = "an autoregressive model" if autoregressive else "a diffusion model"
        raise ValueError(f"sampler: expected {known} for {kind}, got {sampler!r}")
    found.check(diffusion)
    return found


def sample(
    diffusion: Diffusion,
    *,
    batch: int,
    length: int,
    steps: int = 128,
    sampler: str | Sampler | None = None,
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
    """Draws sequences from the model, around given tokens if there are any.

    Starts at t = 1 from the process's stationary distribution and follows the sampler to t = 0. Only positions that can
    still change go through head and sampler.

    Args:
        diffusion: the model. Used in evaluation mode and left in the mode it was in.
        batch: number of sequences B.
        length: tokens in each, L.
        steps: number of reverse steps, at least 1.
        sampler: a key of :data:`SAMPLERS`, or a :class:`Sampler`, which has its own ``steps``. None: ``tweedie``, or
            ``autoregressive`` for an autoregressive model, which writes one token per step and ignores ``steps``.
        temperature: sharpens (below 1) or flattens which token a position changes to, see
            :func:`sedd_ext.reverse_sample`. 1 is the papers' law.
        top_p: a position changes to one of the fewest, most probable tokens that hold this much of the probability.
        fused: draw from a linear head tile by tile, without log-scores of the whole vocabulary.
        generator: random number generator, on the model's device; torch's default one if None.
        device: where to sample; the model's device if None.
        fixed: infilling: tokens ([L] or [B, L], int64) and where they are given ([L] or [B, L], bool). They keep their
            places in every step and in the result; the tokens elsewhere are ignored.
        on_step: called after each step with the number of steps done, their number in all, and the tokens so far
            [B, L].
        progress: show a progress bar.
        autocast_dtype: run the network under autocast in this dtype, e.g. torch.bfloat16.

    Returns:
        Tokens [B, L], int64.

    Raises:
        ValueError: a count below 1, an unknown sampler or one for other models, or ``fixed`` that does not fit: wrong
            shape, a token outside the vocabulary, MASK as a given token, nothing left to sample, or, for an
            autoregressive model, a given token after a gap.
        TypeError: ``fixed`` is not an int64 and a bool tensor.
        ImportError: ``progress`` without rich.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithms 2 and 3.
    """
    for name, value in (("batch", batch), ("length", length), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    sampler = find_sampler(diffusion, sampler, steps)
    process = diffusion.process
    device = torch.device(device) if device is not None else diffusion.device
    x = process.sample_limit((batch, length), generator=generator, device=device)
    free = torch.ones_like(x, dtype=torch.bool)
    if fixed is not None:
        tokens, is_fixed = _checked(fixed, process, batch, length)
        x = torch.where(is_fixed.to(device), tokens.to(device), x).contiguous()
        free = ~is_fixed.to(device)
    walk = Walk(
        diffusion,
        x,
        free,
        temperature=temperature,
        top_p=top_p,
        fused=fused,
        generator=generator,
        autocast_dtype=autocast_dtype,
    )
    total, training = sampler.count(walk), diffusion.training
    diffusion.train(False)
    # autocast around all steps, as it keeps the weights that it has cast; in inference mode it would not
    with ExitStack() as stack:
        stack.callback(diffusion.train, training)
        stack.enter_context(torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None))
        steps_taken = sampler(walk)
        for i in track(range(total), "sampling", progress):
            with torch.no_grad():
                x = next(steps_taken)
            if on_step is not None:
                on_step(i + 1, total, x.clone())
    return x


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
