"""Samplers that write clean tokens for good, a few positions at a time, and decide which positions come first."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sedd.diffusion.autoregressive import Reader
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.sampler import GRIDS, Sampler, check_grid, expect
from sedd.diffusion.walk import Walk
from sedd_ext import Unmasked

__all__ = [
    "AutoregressiveSampler",
    "ConfidenceSampler",
    "EntropyBoundedSampler",
    "EntropySampler",
    "FirstHittingSampler",
    "GreedySampler",
    "MarginSampler",
    "SemiAutoregressiveSampler",
]


def _time(walk: Walk, share: Tensor) -> Tensor:
    """The times [B] at which a position of each sequence is noise with ``share`` [B] of the probability at t = 1."""
    most = walk.schedule.moved(torch.ones((), dtype=torch.float64))
    return walk.schedule.time(share * most)


def _places(where: Tensor, values: Tensor) -> Tensor:
    """The place [B, L] of each position in the order of growing ``values`` [R], given at the positions ``where``."""
    filled = torch.full(where.shape, torch.inf, dtype=values.dtype, device=where.device).masked_scatter(where, values)
    return filled.argsort(dim=1, stable=True).argsort(dim=1)


class FirstHittingSampler(Sampler):
    """Unmasks one position of each sequence per network call, at a time drawn from the process: no time step, no error.

    Of n masked positions at time t, the first one leaves MASK at the time s at which 1 - α_s = (1 - α_t) u^(1/n), u
    uniform in [0, 1). It is any of the n with the same probability. This is the limit of :class:`AncestralSampler` for
    many steps, with n calls for n positions. ``steps`` has no effect.

    Source: Zheng et al. 2024, "Masked diffusion models are secretly time-agnostic masked models".
    """

    needs_mask: ClassVar[bool] = True
    needs_rate: ClassVar[bool] = True

    def count(self, walk: Walk) -> int:
        """A step for each free position."""
        return int(walk.free.sum(1).max())

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        share = torch.ones(len(walk.tokens), dtype=torch.float64, device=walk.tokens.device)
        for _ in range(self.count(walk)):
            masked = walk.open()
            share = share * walk.uniform(len(share)) ** (1 / masked.sum(1).clamp(min=1).double())
            chosen = _places(masked, walk.uniform(len(walk.positions(masked)))) == 0
            walk.fill(masked & chosen, _time(walk, share))
            yield walk.tokens


@dataclass(frozen=True)
class EntropyBoundedSampler(Sampler):
    """Unmasks as many positions at once as the entropies allow: where the model is sure, many; where it is not, one.

    A call unmasks, in the order of growing entropy, the longest run of positions whose summed entropy less the largest
    one is at most γ. This bounds the dependence that is lost by drawing them independently. It takes as many calls as
    it needs; ``steps`` has no effect.

    Attributes:
        gamma: γ ≥ 0, in nats. At 0 a call unmasks one position, and those that have no entropy.

    Source: Ben-Hamu et al. 2025, "Accelerated sampling from masked diffusion models via entropy bounded unmasking".
    """

    gamma: float = 0.1
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the parameters."""
        expect("gamma", self.gamma, self.gamma >= 0, "a number of at least 0")

    def count(self, walk: Walk) -> int:
        """At most a step for each free position."""
        return int(walk.free.sum(1).max())

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        size = walk.free.sum(1).clamp(min=1)
        while bool((masked := walk.open()).any()):
            found = walk.unmask(masked, _time(walk, masked.sum(1) / size.double()))
            entropy = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
            entropy = entropy.masked_scatter(masked, found.entropy.double())
            places = _places(masked, found.entropy)
            before = torch.zeros_like(entropy).scatter(1, places, entropy).cumsum(1).gather(1, places) - entropy
            chosen = masked & (before <= self.gamma)
            walk.write(masked, found.token, chosen)
            yield walk.tokens


