"""The mathematics: noise schedules, objectives, likelihood bounds and samplers of a discrete diffusion model."""

from sedd.diffusion.ablations import ConcreteScore, ImplicitScoreEntropy, TauLDR
from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.continuation import continuation_bound
from sedd.diffusion.d3pm import D3PM, DiscreteTime
from sedd.diffusion.diffusion import Diffusion, LossOptions, Mean, Objective, Parameterization, Score
from sedd.diffusion.genmd4 import GenMD4, PerToken
from sedd.diffusion.likelihood import ElboResult, elbo
from sedd.diffusion.objectives import OBJECTIVES, get_objective, sample_times
from sedd.diffusion.position_loss import GIDD, MD4, UDLM, MeanPrediction, ScoreEntropy
from sedd.diffusion.sampler import GRIDS, Sampler
from sedd.diffusion.samplers import SAMPLERS, sample
from sedd.diffusion.schedule import SCHEDULES, Schedule, get_schedule
from sedd.diffusion.walk import Walk

__all__ = [
    "D3PM",
    "GIDD",
    "GRIDS",
    "MD4",
    "OBJECTIVES",
    "SAMPLERS",
    "SCHEDULES",
    "UDLM",
    "Autoregressive",
    "ConcreteScore",
    "Diffusion",
    "DiscreteTime",
    "ElboResult",
    "GenMD4",
    "ImplicitScoreEntropy",
    "LossOptions",
    "Mean",
    "MeanPrediction",
    "Objective",
    "Parameterization",
    "PerToken",
    "Sampler",
    "Schedule",
    "Score",
    "ScoreEntropy",
    "TauLDR",
    "Walk",
    "continuation_bound",
    "elbo",
    "get_objective",
    "get_schedule",
    "sample",
    "sample_times",
]
