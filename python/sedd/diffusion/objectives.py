"""Training objectives, found by name in :data:`OBJECTIVES`, and the times of a training batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sedd.diffusion.ablations import ConcreteScore, ImplicitScoreEntropy, TauLDR
from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.d3pm import D3PM
from sedd.diffusion.diffusion import Mean, Objective
from sedd.diffusion.genmd4 import GenMD4
from sedd.diffusion.position_loss import GIDD, MD4, UDLM, MeanPrediction, ScoreEntropy
from sedd.diffusion.schedule import construct, default_numbers
from sedd.network import ModelConfig
from sedd_ext import RankOne

__all__ = ["OBJECTIVES", "check_adapted", "get_objective", "objective_params", "sample_times"]


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
        antithetic: spread the batch evenly, at distances 1/B from one random number, instead of B independent draws.
            Each time is still uniform, but the batch's mean loss varies less. Any few consecutive times are spread over
            the interval too, so that the batch can be divided.
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
        # the golden ratio spreads every run of consecutive numbers; a step without common divisor takes each place once
        step = next(k for k in range(round(batch * 0.618), 2 * batch + 1) if math.gcd(k, batch) == 1)
        places = torch.arange(batch, device=device) * step % batch
        u = (u + places.double() / batch) % 1.0
    return eps + (1.0 - eps) * u


OBJECTIVES: dict[str, type[Objective]] = {
    "score_entropy": ScoreEntropy,
    "mean_prediction": MeanPrediction,
    "md4": MD4,
    "genmd4": GenMD4,
    "udlm": UDLM,
    "gidd": GIDD,
    "d3pm": D3PM,
    "tauldr": TauLDR,
    "concrete_score": ConcreteScore,
    "implicit_score_entropy": ImplicitScoreEntropy,
    "autoregressive": Autoregressive,
}
"""All objectives by name. To add one, write a subclass of :class:`sedd.diffusion.Objective` and name it here."""


def get_objective(name: str, **params: float) -> Objective:
    """Makes the objective of that name.

    Args:
        name: a key of :data:`OBJECTIVES`.
        **params: the fields of that class; its defaults where left out.

    Raises:
        ValueError: no objective of that name, or a parameter out of range.
        TypeError: the objective has no parameter of that name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    objective: Objective = construct("objective", name, OBJECTIVES[name], params)
    return objective


def objective_params(name: str, params: Mapping[str, float]) -> dict[str, float]:
    """All parameters of the objective of that name: the given ones, and defaults for the others."""
    return {**default_numbers(OBJECTIVES[name]), **params}


def check_adapted(objective: Objective, process: RankOne, sizes: ModelConfig) -> None:
    """Checks that objective and process suit a network adapted from a model of ``transformers``, which ignores σ̄.

    Raises:
        ValueError: the objective does not predict the clean token with one schedule for all tokens, or the process is
            not absorbing.
    """
    parameterization = objective.parameterization(sizes)
    kind = f"for a network adapted from {sizes.trunk.get('model_type')}"
    if objective.autoregressive or not isinstance(parameterization, Mean) or parameterization.per_token:
        name = next(name for name, its_class in OBJECTIVES.items() if type(objective) is its_class)
        raise ValueError(
            "objective: expected one that predicts the clean token with one schedule for all tokens, such as md4, "
            f"{kind}, got {name}"
        )
    if process.family != "absorbing":
        raise ValueError(f"process: expected absorbing {kind}, got {process.family}")