@dataclass(frozen=True)
class _Ordered(Sampler):
    """n positions in k steps, n/k in each, where the model is surest. At most n steps.

    The network is told the time at which as many positions would be noise as have not been written.

    Attributes:
        steps: k.
        grid: a key of :data:`GRIDS`; n t positions remain after the step to time t, and each step writes at least one.
        noise: times t, the scale of Gumbel noise on the measure of certainty, for more variety.
    """

    grid: str = "uniform"
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Checks the parameters."""
        check_grid(self.grid)
        expect("noise", self.noise, 0 <= self.noise < float("inf"), "a finite number of at least 0")

    @abstractmethod
    def ranked(self, found: Unmasked) -> tuple[Tensor, Tensor]:
        """Tokens to write and how sure the model is of them, both [R]."""

    def count(self, walk: Walk) -> int:
        """At most one step for each free position."""
        return min(self.steps, int(walk.free.sum(1).max()))

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        size = walk.free.sum(1)
        steps = size.clamp(min=1, max=self.steps).double()  # of each sequence, so that the others do not matter
        for i in range(self.count(walk)):
            t, t_next = (GRIDS[self.grid]((1 - j / steps).clamp(min=0)) for j in (i, i + 1))
            where = walk.open()
            # at least one position in each step may take fewer steps
            if not walk.whole_batch and not bool(where.any()):
                return
            tokens, sure = self.ranked(walk.unmask(where, _time(walk, t)))
            if self.noise > 0:
                gumbel = -(-walk.uniform(len(sure)).log()).log()
                sure = sure + self.noise * t[walk.positions(where) // where.shape[1]] * gumbel
            left = where.sum(1)
            wanted = (left - torch.ceil(size * t_next - 1e-6)).clamp(min=1)
            fixed = where & (_places(where, -sure) < wanted[:, None])
            walk.write(where, tokens, fixed)
            walk.free = walk.free & ~fixed
            yield walk.tokens


class ConfidenceSampler(_Ordered):
    """Writes drawn tokens, those of the largest probability first.

    Source: MaskGIT (Chang et al. 2022); LLaDA (Nie et al. 2025), low-confidence remasking.
    """

    needs_mask: ClassVar[bool] = True

    def ranked(self, found: Unmasked) -> tuple[Tensor, Tensor]:
        """By the log-probability of the drawn token."""
        return found.token, found.log_prob


class MarginSampler(_Ordered):
    """Writes drawn tokens, first where the largest probability is furthest above the second largest.

    Source: Kim et al. 2025, "Train for the worst, plan for the best"; Dream's ``topk_margin``.
    """

    needs_mask: ClassVar[bool] = True

    def ranked(self, found: Unmasked) -> tuple[Tensor, Tensor]:
        """By the margin."""
        return found.token, found.margin


class EntropySampler(_Ordered):
    """Writes drawn tokens, first where the distribution has the least entropy. Source: Dream's ``entropy``."""

    needs_mask: ClassVar[bool] = True

    def ranked(self, found: Unmasked) -> tuple[Tensor, Tensor]:
        """By the entropy."""
        return found.token, -found.entropy


class GreedySampler(_Ordered):
    """Greedy decoding: writes the most probable tokens, those of the largest probability first. For any process.

    This suits absorbing noise. Where noise looks like text, a model near t = 1 takes given tokens for noise too.

    Source: Deschenaux & Gulcehre 2024, appendix A.2, for greedy decoding; they do not define the order, which is ours.
    """

    def ranked(self, found: Unmasked) -> tuple[Tensor, Tensor]:
        """By the largest probability."""
        return found.argmax, found.max_prob


@dataclass(frozen=True)
class SemiAutoregressiveSampler(Sampler):
    """Writes blocks from left to right, each by another sampler, which sees the blocks to the right as MASK.

    Attributes:
        steps: steps in all, divided equally among the blocks; at least one for each.
        block: positions in a block.
        sampler: the sampler of the blocks. Its own ``steps`` are of no effect.

    Source: SSD-LM (Han et al. 2023); LLaDA (Nie et al. 2025).
    """

    block: int = 32
    sampler: Sampler = field(default_factory=lambda: ConfidenceSampler(1))
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the parameters."""
        expect("block", self.block, self.block >= 1, "at least 1")
        nested = self.sampler.autoregressive or isinstance(self.sampler, SemiAutoregressiveSampler)
        expect("sampler", type(self.sampler).__name__, not nested, "a sampler that fills blocks")

    def check(self, diffusion: Diffusion) -> None:
        """Both samplers must suit the model."""
        super().check(diffusion)
        self.sampler.check(diffusion)

    def count(self, walk: Walk) -> int:
        """The steps of all blocks."""
        return sum(sampler.count(walk) for sampler in self._blocks(walk))

    def __call__(self, walk: Walk) -> Iterator[Tensor]:
        """See :meth:`Sampler.__call__`."""
        for sampler in self._blocks(walk):
            yield from sampler(walk)

    def _blocks(self, walk: Walk) -> Iterator[Sampler]:
        """The sampler of each block that has free positions. Meanwhile only these are free."""
        free, length = walk.free, walk.tokens.shape[1]
        block = torch.arange(length, device=free.device) // self.block
        numbers = [i for i in range(-(-length // self.block)) if bool(free[:, block == i].any())]
        sampler = dataclasses.replace(self.sampler, steps=max(1, self.steps // len(numbers)))
        for i in numbers:
            walk.free = free & (block == i)
            yield sampler
        walk.free = free


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
