"""The mathematics: noise schedules, objectives, likelihood bounds and samplers of a discrete diffusion model."""

from sedd.diffusion.autoregressive import Autoregressive
from sedd.diffusion.continuation import continuation_bound
from sedd.diffusion.diffusion import Diffusion, Objective, Parameterization, Score
from sedd.diffusion.likelihood import ElboResult, elbo
from sedd.diffusion.objectives import OBJECTIVES, ScoreEntropy, sample_times
from sedd.diffusion.samplers import SAMPLERS, Sampler, Walk, sample
from sedd.diffusion.schedule import SCHEDULES, Schedule, get_schedule

__all__ = [
    "OBJECTIVES",
    "SAMPLERS",
    "SCHEDULES",
    "Autoregressive",
    "Diffusion",
    "ElboResult",
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
