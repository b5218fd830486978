"""Samplers: from noise to text, around given tokens if there are any. Found by name in :data:`SAMPLERS`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.orders import (
    AutoregressiveSampler,
    ConfidenceSampler,
    EntropyBoundedSampler,
    EntropySampler,
    FirstHittingSampler,
    GreedySampler,
    MarginSampler,
    SemiAutoregressiveSampler,
)
from sedd.diffusion.reverse_steps import (
    AncestralSampler,
    CosineTweedieSampler,
    EulerSampler,
    PredictorCorrectorSampler,
    RemaskSampler,
    TweedieSampler,
)
from sedd.diffusion.sampler import Sampler
from sedd.diffusion.walk import Walk
from sedd.options import check_guidance
from sedd.progress import track
from sedd_ext import RankOne

__all__ = ["SAMPLERS", "find_sampler", "sample"]

SAMPLERS: dict[str, type[Sampler]] = {
    "tweedie": TweedieSampler,
    "tweedie_cosine": CosineTweedieSampler,
    "euler": EulerSampler,
    "ancestral": AncestralSampler,
    "remask": RemaskSampler,
    "predictor_corrector": PredictorCorrectorSampler,
    "first_hitting": FirstHittingSampler,
    "entropy_bounded": EntropyBoundedSampler,
    "confidence": ConfidenceSampler,
    "margin": MarginSampler,
    "entropy": EntropySampler,
    "greedy": GreedySampler,
    "semi_autoregressive": SemiAutoregressiveSampler,
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
        given = next((name for name, kind in SAMPLERS.items() if kind is type(found)), type(found).__name__)
        raise ValueError(f"sampler: expected {known} for {kind}, got {given!r}")
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
    whole_batch: bool = False,
    labels: Tensor | None = None,
    guidance: float = 1.0,
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
        on_step: called after each step with the number of steps done, the most that there can be, and the tokens so far
            [B, L].
        progress: show a progress bar.
        autocast_dtype: run the network under autocast in this dtype, e.g. torch.bfloat16.
        whole_batch: all positions go through network and head in every step, so that no step waits for a GPU; see
            :class:`sedd.diffusion.walk.Walk`.
        labels: for a network with classes: the class of each sequence [B], int64; None to sample without classes.
        guidance: classifier-free guidance: above 1, sequences that are more typical of their class; 1 samples the
            model's distribution of the class, 0 that without classes. See :class:`sedd.diffusion.walk.Walk`.

    Returns:
        Tokens [B, L], int64.

    Raises:
        ValueError: a count below 1, an unknown sampler or one for other models, or ``fixed`` that does not fit: wrong
            shape, a token outside the vocabulary, MASK as a given token, nothing left to sample, or, for an
            autoregressive model, a given token after a gap.
        TypeError: ``fixed`` is not an int64 and a bool tensor.
        ImportError: ``progress`` without rich.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithms 2 and 3; guidance from Ho & Salimans 2022, on the
        log-probabilities of tokens.
    """
    sampler = find_sampler(diffusion, sampler, steps)
    for name, value in (("batch", batch), ("length", length), ("steps", sampler.steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    process = diffusion.process
    device = torch.device(device) if device is not None else diffusion.device
    x = process.sample_limit((batch, length), generator=generator, device=device)
    free = torch.ones_like(x, dtype=torch.bool)
    if fixed is not None:
        tokens, is_fixed = _checked(fixed, process, batch, length)
        x = torch.where(is_fixed.to(device), tokens.to(device), x).contiguous()
        free = ~is_fixed.to(device)
    if labels is not None:
        labels = _checked_labels(labels, batch).to(device)
        if diffusion.objective.autoregressive:
            raise ValueError("labels: expected none for an autoregressive model, got some")
    check_guidance(guidance)
    if guidance != 1 and (labels is None or diffusion.network.head_parameters() is None):
        raise ValueError(f"guidance: expected 1 without labels or without a linear head, got {guidance}")
    walk = Walk(
        diffusion,
        x,
        free,
        temperature=temperature,
        top_p=top_p,
        fused=fused,
        generator=generator,
        autocast_dtype=autocast_dtype,
        whole_batch=whole_batch,
        labels=labels,
        guidance=guidance,
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
                taken = next(steps_taken, None)
            if taken is None:  # fewer steps were enough
                break
            x = taken
            if on_step is not None:
                on_step(i + 1, total, x.clone())
    return x


def _checked_labels(labels: Tensor, batch: int) -> Tensor:
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ValueError(f"labels: expected an int64 tensor [{batch}], got {labels.dtype} {list(labels.shape)}")
    return labels


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
