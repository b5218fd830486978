"""Training objectives, found by name in :data:`OBJECTIVES`, and the times of a training batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.diffusion import Diffusion, Mean, Objective, Parameterization
from sedd_ext import (
    RankOne,
    linear_mean_prediction_loss,
    linear_score_entropy_loss,
    mean_prediction_loss,
    score_entropy_loss,
)

__all__ = ["GIDD", "MD4", "OBJECTIVES", "UDLM", "MeanPrediction", "ScoreEntropy", "sample_times"]


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


class _PositionLoss(Objective):
    """A loss that is a sum over positions: σ(t) Σ_i L(x_t^i, x_0^i) for each sequence.

    Positions whose token has π_x = 0 (for absorbing processes: all but MASK) have loss 0, whatever the network says. So
    the head, which is most of the work of a small network, runs at the other positions only. A linear head is fused
    with the loss, and no output of the whole vocabulary is stored.
    """

    operator: Callable[..., Tensor]
    """Computes L from the head's output at some positions."""
    linear_operator: Callable[..., Tensor]
    """Computes L from hidden states and a linear head."""

    def options(self, diffusion: Diffusion, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """More keyword arguments of the operators, numbers or tensors that broadcast to x_t.

        Args:
            diffusion: the model.
            sigma: total noise, broadcasts to the shape of x_t.
            x_t: noised tokens [*B].
        """
        return {}

    def loss(
        self, diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: Tensor, *, given: int, scale: float, fused: bool
    ) -> Tensor:
        """See :meth:`sedd.diffusion.Diffusion.loss`."""
        network, process, schedule = diffusion.network, diffusion.process, diffusion.schedule
        sigma, rate = schedule.total(t), scale * schedule.rate(t)
        hidden = network.hidden(x_t, sigma)[:, given:]
        x_0, x_t = x_0[:, given:], x_t[:, given:]
        options = self.options(diffusion, sigma.unsqueeze(-1), x_t)
        head = network.head_parameters() if fused else None
        if head is not None:
            options["loss_weight"] = rate.unsqueeze(-1)
            loss = type(self).linear_operator(hidden, *head, x_t, x_0, sigma.unsqueeze(-1), process, **options)
            return loss.sum(1).float()
        rows = _scored_rows(x_t, process)
        sequence = rows // x_t.shape[1]
        loss = type(self).operator(
            network.head(hidden.flatten(0, 1).index_select(0, rows)),
            x_t.flatten()[rows],
            x_0.flatten()[rows],
            sigma[sequence],
            process,
            **{
                name: value.expand_as(x_t).flatten()[rows] if isinstance(value, Tensor) else value
                for name, value in options.items()
            },
        )
        total = loss.new_zeros(x_0.shape[0]).index_add(0, sequence, loss)
        return (rate * total).float()


class ScoreEntropy(_PositionLoss):
    """Diffusion-weighted denoising score entropy of the log-scores, for any process.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithm 1 and equation 10.
    """

    operator = staticmethod(score_entropy_loss)
    linear_operator = staticmethod(linear_score_entropy_loss)

    def options(self, diffusion: Diffusion, sigma: Tensor, x_t: Tensor) -> dict[str, Any]:
        """The shift of the log-scores."""
        return diffusion.step_options(sigma, x_t)


class MeanPrediction(_PositionLoss):
    """Score entropy of a network that predicts the clean token, for any process.

    :class:`MD4`, :class:`UDLM` and :class:`GIDD` are special cases.

    Source: see :func:`sedd_ext.mean_prediction_loss`.
    """

    operator = staticmethod(mean_prediction_loss)
    linear_operator = staticmethod(linear_mean_prediction_loss)

    def parameterization(self, config: Any) -> Parameterization:
        """The softmax of the network's output predicts the clean token."""
        return Mean()


class MD4(MeanPrediction):
    """Masked diffusion: the cross-entropy of masked positions, weighted with -α'(t) / (1 - α(t)).

    Source: MD4 (Shi et al. 2024); MDLM (Sahoo et al. 2024) has the same loss.
    """

    def check(self, process: RankOne) -> None:
        """The process must be absorbing."""
        _expect("md4", "absorbing", process)


class UDLM(MeanPrediction):
    """Uniform diffusion with a mean prediction.

    Source: UDLM (Schiff et al. 2024); DUO (Sahoo et al. 2025) has the same bound.
    """

    def check(self, process: RankOne) -> None:
        """The process must be uniform."""
        _expect("udlm", "uniform", process)


class GIDD(MeanPrediction):
    """Masked and uniform noise with a mean prediction.

    Source: GIDD (von Rütte et al. 2025), with a constant mixing distribution.
    """

    def check(self, process: RankOne) -> None:
        """The process must be hybrid."""
        _expect("gidd", "hybrid", process)


def _expect(objective: str, wanted: str, process: RankOne) -> None:
    """Raises a ValueError unless the process is of the wanted kind."""
    kind = process.family if process.uniform_fraction is None else "hybrid"
    if kind != wanted:
        raise ValueError(
            f"process: expected {wanted} for the objective {objective}, got {kind}; the objective mean_prediction "
            "takes any process"
        )


def _scored_rows(x_t: Tensor, process: RankOne) -> Tensor:
    """Indices into the flattened x_t [B, L] of the tokens that the process can produce: π_x > 0."""
    if process.family == "uniform":
        return torch.arange(x_t.numel(), device=x_t.device)
    if process.family == "absorbing":
        return (x_t.flatten() == process.dim - 1).nonzero().squeeze(1)
    return (process.stationary > 0).to(x_t.device)[x_t.flatten()].nonzero().squeeze(1)


OBJECTIVES: dict[str, type[Objective]] = {
    "score_entropy": ScoreEntropy,
    "mean_prediction": MeanPrediction,
    "md4": MD4,
    "udlm": UDLM,
    "gidd": GIDD,
    "autoregressive": Autoregressive,
}
"""All objectives by name. To add one, write a subclass of :class:`sedd.diffusion.Objective` and name it here."""
