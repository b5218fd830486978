"""Likelihood: tight where the score is exact, honest about its errors; n-gram yardsticks; the picture."""

import math
import sys

import pytest
import torch
from toy import VOCABULARY, JointScore, TrueScore, diffusion

from sedd.data.ngram import ngram_bits
from sedd.diffusion.likelihood import ElboResult, elbo, joined, prior_kl
from sedd.diffusion.schedule import get_schedule
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, transition_column

PROCESSES = {"absorbing": Absorbing(VOCABULARY), "uniform": Uniform(VOCABULARY), "hybrid": Hybrid(VOCABULARY, 0.3)}
SCHEDULES = ["loglinear", "cosine", "geometric"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def base(sigma, process):
    """p_base, from the definition: the mean of the columns of exp(σQ) over all tokens but MASK."""
    n = process.dim - (process.mask_id is not None)
    return transition_column(torch.arange(n), torch.tensor(sigma, dtype=torch.float64), process).mean(0)


def divergence(p, q):
    """D_KL(p ‖ q) over the last axis."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PROCESSES)
def test_bound_is_the_entropy_where_the_score_is_exact(name, schedule):
    """Averaged over text from p_0, bound - entropy = D_KL(p_1 ‖ p_base) for each token, with p_1 the noised p_0."""
    process, schedule = PROCESSES[name], get_schedule(schedule)
    p_0 = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    model = TrueScore(process, p_0)
    blocks = model.draw((400, 25), seeded(1))
    result = elbo(diffusion(model, process, schedule), blocks, draws=100, batch_size=2000, generator=seeded(2))
    end = schedule.total(torch.ones(1))
    p_end, p_base = model.p_t(end)[0], base(float(end), process)
    expected = -float(p_0.log()[blocks].mean()) + float(divergence(p_end, p_base))
    assert result.monte_carlo_error < 0.025
    assert abs(result.nats_per_token - expected) < 4 * result.monte_carlo_error
    assert result.tokens == 10_000


@pytest.mark.parametrize("name", PROCESSES)
def test_bound_is_above_the_entropy_where_the_score_is_wrong(name):
    """By D_KL of the text's law from the model's, here a known number."""
    process = PROCESSES[name]
    wrong = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    blocks = TrueScore(process).draw((400, 25), seeded(1))
    result = elbo(
        diffusion(TrueScore(process, wrong), process, get_schedule("loglinear", eps=1e-6)),
        blocks,
        draws=20,
        generator=seeded(2),
    )
    assert result.nats_per_token == pytest.approx(math.log(5), abs=4 * result.monte_carlo_error + 1e-4)


JOINT = torch.softmax(1.5 * torch.randn(5, 5, 5, generator=seeded(7), dtype=torch.float64).flatten(), 0).view(5, 5, 5)
EVERY_TEXT = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * 3)


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_each_text_is_its_exact_likelihood(name, schedule):
    """Five tokens, length three, any joint distribution: with the exact score the bound is -log p_0 of every text.

    At σ̄(1) = 9 or more the base is p_1 but for one part in ten thousand. The mean over the texts has the least noise;
    each of the likelier texts by itself may deviate by its own Monte Carlo error, judged from repeated estimates.
    """
    process = PROCESSES[name]
    # the geometric one leaves much to the part of the bound before t = 0
    schedule = get_schedule(schedule, **({"eps": 1e-4} if schedule == "loglinear" else {"sigma_min": 0.3}))
    p, options = JOINT.flatten(), {"draws": 100, "batch_size": 20_000}
    model, exact = JointScore(process, JOINT), -p.log()
    estimates = torch.stack(
        [
            elbo(diffusion(model, process, schedule), EVERY_TEXT, generator=seeded(i), **options).sequences
            for i in range(30)
        ]
    )
    for weights in (p, torch.full_like(p, 1 / 125)):
        means = estimates @ weights
        error = float(means.std()) / math.sqrt(30)
        assert error < 0.1, "else the test would show little"
        assert float(means.mean()) == pytest.approx(float(weights @ exact), abs=4 * error)
    away = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(30))
    # 46 values of Student's t with 29 degrees of freedom: beyond 5.5 in one of 3,000 such tests
    assert float(away[p > 0.004].abs().max()) < 5.5
    for wrong in (-1.0, 1.0):
        bound = elbo(
            diffusion(JointScore(process, JOINT, wrong), process, schedule), EVERY_TEXT, generator=seeded(50), **options
        )
        assert 3 * (bound.nats_per_token - 6 * bound.monte_carlo_error) > float(exact.mean())


class Interrupted(TrueScore):
    """Fails in its n-th call."""

    calls_left = 10**9

    def hidden(self, x_t, sigma):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        return super().hidden(x_t, sigma)


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
def test_an_interrupted_evaluation_goes_on_to_the_same_bound(schedule, tmp_path):
    process, schedule = PROCESSES["hybrid"], get_schedule(schedule)
    model, file = Interrupted(process), tmp_path / "figures.unfinished"
    blocks = model.draw((7, 4), seeded())
    options = {"draws": 5, "batch_size": 4, "unfinished": file}
    whole = elbo(diffusion(model, process, schedule), blocks, draws=5, batch_size=4, generator=seeded(3))
    calls = 0
    for calls_left in (0, 3, 1, 2):
        model.calls_left = calls_left
        with pytest.raises(KeyboardInterrupt):
            elbo(diffusion(model, process, schedule), blocks, generator=seeded(3), **options)
        calls += calls_left
        assert file.exists() == (calls > 0)
    model.calls_left = 10**9
    result = elbo(diffusion(model, process, schedule), blocks, generator=seeded(3), **options)
    assert 10**9 - model.calls_left == math.ceil(35 / 4) + (4 if float(schedule.total(torch.zeros(1))) else 0) - calls
    assert torch.equal(result.sequences, whole.sequences)
    assert torch.equal(result.integrand, whole.integrand)
    model.calls_left = 0  # it is all there
    again = elbo(diffusion(model, process, schedule), blocks, generator=seeded(3), **options)
    assert torch.equal(again.sequences, whole.sequences)
    assert list(tmp_path.iterdir()) == [file]


def test_an_unfinished_evaluation_of_something_else_is_not_taken(tmp_path):
    process, schedule = PROCESSES["absorbing"], get_schedule("loglinear")
    model, file = Interrupted(process), tmp_path / "figures.unfinished"
    blocks = model.draw((7, 4), seeded())
    model.calls_left = 2
    with pytest.raises(KeyboardInterrupt):
        elbo(diffusion(model, process, schedule), blocks, draws=2, batch_size=3, generator=seeded(), unfinished=file)
    model.calls_left = 10**9
    before = file.read_bytes()
    configured = TrueScore(process)
    configured.config = ModelConfig(time_conditioning=False)
    for other in (
        {"generator": seeded(1)},
        {"draws": 3},
        {"batch_size": 2},
        {"blocks": blocks.flip(0)},
        {"schedule": get_schedule("loglinear", eps=1e-2)},
        {"process": RankOne(torch.full((6,), 1 / 6, dtype=torch.float64))},
        {"model": configured},
    ):
        options = {"model": model, "process": process, "schedule": schedule, "blocks": blocks} | other
        options = {"draws": 2, "batch_size": 3, "generator": seeded()} | options
        options["diffusion"] = diffusion(*(options.pop(name) for name in ("model", "process", "schedule")))
        with pytest.raises(
            ValueError, match=r"unfinished: .* the same model, text, options and version, got another one; delete it"
        ):
            elbo(unfinished=file, **options)
    assert file.read_bytes() == before
    file.write_bytes(before[:-9])
    with pytest.raises(ValueError, match=r"damaged unfinished evaluation"):
        elbo(diffusion(model, process, schedule), blocks, draws=2, batch_size=3, generator=seeded(), unfinished=file)
    with pytest.raises(ValueError, match=r"unfinished: .* needs a generator"):
        elbo(diffusion(model, process, schedule), blocks, draws=2, unfinished=file)


def test_two_hybrid_processes_are_not_the_same(tmp_path):
    """Their names are, and so are their numbers of tokens."""
    file, blocks = tmp_path / "figures.unfinished", torch.zeros(7, 4, dtype=torch.int64)
    options = {"draws": 2, "batch_size": 3, "unfinished": file}
    model = Interrupted(Hybrid(5, 0.1))
    model.calls_left = 2
    with pytest.raises(KeyboardInterrupt):
        elbo(diffusion(model, model.process, get_schedule("loglinear")), blocks, generator=seeded(), **options)
    model.calls_left = 10
    with pytest.raises(ValueError, match="got another one"):
        elbo(diffusion(model, Hybrid(5, 0.9), get_schedule("loglinear")), blocks, generator=seeded(), **options)


def test_the_error_of_a_schedule_that_starts_with_noise():
    """The part before t = 0 is in it, and shrinks with the number of draws."""
    process, schedule = PROCESSES["uniform"], get_schedule("geometric", sigma_min=0.1)
    model = TrueScore(process)
    blocks = model.draw((20, 10), seeded(1))
    errors = []
    for draws in (32, 128):
        results = [
            elbo(diffusion(model, process, schedule), blocks, draws=draws, batch_size=3000, generator=seeded(i))
            for i in range(40)
        ]
        spread = float(torch.tensor([result.nats_per_token for result in results]).std())
        told = float(torch.tensor([result.monte_carlo_error for result in results]).mean())
        assert 0.5 * told < spread < 1.5 * told
        errors.append(spread)
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("name", ["loglinear", "geometric"])
def test_the_bound_does_not_depend_on_the_batch_size(name: str):
    process = PROCESSES["absorbing"]
    model = TrueScore(process)
    blocks = model.draw((7, 10), seeded(1))
    whole, parts = (
        elbo(
            diffusion(model, process, get_schedule(name)), blocks, draws=3, batch_size=size, generator=seeded(2)
        ).sequences
        for size in (100, 4)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)
    assert whole.std() > 0.1


def test_errors_cover_the_estimates_of_repeated_runs():
    process = PROCESSES["absorbing"]
    model = TrueScore(process)
    blocks = model.draw((40, 10), seeded(1))
    schedule = get_schedule("loglinear")
    # the loss is weighted with 1/t: seeds without a token that is masked at a time very near 0, which would dominate
    results = [
        elbo(diffusion(model, process, schedule), blocks, draws=4, batch_size=160, generator=seeded(1000 + i))
        for i in range(40)
    ]
    spread = float(torch.tensor([result.nats_per_token for result in results]).std())
    told = float(torch.tensor([result.monte_carlo_error for result in results]).mean())
    assert 0.5 * told < spread < 1.3 * told
    fresh = [
        elbo(
            diffusion(model, process, schedule),
            model.draw((40, 10), seeded(100 + i)),
            draws=4,
            batch_size=160,
            generator=seeded(1000 + i),
        )
        for i in range(40)
    ]
    spread = float(torch.tensor([result.nats_per_token for result in fresh]).std())
    told = float(torch.tensor([result.standard_error for result in fresh]).mean())
    assert 0.6 * told < spread < 1.4 * told


def test_times_are_stratified():
    process = PROCESSES["absorbing"]
    model = TrueScore(process)
    times = elbo(
        diffusion(model, process, get_schedule("loglinear")), model.draw((50, 2), seeded()), draws=3, generator=seeded()
    ).times
    for k in range(3):
        stratum = times[:, k].sort().values
        assert k / 3 < float(stratum[0])
        assert float(stratum[-1]) <= (k + 1) / 3
        torch.testing.assert_close(
            stratum.diff(), torch.full((49,), 1 / 150, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("sigma", [0.01, 1.0, 6.9, 800.0])
@pytest.mark.parametrize(
    "process",
    [*PROCESSES.values(), RankOne(torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64))],
    ids=[*PROCESSES, "rank_one"],
)
def test_prior_term_is_the_divergence(process, sigma):
    x_0 = torch.arange(process.dim - (process.mask_id is not None))
    column = transition_column(x_0, torch.tensor(sigma, dtype=torch.float64), process)
    expected = divergence(column, base(sigma, process))
    torch.testing.assert_close(prior_kl(x_0, sigma, process), expected, rtol=1e-9, atol=1e-15)


def test_prior_term_of_the_papers_processes():
    x_0 = torch.tensor([[0, 3]])
    sigma = -math.log(1e-3)
    absorbing = prior_kl(x_0, sigma, PROCESSES["absorbing"])
    torch.testing.assert_close(absorbing, torch.full((1, 2), 1e-3 * math.log(VOCABULARY), dtype=torch.float64))
    p = torch.full((5,), 0.999 / 5, dtype=torch.float64)
    p[0] += 1e-3
    to_stationary = float((p * (p * 5).log()).sum())
    assert float(prior_kl(x_0, sigma, PROCESSES["uniform"])[0, 0]) == pytest.approx(to_stationary, rel=1e-9)


def test_result_arithmetic():
    sequences = torch.tensor([2.0, 6.0], dtype=torch.float64)
    integrand = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    result = ElboResult(sequences, 2, torch.zeros(2, 2), integrand, 0.0, n_bytes=8)
    assert result.tokens == 4
    assert result.nats_per_token == 2.0
    assert result.bits_per_token == pytest.approx(2 / math.log(2))
    assert result.bits_per_byte == pytest.approx(1 / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(2))
    assert result.perplexity_mean_of_exp == pytest.approx((math.exp(1) + math.exp(3)) / 2)
    assert result.standard_error == pytest.approx(math.sqrt(8) / math.sqrt(2) / 2)
    assert result.monte_carlo_error == pytest.approx(math.sqrt(2 * 3 * 4 / 2) / 2 / 2 / 2)
    assert math.isnan(ElboResult(sequences, 2, torch.zeros(2, 1), integrand[:, :1], 0.0).monte_carlo_error)
    assert ElboResult(sequences, 2, torch.zeros(2, 2), integrand, 0.0).bits_per_byte is None
    onset = ElboResult(sequences, 2, torch.zeros(2, 2), integrand, 0.0, onset=integrand / 2)
    assert onset.monte_carlo_error == pytest.approx(math.sqrt(1.25) * result.monte_carlo_error)
    assert ElboResult(1e4 * sequences, 2, torch.zeros(2, 2), integrand, 0.0).perplexity == math.inf


@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
def test_results_are_joined_by_sequence(schedule):
    process = RankOne(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64))
    schedule = get_schedule(schedule, **({"sigma_max": 2.0} if schedule == "geometric" else {}))
    model, generator = TrueScore(process), seeded(1)
    blocks = model.draw((7, 6), generator)
    parts = [
        elbo(diffusion(model, process, schedule), part, draws=4, n_bytes=part.numel(), generator=generator)
        for part in blocks.split([2, 5])
    ]
    whole = joined(parts)
    assert torch.equal(whole.sequences, torch.cat([part.sequences for part in parts]))
    assert (whole.tokens, whole.n_bytes, tuple(whole.times.shape)) == (42, 42, (7, 4))
    assert whole.nats_per_token == pytest.approx((2 * parts[0].nats_per_token + 5 * parts[1].nats_per_token) / 7)
    drawn = whole.integrand.mean(1) + (0 if whole.onset is None else whole.onset.mean(1))
    assert whole.prior == pytest.approx(float((whole.sequences - drawn).mean()) / 6)
    assert parts[0].prior != pytest.approx(parts[1].prior, rel=1e-6), "or the weights of the parts would not show"


def test_same_seed_same_bound_whatever_the_mode_and_mode_is_restored():
    process = PROCESSES["hybrid"]
    model = TrueScore(process)
    blocks = model.draw((5, 4), seeded())
    values = []
    for training in (True, False):
        model.train(training)
        values.append(
            elbo(
                diffusion(model, process, get_schedule("loglinear")), blocks, draws=3, generator=seeded()
            ).nats_per_token
        )
        assert model.training is training
    assert values[0] == values[1]
    assert not any(model.modes)


def test_bigram_by_hand():
    train = torch.tensor([0, 1, 0, 1, 0, 2])
    valid = torch.tensor([0, 1, 1, 2])
    unigram = [4 / 10, 3 / 10, 2 / 10, 1 / 10]
    assert ngram_bits(train, valid, 4, 1) == pytest.approx(-sum(math.log2(unigram[y]) for y in (0, 1, 1, 2)) / 4)
    after_0 = (2 + 2 * unigram[1]) / (3 + 2)  # three pairs from 0, to two different tokens
    after_1 = [(0 + 1 * unigram[y]) / (2 + 1) for y in (1, 2)]
    p = [unigram[0], after_0, *after_1]
    assert ngram_bits(train, valid, 4, 2) == pytest.approx(-sum(math.log2(q) for q in p) / 4)


def test_bigram_is_a_distribution_and_handles_the_unseen():
    """Summed over all next tokens, 2^-bits of the second token is one; after a token never seen, it is the unigram."""
    train = torch.randint(5, (200,), generator=seeded())  # tokens 5 and 6 do not occur
    for first in (0, 6):
        valid = torch.tensor([[first, y] for y in range(7)])
        start = ngram_bits(train, valid[:1, :1], 7, 1)
        p = [2 ** -(2 * ngram_bits(train, row[None], 7, 2) - start) for row in valid]
        assert sum(p) == pytest.approx(1.0)
        assert min(p) > 0


def test_rows_are_texts_of_their_own():
    train = torch.tensor([[0, 1], [2, 3]])
    assert ngram_bits(train, torch.tensor([1, 2]), 4, 2) == pytest.approx(2.0)  # 1 → 2 was not a pair; unigram 1/4 each
    assert ngram_bits(train.flatten(), torch.tensor([1, 2]), 4, 2) < 2.0
    rows = ngram_bits(train, torch.tensor([[0, 1], [2, 3]]), 4, 2)
    assert rows > ngram_bits(train, torch.tensor([0, 1]), 4, 2) - 1e-12


def test_bigram_of_a_large_vocabulary_needs_no_table():
    train = torch.randint(50_000, (20_000,), generator=seeded())
    assert ngram_bits(train, train, 50_257, 2) < 1.5 < 10 < ngram_bits(train, train, 50_257, 1)


def test_a_markov_text_shows_the_order():
    """Tokens that repeat with probability 0.9: the bigram model finds its entropy, the unigram model does not."""
    generator = seeded()
    jump = torch.rand(20_000, generator=generator) < 0.1
    x = torch.randint(2, (20_000,), generator=generator)
    last = torch.where(jump, torch.arange(20_000), 0).cummax(0).values
    x = x[last]
    p = 0.95
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert ngram_bits(x[:10_000], x[10_000:], 2, 2) == pytest.approx(entropy, abs=0.03)
    assert ngram_bits(x[:10_000], x[10_000:], 2, 1) == pytest.approx(1.0, abs=0.03)


def test_plot_is_written_whole(tmp_path):
    pytest.importorskip("rich")
    from sedd.commands.perplexity import plot_bound

    process = PROCESSES["absorbing"]
    model = TrueScore(process)
    result = elbo(
        diffusion(model, process, get_schedule("loglinear")), model.draw((5, 4), seeded()), draws=3, generator=seeded()
    )
    plot_bound(result, tmp_path / "bound.png", bins=7)
    assert [path.name for path in tmp_path.iterdir()] == ["bound.png"]
    assert (tmp_path / "bound.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    from sedd.commands.perplexity import plot_bound

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = ElboResult(torch.ones(1), 1, torch.zeros(1, 1), torch.ones(1, 1), 0.0)
    with pytest.raises(ImportError, match=r'pip install "sedd_ext\[eval\]"'):
        plot_bound(result, tmp_path / "bound.png")


def test_progress_without_rich_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    process = PROCESSES["absorbing"]
    with pytest.raises(ImportError, match=r'pip install "sedd_ext\[train\]"'):
        elbo(diffusion(TrueScore(process), process, get_schedule("loglinear")), BLOCKS, draws=1, progress=True)


BLOCKS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("blocks", "arguments", "error", "message"),
    [
        (BLOCKS, {"draws": 0}, ValueError, "draws: expected at least 1, got 0"),
        (BLOCKS, {"batch_size": 0}, ValueError, "batch_size: .* got 0"),
        (BLOCKS, {"n_bytes": 0}, ValueError, "n_bytes: .* got 0"),
        (BLOCKS[0], {}, ValueError, r"blocks: .* got shape \[3\]"),
        (BLOCKS[:0], {}, ValueError, r"blocks: .* got shape \[0, 3\]"),
        (BLOCKS.float(), {}, TypeError, "blocks: .* got torch.float32"),
        (BLOCKS - 1, {}, ValueError, r"blocks: expected tokens in \[0, 6\), got values from -1 to -1"),
        (BLOCKS + VOCABULARY, {}, ValueError, "blocks: expected text, got the MASK token 5 in it"),
    ],
)
def test_bad_input(blocks, arguments, error, message):
    process = PROCESSES["absorbing"]
    with pytest.raises(error, match=message):
        elbo(diffusion(TrueScore(process), process, get_schedule("loglinear")), blocks, **({"draws": 1} | arguments))


@pytest.mark.parametrize(
    ("train", "valid", "order", "message"),
    [
        (BLOCKS, BLOCKS, 3, r"order: expected 1 \(unigram\) or 2 \(bigram\), got 3"),
        (BLOCKS[:0], BLOCKS, 1, r"train_tokens: .* got shape \[0, 3\]"),
        (BLOCKS, BLOCKS + 7, 2, r"valid_tokens: expected tokens in \[0, 7\), got 7 to 7"),
    ],
)
def test_bad_ngram_input(train, valid, order, message):
    with pytest.raises(ValueError, match=message):
        ngram_bits(train, valid, 7, order)
