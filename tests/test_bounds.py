"""Bounds in toy worlds where every sum over sequences can be written out: five tokens, three positions."""

import math

import numpy
import pytest
import torch
from toy import Enumerated, JointMean, JointScore, expected, sequences

from sedd.diffusion import (
    D3PM,
    GIDD,
    MD4,
    UDLM,
    ConcreteScore,
    Diffusion,
    GenMD4,
    ImplicitScoreEntropy,
    Mean,
    MeanPrediction,
    PerToken,
    Score,
    ScoreEntropy,
    TauLDR,
    ablations,
    continuation_bound,
    elbo,
    get_schedule,
    sample_times,
)
from sedd.diffusion.likelihood import closed_terms, prior_kl
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

N, LENGTH = 5, 3
SCHEDULE = get_schedule("loglinear", eps=1e-2)
PROCESSES = {
    "absorbing": Absorbing(N),
    "uniform": Uniform(N),
    "hybrid": Hybrid(N, 0.3),
    "any": RankOne(torch.tensor([0.1, 0.3, 0.05, 0.15, 0.4], dtype=torch.float64)),
}
MEANS = {
    "md4": (MD4, "absorbing"),
    "tauldr": (TauLDR, "absorbing"),
    "udlm": (UDLM, "uniform"),
    "gidd": (GIDD, "hybrid"),
    "mean_prediction": (MeanPrediction, "any"),
}
TEXTS = torch.tensor([[0, 1, 2], [3, 3, 4]])
# float32 losses: the network's log-probabilities are float64, the sum over a sequence is returned in float32
EXACT = 2e-6


