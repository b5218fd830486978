"""Sampler: reproduces a known distribution, infills around given tokens, leaves the model as it was."""

import math

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch.profiler import ProfilerActivity, profile
from toy import P_0, VOCABULARY, TrueScore, diffusion

from sedd.diffusion.orders import GreedySampler
from sedd.diffusion.reverse_steps import TweedieSampler
from sedd.diffusion.samplers import SAMPLERS, sample
from sedd.diffusion.schedule import get_schedule
from sedd.diffusion.walk import Walk
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, Tweedie, Uniform

SCHEDULE = get_schedule("loglinear")
PROCESSES = {"absorbing": Absorbing(VOCABULARY), "uniform": Uniform(VOCABULARY), "hybrid": Hybrid(VOCABULARY, 0.3)}
SHAPE = {"batch": 500, "length": 40}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def p_value(tokens, p_0=P_0):
    """Chi-square test of the tokens against p_0; small where the sampler is wrong."""
    counts = torch.bincount(tokens.flatten(), minlength=len(p_0))
    assert len(counts) == len(p_0), f"a token outside the vocabulary: {counts.tolist()}"
    return chisquare(counts.numpy(), (p_0 / p_0.sum() * counts.sum()).numpy()).pvalue


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("name", PROCESSES)
def test_tweedie_with_the_true_score_is_exact_for_any_number_of_steps(name, steps):
    """Positions are independent here, so each Tweedie step is the exact posterior, however long it is."""
    process = PROCESSES[name]
    # what is left at t = 1 starts from π instead of p_1: an error of ε that 20,000 tokens must not see
    schedule = get_schedule("loglinear", eps=1e-5)
    tokens = sample(diffusion(TrueScore(process), process, schedule), steps=steps, generator=seeded(steps), **SHAPE)
    assert p_value(tokens) > 1e-4


@pytest.mark.parametrize("name", PROCESSES)
def test_euler_with_the_true_score_approaches_the_distribution(name):
    process = PROCESSES[name]
    schedule = get_schedule("geometric", sigma_min=1e-4, sigma_max=12.0)  # its rate has no spike at t = 1
    fine, coarse = (
        sample(
            diffusion(TrueScore(process), process, schedule), sampler="euler", steps=steps, generator=seeded(), **SHAPE
        )
        for steps in (300, 4)
    )
    error = [
        float((torch.bincount(x.flatten(), minlength=5)[:5] / x.numel() - P_0).abs().sum()) for x in (fine, coarse)
    ]
    assert error[0] < 0.03
    assert name == "absorbing" or error[1] > 2 * error[0]


def test_the_sampler_asked_for_is_used():
    process = PROCESSES["uniform"]
    tweedie, euler = (
        sample(diffusion(TrueScore(process), process, SCHEDULE), steps=2, sampler=name, generator=seeded(), **SHAPE)
        for name in ("tweedie", "euler")
    )
    assert p_value(tweedie) > 1e-4 > p_value(euler)


def test_a_wrong_score_is_noticed():
    """The chi-square test above can fail: a model of another distribution does."""
    process = PROCESSES["absorbing"]
    wrong = TrueScore(process, P_0 + torch.tensor([-0.02, 0.02, 0.0, 0.0, 0.0]))
    assert p_value(sample(diffusion(wrong, process, SCHEDULE), steps=4, generator=seeded(), **SHAPE)) < 1e-4


def test_model_shift_is_taken_off():
    for process in PROCESSES.values():
        plain, shifted = (
            sample(
                diffusion(TrueScore(process, shift=shift), process, SCHEDULE),
                steps=3,
                generator=seeded(),
                batch=8,
                length=30,
            )
            for shift in (None, 3.0)
        )
        torch.testing.assert_close(plain, shifted, rtol=0, atol=0)


