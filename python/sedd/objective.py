"""Training objectives: from a batch of text to one number per sequence, found by name in :data:`OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd.model import ScoreModel
from sedd.schedule import Schedule
from sedd_ext import RankOne, linear_score_entropy_loss, sample_transition, score_entropy_loss

__all__ = ["OBJECTIVES", "noised_score_entropy", "sample_times", "score_entropy"]


def sample_times(
    batch: int,
    eps: float = 1e-3,
    antithetic: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the times of a training batch, each uniform on [eps, 1).

    Args:
        batch: number of sequences B.
        eps: the earliest time; nearer to 0 there is hardly anything to denoise.
        antithetic: spread the batch evenly, u_i = (u + i/B) mod 1 with one random u, instead of B independent draws.
            Each time is still uniform, but the batch's mean loss varies less.
        generator: random number generator; torch's default one if None.
        device: where the result lies; the generator's device, else the CPU, if None.

    Returns:
        Times [B], float64.

    Raises:
        ValueError: ``batch`` is not positive or ``eps`` not in [0, 1).

    Source: the evenly spread times are those of VDM (Kingma et al. 2021), appendix I.1.
    """
    if batch < 1:
        raise ValueError(f"batch: expected a positive number of sequences, got {batch}")
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"eps: expected a time in [0, 1), got {eps}")
    if device is None:
        device = generator.device if generator is not None else "cpu"
    u = torch.rand(1 if antithetic else batch, generator=generator, dtype=torch.float64, device=device)
    if antithetic:
        u = (u + torch.arange(batch, dtype=torch.float64, device=device) / batch) % 1.0
    return eps + (1.0 - eps) * u


def score_entropy(
    model: ScoreModel,
    x_0: Tensor,
    t: Tensor,
    process: RankOne,
    schedule: Schedule,
    *,
    scale: float = 1.0,
    fused: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diffusion-weighted denoising score entropy of each sequence at its time: σ(t) Σ_i L(x_t^i, x_0^i).

    Noises the text, runs the model, and scores it. Positions whose token the process cannot have produced (π_x = 0: for
    absorbing, all that are not MASK) have loss zero whatever the model says, and so the head, which is most of the
    work of a small model, runs on the others only; a linear head tile by tile, so that log-scores of the whole
    vocabulary are never there. The expectation over t ~ U(0, 1) is the integral of the likelihood
    bound (:func:`sedd.evaluate.elbo`).

    Args:
        model: the score model, in training or evaluation mode as the caller wants it.
        x_0: text [B, L], int64.
        t: time of each sequence [B], in (0, 1].
        process: the forward process.
        schedule: the noise schedule.
        scale: factor of the result. Gradients are made in the forward pass: a training loss that is a mean had better
            say so here than divide afterwards.
        fused: use :func:`sedd_ext.linear_score_entropy_loss` where the model's head is linear.
        generator: random number generator of the noise; torch's default one if None.

    Returns:
        Nats per sequence times ``scale`` [B], float32, differentiable.

    Raises:
        ValueError: ``x_0`` is not [B, L] or ``t`` not [B]; tokens or times out of range.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithm 1 and equation 10.
    """
    if x_0.dim() != 2:
        raise ValueError(f"x_0: expected a tensor [B, L], got shape {list(x_0.shape)}")
    if t.shape != x_0.shape[:1]:
        raise ValueError(f"t: expected shape [{x_0.shape[0]}], one time for each sequence, got {list(t.shape)}")
    x_t = sample_transition(x_0, schedule.total(t).unsqueeze(-1), process, generator=generator)
    return noised_score_entropy(model, x_0, x_t, t, process, schedule, scale=scale, fused=fused)


def noised_score_entropy(
    model: ScoreModel,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    process: RankOne,
    schedule: Schedule,
    *,
    given: int = 0,
    scale: float = 1.0,
    fused: bool = True,
) -> Tensor:
    """:func:`score_entropy` of text that has been noised already, or of its end, given its beginning.

    Args:
        model, x_0, t, process, schedule, scale, fused: as there.
        x_t: noised text [B, L], int64.
        given: so many tokens at the beginning are read by the model and not scored.

    Returns:
        Nats per sequence times ``scale`` [B], float32, differentiable.
    """
    sigma, rate = schedule.total(t), scale * schedule.rate(t)
    hidden = model.hidden(x_t, sigma)[:, given:]
    x_0, x_t = x_0[:, given:], x_t[:, given:]
    shift = model.log_score_shift(sigma.unsqueeze(-1), x_t)
    head = model.head_parameters() if fused else None
    if head is not None:
        loss = linear_score_entropy_loss(
            hidden,
            *head,
            x_t,
            x_0,
            sigma.unsqueeze(-1),
            process,
            log_score_shift=shift,
            loss_weight=rate.unsqueeze(-1),
        )
        return loss.sum(1).float()
    rows = _scored_rows(x_t, process)
    sequence = rows // x_t.shape[1]
    loss = score_entropy_loss(
        model.head(hidden.flatten(0, 1).index_select(0, rows)),
        x_t.flatten()[rows],
        x_0.flatten()[rows],
        sigma[sequence],
        process,
        log_score_shift=None if shift is None else shift.expand_as(x_t).flatten()[rows],
    )
    total = loss.new_zeros(x_0.shape[0]).index_add(0, sequence, loss)
    return (rate * total).float()


def _scored_rows(x_t: Tensor, process: RankOne) -> Tensor:
    """Indices into the flattened x_t [B, L] of every token that the process can have produced: π_x > 0."""
    if process.family == "uniform":
        return torch.arange(x_t.numel(), device=x_t.device)
    if process.family == "absorbing":
        return (x_t.flatten() == process.dim - 1).nonzero().squeeze(1)
    return (process.stationary > 0).to(x_t.device)[x_t.flatten()].nonzero().squeeze(1)


Objective = Callable[..., Tensor]

OBJECTIVES: dict[str, Objective] = {"score_entropy": score_entropy}
"""Every objective by its name. To add one: write a function with :func:`score_entropy`'s signature, name it here."""
