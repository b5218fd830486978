"""Samplers: exact laws on short texts that can be enumerated, the order of positions, and calls of the network."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest
from toy import P_0, VOCABULARY, Enumerated, JointMean, JointScore, TrueScore, diffusion

from sedd.commands.sampler_params import make_sampler, parameters
from sedd.diffusion import (
    GRIDS,
    MD4,
    SAMPLERS,
    Diffusion,
    GenMD4,
    Mean,
    MeanPrediction,
    Schedule,
    Walk,
    get_schedule,
    sample,
)
from sedd.diffusion import walk as walk_module
from sedd.diffusion.orders import (
    AutoregressiveSampler,
    ConfidenceSampler,
    EntropyBoundedSampler,
    EntropySampler,
    FirstHittingSampler,
    GreedySampler,
    MarginSampler,
    SemiAutoregressiveSampler,
)
from sedd.diffusion.reverse_steps import (
    AncestralSampler,
    PredictorCorrectorSampler,
    RemaskSampler,
    TweedieSampler,
)
from sedd_ext import Absorbing, Hybrid, Uniform, unmask

TOKENS, LENGTH, TEXTS = 3, 3, 20_000
PROCESSES = {"absorbing": Absorbing(TOKENS), "uniform": Uniform(TOKENS), "hybrid": Hybrid(TOKENS, 0.3)}
SCHEDULES = {
    "loglinear": get_schedule("loglinear", eps=1e-4),
    "cosine": get_schedule("cosine", eps=1e-4),
    "geometric": get_schedule("geometric", sigma_min=1e-4, sigma_max=12.0),
}
GENERATOR = torch.Generator().manual_seed(11)
JOINT = torch.rand(TOKENS, TOKENS, TOKENS, generator=GENERATOR, dtype=torch.float64) ** 4
JOINT /= JOINT.sum()
FOR_MASKS = {name: kind for name, kind in SAMPLERS.items() if kind.needs_mask}
FOR_ALL = {name: kind for name, kind in SAMPLERS.items() if not kind.autoregressive}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def transition(process, sigma, tokens):
    """What becomes of each token [..., n, N] at total noise σ̄."""
    kept = torch.exp(-sigma.double())[..., None, None]
    return kept * torch.eye(tokens, process.dim, dtype=torch.float64) + (1 - kept) * process.stationary


class Exact(JointMean):
    """Predicts short text exactly, and notes the sequences and the noise level of every call."""

    def __init__(self, process=PROCESSES["absorbing"], joint=JOINT, time_conditioning=True):
        super().__init__(process.dim, joint, lambda sigma: transition(process, sigma, len(joint)))
        self.time_conditioning = time_conditioning
        self.calls, self.sigmas = [], []

    def hidden(self, x_t, sigma):
        self.calls.append(len(x_t))
        self.sigmas.append(sigma.expand(len(x_t)).clone())
        # the prediction depends on the noise only where unmasked tokens may be wrong
        return super().hidden(x_t, sigma if self.time_conditioning else torch.ones(1))


def model_of(network, schedule=SCHEDULES["loglinear"], process=PROCESSES["absorbing"]):
    objective = MD4() if process.family == "absorbing" else MeanPrediction()
    return Diffusion(network, process, schedule, objective, Mean())


def texts(sampler, network=None, *, batch=TEXTS, seed=0, schedule=SCHEDULES["loglinear"], **options):
    network = Exact() if network is None else network
    model = model_of(network, schedule)
    length = network.joint.dim()
    return sample(model, batch=batch, length=length, sampler=sampler, generator=seeded(seed), **options)


def p_value(tokens, law=JOINT):
    """Chi-square test of whole sequences [n, L] against their law, one axis a position."""
    places = torch.zeros(len(tokens), dtype=torch.int64)
    for i, size in enumerate(law.shape):
        places = places * size + tokens[:, i]
    counts = torch.bincount(places, minlength=law.numel())
    assert len(counts) == law.numel(), "a token that the law has not"
    expected = law.flatten() / law.sum() * len(tokens)
    common = expected >= 5
    assert bool((counts[expected == 0] == 0).all())
    seen = [*counts[common].tolist(), int(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    return chisquare(seen[: -1 if wanted[-1] == 0 else None], wanted[: -1 if wanted[-1] == 0 else None]).pvalue


# -- first hitting, and the steps whose limit it is --------------------------------------------------------------------


@pytest.mark.parametrize("time_conditioning", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_hitting_has_the_law_of_the_text_with_a_call_for_each_position(schedule, time_conditioning):
    network = Exact(time_conditioning=time_conditioning)
    tokens = texts(FirstHittingSampler(1), network, schedule=SCHEDULES[schedule])
    assert p_value(tokens) > 1e-4
    assert network.calls == [TEXTS] * LENGTH


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_hitting_times_are_those_of_the_process(schedule):
    """With n masked positions, (1 - α_s) / (1 - α_t) to the power of n is uniform, and so is the position."""
    process, seen, length = Absorbing(2), [], 4
    network = Exact(process, torch.full([2] * length, 1 / 16, dtype=torch.float64))
    model = model_of(network, SCHEDULES[schedule], process)
    sample(
        model,
        batch=4000,
        length=length,
        sampler="first_hitting",
        generator=seeded(1),
        on_step=lambda i, n, x: seen.append(x == 2),
    )
    moved = model.schedule.moved(torch.ones(1).double())
    assert len(network.sigmas) == length
    for n, sigma in zip(range(length, 0, -1), network.sigmas, strict=True):
        now = -torch.expm1(-sigma)
        assert kstest(((now / moved) ** n).numpy(), "uniform").pvalue > 1e-4
        moved = now
    counts = (~seen[0]).sum(0)
    assert chisquare(counts.numpy()).pvalue > 1e-4
    assert [int(masked.sum(1).unique()) for masked in seen] == [3, 2, 1, 0]


def first_times(sampler, batch=3000):
    """The share of moved positions at the time of each sequence's first step that unmasks."""
    network, times = Exact(), torch.full((batch,), torch.nan, dtype=torch.float64)
    started = torch.zeros(batch, dtype=torch.bool)

    def note(step, steps, tokens):
        new = (tokens < TOKENS).any(1) & ~started
        if bool(new.any()):
            sigma = network.sigmas[-1]
            times[new] = -torch.expm1(-(sigma if len(sigma) == batch else sigma[:1].expand(batch)))[new]
        started[new] = True

    texts(sampler, network, batch=batch, on_step=note)
    return times.numpy()


