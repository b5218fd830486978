"""Objectives of networks that predict the clean token: the bound is tight where the prediction is exact."""

import pytest
import torch
from toy import P_0, VOCABULARY, TrueScore

from sedd.diffusion import GIDD, MD4, UDLM, Diffusion, Mean, MeanPrediction, elbo, get_schedule, sample
from sedd.diffusion.likelihood import prior_kl
from sedd_ext import Absorbing, Hybrid, Uniform

CASES = {
    "md4": (MD4, Absorbing(VOCABULARY)),
    "udlm": (UDLM, Uniform(VOCABULARY)),
    "gidd": (GIDD, Hybrid(VOCABULARY, 0.3)),
}


class TrueMean(TrueScore):
    """Exactly right for text whose tokens are drawn independently: μ_k ∝ p_0(k) p(x_t | k)."""

    def hidden(self, x_t, sigma):
        a = torch.exp(-sigma.double())[:, None, None]
        here = torch.nn.functional.one_hot(x_t, self.process.dim)
        likelihood = a * here + (1 - a) * self.process.stationary[x_t][..., None]
        return (self.p_0 * likelihood).log()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CASES)
def test_bound_is_the_entropy_where_the_prediction_is_exact(name):
    objective, process = CASES[name]
    schedule = get_schedule("loglinear", eps=1e-6)
    model = TrueMean(process)
    blocks = model.draw((400, 25), seeded(1))
    result = elbo(Diffusion(model, process, schedule, objective(), Mean()), blocks, draws=40, generator=seeded(2))
    prior = float(prior_kl(blocks, float(schedule.total(torch.ones(1))), process).mean())
    assert result.monte_carlo_error < 0.05
    assert result.nats_per_token - prior == pytest.approx(
        -float(P_0.log()[blocks].mean()), abs=4 * result.monte_carlo_error + 1e-3
    )


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_right_frequencies(name):
    objective, process = CASES[name]
    diffusion = Diffusion(TrueMean(process), process, get_schedule("loglinear"), objective(), Mean())
    tokens = sample(diffusion, batch=400, length=25, steps=16, generator=seeded(3))
    frequencies = tokens.flatten().bincount(minlength=VOCABULARY)[:VOCABULARY] / tokens.numel()
    torch.testing.assert_close(frequencies.double(), P_0, rtol=0, atol=0.03)


def test_an_objective_refuses_another_process():
    schedule = get_schedule("loglinear")
    with pytest.raises(ValueError, match="process: expected absorbing for the objective md4, got uniform"):
        Diffusion(TrueMean(Uniform(5)), Uniform(5), schedule, MD4(), Mean())
    Diffusion(TrueMean(Uniform(5)), Uniform(5), schedule, MeanPrediction(), Mean())