def test_same_seed_same_text():
    process = PROCESSES["hybrid"]
    one, two, three = (
        sample(diffusion(TrueScore(process), process, SCHEDULE), steps=5, generator=seeded(seed), batch=8, length=30)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_denoising_step_leaves_no_mask():
    process = PROCESSES["absorbing"]
    sampled, rough = (
        sample(
            diffusion(TrueScore(process), process, get_schedule("geometric", sigma_min=0.1, sigma_max=20.0)),
            sampler=TweedieSampler(20, denoise=denoise),
            generator=seeded(),
            **SHAPE,
        )
        for denoise in (True, False)
    )
    assert not bool((sampled == process.mask_id).any())
    assert bool((rough == process.mask_id).any())


def test_head_runs_on_masked_positions_only_and_the_model_rests_when_none_is_left():
    process = PROCESSES["absorbing"]
    model = TrueScore(process)
    sample(diffusion(model, process, SCHEDULE), steps=200, batch=2, length=10, generator=seeded())
    assert model.rows_scored[0] == 20
    assert model.rows_scored == sorted(model.rows_scored, reverse=True)
    assert model.rows_scored[-1] > 0
    assert len(model.rows_scored) < 201


class Counting(TrueScore):
    """Absorbing diffusion of text of one token: the network needs no time, and counts the sequences it is shown."""

    def __init__(self, process, time_conditioning):
        super().__init__(process, torch.tensor([1.0]))
        self.time_conditioning = time_conditioning
        self.sequences = []

    def hidden(self, x_t, sigma):
        self.sequences.append(len(x_t))
        return super().hidden(x_t, torch.ones(1))

    def log_score_shift(self, sigma, x_t):
        return torch.expm1(sigma).log() - math.log(math.expm1(1.0))


def test_finished_sequences_leave_the_batch():
    process = Absorbing(3)
    model = Counting(process, time_conditioning=True)
    where = torch.ones(4, 30, dtype=torch.bool)
    where[0] = False  # one sequence with much to do, three with one position each
    where[1:, 0] = False
    tokens = torch.zeros(30, dtype=torch.int64)
    sample(diffusion(model, process, SCHEDULE), batch=4, length=30, steps=50, fixed=(tokens, where), generator=seeded())
    assert model.sequences[0] == 4
    assert model.sequences[-1] == 1
    assert model.sequences == sorted(model.sequences, reverse=True)


def test_a_network_without_time_rests_while_nothing_changes():
    """Of 400 steps over 8 positions, only those after a change take a function evaluation; the text is the same."""
    process, texts, evaluations = Absorbing(3), [], []
    for time_conditioning in (True, False):
        model = Counting(process, time_conditioning)
        texts.append(sample(diffusion(model, process, SCHEDULE), batch=3, length=8, steps=400, generator=seeded()))
        evaluations.append(sum(model.sequences))
    assert torch.equal(*texts)
    assert evaluations[0] > 600
    assert evaluations[1] <= 3 * 8


def build(process, **options):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=12, dropout=0.0, **options)
    model = SEDD(config, process)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", PROCESSES)
