"""The mathematics: noise schedules, objectives, likelihood bounds and samplers of a discrete diffusion model."""

from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.continuation import continuation_bound
from sedd.diffusion.diffusion import Diffusion, Mean, Objective, Parameterization, Score
from sedd.diffusion.likelihood import ElboResult, elbo
from sedd.diffusion.objectives import GIDD, MD4, OBJECTIVES, UDLM, MeanPrediction, ScoreEntropy, sample_times
from sedd.diffusion.samplers import SAMPLERS, Sampler, Walk, sample
from sedd.diffusion.schedule import SCHEDULES, Schedule, get_schedule

__all__ = [
    "GIDD",
    "MD4",
    "OBJECTIVES",
    "SAMPLERS",
    "SCHEDULES",
    "UDLM",
    "Autoregressive",
    "Diffusion",
    "ElboResult",
    "Mean",
    "MeanPrediction",
    "Objective",
    "Parameterization",
    "Sampler",
    "Schedule",
    "Score",
    "ScoreEntropy",
    "Walk",
    "continuation_bound",
    "elbo",
    "get_schedule",
    "sample",
    "sample_times",
]
