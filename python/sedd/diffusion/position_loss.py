"""Objectives that are a sum over positions: score entropy, and mean prediction in its forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion, LossOptions, Mean, Objective, Parameterization
from sedd_ext import (
    RankOne,
    linear_mean_prediction_loss,
    linear_score_entropy_loss,
    mean_prediction_loss,
    score_entropy_loss,
)

__all__ = ["GIDD", "MD4", "UDLM", "MeanPrediction", "PositionLoss", "ScoreEntropy", "expect_process", "scored_rows"]

Term = tuple[Tensor | float, dict[str, Any]]
"""A weight, one number or [B], and arguments of the operators; see :meth:`PositionLoss.terms`."""


class PositionLoss(Objective):
    """A loss that is a sum over positions: σ(t) Σ_i L(x_t^i, x_0^i) for each sequence.

    Positions whose token has π_x = 0 (for absorbing processes: all but MASK) have loss 0, whatever the network says. So
    the head, which is most of the work of a small network, runs at the other positions only. A linear head is fused
    with the loss, and no output of the whole vocabulary is stored.
    """

    operator: Callable[..., Tensor]
    """Computes L from the head's output at some positions."""
    linear_operator: Callable[..., Tensor]
    """Computes L from hidden states and a linear head."""

    def terms(self, diffusion: Diffusion, t: Tensor, x_t: Tensor) -> Sequence[Term]:
        """The loss as a weighted sum of calls of the operator.

        Args:
            diffusion: the model.
            t: time of each sequence [B].
            x_t: noised tokens [B, L].

        Returns:
            For each call: the weight of the sequences, one number or [B], and keyword arguments of the operators. Those
            that are tensors of two dimensions broadcast to [B, L] and are numbers of the positions.
        """
        schedule = diffusion.schedule
        return [(schedule.rate(t), {"sigma": schedule.total(t).unsqueeze(-1), "process": diffusion.process})]

    def loss(self, diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: Tensor, options: LossOptions) -> Tensor:
        """See :meth:`sedd.diffusion.Diffusion.loss`."""
        return self.weighted(self.terms(diffusion, t, x_t[:, options.given :]), diffusion, x_0, x_t, t, options)

    def weighted(
        self,
        terms: Sequence[Term],
        diffusion: Diffusion,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        options: LossOptions,
    ) -> Tensor:
        """The weighted sum of terms [B], with one call of the network; see :meth:`loss` for the other arguments."""
        network, given, scale = diffusion.network, options.given, options.scale
        hidden = network.hidden(x_t, diffusion.schedule.total(t), **options.conditions)[:, given:]
        x_0, x_t = x_0[:, given:], x_t[:, given:]
        head = network.head_parameters() if options.fused else None
        total: Tensor | float = 0.0
        if head is not None:
            for weight, arguments in terms:
                by_row = weight.unsqueeze(-1) * scale if isinstance(weight, Tensor) else weight * scale
                arguments = {**arguments, "loss_weight": by_row, "capacity": options.positions(x_t)}
                loss = type(self).linear_operator(hidden, *head, x_t, x_0, **arguments)
                total = total + loss.sum(1)
        else:
            rows = scored_rows(x_t, diffusion.process)
            sequence = rows // x_t.shape[1]
            logits = network.head(hidden.flatten(0, 1).index_select(0, rows))
            for weight, arguments in terms:
                own = {
                    name: value.expand_as(x_t).flatten()[rows]
                    if isinstance(value, Tensor) and value.dim() == 2
                    else value
                    for name, value in arguments.items()
                }
                loss = type(self).operator(logits, x_t.flatten()[rows], x_0.flatten()[rows], **own)
                summed = loss.new_zeros(x_0.shape[0]).index_add(0, sequence, loss)
                total = total + weight * scale * summed
        assert isinstance(total, Tensor)
        return total.float()


class ScoreEntropy(PositionLoss):
    """Diffusion-weighted denoising score entropy of the log-scores, for any process.

    Source: SEDD (Lou, Meng & Ermon 2024), algorithm 1 and equation 10.
    """

    operator = staticmethod(score_entropy_loss)
    linear_operator = staticmethod(linear_score_entropy_loss)

    def terms(self, diffusion: Diffusion, t: Tensor, x_t: Tensor) -> Sequence[Term]:
        """Adds the shift of the log-scores; see :meth:`PositionLoss.terms`."""
        return [
            (weight, {**arguments, **diffusion.step_options(arguments["sigma"], x_t)})
            for weight, arguments in super().terms(diffusion, t, x_t)
        ]


class MeanPrediction(PositionLoss):
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
        expect_process("md4", "absorbing", process)


class UDLM(MeanPrediction):
    """Uniform diffusion with a mean prediction.

    Source: UDLM (Schiff et al. 2024); DUO (Sahoo et al. 2025) has the same bound.
    """

    def check(self, process: RankOne) -> None:
        """The process must be uniform."""
        expect_process("udlm", "uniform", process)


class GIDD(MeanPrediction):
    """Masked and uniform noise with a mean prediction.

    Source: GIDD (von Rütte et al. 2025), with a constant mixing distribution.
    """

    def check(self, process: RankOne) -> None:
        """The process must be hybrid."""
        expect_process("gidd", "hybrid", process)


def expect_process(objective: str, wanted: str, process: RankOne) -> None:
    """Raises a ValueError unless the process is of the wanted kind."""
    kind = process.family if process.uniform_fraction is None else "hybrid"
    if kind != wanted:
        raise ValueError(
            f"process: expected {wanted} for the objective {objective}, got {kind}; the objective mean_prediction "
            "takes any process"
        )


def scored_rows(x_t: Tensor, process: RankOne) -> Tensor:
    """Indices into the flattened x_t [B, L] of the tokens that the process can produce: π_x > 0."""
    if process.family == "uniform":
        return torch.arange(x_t.numel(), device=x_t.device)
    if process.family == "absorbing":
        return (x_t.flatten() == process.dim - 1).nonzero().squeeze(1)
    return (process.stationary > 0).to(x_t.device)[x_t.flatten()].nonzero().squeeze(1)