def test_ancestral_steps_have_the_times_of_first_hitting_in_the_limit():
    exact = first_times(FirstHittingSampler(1))
    assert ks_2samp(exact, first_times(AncestralSampler(1000))).pvalue > 1e-4
    assert ks_2samp(exact, first_times(AncestralSampler(8))).pvalue < 1e-4


@pytest.mark.parametrize(
    "many",
    [AncestralSampler(400), TweedieSampler(400), RemaskSampler(400, eta=1e-3)],
    ids=["ancestral", "tweedie", "remask"],
)
def test_many_steps_approach_the_law_and_few_do_not(many):
    assert p_value(texts(many, batch=4000)) > 1e-4
    assert p_value(texts(dataclasses.replace(many, steps=2), batch=4000)) < 1e-4


def test_ancestral_steps_unmask_at_the_rate_of_the_process_whatever_the_scores():
    """Scores that are too low by a factor delay Tweedie steps, and not ancestral ones."""
    process, schedule, masked = Absorbing(VOCABULARY), SCHEDULES["loglinear"], {}
    joint = torch.rand(VOCABULARY, VOCABULARY, generator=seeded(), dtype=torch.float64)
    for name in ("tweedie", "ancestral"):
        network = JointScore(process, joint / joint.sum(), error=-1.0)
        sampler = SAMPLERS[name](2, denoise=False)
        half = []
        sample(
            diffusion(network, process, schedule),
            batch=4000,
            length=2,
            sampler=sampler,
            generator=seeded(),
            on_step=lambda i, n, x, half=half: half.append(float((x == VOCABULARY).double().mean())),
        )
        masked[name] = half[0]
    assert masked["ancestral"] == pytest.approx(0.5, abs=0.03)
    assert masked["tweedie"] == pytest.approx(1 - 0.5 / math.e, abs=0.03)


def test_ancestral_steps_call_the_network_only_where_something_unmasks():
    network = Exact()
    texts(AncestralSampler(500), network, batch=10)
    assert sum(network.calls) <= 10 * LENGTH
    assert len(network.calls) < 40


