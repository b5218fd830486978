"""Continuations of a context, as evaluation tasks need them: how likely one is, and what greedy decoding writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sedd.diffusion.autoregressive import Reader
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.likelihood import closed_terms, with_onset
from sedd.diffusion.orders import GreedySampler
from sedd.diffusion.walk import Walk

__all__ = ["continuation_bound", "greedy_continuation", "is_greedy", "seed_of"]


def continuation_bound(
    diffusion: Diffusion,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    draws: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Estimates of the bound -log p(continuation | context) ≤ ∫ σ(t) Σ L dt + prior term, one for each noise level.

    Only the continuation diffuses: its tokens are noised and scored, and those of the context stay clean. For the exact
    score of this conditional process, this is theorem 3.6 unchanged. A model trained on whole noised texts approximates
    that score as well as it can infill. The k-th time lies in [k/draws, (k+1)/draws).

    Times and random numbers depend on the seed, the context and the position in the text, but not on the continuation.
    Answers to one question therefore see the same times and, with an absorbing process whose tokens have one schedule,
    the same masks (common random numbers), and their differences have much less noise than the bounds themselves.

    For an autoregressive model, the result is the exact -log p(continuation | context).

    Args:
        diffusion: the model, in evaluation mode.
        context: the tokens before the continuation, possibly none.
        continuation: tokens to score, at least one.
        draws: number of noise levels.
        length: the most tokens that the model takes; context and continuation together must fit.
        seed: seed of the random numbers.
        batch_size: sequences in a call of the model.

    Returns:
        Nats [draws], float64, on the CPU. Their mean is the estimate. [1] for an autoregressive model.

    Raises:
        ValueError: the continuation is empty, or there are more tokens than ``length``.
    """
    n, total = len(continuation), len(context) + len(continuation)
    if not 1 <= n <= total <= length:
        raise ValueError(
            f"continuation: expected at least 1 token, at most {length} with the context, got {n} after {len(context)}"
        )
    device = diffusion.device
    if diffusion.objective.autoregressive:
        whole = torch.tensor([[*context, *continuation]], device=device)
        with torch.no_grad():
            return diffusion.loss(whole, whole, torch.ones(1, device=device), given=len(context)).double().cpu()
    generator = torch.Generator(device).manual_seed(seed_of(seed, context))
    text = torch.tensor([*context, *continuation], device=device)
    places = torch.rand(draws, generator=generator, dtype=torch.float64, device=device)
    own, *before = with_onset(diffusion)
    parts = [(own, (torch.arange(1, draws + 1, device=device) - places) / draws)]
    parts += [(part, 1.0 - places) for part in before]
    # one row is one noise level of a text of full length, so that a place in the text always has the same noise
    padded = torch.zeros(draws, length, dtype=torch.int64, device=device)
    padded[:, :total] = text
    result = closed_terms(diffusion, text[len(context) :]).sum() + torch.zeros(draws, dtype=torch.float64)
    for part, times in parts:
        noised = part.noise(padded, times, generator=generator)[:, :total]
        noised[:, : len(context)] = text[: len(context)]
        for first in range(0, draws, batch_size):
            rows = slice(first, first + batch_size)
            x_t, t = noised[rows].contiguous(), times[rows]
            with torch.no_grad():
                loss = part.loss(text.expand(len(x_t), -1), x_t, t, given=len(context))
            result[rows] += loss.double().cpu()
    return result


@torch.no_grad()
def greedy_continuation(diffusion: Diffusion, context: Sequence[int], n: int, *, seed: int = 0) -> list[int]:
    """Greedy decoding after a context by :class:`GreedySampler`, one token per step.

    All n positions start as noise of the process: MASK if it is absorbing, otherwise random tokens that depend on the
    seed and the context. An autoregressive model writes from left to right instead.

    Args:
        diffusion: the model, in evaluation mode.
        context: the tokens before the continuation, possibly none.
        n: number of tokens to write, at least 1.
        seed: seed of the noise.

    Returns:
        n tokens.
    """
    if diffusion.objective.autoregressive:
        reader, text = Reader(diffusion, len(context) + n), [*context]
        for position in range(len(context), len(context) + n):
            logits = reader.logits(torch.tensor([[*text, 0]], device=diffusion.device), position)
            text.append(int(logits[0, :-1].argmax()))
        return text[len(context) :]
    walk = _continuation(diffusion, context, n, seed)
    for _ in GreedySampler(n)(walk):
        pass
    tokens: list[int] = walk.tokens[0, len(context) :].tolist()
    return tokens


@torch.no_grad()
def is_greedy(diffusion: Diffusion, context: Sequence[int], continuation: Sequence[int], *, seed: int = 0) -> bool:
    """Whether :func:`greedy_continuation` gives exactly these tokens. Stops at the first difference."""
    if diffusion.objective.autoregressive:
        return greedy_continuation(diffusion, context, len(continuation), seed=seed) == list(continuation)
    walk = _continuation(diffusion, context, len(continuation), seed)
    wanted = torch.tensor([[*context, *continuation]], device=walk.tokens.device)
    return all(bool((walk.free | (tokens == wanted)).all()) for tokens in GreedySampler(len(continuation))(walk))


def _continuation(diffusion: Diffusion, context: Sequence[int], n: int, seed: int) -> Walk:
    """A walk that starts from a context and n positions of noise."""
    device = diffusion.device
    generator = torch.Generator(device).manual_seed(seed_of(seed, context))
    noise = diffusion.process.sample_limit((n,), generator=generator, device=device)
    start = torch.tensor(context, dtype=torch.int64, device=device)
    free = torch.arange(len(context) + n, device=device) >= len(context)
    return Walk(diffusion, torch.cat([start, noise])[None], free[None], generator=generator)


def seed_of(seed: int, tokens: Sequence[int]) -> int:
    """A seed that depends on another seed and a text."""
    word = hashlib.blake2b(f"{seed} {list(tokens)}".encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") >> 1