def test_the_fused_sampler_has_the_law_of_the_unfused_one(name):
    """One step of a real network: the frequencies of all tokens at a position, compared by a chi-square test."""
    process = PROCESSES[name]
    model = build(process)
    where = torch.arange(3) > 0
    start = (torch.tensor([0, 1, 2]), where)
    counts = [
        sample(
            diffusion(model, process, SCHEDULE),
            batch=20_000,
            length=3,
            steps=1,
            fixed=start,
            fused=fused,
            generator=seeded(int(fused)),
        )[:, 0].bincount(minlength=process.dim)
        for fused in (True, False)
    ]
    seen = torch.stack(counts).numpy()
    assert chi2_contingency(seen[:, seen.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_a_low_temperature_writes_the_likeliest_tokens(fused):
    process = PROCESSES["absorbing"]
    model = build(process)
    options = {"batch": 2, "length": 12, "steps": 1, "fused": fused}
    cold = [
        sample(diffusion(model, process, SCHEDULE), temperature=1e-3, generator=seeded(1), **options) for _ in range(2)
    ]
    # positions that changed at t = 1 took the likeliest token, whatever the random numbers
    narrow = sample(diffusion(model, process, SCHEDULE), top_p=1e-6, generator=seeded(1), **options)
    assert torch.equal(*cold)
    assert torch.equal(cold[0], narrow)


def test_time_conditioning_is_all_that_sigma_does():
    process = PROCESSES["absorbing"]
    x = torch.randint(VOCABULARY, (2, 12), generator=seeded())
    for told in (True, False):
        model = build(process, time_conditioning=told)
        early, late = (model.hidden(x, torch.full((2,), s)) for s in (0.1, 3.0))
        assert torch.equal(early, late) is not told
        torch.testing.assert_close(model.hidden(x, torch.tensor([0.1])), early)


FOR_ALL = [name for name, kind in SAMPLERS.items() if not kind.autoregressive and not kind.needs_mask]


@pytest.mark.parametrize("sampler", FOR_ALL)  # test_samplers.py has those for absorbing processes alone
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("given", ["prefix", "suffix", "middle", "spans"])
def test_infilling_keeps_every_given_token_in_every_step(name, sampler, given):
    process = PROCESSES[name]
    where = torch.zeros(12, dtype=torch.bool)
    where[{"prefix": slice(0, 4), "suffix": slice(7, 12), "middle": slice(3, 9), "spans": slice(0, 12, 3)}[given]] = (
        True
    )
    tokens = torch.randint(VOCABULARY, (12,), generator=seeded(5))
    seen = []
    filled = sample(
        diffusion(TrueScore(process), process, SCHEDULE),
        batch=3,
        length=12,
        steps=6,
        sampler=sampler,
        fixed=(tokens, where),
        generator=seeded(),
        on_step=lambda step, steps, x: seen.append((step, steps, x)),
    )
    steps = min(6, int((~where).sum())) if sampler == "greedy" else 7
    assert [entry[:2] for entry in seen] == [(i, steps) for i in range(1, steps + 1)]
    for x in (*(entry[2] for entry in seen), filled):
        assert torch.equal(x[:, where], tokens[where].expand(3, -1))
    assert torch.equal(seen[-1][2], filled)


def test_infilling_around_given_tokens_leaves_the_rest_to_the_model():
    process = PROCESSES["uniform"]
    where = torch.arange(40) % 2 == 0
    tokens = torch.full((500, 40), 4)
    x = sample(
        diffusion(TrueScore(process), process, get_schedule("loglinear", eps=1e-5)),
        steps=3,
        fixed=(tokens, where),
        generator=seeded(),
        **SHAPE,
    )
    assert p_value(x[:, ~where]) > 1e-4


def test_infilling_with_other_positions_in_each_sequence():
    process = PROCESSES["absorbing"]
    tokens = torch.randint(VOCABULARY, (2, 6), generator=seeded())
    where = torch.tensor([[True] * 6, [False, True] * 3])
    x = sample(
        diffusion(TrueScore(process), process, SCHEDULE),
        batch=2,
        length=6,
        steps=3,
        fixed=(tokens, where),
        generator=seeded(),
    )
    assert torch.equal(x[0], tokens[0])
    assert torch.equal(x[1, 1::2], tokens[1, 1::2])


def test_tokens_outside_the_given_positions_do_not_matter():
    process = PROCESSES["absorbing"]
    where = torch.tensor([True, False, False])
    for unknown in (process.mask_id, -1):
        fixed = (torch.tensor([2, unknown, unknown]), where)
        x = sample(
            diffusion(TrueScore(process), process, SCHEDULE),
            batch=4,
            length=3,
            steps=2,
            fixed=fixed,
            generator=seeded(),
        )
        assert x[:, 0].tolist() == [2] * 4


def test_mode_is_evaluation_inside_and_restored_outside():
    process = PROCESSES["absorbing"]
    for training in (True, False):
        model = TrueScore(process).train(training)
        sample(diffusion(model, process, SCHEDULE), batch=1, length=3, steps=2, generator=seeded())
        assert model.training is training
        assert model.modes
        assert not any(model.modes)


def test_mode_is_restored_after_an_error():
    process = PROCESSES["absorbing"]
    model = TrueScore(process, torch.full((5,), torch.nan)).train()
    with pytest.raises(ValueError, match="log_score"):
        sample(diffusion(model, process, SCHEDULE), batch=1, length=3, steps=2, generator=seeded())
    assert model.training


def test_samples_are_ordinary_tensors():
    """Not inference tensors, which autograd would refuse: a caller may train on what was sampled."""
    process = PROCESSES["absorbing"]
    seen = []
    x = sample(
        diffusion(TrueScore(process), process, SCHEDULE),
        batch=1,
        length=3,
        steps=2,
        on_step=lambda *a: seen.append(a[2]),
    )
    assert not x.is_inference()
    assert not any(tokens.is_inference() for tokens in seen)
    x[:] = 0  # a callback's tokens are its own
    assert bool(seen[-1].any()) or seen[-1].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_real_model_samples(dtype):
    process = Absorbing(257)
    x = sample(
        diffusion(SEDD("tiny", process), process, SCHEDULE),
        batch=2,
        length=16,
        steps=3,
        generator=seeded(),
        autocast_dtype=dtype,
    )
    assert x.shape == (2, 16)
    assert x.dtype == torch.int64
    assert 0 <= int(x.min()) <= int(x.max()) < 257


def test_weights_are_cast_once_a_sample_and_not_in_every_step():
    """Seen by the profiler: a dispatch mode of Python would change what is cast."""
    model = SEDD(ModelConfig(16, 2, 2, 8, 12), Absorbing(20))
    calls, shape = [], list(model.blocks[0].attn_qkv.weight.shape)
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        sample(diffusion(model, model.process, SCHEDULE), batch=2, length=12, steps=5, autocast_dtype=torch.bfloat16)
    casts = [event for event in profiled.events() if event.name == "aten::_to_copy" and event.input_shapes[0] == shape]
    assert len(calls) >= 5
    assert len(casts) == len(model.blocks)


def test_fixed_tokens_in_any_layout():
    process = PROCESSES["absorbing"]
    tokens, where = torch.arange(12).remainder(5).view(3, 4).T, torch.tensor([True, False, False]).expand(4, 3)
    x = sample(
        diffusion(TrueScore(process), process, SCHEDULE), batch=4, length=3, steps=2, fixed=(tokens, where.T.clone().T)
    )
    assert torch.equal(x[:, 0], tokens[:, 0])
    assert bool((x < 5).all())


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sedd.progress.LINE_EVERY", 0.0)
    process = PROCESSES["absorbing"]
    sample(diffusion(TrueScore(process), process, SCHEDULE), batch=1, length=3, steps=2, progress=True)
    assert capsys.readouterr().err.splitlines()[-1] == "100%  sampling: 3 of 3"


TOKENS, WHERE = torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, False])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"length": 0}, ValueError, "length: .* got 0"),
        ({"steps": 0}, ValueError, "steps: .* got 0"),
        ({"sampler": TweedieSampler(0)}, ValueError, "steps: .* got 0"),
        (
            {"sampler": "magic"},
            ValueError,
            "sampler: expected one of 'tweedie', 'tweedie_cosine', 'euler', 'ancestral', .*, 'autoregressive', got ",
        ),
        ({"fixed": (TOKENS[:2], WHERE)}, ValueError, r"fixed: expected the tokens as \[3\] or \[2, 3\], got \[2\]"),
        ({"fixed": (TOKENS, WHERE[None])}, ValueError, r"fixed: expected the positions .* got \[1, 3\]"),
        ({"fixed": (TOKENS.int(), WHERE)}, TypeError, "fixed: expected the tokens as a torch.int64 .* got torch.int32"),
        ({"fixed": (TOKENS, WHERE.long())}, TypeError, "fixed: expected the positions as a torch.bool .* torch.int64"),
        ({"fixed": (TOKENS + 6, WHERE)}, ValueError, r"fixed: expected tokens in \[0, 6\), got values from 6 to 6"),
        ({"fixed": (TOKENS - 1, WHERE)}, ValueError, r"fixed: .* got values from -1 to -1"),
        ({"fixed": (TOKENS + VOCABULARY, WHERE)}, ValueError, "fixed: the MASK token 5 is no text"),
        ({"fixed": (TOKENS, WHERE | True)}, ValueError, "fixed: every position is given"),
    ],
)
def test_bad_input(arguments, error, message):
    process = PROCESSES["absorbing"]
    with pytest.raises(error, match=message):
        sample(diffusion(TrueScore(process), process, SCHEDULE), **({"batch": 2, "length": 3, "steps": 2} | arguments))