# -- steps back to MASK ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_remasking_leaves_the_share_of_masked_positions(schedule, eta):
    """At each time it is that of the process, however many positions return; and single tokens have their law."""
    seen, sampler, batch = [], RemaskSampler(8, eta=eta), 5000
    tokens = texts(sampler, batch=batch, schedule=SCHEDULES[schedule], on_step=lambda i, n, x: seen.append(x == TOKENS))
    start = SCHEDULES[schedule].moved(torch.ones(()).double())
    for masked, t in zip(seen, sampler.times()[1:], strict=False):
        share = float(SCHEDULES[schedule].moved(t) / start)
        error = math.sqrt(share * (1 - share) / masked.numel())
        # the process starts with α(1) of the tokens unmasked, and the sampler with none
        assert abs(float(masked.double().mean()) - share) < 4.5 * error + 3e-4
    returned = sum(int((after & ~before).sum()) for before, after in itertools.pairwise(seen))
    assert (returned > 0) == (eta > 0)
    assert not bool(seen[-1].any())
    assert p_value(tokens[:, :1], JOINT.sum((1, 2))) > 1e-4


def distance(tokens):
    places = (tokens * torch.tensor([9, 3, 1])).sum(1)
    return float((torch.bincount(places, minlength=27) / len(tokens) - JOINT.flatten()).abs().sum())


def noised(process, t, batch, joint=JOINT):
    """Text of the toy world at time t."""
    clean = torch.multinomial(joint.flatten(), batch, replacement=True, generator=seeded(4))
    x_0 = torch.stack(torch.unravel_index(clean, joint.shape), 1)
    model = model_of(Exact(process, joint), process=process)
    return model, model.noise(x_0, torch.full((batch,), t, dtype=torch.float64), generator=seeded(5))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_small_corrector_steps_leave_the_law_at_their_time(process):
    t = torch.tensor(0.5, dtype=torch.float64)
    model, x_t = noised(process, 0.5, TEXTS)
    walk = Walk(model, x_t, torch.ones_like(x_t, dtype=torch.bool), generator=seeded(6))
    law = Enumerated(JOINT, transition(process, model.schedule.total(t), TOKENS)).marginal()
    law = law.view([process.dim] * LENGTH)
    assert p_value(walk.tokens, law) > 1e-4
    corrector = PredictorCorrectorSampler(1, size=0.02)
    for _ in range(40):
        corrector.correct(walk, t)
    assert p_value(walk.tokens, law) > 1e-4
    assert float((walk.tokens != x_t).double().mean()) > 0.05
    # steps in which many positions change together show
    for _ in range(40):
        PredictorCorrectorSampler(1, size=1.0).correct(walk, t)
    assert p_value(walk.tokens, law) < 1e-4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("t", [0.1, 0.7])
def test_corrector_steps_of_any_size_are_exact_for_one_position(process, t):
    joint = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    model, x_t = noised(process, t, TEXTS, joint)
    walk = Walk(model, x_t, torch.ones_like(x_t, dtype=torch.bool), generator=seeded(6))
    time = torch.tensor(t, dtype=torch.float64)
    law = joint @ transition(process, model.schedule.total(time), TOKENS)
    for _ in range(5):
        PredictorCorrectorSampler(1, size=1.0).correct(walk, time)
    assert p_value(walk.tokens, law) > 1e-4


def test_correctors_bring_few_steps_nearer_to_the_law():
    plain = texts(TweedieSampler(4))
    corrected = texts(PredictorCorrectorSampler(4, correctors=20, size=0.2))
    assert distance(corrected) < 0.7 * distance(plain)


def test_a_corrector_does_nothing_where_there_is_no_later_time():
    model = model_of(Exact())
    x = torch.full((2, LENGTH), TOKENS)
    walk = Walk(model, x, torch.ones_like(x, dtype=torch.bool))
    PredictorCorrectorSampler(1).correct(walk, torch.ones((), dtype=torch.float64))
    assert torch.equal(walk.tokens, x)
    assert model.network.calls == []


# -- orders ------------------------------------------------------------------------------------------------------------


class Rows(Exact):
    """Each position has a distribution of its own [L, n], whatever the others are."""

    def __init__(self, rows, time_conditioning=True):
        super().__init__(joint=torch.ones([1] * len(rows)), time_conditioning=time_conditioning)
        self.logits = torch.nn.functional.pad(rows.log(), (0, 1))

    def hidden(self, x_t, sigma):
        self.calls.append(len(x_t))
        self.sigmas.append(sigma.expand(len(x_t)).clone())
        return self.logits.expand(len(x_t), -1, -1).clone()