def joint(seed=0, length=LENGTH):
    """A distribution of texts whose positions depend on one another."""
    logits = 1.5 * torch.randn([N] * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.flatten().softmax(0).view(logits.shape)


def product(length=LENGTH):
    """A distribution of texts with independent positions."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01], dtype=torch.float64)
    return p if length == 1 else torch.einsum("...,x->...x", product(length - 1), p)


def noise(process):
    """What becomes of each token, from the matrix exponential's closed form."""
    here = torch.eye(N, process.dim, dtype=torch.float64)

    def q(sigma):
        a = torch.exp(-sigma.double())[..., None, None]
        return a * here + (1 - a) * process.stationary

    return q


def integral(function, points=48):
    """∫ from 0 to 1, with more points near 0, where uniform noise has a logarithm."""
    nodes, weights = numpy.polynomial.legendre.leggauss(points)
    u = (nodes + 1) / 2
    return sum(w / 2 * 3 * v**2 * function(v**3) for v, w in zip(u, weights, strict=True))


def model(objective, process, text, schedule=SCHEDULE):
    return Diffusion(JointMean(process.dim, text, noise(process)), process, schedule, objective, Mean())


def at(process, text, t, schedule=SCHEDULE):
    """The toy at time t of a schedule."""
    return Enumerated(text, noise(process)(schedule.total(torch.tensor(t, dtype=torch.float64))))


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("x_0", TEXTS)
def test_the_bound_of_an_exact_prediction_is_exact(name, x_0):
    kind, family = MEANS[name]
    process, text = PROCESSES[family], joint()
    diffusion = model(kind(), process, text)
    bound = integral(lambda t: expected(diffusion, at(process, text, t), x_0, t))
    left = at(process, text, 1.0).information(x_0)
    assert bound + left == pytest.approx(-math.log(text[tuple(x_0)]), abs=EXACT)


@pytest.mark.parametrize("name", ["absorbing", "uniform", "hybrid", "any"])
@pytest.mark.parametrize("kind", [ScoreEntropy, ConcreteScore, ImplicitScoreEntropy])
def test_the_bound_of_exact_scores_is_exact(name, kind):
    process, text, x_0 = PROCESSES[name], joint(1), TEXTS[0]
    diffusion = Diffusion(JointScore(process, text), process, SCHEDULE, kind(), Score(False, False))
    bound = integral(lambda t: expected(diffusion, at(process, text, t), x_0, t))
    left = at(process, text, 1.0).information(x_0)
    assert bound + left == pytest.approx(-math.log(text[tuple(x_0)]), abs=EXACT)


def test_a_wrong_prediction_costs_more():
    """The bound is above the truth, and the difference is that of the two joint distributions."""
    process, text, x_0 = PROCESSES["absorbing"], joint(), TEXTS[0]
    diffusion = model(MD4(), process, joint(5))
    bounds = [
        integral(lambda t, x=x: expected(diffusion, at(process, text, t), x, t), points=8)
        + at(process, joint(5), 1.0).information(x)
        for x in sequences(N, LENGTH)
    ]
    # exact for the model's own distribution, so the average over the text is its cross-entropy
    assert sum(p * b for p, b in zip(text.flatten().tolist(), bounds, strict=True)) == pytest.approx(
        -float((text * joint(5).log()).sum()), abs=EXACT
    )
    assert bounds[int(x_0 @ torch.tensor([25, 5, 1]))] == pytest.approx(-math.log(joint(5)[tuple(x_0)]), abs=EXACT)


# -- discrete time -----------------------------------------------------------------------------------------------------


def discrete(process, text, steps, x_0):
    """D3PM's bound, without what is left at t = 1."""
    diffusion = model(D3PM(steps), process, text)
    times = [i / steps for i in range(1, steps + 1)]
    return sum(expected(diffusion, at(process, text, t), x_0, t) for t in times) / steps


@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid", "any"])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_discrete_time_is_exact_for_independent_positions(family, steps):
    """Steps move the positions independently: with as few as one of them, the bound is exact for such text."""
    process, x_0 = PROCESSES[family], TEXTS[0]
    left = at(process, product(), 1.0).information(x_0)
    assert discrete(process, product(), steps, x_0) + left == pytest.approx(-math.log(product()[tuple(x_0)]), abs=EXACT)


@pytest.mark.parametrize("family", ["absorbing", "uniform"])
def test_discrete_time_tends_to_continuous_time(family):
    """For dependent positions the error falls as 1/T."""
    process, text = PROCESSES[family], joint()
    exact = -float((text * text.log()).sum())
    some = sequences(N, LENGTH)[torch.multinomial(text.flatten(), 6, generator=torch.Generator().manual_seed(0))]
    errors = []
    for steps in (8, 32, 128):
        errors.append(
            sum(
                discrete(process, text, steps, x) + at(process, text, 1.0).information(x) + math.log(text[tuple(x)])
                for x in some
            )
        )
    assert errors[0] > 0.01 * exact
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_discrete_bound_needs_no_noise_before_the_first_step():
    """Geometric noise has σ̄(0) > 0; in discrete time the first step starts at the clean text."""
    process, x_0 = PROCESSES["uniform"], TEXTS
    schedule = get_schedule("geometric", sigma_min=0.05, sigma_max=4.0)
    result = elbo(
        model(D3PM(4), process, product(), schedule), x_0, draws=16_000, generator=torch.Generator().manual_seed(0)
    )
    assert result.onset is None
    exact = [-math.log(product()[tuple(x)]) for x in x_0]
    left = [at(process, product(), 1.0, schedule).information(x) for x in x_0]
    prior = closed_terms(model(D3PM(4), process, product(), schedule), x_0).sum(1).tolist()
    wanted = sum(e - i + p for e, i, p in zip(exact, left, prior, strict=True)) / 2 / LENGTH
    assert result.nats_per_token == pytest.approx(wanted, abs=4 * result.monte_carlo_error)
    assert result.monte_carlo_error < 0.01


@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid"])
def test_training_adds_the_cross_entropy(family):
    process, x_0 = PROCESSES[family], TEXTS
    t = torch.tensor([0.3, 0.8])
    values = []
    for ce_weight in (0.0, 0.5):
        diffusion = model(D3PM(10, ce_weight), process, joint())
        values.append(diffusion(x_0, t, generator=torch.Generator().manual_seed(3)))
    x_t = diffusion.noise(x_0, t, generator=torch.Generator().manual_seed(3))
    log_mean = diffusion.network.hidden(x_t, diffusion.schedule.total(t))
    nats = -log_mean.gather(-1, x_0[..., None]).squeeze(-1)
    nats = torch.where(process.stationary[x_t] > 0, nats, 0.0).sum(1)
    torch.testing.assert_close(values[1] - values[0], 0.5 * nats.float(), rtol=1e-4, atol=1e-5)
    # the bound has no such part
    bounds = [model(D3PM(10, w), process, joint()).loss(x_0, x_t, t, fused=False) for w in (0.0, 0.5)]
    torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("family", ["absorbing", "uniform"])
def test_training_covers_every_step(family):
    """Also the first one, to the clean text, which starts before the earliest time of other objectives."""
    objective = D3PM(1000)
    times = sample_times(100_000, objective.earliest_time, generator=torch.Generator().manual_seed(0))
    steps = torch.ceil(times * objective.steps - 1e-9).long().bincount(minlength=1001)
    assert int(steps[0]) == 0
    assert int(steps[1:].min()) > 0
    # and its loss is finite at the earliest time
    diffusion = model(objective, PROCESSES[family], joint())
    assert bool(diffusion(TEXTS, torch.full((2,), objective.earliest_time, dtype=torch.float64)).isfinite().all())


@pytest.mark.parametrize(
    ("params", "message"),
    [((0,), "steps: expected a whole"), ((2.5,), "steps: expected a whole"), ((3, -1.0), "ce_weight: expected")],
)
def test_d3pm_refuses_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        D3PM(*params)


# -- a schedule for each token -----------------------------------------------------------------------------------------

POWERS = torch.tensor([0.4, 0.9, 1.0, 1.7, 3.2], dtype=torch.float64)
START = 0.05


def genmd4(text, powers=POWERS, eps=1e-2):
    """The exact model of a text whose tokens have these powers, and what becomes of each token at time t."""

    def at_tau(tau):
        masked = (1 - eps) * tau[..., None] ** powers
        here = torch.diag_embed(1 - masked)
        return torch.cat([here, masked[..., None]], -1)

    network = JointMean(N + 1, text, lambda sigma: at_tau(-torch.expm1(-sigma.double()) / (1 - eps)))
    objective = GenMD4(START)
    diffusion = Diffusion(network, Absorbing(N), get_schedule("loglinear", eps=eps), objective, Mean(per_token=True))
    diffusion.schedule.double()
    with torch.no_grad():
        diffusion.schedule.raw_power.copy_(powers.expm1().log())

    def toy(t):
        return Enumerated(text, at_tau(torch.tensor(START + (1 - START) * t, dtype=torch.float64)))

    return diffusion, toy


@pytest.mark.parametrize("x_0", TEXTS)
def test_genmd4_is_exact_with_its_powers(x_0):
    diffusion, toy = genmd4(joint())
    bound = integral(lambda t: expected(diffusion, toy(t), x_0, t))
    assert bound == pytest.approx(toy(0.0).information(x_0) - toy(1.0).information(x_0), abs=EXACT)


@pytest.mark.parametrize("t", [0.1, 0.8])
def test_genmd4_masks_each_token_by_its_own_schedule(t):
    diffusion, toy = genmd4(joint())
    draws = 40_000
    x_0 = torch.arange(N).expand(draws, -1)
    x_t = diffusion.noise(x_0, torch.full((draws,), t), generator=torch.Generator().manual_seed(1))
    assert bool(((x_t == N) | (x_t == x_0)).all())
    masked = toy(t).q[:, N]
    deviations = ((x_t == N).double().mean(0) - masked) / (masked * (1 - masked) / draws).sqrt()
    assert float(deviations.abs().max()) < 4.5


def test_genmd4_reconstructs_what_lies_before_its_start():
    """Masked positions at the start are guessed from the powers: the expectation of -log p, written out."""
    diffusion, toy = genmd4(joint())
    guess = START**POWERS / (START**POWERS).sum()
    for x_0 in TEXTS:
        wanted = 0.0
        for x_t, weight in zip(toy(0.0).x_t, toy(0.0).given(x_0), strict=True):
            wanted -= float(weight * guess[x_0][x_t == N].log().sum())
        nats = diffusion.objective.reconstruction(diffusion, x_0)
        assert float(nats.detach().sum()) == pytest.approx(wanted, rel=1e-5)
    # over all texts, it is above what the best model reaches
    texts, weights = sequences(N, LENGTH), joint().flatten()
    average = float(weights @ diffusion.objective.reconstruction(diffusion, texts).detach().sum(1))
    information = torch.tensor([toy(0.0).information(x_0) for x_0 in texts], dtype=torch.float64)
    assert average > float(weights @ (-weights.log() - information)) > 0


def test_the_bound_of_genmd4_has_all_of_its_parts():
    """The integral from the start on, the reconstruction before it, and the prior term."""
    diffusion, toy = genmd4(joint())
    result = elbo(diffusion, TEXTS, draws=8000, generator=torch.Generator().manual_seed(0))
    parts = [
        sum(toy(0.0).information(x) - toy(1.0).information(x) for x in TEXTS),
        float(diffusion.objective.reconstruction(diffusion, TEXTS).detach().sum()),
        float(prior_kl(TEXTS, -math.log(1e-2), Absorbing(N)).sum()),
    ]
    assert result.onset is None
    assert result.prior == pytest.approx(sum(parts[1:]) / TEXTS.numel(), rel=1e-5)
    assert result.monte_carlo_error < 0.03
    assert result.nats_per_token == pytest.approx(sum(parts) / TEXTS.numel(), abs=4 * result.monte_carlo_error)


def test_continuations_under_genmd4():
    """Given a context, the tokens after it: for independent positions, the sum over them."""
    diffusion, _ = genmd4(product())
    _, one = genmd4(product(1))
    context, continuation = [2], [0, 3]
    nats = continuation_bound(diffusion, context, continuation, draws=20_000, length=LENGTH, batch_size=4096)
    tokens = torch.tensor(continuation)
    wanted = sum(one(0.0).information(x[None]) - one(1.0).information(x[None]) for x in tokens)
    wanted += float(closed_terms(diffusion, tokens).sum())
    assert float(nats.mean()) == pytest.approx(wanted, abs=4 * float(nats.std()) / math.sqrt(len(nats)))
    assert float(nats.std()) / math.sqrt(len(nats)) < 0.02 * wanted


def test_genmd4_with_equal_powers_is_md4():
    diffusion, toy = genmd4(joint(), torch.ones(N, dtype=torch.float64))
    md4 = Diffusion(diffusion.network, Absorbing(N), get_schedule("loglinear", eps=1e-2), MD4(), Mean())
    for t in (0.1, 0.7):
        tau = START + (1 - START) * t
        mine = expected(diffusion, toy(t), TEXTS[0], t) / (1 - START)
        theirs = expected(md4, toy(t), TEXTS[0], tau)
        assert mine == pytest.approx(theirs, rel=1e-5)


class Table(torch.nn.Module):
    """Any logits for any sequence: a table of random numbers."""

    time_conditioning = True

    def __init__(self, dim):
        super().__init__()
        rows = dim**LENGTH
        self.logits = torch.nn.Parameter(
            torch.randn(rows, LENGTH, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        )
        self.dim = dim

    def hidden(self, x_t, sigma):
        return self.logits[(x_t * self.dim ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)]

    def head(self, hidden):
        return hidden

    def head_parameters(self):
        """The head is no matrix."""


@pytest.mark.parametrize("t", [0.2, 0.9])
def test_reinforce_has_the_gradient_of_the_expectation(t, monkeypatch):
    """All pairs of noised copies, against the derivative of the sum over all of them."""
    diffusion, _ = genmd4(joint())
    diffusion.network = Table(N + 1).requires_grad_(False)
    x_0, schedule = TEXTS[1], diffusion.schedule
    masks = sequences(2, LENGTH).bool()
    x_t = torch.where(masks, N, x_0)
    times = torch.full((len(x_t),), t, dtype=torch.float64)

    # the expectation, differentiated as it stands
    log_q = schedule.log_prob(x_t, x_0.expand_as(x_t), times).sum(1)
    tau, w = schedule.time(times[:1]), schedule.power().double()[x_0]
    masked = (1 - 1e-2) * tau**w
    torch.testing.assert_close(log_q.exp(), torch.where(masks, masked, 1 - masked).prod(1))  # q itself is right
    loss = diffusion.loss(x_0.expand_as(x_t), x_t, times, fused=False).double()
    exact = (log_q.exp() * loss).sum() + diffusion.objective.reconstruction(diffusion, x_0).sum()
    (wanted,) = torch.autograd.grad(exact, schedule.raw_power)

    # training, for every pair of noised copies with its probability
    one, two = (i.flatten() for i in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    copies = iter((x_t[one], x_t[two]))
    monkeypatch.setattr(diffusion, "noise", lambda *_, **__: next(copies))
    weight = (log_q[one] + log_q[two]).exp().detach()
    clean = x_0.expand(len(one), -1)
    loss = diffusion(clean, times[0].expand(len(one)), fused=False)
    assert float((weight * loss.detach()).sum()) == pytest.approx(float(exact.detach()), rel=1e-5)
    (got,) = torch.autograd.grad((weight * loss.double()).sum(), schedule.raw_power)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    # and not without the part that says how the noise depends on the powers
    along = (log_q.exp().detach() * diffusion.loss(x_0.expand_as(x_t), x_t, times, fused=False)).sum()
    (pathwise,) = torch.autograd.grad(
        along + diffusion.objective.reconstruction(diffusion, x_0).sum(), schedule.raw_power
    )
    assert float((pathwise - wanted).abs().max()) > 0.05


def test_genmd4_starts_from_a_polynomial_schedule():
    for name, power in (("loglinear", 1.0), ("polynomial", 2.0)):
        schedule = GenMD4().schedule(get_schedule(name), Absorbing(N))
        assert isinstance(schedule, PerToken)
        torch.testing.assert_close(schedule.power(), torch.tensor([power] * N + [1.0]))
        assert GenMD4().schedule(schedule, Absorbing(N)) is schedule
    with pytest.raises(ValueError, match="schedule: expected loglinear or polynomial for the objective genmd4"):
        GenMD4().schedule(get_schedule("cosine"), Absorbing(N))
    with pytest.raises(ValueError, match="process: expected absorbing for the objective genmd4, got uniform"):
        GenMD4().check(Uniform(N))
    with pytest.raises(ValueError, match="start: expected a number between 0 and 1"):
        GenMD4(0.0)


# -- ablations ---------------------------------------------------------------------------------------------------------


def jumps(process, x_t):
    """Every jump of the forward process from one sequence: the sequence after it, its position, its rate."""
    found = []
    for i in range(LENGTH):
        for y in range(process.dim):
            rate = float(process.stationary[y])
            if y != x_t[i] and rate > 0:
                after = x_t.clone()
                after[i] = y
                found.append((after, i, rate))
    return found


def every_jump(process, x_0, t, monkeypatch):
    """Sequences with their probabilities, such that training sees every noised text and every jump from it."""
    toy = at(process, joint(), t)
    before, after, position, rates, weight = [], [], [], [], []
    for x_t, q in zip(toy.x_t, toy.given(x_0), strict=True):
        if q == 0:
            continue
        found = jumps(process, x_t) or [(x_t, 0, 0.0)]
        total = sum(rate for _, _, rate in found)
        for new, i, rate in found:
            before.append(x_t)
            after.append(new)
            position.append(i)
            rates.append(total)
            weight.append(float(q) * (rate / total if total else 1.0))
    drawn = torch.stack(after), torch.tensor(position), torch.tensor(rates, dtype=torch.float64)
    monkeypatch.setattr(ablations, "neighbours", lambda *_: drawn)
    monkeypatch.setattr(Diffusion, "noise", lambda *_, **__: torch.stack(before))
    return torch.tensor(weight, dtype=torch.float64)


@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid", "any"])
def test_implicit_score_entropy_has_the_gradient_of_score_entropy(family, monkeypatch):
    process, x_0, t = PROCESSES[family], TEXTS[1], 0.4
    network = Table(process.dim)
    explicit = Diffusion(network, process, SCHEDULE, ScoreEntropy(), Score(False, False))
    toy = at(process, joint(), t)
    weight = toy.given(x_0)
    times = torch.full((len(weight),), t, dtype=torch.float64)
    loss = explicit.loss(x_0.expand_as(toy.x_t), toy.x_t, times, fused=False)
    (wanted,) = torch.autograd.grad((weight * loss.double()).sum(), network.logits)

    implicit = Diffusion(network, process, SCHEDULE, ImplicitScoreEntropy(), Score(False, False))
    weight = every_jump(process, x_0, t, monkeypatch)
    loss = implicit(x_0.expand(len(weight), -1), torch.full((len(weight),), t, dtype=torch.float64))
    (got,) = torch.autograd.grad((weight * loss.double()).sum(), network.logits)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_tauldr_has_the_expectation_of_md4(monkeypatch):
    process, x_0, t = PROCESSES["absorbing"], TEXTS[1], 0.4
    network = Table(process.dim)
    toy = at(process, joint(), t)
    md4 = Diffusion(network, process, SCHEDULE, MD4(), Mean())
    wanted = expected(md4, toy, x_0, t)
    tauldr = Diffusion(network, process, SCHEDULE, TauLDR(), Mean())
    weight = every_jump(process, x_0, t, monkeypatch)
    loss = tauldr(x_0.expand(len(weight), -1), torch.full((len(weight),), t, dtype=torch.float64))
    assert float((weight * loss.detach()).sum()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid", "any"])
def test_concrete_score_is_the_squared_error_of_the_ratios(family):
    process, x_0, t = PROCESSES[family], TEXTS[:1], torch.tensor([0.4])
    diffusion = Diffusion(Table(process.dim), process, SCHEDULE, ConcreteScore(), Score(False, False))
    got = diffusion(x_0, t, generator=torch.Generator().manual_seed(1))
    x_t = diffusion.noise(x_0, t, generator=torch.Generator().manual_seed(1))
    q = noise(process)(SCHEDULE.total(t))[0]
    wanted = 0.0
    for i in range(LENGTH):
        x, clean = int(x_t[0, i]), int(x_0[0, i])
        scores = diffusion.network.hidden(x_t, None)[0, i].exp()
        for y in range(process.dim):
            if y != x:
                wanted += float(process.stationary[x]) * float(scores[y] - q[clean, y] / q[clean, x]) ** 2 / 2
    assert float(got) == pytest.approx(wanted * float(SCHEDULE.rate(t)), rel=1e-5)


@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid", "any"])
def test_neighbours_are_drawn_by_their_rates(family):
    process = PROCESSES[family]
    x_t = torch.tensor([[0, 1, process.dim - 1]])
    draws = 40_000
    after, position, rate = ablations.neighbours(x_t.expand(draws, -1), process, torch.Generator().manual_seed(2))
    wanted = jumps(process, x_t[0])
    total = sum(r for _, _, r in wanted)
    torch.testing.assert_close(rate, torch.full((draws,), total, dtype=torch.float64))
    square = 0.0
    for sequence, i, r in wanted:
        count = int(((after == sequence).all(1) & (position == i)).sum())
        square += (count - draws * r / total) ** 2 / (draws * r / total)
    freedom = len(wanted) - 1
    assert square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_a_sequence_without_a_jump_is_its_own_neighbour():
    x_t = torch.tensor([[N, N], [0, N]])
    after, position, rate = ablations.neighbours(x_t, Absorbing(N), torch.Generator().manual_seed(0))
    assert after.tolist() == [[N, N], [N, N]]
    assert rate.tolist() == [0.0, 1.0]
    assert int(position[1]) == 0