class Reluctant(TrueScore):
    """Scores that are far too low, so that MASK hardly ever goes by itself."""

    def hidden(self, x_t, sigma):
        return super().hidden(x_t, sigma) - 30.0


@pytest.mark.parametrize("denoise", [True, False])
def test_the_last_step_leaves_no_mask_whatever_the_scores(denoise):
    process = PROCESSES["absorbing"]
    x = sample(
        diffusion(Reluctant(process), process, SCHEDULE), batch=2, length=50, sampler=TweedieSampler(2, denoise=denoise)
    )
    assert bool((x == process.mask_id).any()) != denoise


class Contextual(TrueScore):
    """Scores of a text whose tokens repeat one another, which do not depend on the time."""

    def __init__(self, process, time_conditioning):
        super().__init__(process)
        self.time_conditioning = time_conditioning

    def hidden(self, x_t, sigma):
        counts = torch.nn.functional.one_hot(x_t, self.process.dim).sum(1)[:, : self.process.dim - 1]
        log_p = torch.log_softmax(2.0 * counts.double(), -1)
        return torch.nn.functional.pad(log_p, (0, 1))[:, None].repeat(1, x_t.shape[1], 1)

    def log_score_shift(self, sigma, x_t):
        return sigma.double().expm1().log()


def test_states_that_are_kept_are_those_of_the_tokens_that_are_there():
    """A network that is not told the time draws what it would draw if it were called in every step."""
    process = PROCESSES["absorbing"]
    drawn = [
        sample(
            diffusion(Contextual(process, time_conditioning), process, SCHEDULE),
            batch=4,
            length=12,
            steps=8,
            generator=torch.Generator().manual_seed(0),
        )
        for time_conditioning in (True, False)
    ]
    assert torch.equal(*drawn)