MARGINAL = torch.tensor(  # the largest probability grows downwards
    [[0.450, 0.200, 0.200, 0.150, 0.000], [0.480, 0.130, 0.130, 0.130, 0.130], [0.500, 0.498, 0.002, 0.000, 0.000]],
    dtype=torch.float64,
)


def written(sampler, rows=MARGINAL, batch=1, walk_options=None, free=None):
    """The positions that each step writes, of each sequence, and the network."""
    network, process = Rows(rows), Absorbing(rows.shape[1])
    x = torch.full((batch, len(rows)), process.mask_id)
    free = torch.ones_like(x, dtype=torch.bool) if free is None else free
    x = torch.where(free, x, 0)
    walk = Walk(model_of(network, process=process), x, free, generator=seeded(), **(walk_options or {}))
    steps, before = [], walk.open()
    for tokens in sampler(walk):
        masked = tokens == process.mask_id
        steps.append([(row.nonzero()[:, 0]).tolist() for row in before & ~masked])
        before = masked
    assert not bool(before.any())
    return steps, network, walk.tokens


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (ConfidenceSampler(3), [2, 1, 0]),
        (MarginSampler(3), [1, 0, 2]),
        (EntropySampler(3), [2, 0, 1]),
        (GreedySampler(3), [2, 1, 0]),
    ],
)
def test_the_order_is_the_one_asked_for(sampler, order):
    steps, _, tokens = written(sampler, walk_options={"top_p": 1e-6})  # the most probable token is drawn
    assert steps == [[[i]] for i in order]
    assert tokens.tolist() == [[0, 0, 0]]


def test_confidence_is_that_of_the_drawn_token():
    """A position whose unlikely token was drawn waits, although its most probable token is likelier than others."""
    rows = torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=torch.float64)
    network, process = Rows(rows), Absorbing(2)
    x = torch.full((500, 2), 2)
    walk = Walk(model_of(network, process=process), x, torch.ones_like(x, dtype=torch.bool), generator=seeded())
    found = walk.unmask(walk.open(), 1.0)
    drawn, log_prob = found.token.view(500, 2), found.log_prob.view(500, 2)
    assert torch.equal(log_prob.exp(), rows.expand(500, -1, -1).gather(2, drawn[..., None]).squeeze(2))
    walk.generator.manual_seed(0)
    tokens = next(ConfidenceSampler(2)(walk))
    first = (tokens[:, 1] != 2).long()
    assert torch.equal(first, log_prob.argmax(1))
    assert 0 < int(first.sum()) < 500


@pytest.mark.parametrize(
    ("kind", "grid", "expected"),
    [
        (ConfidenceSampler, "uniform", [8, 5, 3, 0]),
        (MarginSampler, "uniform", [8, 5, 3, 0]),
        (EntropySampler, "cosine", [9, 8, 4, 0]),  # ⌈10 sin(π/2 t)⌉ is 10, 8, 4, 0, and each step writes something
        (GreedySampler, "quadratic", [6, 3, 1, 0]),
    ],
)
def test_positions_in_each_step(kind, grid, expected):
    steps, network, _ = written(kind(4, grid=grid), torch.rand(10, 4, generator=seeded(2)).double().softmax(1))
    left = [10 - sum(len(step[0]) for step in steps[: i + 1]) for i in range(len(steps))]
    assert left == expected
    assert network.calls == [1] * 4


def test_more_steps_than_positions_write_one_each():
    for kind in (ConfidenceSampler, GreedySampler):
        for grid in ("uniform", "cosine", "quadratic"):
            steps, _, _ = written(kind(100, grid=grid))
            assert [len(step[0]) for step in steps] == [1, 1, 1]


def test_a_sequence_does_not_depend_on_the_others():
    """Sequences with fewer open positions take fewer steps, at times of their own."""
    free = torch.ones(2, 6, dtype=torch.bool)
    free[1, :3] = False
    rows = torch.rand(6, 4, generator=seeded(2)).double().softmax(1)
    for sampler in (GreedySampler(4), MarginSampler(2), EntropyBoundedSampler(1, gamma=1.0)):
        both, together, _ = written(sampler, rows, 2, free=free)
        for i in range(2):
            one, alone, _ = written(sampler, rows, 1, free=free[i : i + 1])
            assert [step[i] for step in both if step[i]] == [step[0] for step in one]
            told = [s[min(i, len(s) - 1)] for s, step in zip(together.sigmas, both, strict=True) if step[i]]
            torch.testing.assert_close(torch.stack(told), torch.cat(alone.sigmas))


