"""Saved models without this package: ``transformers.AutoModel`` loads their folder, and the model card is right."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

import scipy.stats
import torch
import transformers
from huggingface_hub import ModelCard
from tokenizers_made_here import byte_level
from torch import Tensor, nn

from sedd.cli import main
from sedd.data.tokenizer import JsonTokenizer
from sedd.diffusion import OBJECTIVES, SCHEDULES, Diffusion, get_objective, get_schedule
from sedd.diffusion.schedule import LogLinear, Polynomial
from sedd.hub import SEDD, load_model
from sedd.hub.card import _is_repository, _public, model_card
from sedd.hub.formats import read_model
from sedd.hub.modeling_sedd import SCORE_OBJECTIVES, SEDDConfig, SEDDModel
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, Uniform, reference

N = 4
PROCESSES = {"absorbing": Absorbing(N), "uniform": Uniform(N), "hybrid": Hybrid(N, 0.3)}
T_END = 1e-5


def make(process: str, objective: str = "score_entropy", schedule: str = "loglinear", **sizes: Any) -> SEDD:
    """A model with random weights, large enough that every part of it matters."""
    torch.manual_seed(0)
    params = {"steps": 5} if objective == "d3pm" else {}
    config = ModelConfig(16, 2, 2, 8, **{"length": 6, "dropout": 0.1, **sizes})
    model = SEDD(config, PROCESSES[process], get_schedule(schedule), "text8", objective, params)
    model.tokenizer = None
    learned = model.schedule.parameters() if isinstance(model.schedule, nn.Module) else []
    for parameter in (*model.parameters(), *learned):
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


KINDS: dict[str, SEDD] = {
    **{f"absorbing {name}": make("absorbing", schedule=name) for name in SCHEDULES},
    "absorbing without the shift": make("absorbing", scale_by_sigma=False, time_conditioning=False),
    "absorbing md4": make("absorbing", "md4", "cosine", time_conditioning=False),
    "absorbing genmd4": make("absorbing", "genmd4"),
    "absorbing genmd4 polynomial": make("absorbing", "genmd4", "polynomial"),
    "absorbing d3pm": make("absorbing", "d3pm"),
    "uniform": make("uniform", schedule="geometric"),
    "uniform udlm": make("uniform", "udlm"),
    "uniform d3pm": make("uniform", "d3pm", "geometric"),
    "hybrid": make("hybrid"),
    "hybrid without the shift": make("hybrid", hybrid_shift=False),
    "hybrid gidd": make("hybrid", "gidd", "cosine"),
    "learned positions": make("absorbing", positions="learned"),
    "images": make("absorbing", "md4", shape=(2, 3, 1), classes=2),
    "images, learned positions": make("uniform", shape=(1, 3, 2), positions="learned"),
}


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies the code files of models to this folder and imports them from there."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
    yield
    sys.path[:] = [path for path in sys.path if path != folder]
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def auto(folder: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def twin(model: SEDD) -> SEDDModel:
    """The model of the code file with the weights of a model."""
    other = SEDDModel(SEDDConfig(**model.to_config()))
    learned = model.schedule.state_dict(prefix="schedule.") if isinstance(model.schedule, nn.Module) else {}
    other.load_state_dict({**model.state_dict(), **learned})
    return other.eval()


def diffusion_of(model: SEDD) -> Diffusion:
    assert model.schedule is not None
    objective = get_objective(model.objective, **model.objective_params)
    return Diffusion(model, model.process, model.schedule, objective, model.parameterization).eval()


# -- the code file -----------------------------------------------------------------------------------------------------


def test_the_kinds_are_all_objectives_and_schedules() -> None:
    """A new one must be added to the code file, and here."""
    scores = {
        name for name in OBJECTIVES if type(get_objective(name).parameterization(ModelConfig())).__name__ == "Score"
    }
    assert scores - {"autoregressive"} == set(SCORE_OBJECTIVES)
    assert {model.to_config()["noise"]["type"] for model in KINDS.values()} == set(SCHEDULES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_that_of_sedd(kind: str) -> None:
    """Bit for bit the states and logits, and the log-scores unless they follow from a prediction of the clean token."""
    model = KINDS[kind]
    other = twin(model)
    x = torch.randint(model.dim, (3, 6), generator=torch.Generator().manual_seed(1))
    x[:, ::2] = model.dim - 1
    t = torch.tensor([0.01, 0.4, 1.0])
    assert model.schedule is not None
    sigma = model.schedule.total(t)
    torch.testing.assert_close(other.total(t), sigma, rtol=0, atol=0)
    for labels in (None, torch.tensor([1, 0, 2])) if model.config.classes else (None,):
        with torch.no_grad():
            found, states = other(x, sigma, labels=labels), model.hidden(x, sigma, labels=labels)
            again = other(x, t=t, labels=labels)
        torch.testing.assert_close(other.hidden(x, sigma, labels).detach(), states, rtol=0, atol=0)
        torch.testing.assert_close(found.logits, model.head(states).detach(), rtol=0, atol=0)
        torch.testing.assert_close(again.logits, found.logits, rtol=0, atol=0)
    if model.objective == "genmd4":
        assert found.log_score is None
    else:
        with torch.no_grad():
            expected, score = model(x, sigma), other(x, sigma).log_score
        close = 0.0 if model.objective in SCORE_OBJECTIVES else 1e-6
        torch.testing.assert_close(score, expected, rtol=close, atol=close)


def transitions(model: SEDD, t: Tensor, t_next: Tensor | None, states: Tensor) -> Tensor:
    """Probabilities [S, L, N] of sedd's reference for a reverse step from each of the states [S, L], in float64."""
    diffusion = diffusion_of(model)
    step = diffusion.schedule.reverse_step(t, t_next)
    if step is None:
        return torch.nn.functional.one_hot(states, model.dim).double()
    sigma = diffusion.schedule.total(t).expand(states.shape)
    with torch.no_grad():
        logits = model.head(model.hidden(states, sigma[:1, 0]))
    options = diffusion.step_options(sigma, states)
    denoise = t_next is None
    return reference.reverse_probs(logits.double(), states, step, model.process, denoise=denoise, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_probabilities_of_the_reference(kind: str) -> None:
    model = KINDS[kind]
    other, x = twin(model), torch.arange(6)[None] % model.dim
    rows = (x == N)[0] if model.process.family == "absorbing" else torch.ones(6, dtype=torch.bool)  # that can change
    for t, t_next in ((1.0, 0.6), (0.6, 0.59), (0.2, T_END), (T_END, None), (0.7, None)):
        early = None if t_next is None else torch.tensor(t_next, dtype=torch.float64)
        late = torch.tensor(t, dtype=torch.float64)
        if early is not None and float(other.total(late) - other.total(early)) <= 0:
            continue  # of discrete time
        with torch.no_grad():
            logits = model.head(model.hidden(x, other.total(late)[None]))[0]
            found = other.reverse_probs(logits[rows], x[0, rows], late, early)
        expected = transitions(model, late, early, x)[0, rows]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("absorbing loglinear", False),
        ("absorbing loglinear", True),
        ("absorbing genmd4", False),
        ("uniform udlm", False),
        ("hybrid", True),
    ],
)
def test_samples_have_the_law_of_the_reference(kind: str, given: bool) -> None:
    """Sequences of two tokens, whose law after three steps is a product of small matrices."""
    model, count, steps = KINDS[kind], 5_000, 3
    n = model.dim
    states = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    pi = model.process.stationary
    first = torch.nn.functional.one_hot(torch.tensor(1), n).double() if given else pi
    law = torch.outer(first, pi).flatten()
    times = T_END + (1 - T_END) * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, t_next in zip(times, [*times[1:], None], strict=True):
        probs = transitions(model, t, t_next, states)
        if given:
            probs[:, 0] = torch.nn.functional.one_hot(states[:, 0], n)
        law = law @ (probs[:, 0, :, None] * probs[:, 1, None, :]).flatten(1)
    fixed = (torch.tensor([1, 0]), torch.tensor([True, False])) if given else None
    generator = torch.Generator().manual_seed(0)
    drawn = twin(model).sample(count, 2, steps, fixed=fixed, generator=generator)
    counts = torch.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n)
    possible = law > 1e-12
    assert int(counts[~possible].sum()) == 0
    expected = law[possible] / law[possible].sum() * count
    assert float(expected.min()) > 5
    assert scipy.stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(1, 6, dtype=torch.int64)), "sigma, t: expected one of them, got neither"),
        (lambda model: model(torch.zeros(1, 6, dtype=torch.int64), 0.1, 0.1), "expected one of them, got both"),
        (lambda model: model(torch.zeros(1, 6, dtype=torch.int64), torch.ones(3)), "expected one number or 1, got 3"),
        (lambda model: model(torch.zeros(1, 5, dtype=torch.int64), 0.1), "expected sequences of 6 tokens, got 5"),
        (lambda _: twin(KINDS["hybrid"]).sample(1, labels=torch.zeros(1)), "labels: expected none"),
        (lambda _: SEDDModel(SEDDConfig()), "graph.type: expected one of absorb, uniform, hybrid; got None"),
        (
            lambda _: SEDDModel(SEDDConfig(graph={"type": "absorb"}, noise={"type": "mine"})),
            "noise.type: .* got 'mine'",
        ),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(twin(KINDS["images"]))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_precisions_and_devices(tmp_path: Path) -> None:
    model = KINDS["absorbing loglinear"]
    model.save_pretrained(tmp_path / "model")
    x = torch.randint(model.dim, (2, 6))
    expected = model(x, torch.tensor([0.5])).detach()
    for dtype, close in ((torch.bfloat16, 0.3), (torch.float16, 0.05)):
        other = auto(tmp_path / "model", dtype=dtype, device_map="cpu")
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        turned = twin(model).rotary_emb(torch.arange(2000))
        for cast in (other, twin(model).to(dtype)):
            assert all(torch.equal(*pair) for pair in zip(cast.rotary_emb(torch.arange(2000)), turned, strict=True))
        found = other(x, 0.5).log_score
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=close)
        assert other.sample(2).max() < N
    places = {"vocab_embed": "disk", "blocks": "disk", "": "cpu"}
    places = {name: places.get(name, "cpu") for name, _ in twin(model).named_children()}
    other = auto(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    # products of weights read from a file may be rounded in another way, which depends on their place in memory
    torch.testing.assert_close(other(x, 0.5).log_score.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["absorbing loglinear", "absorbing genmd4", "hybrid gidd", "images"])
def test_a_folder_saved_by_transformers_loads_again(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]
    model.save_pretrained(tmp_path / "model")
    other = auto(tmp_path / "model")
    assert type(other).__module__.startswith("transformers_modules")
    assert not other.training
    other.save_pretrained(tmp_path / "again")
    found = SEDD.from_pretrained(tmp_path / "again")
    assert found.to_config() == model.to_config()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    if isinstance(model.schedule, nn.Module):
        assert isinstance(found.schedule, nn.Module)
        assert torch.equal(found.schedule.state_dict()["raw_power"], model.schedule.state_dict()["raw_power"])
    third = auto(tmp_path / "again")
    assert all(
        torch.equal(a, b) for a, b in zip(third.state_dict().values(), twin(model).state_dict().values(), strict=True)
    )


def test_embedding_and_head_are_not_tied(tmp_path: Path) -> None:
    KINDS["uniform"].save_pretrained(tmp_path / "model")
    other = auto(tmp_path / "model")
    other.tie_weights()
    assert not torch.equal(other.vocab_embed.embedding, other.output_layer.linear.weight)
    assert torch.equal(other.vocab_embed.embedding, KINDS["uniform"].vocab_embed.embedding)


def test_a_model_of_images_is_loaded_as_a_network(tmp_path: Path) -> None:
    model = KINDS["images"]
    model.save_pretrained(tmp_path / "model")
    found = SEDD.from_pretrained(tmp_path / "model")
    assert (found.config, found.to_config()["tokenizer"]) == (model.config, None)
    drawn = auto(tmp_path / "model").sample(2, steps=2, labels=torch.tensor([0, 1]))
    assert drawn.shape == (2, 6)
    with pytest.raises(ValueError, match=r"expected a model of text or a run .*; SEDD.from_pretrained loads it"):
        load_model(tmp_path / "model")


class Mine(LogLinear):
    """A schedule that the code file does not have."""


def test_a_model_with_a_class_of_ones_own_has_no_code_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "mine", Mine)
    SEDD(ModelConfig(16, 1, 2, 8, 6), Absorbing(27), Mine(), "text8").save_pretrained(tmp_path / "model")
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert not (tmp_path / "model" / "modeling_sedd.py").exists()
    assert "AutoModel" not in (tmp_path / "model" / "README.md").read_text()
    assert isinstance(SEDD.from_pretrained(tmp_path / "model").schedule, Mine)


