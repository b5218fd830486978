"""Objectives of networks that predict the clean token: the bound is tight where the prediction is exact."""

import pytest
import torch
from toy import P_0, VOCABULARY, TrueScore

from sedd.diffusion import (
    D3PM,
    GIDD,
    MD4,
    SAMPLERS,
    UDLM,
    Diffusion,
    GenMD4,
    Mean,
    MeanPrediction,
    TauLDR,
    elbo,
    get_schedule,
    sample,
)
from sedd.diffusion.likelihood import prior_kl
from sedd_ext import Absorbing, Hybrid, Uniform

EPS = 1e-6
POWERS = torch.tensor([1.4, 0.7, 1.0, 2.0, 1.2, 1.0], dtype=torch.float64)  # MASK has none
CASES = {
    "md4": (MD4(), Absorbing(VOCABULARY)),
    "tauldr": (TauLDR(), Absorbing(VOCABULARY)),
    "udlm": (UDLM(), Uniform(VOCABULARY)),
    "gidd": (GIDD(), Hybrid(VOCABULARY, 0.3)),
    "d3pm, absorbing": (D3PM(32), Absorbing(VOCABULARY)),
    "d3pm, uniform": (D3PM(32), Uniform(VOCABULARY)),
    "genmd4": (GenMD4(), Absorbing(VOCABULARY)),
}


class TrueMean(TrueScore):
    """Exactly right for text whose tokens are drawn independently: μ_k ∝ p_0(k) p(x_t | k)."""

    def hidden(self, x_t, sigma):
        a = torch.exp(-sigma.double())[:, None, None]
        here = torch.nn.functional.one_hot(x_t, self.process.dim)
        likelihood = a * here + (1 - a) * self.process.stationary[x_t][..., None]
        return (self.p_0 * likelihood).log()


class TrueGenMD4(TrueMean):
    """Exactly right for these powers: a masked token k has been masked with probability (1-ε) τ^{w_k}."""

    def hidden(self, x_t, sigma):
        log_tau = torch.log(-torch.expm1(-sigma.double()) / (1 - EPS))[:, None, None]
        masked = self.p_0.log() + POWERS * log_tau
        there = torch.where(torch.nn.functional.one_hot(x_t, self.process.dim) > 0, 0.0, -50.0)
        return torch.where((x_t == VOCABULARY)[..., None], masked, there)


def diffusion_of(name):
    """The exact model of an objective."""
    objective, process = CASES[name]
    if name != "genmd4":
        return Diffusion(TrueMean(process), process, get_schedule("loglinear", eps=EPS), objective, Mean())
    how = objective.parameterization(None)
    model = Diffusion(TrueGenMD4(process), process, get_schedule("loglinear", eps=EPS), objective, how)
    with torch.no_grad():
        model.schedule.raw_power.copy_(POWERS[:-1].expm1().log())
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CASES)
def test_bound_is_the_entropy_where_the_prediction_is_exact(name):
    diffusion = diffusion_of(name)
    blocks = diffusion.network.draw((400, 25), seeded(1))
    result = elbo(diffusion, blocks, draws=40, generator=seeded(2))
    prior = float(prior_kl(blocks, float(diffusion.schedule.total(torch.ones(1))), diffusion.process).mean())
    assert result.monte_carlo_error < 0.05
    assert result.nats_per_token - prior == pytest.approx(
        -float(P_0.log()[blocks].mean()), abs=4 * result.monte_carlo_error + 1e-3
    )


@pytest.mark.parametrize("sampler", ["tweedie", "tweedie_cosine"])
@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_right_frequencies(name, sampler):
    diffusion = diffusion_of(name)
    tokens = sample(diffusion, batch=400, length=25, steps=16, sampler=sampler, generator=seeded(3))
    frequencies = tokens.flatten().bincount(minlength=VOCABULARY)[:VOCABULARY] / tokens.numel()
    torch.testing.assert_close(frequencies.double(), P_0, rtol=0, atol=0.03)


def test_a_schedule_for_each_token_has_no_euler_step():
    with pytest.raises(ValueError, match=r"sampler: expected tweedie, tweedie_cosine, .* for genmd4"):
        sample(diffusion_of("genmd4"), batch=1, length=4, sampler="euler")


def test_greedy_decoding_takes_the_most_probable_tokens():
    # at τ = 1/3, masked tokens of genmd4 are more often those that are masked early: p_0 τ^w is 0.10 and 0.14
    for name, wanted in (("md4", [0, 0, 0, 0, 0, 0]), ("genmd4", [0, 0, 0, 0, 1, 1])):
        tokens = sample(diffusion_of(name), batch=2, length=6, steps=3, sampler="greedy", generator=seeded(3))
        assert tokens.tolist() == [wanted] * 2


def test_cosine_steps_are_short_near_the_noise():
    times = SAMPLERS["tweedie_cosine"](4).times()
    torch.testing.assert_close(times, torch.tensor([1.0, 0.9239, 0.7071, 0.3827, 1e-5]).double(), rtol=0, atol=1e-4)


def test_an_objective_refuses_another_process():
    schedule = get_schedule("loglinear")
    with pytest.raises(ValueError, match="process: expected absorbing for the objective md4, got uniform"):
        Diffusion(TrueMean(Uniform(5)), Uniform(5), schedule, MD4(), Mean())
    Diffusion(TrueMean(Uniform(5)), Uniform(5), schedule, MeanPrediction(), Mean())