def test_noise_changes_the_order():
    first = [written(MarginSampler(3, noise=noise), batch=300)[0][0] for noise in (0.0, 100.0)]
    counts = [[row[0] for row in rows].count(1) for rows in first]
    assert counts[0] == 300
    assert 60 < counts[1] < 140, "a third"


# -- entropy-bounded ---------------------------------------------------------------------------------------------------


def test_entropy_bounds_of_nothing_and_everything():
    for gamma, calls in ((0.0, LENGTH), (math.inf, 1)):
        network, masked = Exact(), []
        texts(
            EntropyBoundedSampler(1, gamma=gamma), network, batch=50, on_step=lambda i, n, x, m=masked: m.append(x == 3)
        )
        assert network.calls == [50] * calls
        assert all(len(m.sum(1).unique()) == 1 for m in masked)
    assert p_value(texts(EntropyBoundedSampler(1, gamma=0.0))) > 1e-4
    assert p_value(texts(EntropyBoundedSampler(1, gamma=math.inf))) < 1e-4


def test_the_entropy_bound_is_on_the_sum_without_the_largest():
    p = torch.tensor([0.3, 0.02, 0.5, 0.1], dtype=torch.float64)
    rows = torch.stack([p, 1 - p], 1)
    h = torch.special.entr(rows).sum(1)  # grows in the order 1, 3, 0, 2
    for gamma, expected in (
        (float(h[1]) - 1e-9, [[1], [3], [0], [2]]),
        (float(h[1]) + 1e-9, [[1, 3], [0], [2]]),
        (float(h[1] + h[3]) - 1e-9, [[1, 3], [0], [2]]),
        (float(h[1] + h[3]) + 1e-9, [[0, 1, 3], [2]]),
        (float(h[1] + h[3] + h[0]) + 1e-9, [[0, 1, 2, 3]]),
    ):
        steps, _, _ = written(EntropyBoundedSampler(1, gamma=gamma), rows)
        assert [step[0] for step in steps] == expected


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", sorted(FOR_ALL.keys() - {"semi_autoregressive", "euler"}))
def test_blocks_are_written_from_left_to_right(inner):
    seen = []
    network = TrueScore(Absorbing(VOCABULARY))
    tokens = sample(
        diffusion(network, network.process, get_schedule("loglinear")),
        batch=3,
        length=10,
        sampler=SemiAutoregressiveSampler(9, block=4, sampler=SAMPLERS[inner](1)),
        generator=seeded(),
        on_step=lambda i, n, x: seen.append((i, n, x == VOCABULARY)),
    )
    assert not bool((tokens == VOCABULARY).any())
    for _, _, masked in seen:
        begun = (~masked).any(0).nonzero()
        block = int(begun.max()) // 4 if len(begun) else 0
        assert not bool(masked[:, : 4 * block].any()), "a block begins when the one before has ended"
    assert [i for i, _, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) <= seen[0][1]


def test_the_steps_of_blocks_are_those_of_the_whole():
    for steps, block, expected in ((6, 2, 6), (4, 2, 3), (1, 3, 2), (6, 100, 6)):
        network = Rows(torch.full((6, 2), 0.5, dtype=torch.float64))
        x = torch.full((1, 6), 2)
        walk = Walk(model_of(network, process=Absorbing(2)), x, torch.ones_like(x, dtype=torch.bool))
        sampler = SemiAutoregressiveSampler(steps, block=block)
        assert sampler.count(walk) == expected
        assert bool(walk.free.all())
        assert len(list(sampler(walk))) == expected
        assert len(network.calls) == expected


# -- all of them -------------------------------------------------------------------------------------------------------


GIVEN = {"prefix": slice(0, 4), "suffix": slice(7, 12), "middle": slice(3, 9), "spans": slice(0, 12, 3)}


class MeanRows(TrueScore):
    """The prediction of clean tokens that are independent."""

    def hidden(self, x_t, sigma):
        return self.p_0.log().expand(*x_t.shape, -1).clone()