def test_sedd_does_not_run_the_code_file(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "executed"
    SEDD(ModelConfig(16, 1, 2, 8, 6), Absorbing(27), LogLinear(), "text8").save_pretrained(folder)
    with open(folder / "modeling_sedd.py", "a") as file:
        file.write(f"open({str(trace)!r}, 'w').close()\n")
    load_model(folder)
    SEDD.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert main(["convert", str(folder), str(tmp_path / "converted")]) == 0
    assert not trace.exists()
    for copy in ("copy", "converted"):
        assert str(trace) not in (tmp_path / copy / "modeling_sedd.py").read_text()
    auto(folder)  # it would have
    assert trace.exists()


# -- the model card ----------------------------------------------------------------------------------------------------


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


HOOK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sedd", "sedd_ext"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
try:
    import sedd
except ImportError:
    pass
else:
    raise SystemExit("sedd was imported")
"""
COMPARE = """
import json, torch
out = model(torch.tensor([[0, 5, 27, 27, 3]]), t=0.5).log_score
model.save_pretrained("again")
print(json.dumps({"log_score": out.tolist(), "shape": list(tokens.shape), "top": int(tokens.max())}))
"""


def test_the_programs_of_the_model_card_run_without_sedd_and_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one in a process that cannot import sedd, with figures equal to those of sedd."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = SEDD(ModelConfig(16, 1, 2, 8, 12), Absorbing(27), LogLinear(), "text8").eval()
    nn.init.normal_(model.output_layer.linear.weight)
    model.save_pretrained("model")
    first, second = snippets(Path("model"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", HOOK + first + COMPARE],
        capture_output=True,
        text=True,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    text, line = done.stdout.splitlines()[-2:]
    assert re.fullmatch("[a-z ]{12}", text)
    found = json.loads(line)
    assert (found["shape"], found["top"] < 27) == ([1, 12], True)
    assert model.schedule is not None
    expected = model(torch.tensor([[0, 5, 27, 27, 3]]), model.schedule.total(torch.tensor([0.5])))
    torch.testing.assert_close(torch.tensor(found["log_score"]), expected.detach(), rtol=1e-6, atol=1e-6)
    assert load_model("again").tokenizer.name == "text8"
    capsys.readouterr()
    exec(second, {})
    assert re.fullmatch("[a-z ]{12}\n", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json", "images"])
def test_the_program_for_other_tokens_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes, tokenizer = ModelConfig(16, 1, 2, 8, 6), "bytes" if kind == "bytes" else JsonTokenizer(byte_level().to_str())
    model = KINDS["images"]
    if kind != "images":
        count = 257 if isinstance(tokenizer, str) else tokenizer.vocab_size
        model = SEDD(sizes, Absorbing(count), LogLinear(), tokenizer)
    model.save_pretrained("model")
    capsys.readouterr()
    for program in snippets(Path("model")):
        exec(program, {})
        assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations, of text in a private folder."""
    folder = tmp_path_factory.mktemp("private")
    text, run = folder / "book.txt", folder / "run"
    text.write_text("the cat sat on the mat " * 200)
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=16", "--model.length=8"]
    options = [f"--data.source={text}", f"--data.cache_dir={folder}", "--tokenizer=text8", "--batch_size=4"]
    assert main(["train", *sizes, *options, "--steps=3", f"--run_dir={run}"]) == 0
    (run / "eval").mkdir(exist_ok=True)
    words = ["--draws=2", "--blocks=5", "--json", str(run / "eval" / "perplexity.json")]
    assert main(["eval", "perplexity", str(run), *words]) == 0
    generative = {
        "settings": {
            "model": "/elsewhere/run/checkpoints/step_00000003",
            "judge": "/home/someone/gpt2",
            "num": 7,
            "seed": 0,
            "length": 8,
        },
        "rows": [{"sampler": "tweedie", "steps": 4, "perplexity": 31.4159, "perplexity_error": 0.271, "texts": ["x"]}],
    }
    (run / "eval" / "generative.json").write_text(json.dumps(generative))
    tasks = {
        "model": str(run / "checkpoints" / "step_00000003"),
        "draws": 9,
        "options": {"tasks": ["piqa"], "draws": 9, "limit": 50, "include_path": "/home/someone/tasks"},
        "results": {"piqa": {"acc,none": 0.51234, "acc_stderr,none": 0.0123}},
    }
    (run / "eval" / "tasks.json").write_text(json.dumps(tasks))
    (run / "eval" / "latency.json").write_text(json.dumps({"rows": [{"steps": 4, "seconds": 1.5}]}))
    other = json.loads((run / "eval" / "perplexity.json").read_text())
    other["model"] = str(run / "checkpoints" / "step_00000002")
    other["texts"]["validation text"]["nats_per_token"] = 7.77
    (run / "eval" / "other.json").write_text(json.dumps(other))
    other["model"] = str(run.with_name("second") / "checkpoints" / "step_00000003")
    (run / "eval" / "second.json").write_text(json.dumps(other))
    return run


def test_the_card_of_a_run_has_its_training_and_its_figures(run: Path, tmp_path: Path) -> None:
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    card = ModelCard.load(tmp_path / "model" / "README.md")
    row = json.loads((run / "eval" / "perplexity.json").read_text())["texts"]["validation text"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = next(row for row in metrics if "valid_nats_per_token" in row)
    numbers = {
        ("validation text", "perplexity"): (row["perplexity"], row["perplexity"] * row["standard_error"]),
        ("validation text", "nats_per_token"): (row["nats_per_token"], row["standard_error"]),
        ("validation text", "bits_per_byte"): (
            row["bits_per_byte"],
            row["bits_per_byte"] * row["standard_error"] / row["nats_per_token"],
        ),
        ("validation data", "nats_per_token"): (valid["valid_nats_per_token"], valid["valid_standard_error"]),
        ("7 samples, tweedie, 4 steps", "perplexity_of_samples"): (31.4159, 0.271),
        ("piqa", "acc"): (0.51234, 0.0123),
    }
    results = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
    assert results.keys() == numbers.keys()
    for key, (value, error) in numbers.items():
        found = re.fullmatch(r"([\d.]+) ± ([\d.]+)", results[key].metric_value)
        assert found is not None
        assert float(found[1]) == pytest.approx(value, abs=0.06 * error)
        assert float(found[2]) == pytest.approx(error, rel=0.06)
        assert f"| {key[0]} | {results[key].metric_name} | {found[0]} |" in card.text
    assert card.data.model_name == "model"
    for line in (
        "| data | book.txt |",
        "| tokeniser | text8 |",
        "| objective | score_entropy |",
        "| noise | absorbing |",
        "| schedule | loglinear (eps 0.001) |",
        "| steps | 3 |",
        "| tokens seen | 96 (4 blocks of 8 in each step) |",
        "| seed | 0 |",
        "held out from book.txt",
        "`sedd eval perplexity RUN --draws 2 --blocks 5 --seed 0`",
        "`sedd eval generative RUN --samplers tweedie --steps 4 --num 7 --length 8 --judge gpt2 --seed 0`",
        "`sedd eval harness RUN --tasks piqa --draws 9 --limit 50 --include_path tasks`",
    ):
        assert line in card.text, line
    assert "7.77" not in card.content  # of another checkpoint, and of another run at the same step
    assert str(run.parent) not in card.content
    assert "/home/someone" not in card.content


def test_the_commands_of_the_card_measure_its_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder of the text, as the card has only its name."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for file in (copy / "eval").iterdir():
        file.unlink()
    (tmp_path / "lines.txt").write_text("the cat\n\nsat on\nthe mat\n" * 40)
    words = ["--documents", "line", "--draws", "3", "--seed", "5", "--blocks", "9", "--batch_size", "4"]
    file = copy / "eval" / "lines.json"
    assert main(["eval", "perplexity", str(copy), str(tmp_path / "lines.txt"), *words, "--json", str(file)]) == 0
    measured = json.loads(file.read_text())
    content = SEDD.from_pretrained(copy).generate_model_card(name="m").content
    (command,) = re.findall(r"`(sedd eval perplexity RUN lines.txt [^`]*)`", content)
    monkeypatch.chdir(tmp_path)
    again = shlex.split(command.replace("RUN", str(copy)))[1:]
    assert main([*again, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == measured | {"options": ANY}
    assert measured["texts"]["lines.txt"]["blocks"] == 9


def test_figures_of_another_run_that_has_the_same_name_are_left_out(run: Path, tmp_path: Path) -> None:
    """Both runs exist, and the last three parts of their paths are the same."""
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    assert SEDD.from_pretrained(run).generate_model_card(name="m").content.count("nats per token (upper bound)") > 2
    content = SEDD.from_pretrained(copy).generate_model_card(name="m").content
    assert "RUN --draws" not in content
    assert "RUN --tasks" not in content


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("wikitext", "wikitext"),
        ("private/book.txt", "book.txt"),
        ("private/client/books", "books"),
        ("~/books", "books"),
        (".", "local data"),
        ("..", "local data"),
        ("/", "local data"),
    ],
)
def test_of_local_files_only_the_names_are_shown(source: str, shown: str) -> None:
    """Also of files that do not exist in the current folder."""
    assert _public(source) == shown
    assert _is_repository(source) == (source == "openai-community/gpt2")


@pytest.mark.parametrize(
    ("init", "base", "shown"),
    [("openai-community/gpt2", "openai-community/gpt2", "openai-community/gpt2"), ("private/my/gpt2", None, "gpt2")],
)
def test_the_card_names_the_model_of_the_hub_that_training_began_with(
    init: str, base: str | None, shown: str, run: Path
) -> None:
    stored = read_model(run)
    assert stored.config is not None
    stored = dataclasses.replace(stored, config=dataclasses.replace(stored.config, init=init))
    card = model_card("m", "facts", SEDD.from_pretrained(run).to_config(), stored)
    assert card.data.base_model == base
    assert f"| fine-tuned from | {shown} |" in card.text


def test_the_card_has_no_folders_of_texts(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    found = json.loads((copy / "eval" / "perplexity.json").read_text())
    row = found["texts"]["validation text"] | {"reading": "held out from private/book.txt"}
    found["model"] = str(copy / "checkpoints" / "step_00000003")
    found["texts"] = {"validation text": row, "private/one/book.txt": row, "private/two/book.txt": row}
    (copy / "eval" / "perplexity.json").write_text(json.dumps(found))
    content = SEDD.from_pretrained(copy).generate_model_card(name="m").content
    assert "private" not in content
    assert "held out from book.txt;" in content
    assert "`sedd eval perplexity RUN book.txt --draws 2" in content


def test_a_readme_that_is_no_card_of_this_package_is_not_copied(tmp_path: Path) -> None:
    SEDD(ModelConfig(16, 1, 2, 8, 6), Absorbing(27), LogLinear(), "text8").save_pretrained(tmp_path / "model")
    for text in ("My notes.\n", "---\ntags: [mine]\n---\nMy notes.\n", "---\na: [\n---\nMy notes.\n"):
        (tmp_path / "model" / "README.md").write_text(text)
        card = SEDD.from_pretrained(tmp_path / "model").generate_model_card(name="m")
        assert "My notes." not in card.content
        assert "# m" in card.content


def test_a_changed_model_has_no_figures_and_an_unchanged_one_keeps_its_card(run: Path, tmp_path: Path) -> None:
    SEDD.from_pretrained(run).save_pretrained(tmp_path / "model")
    written = (tmp_path / "model" / "README.md").read_text()
    assert "| steps | 3 |" in written
    SEDD.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == written
    for source in (run, tmp_path / "model"):
        changed = SEDD.from_pretrained(source)
        with torch.no_grad():
            changed.blocks[0].attn_out.weight[0, 0] += 1e-3
        changed.save_pretrained(tmp_path / f"changed {source.name}", model_card_kwargs={"text": "Fine-tuned."})
        card = ModelCard.load(tmp_path / f"changed {source.name}" / "README.md")
        assert card.data.eval_results is None
        assert "None: this model has no evaluation." in card.text
        assert "How the model was trained is not recorded" in card.text
        assert card.text.endswith("Fine-tuned.\n") or card.text.endswith("Fine-tuned.")


def test_a_new_model_has_no_figures(tmp_path: Path) -> None:
    SEDD(dataclasses.replace(ModelConfig(16, 1, 2, 8, 6)), Uniform(27), Polynomial(), "text8").save_pretrained(
        tmp_path / "m"
    )
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.eval_results is None
    assert card.data.library_name == "transformers"
    assert "None: this model has no evaluation." in card.text
    assert "uniform noise, polynomial schedule (eps 0.001, power 2)" in card.text


def test_a_damaged_evaluation_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "eval" / "broken.json").write_text("{")
    try:
        assert main(["convert", str(run), str(tmp_path / "model")]) == 2
    finally:
        (run / "eval" / "broken.json").unlink()
    assert "broken.json" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