# -- what a sampler can do with the walk -------------------------------------------------------------------------------


def walk_of(process, tokens, **options):
    return Walk(diffusion(TrueScore(process), process, SCHEDULE), tokens, torch.ones_like(tokens).bool(), **options)


def test_the_time_may_differ_by_sequence():
    """Sequences at times of their own are drawn as each of them would be alone, in each of three processes."""
    t, t_next = torch.tensor([0.9, 0.4, 0.1]).double(), torch.tensor([0.5, 0.3, 0.05]).double()
    for process in PROCESSES.values():
        x = process.sample_limit((3, 2000), generator=seeded())
        dsigma = SCHEDULE.total(t) - SCHEDULE.total(t_next)
        walk = walk_of(process, x)
        where = walk.open()
        together = walk.probs(where, t, Tweedie(dsigma))
        for i in range(3):
            alone = walk_of(process, x[i : i + 1])
            expected = alone.probs(alone.open(), t[i], Tweedie(float(dsigma[i])))
            rows = where.nonzero()[:, 0] == i
            torch.testing.assert_close(together[rows], expected, rtol=1e-12, atol=0)
        drawn = walk_of(process, x, generator=seeded(1)).draw(where, t, Tweedie(dsigma))
        for i in range(3):
            rows = where.nonzero()[:, 0] == i
            # the positions of one sequence, pooled by the token they had
            law = together[rows].sum(0)
            counts = torch.bincount(drawn[rows], minlength=process.dim)
            seen = law > 5
            assert (
                chisquare(counts[seen].numpy(), (law[seen] / law[seen].sum() * counts[seen].sum()).numpy()).pvalue
                > 1e-4
            )


def test_the_shift_is_that_of_the_sequence():
    """A real network, whose states and shift of the log-scores depend on the noise level of each sequence."""
    process, t = PROCESSES["absorbing"], torch.tensor([0.9, 0.4, 0.1]).double()
    model = diffusion(build(process), process, SCHEDULE).eval()
    x = process.sample_limit((3, 5))
    where = torch.ones_like(x, dtype=torch.bool)
    together = Walk(model, x, where).probs(where, t, Tweedie(SCHEDULE.total(t) / 2)).view(3, 5, -1)
    for i in range(3):
        step = Tweedie(float(SCHEDULE.total(t[i])) / 2)
        alone = Walk(model, x[i : i + 1], where[i : i + 1]).probs(where[i : i + 1], t[i], step)
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-6)
    assert float((together[0] - together[2]).abs().max()) > 0.01, "or the noise level would not show"


def test_a_token_may_return_to_mask():
    process = PROCESSES["absorbing"]
    walk = walk_of(process, torch.zeros(2, 4, dtype=torch.int64))
    assert not bool(walk.open().any())
    back = torch.tensor([[True, False, False, False], [False, True, True, False]])
    walk.remask(back)
    assert torch.equal(walk.tokens == process.mask_id, back)
    assert torch.equal(walk.open(), back)
    walk.step(0.5, Tweedie(float(SCHEDULE.total(torch.tensor(0.5)))), denoise=True)
    assert not bool((walk.tokens == process.mask_id).any())
    assert walk.tokens[~back].tolist() == [0] * 5
    with pytest.raises(ValueError, match="remask: expected a process with a MASK"):
        walk_of(PROCESSES["uniform"], torch.zeros(1, 2, dtype=torch.int64)).remask(torch.ones(1, 2).bool())


def test_greedy_in_fewer_steps_fixes_equal_parts():
    process = PROCESSES["absorbing"]
    walk = walk_of(process, torch.full((2, 10), process.mask_id))
    walk.free[1, 4:] = False
    free = [int(walk.free[0].sum())]
    for tokens in GreedySampler(4)(walk):
        free.append(int(walk.free[0].sum()))
        assert torch.equal(tokens[walk.free], torch.full_like(tokens[walk.free], process.mask_id))
    assert free == [10, 8, 5, 3, 0]
    assert walk.tokens[0].tolist() == [0] * 10, "the most probable token"