@pytest.mark.parametrize("sampler", FOR_MASKS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("how", ["score", "mean"])
def test_infilling_keeps_every_given_token_in_every_step_and_leaves_no_mask(sampler, given, how):
    process = Absorbing(VOCABULARY)
    where = torch.zeros(12, dtype=torch.bool)
    where[GIVEN[given]] = True
    tokens, seen = torch.randint(VOCABULARY, (12,), generator=seeded(5)), []
    schedule = get_schedule("loglinear")
    scores, means = diffusion(TrueScore(process), process, schedule), model_of(MeanRows(process), schedule, process)
    filled = sample(
        scores if how == "score" else means,
        batch=3,
        length=12,
        sampler=sampler,
        steps=6,
        fixed=(tokens, where),
        generator=seeded(),
        on_step=lambda i, n, x: seen.append(x),
    )
    for x in (*seen, filled):
        assert torch.equal(x[:, where], tokens[where].expand(3, -1))
    assert torch.equal(seen[-1], filled)
    assert not bool((filled == process.mask_id).any())


@pytest.mark.parametrize("sampler", FOR_ALL)
def test_the_law_of_independent_tokens(sampler):
    """Of every sampler whose order of positions does not depend on the tokens that it has drawn."""
    process = Absorbing(VOCABULARY)
    model = diffusion(TrueScore(process), process, get_schedule("loglinear", eps=1e-5))
    tokens = sample(model, batch=500, length=40, sampler=sampler, steps=8, generator=seeded(3))
    assert not bool((tokens == process.mask_id).any())
    counts = torch.bincount(tokens.flatten(), minlength=VOCABULARY)
    pvalue = chisquare(counts.numpy(), (P_0 / P_0.sum() * counts.sum()).numpy()).pvalue
    assert (pvalue > 1e-4) == (sampler not in ("greedy", "confidence", "semi_autoregressive"))


@pytest.mark.parametrize("sampler", FOR_ALL)
def test_same_seed_same_text(sampler):
    one, two, three = (texts(sampler, batch=60, seed=seed, steps=3) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert torch.equal(one, three) == (sampler == "greedy")


@pytest.mark.parametrize("sampler", FOR_MASKS)
def test_finished_sequences_leave_the_batch(sampler):
    """One sequence with much to do, and three with one position each."""
    where = torch.ones(4, 12, dtype=torch.bool)
    where[0] = False
    where[1:, 0] = False
    rows = torch.rand(12, 4, generator=seeded(2)).double().softmax(1)
    options = {"gamma": 0.0} if sampler == "entropy_bounded" else {"block": 4} if "semi" in sampler else {}
    network, process = Rows(rows), Absorbing(4)
    sample(
        model_of(network, process=process),
        batch=4,
        length=12,
        sampler=SAMPLERS[sampler](12, **options),
        fixed=(torch.zeros(12, dtype=torch.int64), where),
        generator=seeded(),
    )
    if sampler in ("ancestral", "remask"):
        assert sum(network.calls) <= 12 + 3 + 5
    else:
        assert network.calls == [4, *[1] * 11]


CALLS = {  # of the network, for 8 positions in 4 steps
    "tweedie": (TweedieSampler(4), 5),
    "predictor_corrector": (PredictorCorrectorSampler(4, correctors=2, size=0.5), 11),
    "first_hitting": (FirstHittingSampler(4), 8),
    "entropy_bounded": (EntropyBoundedSampler(4, gamma=0.0), 8),
    "confidence": (ConfidenceSampler(4), 4),
    "margin": (MarginSampler(4), 4),
    "entropy": (EntropySampler(4), 4),
    "greedy": (GreedySampler(4), 4),
    "semi_autoregressive": (SemiAutoregressiveSampler(4, block=4), 4),
    "ancestral": (AncestralSampler(4), 5),
    "remask": (RemaskSampler(4), 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_network(name):
    sampler, calls = CALLS[name]
    network = Rows(torch.rand(8, 4, generator=seeded(2)).double().softmax(1))
    counted = []
    sample(
        model_of(network, process=Absorbing(4)),
        batch=40,
        length=8,
        sampler=sampler,
        generator=seeded(),
        on_step=lambda i, n, x: counted.append((i, n)),
    )
    # of a batch of 40, some sequence has something to do in every step, but for the last one, from t = 1e-5
    assert len(network.calls) <= calls
    assert len(network.calls) >= calls - (name in ("tweedie", "ancestral", "remask", "predictor_corrector"))
    assert [i for i, _ in counted] == list(range(1, len(counted) + 1))
    assert len(counted) <= counted[0][1]


@pytest.mark.parametrize("sampler", FOR_ALL)
def test_temperature_and_top_p_reach_every_sampler(sampler):
    process = Absorbing(VOCABULARY)
    model = diffusion(TrueScore(process), process, get_schedule("loglinear"))
    for options in ({"temperature": 1e-3}, {"top_p": 1e-6}):
        tokens = sample(model, batch=4, length=20, sampler=sampler, steps=5, generator=seeded(), **options)
        assert tokens.tolist() == [[0] * 20] * 4, "the most probable token"


def test_statistics_of_positions():
    rows = torch.rand(6, 5, generator=seeded(2)).double().softmax(1)
    x = torch.full((1, 6), 5)
    walk = Walk(
        model_of(Rows(rows), process=Absorbing(5)),
        x,
        torch.ones_like(x, dtype=torch.bool),
        temperature=0.5,
        top_p=0.5,
        generator=seeded(),
    )
    where = torch.tensor([[True, False, True, True, False, True]])
    found, p = walk.unmask(where, 0.3), rows[where[0]]
    ordered = p.sort(1, descending=True).values
    torch.testing.assert_close(found.max_prob, ordered[:, 0])
    torch.testing.assert_close(found.margin, ordered[:, 0] - ordered[:, 1])
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(1))
    torch.testing.assert_close(found.log_prob, p.log().gather(1, found.token[:, None])[:, 0])
    assert torch.equal(found.argmax, p.argmax(1))
    assert torch.equal(walk.tokens, x)


def test_filling_computes_no_statistics(monkeypatch):
    calls = []

    def recorded(logits, *, statistics, **options):
        calls.append(statistics)
        return unmask(logits, statistics=statistics, **options)

    monkeypatch.setattr(walk_module, "unmask", recorded)
    x = torch.full((1, 4), 5)
    rows = torch.rand(4, 5, generator=seeded(2)).double().softmax(1)
    walk = Walk(model_of(Rows(rows), process=Absorbing(5)), x, torch.ones_like(x, dtype=torch.bool))
    walk.fill(walk.open(), 0.5)
    assert calls == [()]
    assert int(walk.tokens.max()) < 5


@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_statistics_of_other_processes_are_those_of_the_denoising_step(name):
    process = PROCESSES[name]
    exact, x_t = noised(process, 0.5, 200)  # predicts clean tokens
    scores = diffusion(TrueScore(process, torch.full((TOKENS,), 1 / TOKENS)), process, exact.schedule)
    for model in (exact, scores):
        walk = Walk(model, x_t, torch.ones_like(x_t, dtype=torch.bool), generator=seeded())
        t = torch.full((200,), 0.5, dtype=torch.float64)
        found = walk.unmask(walk.open(), t)
        probs = walk.probs(walk.open(), 0.5, model.schedule.reverse_step(t[0], None), denoise=True)
        torch.testing.assert_close(found.max_prob, probs.max(1).values)
        torch.testing.assert_close(found.log_prob, probs.gather(1, found.token[:, None])[:, 0].log())
        assert int(found.token.max()) < TOKENS


@pytest.mark.parametrize("name", ["loglinear", "geometric", "cosine", "polynomial"])
def test_times_of_a_share_of_noise(name):
    schedule = get_schedule(name)
    t = torch.tensor([0.0, 0.01, 0.3, 0.8, 1.0], dtype=torch.float64)
    for time in (schedule.time, functools.partial(Schedule.time, schedule)):  # a formula, and bisection
        torch.testing.assert_close(time(schedule.moved(t)), t, rtol=1e-6, atol=1e-12)
        assert time(torch.tensor([0.0, 1.0]).double()).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


def test_the_network_is_told_the_time_of_the_share_that_is_not_written():
    for sampler in (GreedySampler(3), EntropyBoundedSampler(3, gamma=0.0)):
        _, network, _ = written(sampler)
        told = -torch.expm1(-torch.cat(network.sigmas))
        start = SCHEDULES["loglinear"].moved(torch.ones(()).double())
        torch.testing.assert_close(told / start, torch.tensor([3, 2, 1]).double() / 3)


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TweedieSampler(4, grid="magic"), "grid: expected one of uniform, cosine, quadratic, got 'magic'"),
        (lambda: RemaskSampler(4, eta=1.5), "eta: expected a number from 0 to 1, got 1.5"),
        (lambda: RemaskSampler(4, grid="magic"), "grid: expected one of"),
        (lambda: PredictorCorrectorSampler(4, correctors=0), "correctors: expected at least 1, got 0"),
        (lambda: PredictorCorrectorSampler(4, size=0.0), r"size: expected a number above 0 and at most 1, got 0\.0"),
        (lambda: EntropyBoundedSampler(4, gamma=-1.0), r"gamma: expected a number of at least 0, got -1\.0"),
        (lambda: EntropyBoundedSampler(4, gamma=math.nan), "gamma: expected a number of at least 0, got nan"),
        (lambda: ConfidenceSampler(4, noise=-1.0), "noise: expected a finite number of at least 0"),
        (lambda: MarginSampler(4, grid="magic"), "grid: expected one of"),
        (lambda: SemiAutoregressiveSampler(4, block=0), "block: expected at least 1, got 0"),
        (
            lambda: SemiAutoregressiveSampler(4, sampler=AutoregressiveSampler(1)),
            "sampler: expected a sampler that fills blocks, got 'AutoregressiveSampler'",
        ),
        (
            lambda: SemiAutoregressiveSampler(4, sampler=SemiAutoregressiveSampler(1)),
            "sampler: expected a sampler that fills blocks",
        ),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", FOR_MASKS)
@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_other_processes_are_refused(sampler, name):
    model = model_of(Exact(PROCESSES[name]), process=PROCESSES[name])
    with pytest.raises(ValueError, match=r"sampler: expected one for .* noise, such as tweedie or euler, got .*MASK"):
        sample(model, batch=1, length=3, sampler=sampler)


@pytest.mark.parametrize("sampler", FOR_ALL)
def test_tokens_with_schedules_of_their_own(sampler):
    process, objective = PROCESSES["absorbing"], GenMD4()
    model = Diffusion(Exact(), process, get_schedule("loglinear"), objective, objective.parameterization(None))
    if SAMPLERS[sampler].needs_rate:
        with pytest.raises(ValueError, match=r"sampler: expected tweedie, .* for genmd4, whose tokens"):
            sample(model, batch=1, length=3, sampler=sampler)
    else:
        tokens = sample(model, batch=4, length=3, sampler=sampler, steps=4)
        assert not bool((tokens == TOKENS).any())
    with pytest.raises(ValueError, match="rate each"):
        sample(model, batch=1, length=3, sampler=SemiAutoregressiveSampler(4, sampler=FirstHittingSampler(1)))


def test_a_grid_of_ones_own(monkeypatch):
    monkeypatch.setitem(GRIDS, "cubic", lambda u: u**3)
    times = TweedieSampler(4, grid="cubic").times()
    torch.testing.assert_close(times, torch.tensor([1.0, 0.4219, 0.125, 0.0156, 0.0]).double(), rtol=0, atol=1e-4)
    steps, _, _ = written(EntropySampler(4, grid="cubic"), torch.rand(10, 4, generator=seeded(2)).double().softmax(1))
    assert [len(step[0]) for step in steps] == [5, 3, 1, 1]
    assert torch.equal(texts("tweedie_cosine", batch=50, steps=4), texts(TweedieSampler(4, grid="cosine"), batch=50))


def test_samplers_from_words():
    assert make_sampler("tweedie", 5, {"grid": "cosine", "denoise": "false"}) == TweedieSampler(5, False, "cosine")
    assert make_sampler("remask", 5, {"eta": "0.5"}) == RemaskSampler(5, eta=0.5)
    assert make_sampler("entropy_bounded", 5, {"gamma": "1"}) == EntropyBoundedSampler(5, gamma=1.0)
    words = {"block": "4", "sampler": "entropy_bounded", "gamma": "0.5"}
    expected = SemiAutoregressiveSampler(5, block=4, sampler=EntropyBoundedSampler(5, gamma=0.5))
    assert make_sampler("semi_autoregressive", 5, words) == expected
    assert make_sampler("semi_autoregressive", 5, {"noise": "2"}).sampler == ConfidenceSampler(5, noise=2.0)
    known = parameters()
    assert known["gamma"] == "Parameter of entropy_bounded (default: 0.1)."
    assert known["sampler"] == "Parameter of semi_autoregressive (default: confidence)."
    assert known["noise"] == "Parameter of confidence, margin, entropy, greedy (default: 0.0)."
    assert "steps" not in known
