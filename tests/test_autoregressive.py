"""The autoregressive baseline: its network, loss, exact likelihood, cache and sampler, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sedd.diffusion import (
    SAMPLERS,
    Autoregressive,
    Diffusion,
    ScoreEntropy,
    continuation_bound,
    elbo,
    get_schedule,
    sample,
)
from sedd.diffusion.autoregressive import Reader
from sedd.diffusion.continuation import greedy_continuation, is_greedy
from sedd.diffusion.orders import AutoregressiveSampler
from sedd.diffusion.walk import Walk
from sedd.network import DiffusionTransformer, KeyValueCache, ModelConfig
from sedd_ext import Absorbing, Uniform

N, LENGTH = 7, 9
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "n_blocks": 2,
    "n_heads": 2,
    "cond_dim": 8,
    "length": LENGTH,
    "dropout": 0.0,
}


def network_of(n: int = N, causal: bool = True) -> DiffusionTransformer:
    """A network whose parameters are all random, and so none of its parts is idle."""
    torch.manual_seed(87)
    network = DiffusionTransformer(ModelConfig(**SIZES, causal=causal), n + 1).double().eval()
    for name, parameter in network.named_parameters():
        # norms near 1 and small biases: the best next token depends on the text
        around, width = (1.0, 0.1) if "norm" in name else (0.0, 0.05 if name.endswith("bias") else 0.4)
        torch.nn.init.normal_(parameter, around, width)
    return network


def model_of(n: int = N) -> Diffusion:
    return Diffusion(network_of(n), Absorbing(n), get_schedule("loglinear"), Autoregressive())


def text(batch: int = 3, n: int = N, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(n, (batch, length), generator=torch.Generator().manual_seed(1))


def log_probs(model: Diffusion, x_0: torch.Tensor) -> torch.Tensor:
    """The log-probability of every token at every position [B, L, n], by a call for each position."""
    n, columns = model.process.dim - 1, []
    for position in range(x_0.shape[1]):
        read = torch.cat([torch.full((len(x_0), 1), n), x_0[:, :position]], 1)
        logits = model.network.head(model.network.hidden(read, torch.ones(1, dtype=torch.float64))[:, -1])
        columns.append(logits[:, :n].log_softmax(-1))
    return torch.stack(columns, 1)


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_causal_network_sees_no_later_token_and_no_noise() -> None:
    network, x, one = network_of(), text(), torch.ones(3, dtype=torch.float64)
    states = network.hidden(x, one)
    for j in range(LENGTH):
        changed = x.clone()
        changed[:, j] = (x[:, j] + 1) % N
        other = network.hidden(changed, one)
        torch.testing.assert_close(other[:, :j], states[:, :j], rtol=0, atol=1e-13)
        assert bool((other[:, j:] != states[:, j:]).any(-1).all())
    assert torch.equal(network.hidden(x, 5 * one), states)
    assert not network.time_conditioning


def test_the_default_network_sees_both_sides() -> None:
    network, x, one = network_of(causal=False), text(), torch.ones(3, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % N
    assert bool((network.hidden(changed, one)[:, 0] != network.hidden(x, one)[:, 0]).any())
    assert ModelConfig().time_conditioning
    assert not ModelConfig().causal


@pytest.mark.parametrize("parts", [[1] * LENGTH, [4, 1, 1, 3], [2, 7], [LENGTH]], ids=str)
def test_states_with_a_cache_are_those_without(parts: list[int]) -> None:
    network, x, one = network_of(), text(), torch.ones(1, dtype=torch.float64)
    cache = KeyValueCache(LENGTH)
    states = torch.cat([network.hidden(part, one, cache) for part in x.split(parts, 1)], 1)
    torch.testing.assert_close(states, network.hidden(x, one), rtol=1e-12, atol=1e-12)
    assert cache.length == LENGTH


def test_a_cache_is_refused_where_it_does_not_fit() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="cache: expected at most 4 positions, got 5 after 0"):
        network_of().hidden(text(length=5), one, KeyValueCache(4))
    with pytest.raises(ValueError, match="cache: expected a causal network"):
        network_of(causal=False).hidden(text(), one, KeyValueCache(LENGTH))


# -- loss and likelihood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("given", [0, 4])
def test_the_loss_is_the_sum_of_the_log_softmax(fused: bool, given: int) -> None:
    model, x = model_of(), text()
    expected = -log_probs(model, x).gather(-1, x[..., None])[:, given:].sum((1, 2))
    gradients = torch.autograd.grad(0.5 * expected.sum(), list(model.parameters()), allow_unused=True)
    loss = model.loss(x, x, torch.ones(3), given=given, scale=0.5, fused=fused)
    torch.testing.assert_close(loss, 0.5 * expected.float(), rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    # MASK is no token: its row of the head learns nothing
    names = [name for name, _ in model.named_parameters()]
    for name, value in zip(names, found, strict=True):
        if name.startswith("network.output_layer.linear"):
            assert value is not None
            assert not bool(value[-1].any())


def test_training_draws_no_noise_and_the_time_has_no_effect() -> None:
    model, x = model_of(), text()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    loss = model(x, torch.full((3,), 0.2), generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(loss, model(x, torch.full((3,), 0.9)))


def test_the_likelihoods_of_all_texts_sum_to_1() -> None:
    model = model_of(3)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    result = elbo(model, every, draws=8, batch_size=5)
    assert float((-result.sequences).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert result.exact
    assert result.integrand.shape == (27, 1)
    assert (result.prior, result.monte_carlo_error, result.onset) == (0.0, 0.0, None)
    expected = -log_probs(model, every).gather(-1, every[..., None]).sum((1, 2))
    torch.testing.assert_close(result.sequences, expected, rtol=1e-6, atol=0)


def test_the_likelihood_of_a_schedule_that_starts_with_noise_is_exact_too() -> None:
    model = model_of().with_schedule(get_schedule("geometric"))
    assert torch.equal(elbo(model, text(), draws=1).sequences, elbo(model_of(), text(), draws=3).sequences)


def test_a_continuation_has_its_exact_likelihood() -> None:
    model, x = model_of(), text(1)
    found = continuation_bound(model, x[0, :4].tolist(), x[0, 4:].tolist(), draws=5, length=LENGTH)
    expected = -log_probs(model, x).gather(-1, x[..., None])[:, 4:].sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    whole = continuation_bound(model, [], x[0].tolist(), draws=1, length=LENGTH)
    torch.testing.assert_close(whole, elbo(model, x, draws=1).sequences)


def test_greedy_decoding_takes_the_most_probable_next_token() -> None:
    model, context = model_of(), [2, 5, 1]
    written = list(context)
    for _ in range(5):
        written.append(int(log_probs(model, torch.tensor([[*written, 0]]))[0, -1].argmax()))
    assert len(set(written[3:])) > 1
    assert greedy_continuation(model, context, 5) == written[3:]
    assert is_greedy(model, context, written[3:])
    assert not is_greedy(model, context, [*written[3:-1], (written[-1] + 1) % N])


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("given", [0, 3])
def test_the_same_text_with_the_cache_and_without(options: dict[str, Any], given: int) -> None:
    model, x = model_of(), text(8)
    fixed = (x, torch.arange(LENGTH) < given) if given else None
    written = [
        sample(
            model,
            batch=8,
            length=LENGTH,
            sampler=AutoregressiveSampler(1, cached=cached),
            fixed=fixed,
            generator=torch.Generator().manual_seed(5),
            **options,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*written)
    assert torch.equal(written[0][:, :given], x[:, :given])
    assert int(written[0].max()) < N, "no MASK is left"


def test_logits_with_the_cache_are_those_without_after_a_start_of_several_tokens() -> None:
    model, x = model_of(), text()
    readers = [Reader(model, LENGTH, cached=cached) for cached in (True, False)]
    expected = log_probs(model, x)
    for position in (3, 4, 7, 8):
        for reader in readers:
            found = reader.logits(x, position)[:, :N].log_softmax(-1)
            torch.testing.assert_close(found, expected[:, position], rtol=1e-11, atol=1e-11)


def test_each_token_is_read_once() -> None:
    model, seen = model_of(), []
    hidden = model.network.hidden
    model.network.hidden = lambda x, *rest: seen.append(x.shape[1]) or hidden(x, *rest)  # type: ignore
    tokens, steps = torch.zeros(LENGTH, dtype=torch.int64), []
    fixed = tokens, torch.arange(LENGTH) < 4
    sample(model, batch=2, length=LENGTH, fixed=fixed, on_step=lambda *step: steps.append(step[:2]))
    assert seen == [5, 1, 1, 1, 1]  # MASK and the given tokens, then one at a time
    assert steps == [(i + 1, 5) for i in range(5)]


def test_samples_follow_the_distribution_of_the_model() -> None:
    model, count = model_of(3), 20_000
    written = sample(model, batch=count, length=3, generator=torch.Generator().manual_seed(0))
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = (-elbo(model, every, draws=1).sequences).exp()
    found = torch.bincount(written @ torch.tensor([9, 3, 1]), minlength=27) / count
    assert bool(((found - p).abs() < 5 * (p * (1 - p) / count).sqrt() + 1e-9).all())


def test_temperature_and_top_p_choose_among_the_next_tokens() -> None:
    model = model_of()
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, 50.0], dtype=torch.float64)  # the last is MASK's
    tokens = torch.full((1, LENGTH), N)

    def draws(**options: Any) -> torch.Tensor:
        walk = Walk(model, tokens, tokens == N, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(walk.choose(logits.expand(40_000, -1)), minlength=N) / 40_000

    torch.testing.assert_close(draws().double(), logits[:N].softmax(-1), rtol=0, atol=0.012)
    expected = (logits[:N] / 0.5).softmax(-1)
    torch.testing.assert_close(draws(temperature=0.5).double(), expected, rtol=0, atol=0.012)
    nucleus = torch.where(torch.arange(N) < 2, logits[:N], -math.inf).softmax(-1)  # 0.60 + 0.22 > 0.7
    torch.testing.assert_close(draws(top_p=0.7).double(), nucleus, rtol=0, atol=0.012)
    low = Walk(model, tokens, tokens == N).choose(logits[None] - 2000)  # softmax does not depend on the level
    assert 0 <= int(low) < N


def test_beginnings_of_different_lengths() -> None:
    model, x = model_of(), text(3)
    given = torch.arange(LENGTH) < torch.tensor([[5], [LENGTH], [2]])
    written = sample(model, batch=3, length=LENGTH, fixed=(x, given), top_p=1e-6)  # the most probable tokens
    assert torch.equal(written[given], x[given])
    for row, beginning in ((0, 5), (2, 2)):
        expected = greedy_continuation(model, x[row, :beginning].tolist(), LENGTH - beginning)
        assert written[row, beginning:].tolist() == expected


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    model, x = model_of(), text()
    gap = (torch.arange(LENGTH) < 2) | (torch.arange(LENGTH) > 5)
    with pytest.raises(ValueError, match="fixed: expected given tokens at the beginning only"):
        sample(model, batch=3, length=LENGTH, fixed=(x, gap))
    for name, kind in SAMPLERS.items():
        if not kind.autoregressive:
            with pytest.raises(ValueError, match=f"sampler: expected 'autoregressive' .*, got '{name}'"):
                sample(model, batch=1, length=4, sampler=name)
    usual = Diffusion(network_of(causal=False), Absorbing(N), get_schedule("loglinear"), ScoreEntropy())
    with pytest.raises(
        ValueError, match=r"sampler: expected 'tweedie', 'tweedie_cosine', 'euler', .* for a diffusion model"
    ):
        sample(usual, batch=1, length=4, sampler="autoregressive")
    with pytest.raises(ValueError, match="process: expected absorbing for the objective autoregressive"):
        Diffusion(network_of(), Uniform(N + 1), get_schedule("loglinear"), Autoregressive())
    with pytest.raises(ValueError, match="network: expected a causal one"):
        Diffusion(network_of(causal=False), Absorbing(N), get_schedule("loglinear"), Autoregressive())


def test_options_that_do_not_fit_are_refused() -> None:
    config = pytest.importorskip("sedd.config")
    assert config.TrainConfig(objective="autoregressive").resolved().model.causal
    assert config.TrainConfig().resolved().model.causal is False
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("autoregressive", {"process": "uniform"}, "process: expected absorbing for the objective autoregressive"),
        ("autoregressive", {"model": {"causal": False}}, "model.causal: expected true"),
        ("autoregressive", {"model": {"time_conditioning": True}}, "model.time_conditioning: expected false"),
        ("score_entropy", {"model": {"causal": True}}, "model.causal: expected false for the objective score_entropy"),
    )
    for objective, changes, message in cases:
        values = {**changes, "model": config.ModelOptions(**changes.get("model", {}))}
        with pytest.raises(ValueError, match=message):
            config.TrainConfig(objective=objective, **values)


# -- runs and commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, threads: Callable[[int], None]) -> Any:
    pytest.importorskip("rich")
    pytest.importorskip("tensorboard")
    from sedd.config import ModelOptions, TrainConfig
    from sedd.data.options import DataConfig

    threads(1)
    source = tmp_path / "text.txt"
    source.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(2000)))
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        objective="autoregressive",
        data=DataConfig(source=str(source), cache_dir=str(tmp_path / "cache")),
        model=ModelOptions(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=16, dropout=0.1),
        batch_size=8,
        steps=60,
        warmup=4,
        lr=1e-2,
        log_every=20,
        valid_every=30,
        valid_blocks=4,
        valid_samples=1,
        checkpoint_every=30,
    )


def losses(run: Path | str) -> list[float]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_resumes_bit_for_bit(config: Any, precision: Any, tmp_path: Path) -> None:
    from sedd.training.run import Run

    config = dataclasses.replace(config, precision=precision)
    Run(config).train()
    whole = losses(config.run_dir)
    assert len(whole) == 60
    assert whole[0] == pytest.approx(math.log(257 - 1), rel=0.01)  # the head begins at 0; bytes and end-of-text
    assert sum(whole[-10:]) < 0.8 * sum(whole[:10])
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"), steps=30)
    Run(half).train()
    Run(dataclasses.replace(half, steps=60), resume=True).train()
    assert losses(half.run_dir) == whole
    name = "checkpoints/step_00000060/ema.safetensors"
    assert Path(half.run_dir, name).read_bytes() == Path(config.run_dir, name).read_bytes()
    for changes, message in (
        ({"objective": "score_entropy"}, "model.causal: expected false"),
        ({"init": config.run_dir, "run_dir": "new", "objective": "score_entropy"}, "model.causal"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)


def test_the_commands(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sedd.cli import main

    run, other = config.run_dir, str(tmp_path / "diffusion")
    sizes = "--model.hidden_size 16 --model.n_blocks 1 --model.n_heads 2 --model.cond_dim 8 --model.length 16"
    options = f"--data.source {config.data.source} --steps 20 --batch_size 8 --report_to none {sizes} --precision fp32"
    assert main(f"train --objective autoregressive --run_dir {run} {options}".split()) == 0
    assert "no noise (autoregressive)" in capsys.readouterr().err
    figures = tmp_path / "figures.json"
    assert main(f"eval perplexity {run} --blocks 8 --json {figures}".split()) == 0
    out = capsys.readouterr().out
    assert "exact likelihoods" in out
    assert "bound" not in out
    row = json.loads(figures.read_text())["texts"]["validation text"]
    assert (row["exact"], row["monte_carlo_error"], row["prior"], row["draws"]) == (True, 0.0, 0.0, 1)
    assert 0 < row["bits_per_byte"] < 8
    texts = tmp_path / "texts.json"
    assert main(f"sample {run} --num 2 --top_p 0.9 --json {texts}".split()) == 0
    assert [len(text["tokens"]) for text in json.loads(texts.read_text())] == [16, 16]
    assert main(["infill", run, "the {{8}}", "--json", str(texts)]) == 0
    assert json.loads(texts.read_text())[0]["text"].startswith("the ")
    capsys.readouterr()
    assert main(f"train --run_dir {other} {options}".split()) == 0
    for words, message in (
        (["infill", run, "a{{4}}b"], "template: expected given tokens at the beginning only"),
        (["sample", run, "--sampler", "greedy"], "--sampler: expected 'autoregressive' for an autoregressive model"),
        (
            ["sample", other, "--sampler", "autoregressive"],
            "--sampler: expected 'tweedie', 'tweedie_cosine', 'euler', ",
        ),
        (["sample", run, "--compile"], "--compile: expected a diffusion model"),
        (["convert", run, str(tmp_path / "model")], "save_pretrained: expected a diffusion model"),
        (["eval", "perplexity", run, "--plot", "x.png"], "--plot: expected a diffusion model"),
        (["eval", "latency", run], "run: expected a diffusion model"),
        (["eval", "latency", other, "--twin", other], "--twin: expected a run of sedd train --objective autoreg"),
        (f"train --init {other} --objective autoregressive --run_dir {run}2 {options}".split(), "model.causal: "),
        (f"train --init {run} --run_dir {run}2 {options}".split(), "model.causal: expected false for the objective"),
    ):
        assert main(words) == 2, words
        assert message in re.sub(r"\s+", " ", capsys.readouterr().err), words
    times = tmp_path / "times.json"
    latency = f"eval latency {other} --twin {run} --steps 1,2 --batch_sizes 1 --repeats 1 --json {times}"
    assert main(latency.split()) == 0
    assert json.loads(times.read_text())["twin"].startswith(run)


def test_a_run_judges_samples(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples of itself and of a diffusion model, under its exact likelihood given the first token."""
    from sedd.cli import main
    from sedd.commands.judge import load_judge

    run, other = config.run_dir, str(tmp_path / "diffusion")
    sizes = "--model.hidden_size 16 --model.n_blocks 1 --model.n_heads 2 --model.cond_dim 8 --model.length 16"
    options = f"--data.source {config.data.source} --steps 20 --batch_size 8 --report_to none {sizes} --precision fp32"
    assert main(f"train --objective autoregressive --run_dir {run} {options}".split()) == 0
    assert main(f"train --run_dir {other} {options}".split()) == 0
    judge = load_judge(run)
    texts = ["the cat sat", "", "a", "on the mat", "longer than the sixteen bytes of the model"]
    nats, counts = judge.read(texts, 2)
    assert counts.tolist() == [10, 0, 0, 9, 15]
    assert nats[[1, 2]].tolist() == [0.0, 0.0]
    x_0 = torch.tensor([list(texts[4].encode())[:16]])
    whole, first = (
        float(judge.loaded.diffusion.loss(part, part, torch.ones(1)).detach()) for part in (x_0, x_0[:, :1])
    )
    assert float(nats[4]) == pytest.approx(whole - first, rel=1e-5)
    figures = tmp_path / "generative.json"
    for name, sampler in ((other, "tweedie"), (run, "autoregressive")):
        figures.unlink(missing_ok=True)
        words = f"eval generative {name} --judge {run} --num 4 --steps 2 --samplers {sampler} --json {figures}"
        assert main(words.split()) == 0
        (row,) = json.loads(figures.read_text())["rows"]
        assert 1 < row["perplexity"] < 1000
        assert row["steps"] == (2 if name == other else 16)
    capsys.readouterr()
    assert main(f"eval generative {run} --num 2 --judge {other}".split()) == 2
    error = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "--judge: expected a causal language model, got" in error
    features = judge.features(texts, 2)
    for place, text in enumerate(("the cat sat", " ", "a", "on the mat", "longer than the ")):
        alone = judge.loaded.model.hidden(torch.tensor([list(text.encode())]), torch.ones(1))[0, -1]
        torch.testing.assert_close(features[place], alone.detach(), rtol=1e-5, atol=1e-5)
    pytest.importorskip("mauve")
    (tmp_path / "real.txt").write_text("the quick brown fox jumps over the lazy dog, and then it sleeps.")
    words = f"eval generative {other} --judge {run} --num 4 --steps 2 --samplers tweedie --text {tmp_path}/real.txt"
    figures.unlink()
    assert main(f"{words} --mauve prefix --given 4 --compared 8 --json {figures}".split()) == 0
    found = json.loads(figures.read_text())
    assert 0 < found["rows"][0]["mauve_prefix"] <= 1
    real = torch.frombuffer(bytearray((tmp_path / "real.txt").read_bytes()), dtype=torch.uint8).long().view(4, 16)
    network = judge.loaded.model
    logits = network.head(network.hidden(real[:, :8], torch.ones(1)))[:, 3:7, :-1]  # MASK is never written
    log_p = logits.detach().double().log_softmax(-1)
    nats = -log_p.gather(-1, real[:, 4:8, None]).squeeze(-1)
    assert found["real"]["perplexity_prefix"] == pytest.approx(float(nats.mean().exp()), rel=1e-5)
    error = nats.mean(1).std() / 2 * nats.mean().exp()
    assert found["real"]["perplexity_prefix_error"] == pytest.approx(float(error), rel=1e-3)
    assert found["rows"][0]["perplexity_prefix"] > 1
    capsys.readouterr()
    assert main(f"{words} --length 32 --num 2 --mauve unconditional --compared 20".split()) == 2
    assert "--compared: expected at most 16, the length of the judge" in capsys.readouterr().err


def test_the_report_of_a_run(config: Any) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from sedd.cli import main
    from sedd.training.run import Run

    Run(dataclasses.replace(config, steps=4, valid_every=2, valid_samples=0)).train()
    assert main(["report", config.run_dir, "--samples", "1"]) == 0
    page = Path(config.run_dir, "report.html").read_text()
    assert "One token at a time, seed 0." in page
    assert "validation bound" not in page
