"""Training objectives, found by name in :data:`OBJECTIVES`, and the times of a training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.diffusion import Diffusion, Objective
from sedd_ext import RankOne, linear_score_entropy_loss, score_entropy_loss

__all__ = ["OBJECTIVES", "ScoreEntropy", "sample_times"]


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


class ScoreEntropy(Objective):
    """Diffusion-weighted denoising score entropy: σ(t) Σ_i L(x_t^i, x_0^i) for each sequence.

    Positions whose token has π_x = 0 (for absorbing processes: all but MASK) have loss 0, whatever the network says. So
    the head, which is most of the work of a small network, runs at the other positions only. A linear head runs tile by
    tile, and no log-scores of the whole vocabulary are stored.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithm 1 and equation 10.
    """

    def loss(
        self, diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: Tensor, *, given: int, scale: float, fused: bool
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Diffusion.loss`."""
        network, process, schedule = diffusion.network, diffusion.process, diffusion.schedule
        sigma, rate = schedule.total(t), scale * schedule.rate(t)
        hidden = network.hidden(x_t, sigma)[:, given:]
        x_0, x_t = x_0[:, given:], x_t[:, given:]
        shift = diffusion.log_score_shift(sigma.unsqueeze(-1), x_t)
        head = network.head_parameters() if fused else None
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
            network.head(hidden.flatten(0, 1).index_select(0, rows)),
            x_t.flatten()[rows],
            x_0.flatten()[rows],
            sigma[sequence],
            process,
            log_score_shift=None if shift is None else shift.expand_as(x_t).flatten()[rows],
        )
        total = loss.new_zeros(x_0.shape[0]).index_add(0, sequence, loss)
        return (rate * total).float()


def _scored_rows(x_t: Tensor, process: RankOne) -> Tensor:
    """Indices into the flattened x_t [B, L] of the tokens that the process can produce: π_x > 0."""
    if process.family == "uniform":
        return torch.arange(x_t.numel(), device=x_t.device)
    if process.family == "absorbing":
        return (x_t.flatten() == process.dim - 1).nonzero().squeeze(1)
    return (process.stationary > 0).to(x_t.device)[x_t.flatten()].nonzero().squeeze(1)


OBJECTIVES: dict[str, type[Objective]] = {"score_entropy": ScoreEntropy, "autoregressive": Autoregressive}
"""All objectives by name. To add one, write a subclass of :class:`sedd.diffusion.Objective` and name it here."""
