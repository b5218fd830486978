"""lm-evaluation-harness: likelihoods of answers that are exact where the score is, greedy answers, tasks end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("rich")

import torch
import yaml
from lm_eval.api.instance import Instance
from toy import VOCABULARY, JointScore, TrueScore, diffusion

from sedd.cli import main
from sedd.diffusion.continuation import continuation_bound, greedy_continuation, is_greedy
from sedd.diffusion.objectives import OBJECTIVES
from sedd.diffusion.samplers import sample
from sedd.diffusion.schedule import Geometric, LogLinear
from sedd.hub import SEDD
from sedd.lm_eval_model import SEDDLM
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Uniform

ABSORBING, UNIFORM = Absorbing(VOCABULARY), Uniform(VOCABULARY)
GENERATOR = torch.Generator().manual_seed(3)
JOINT = torch.softmax(1.5 * torch.randn(125, generator=GENERATOR, dtype=torch.float64), 0).view(5, 5, 5)


def bound(model: TrueScore, context: list[int], continuation: list[int], **options: Any) -> torch.Tensor:
    schedule = options.pop("schedule", LogLinear(1e-4))
    options = {"draws": 2000, "length": 4, "batch_size": 2000} | options
    return continuation_bound(diffusion(model, model.process, schedule), context, continuation, **options)


@pytest.mark.parametrize("schedule", [LogLinear(1e-4), Geometric()], ids=["loglinear", "geometric"])
def test_likelihood_of_an_answer_is_exact_where_the_score_is(schedule: Any) -> None:
    """Absorbing: a clean context tells the score of the whole text's law all that it must know."""
    model, p = JointScore(ABSORBING, JOINT), JOINT[2] / JOINT[2].sum()
    total = 0.0
    for first in range(5):
        for second in range(0, 5, 2):
            nats = bound(model, [2], [first, second], schedule=schedule)
            error = float(nats.std()) / math.sqrt(len(nats))
            assert float(nats.mean()) == pytest.approx(-math.log(p[first, second]), abs=5 * error)
    for token in range(5):
        one = bound(model, [2, 4], [token], schedule=schedule)
        exact = JOINT[2, 4, token] / JOINT[2, 4].sum()
        assert float(one.mean()) == pytest.approx(-math.log(exact), abs=5 * float(one.std()) / math.sqrt(len(one)))
        total += math.exp(-float(one.mean()))
    assert total == pytest.approx(1.0, abs=0.1)


def test_other_processes_and_no_context() -> None:
    for model in (TrueScore(UNIFORM), TrueScore(ABSORBING)):
        for context in ([], [1, 0]):
            nats = bound(model, context, [2, 0], schedule=Geometric())
            error = float(nats.std()) / math.sqrt(len(nats))
            exact = -float(model.p_0[2].log() + model.p_0[0].log())
            assert float(nats.mean()) == pytest.approx(exact, abs=5 * error)


def test_answers_to_one_question_share_their_noise() -> None:
    """The difference of two answers has far less noise than under independent numbers; its mean is the same."""
    model = JointScore(ABSORBING, JOINT)
    pairs = [([0, 1], [3, 4]), ([0, 3], [1, 2])]
    for first, second in pairs:
        together, apart = [], []
        for seed in range(40):
            a, b = (bound(model, [2], answer, draws=16, seed=seed).mean() for answer in (first, second))
            together.append(float(a - b))
            apart.append(float(a - bound(model, [2], second, draws=16, seed=1000 + seed).mean()))
        spread = [float(torch.tensor(values).std()) for values in (together, apart)]
        assert spread[0] < 0.8 * spread[1]
        means = [float(torch.tensor(values).mean()) for values in (together, apart)]
        assert means[0] == pytest.approx(means[1], abs=5 * spread[1] / math.sqrt(40))
    assert torch.equal(bound(model, [2], [0, 1], draws=9), bound(model, [2], [0, 1], draws=9, batch_size=4))
    assert not torch.equal(bound(model, [2], [0, 1], draws=9), bound(model, [2], [0, 1], draws=9, seed=1))


def test_greedy_writes_the_likeliest_token_where_the_model_is_surest() -> None:
    model, schedule = JointScore(ABSORBING, JOINT), LogLinear()
    for first in range(5):
        for second in range(5):
            law = JOINT[first, second]
            assert greedy_continuation(diffusion(model, ABSORBING, schedule), [first, second], 1) == [int(law.argmax())]
        law = JOINT[first] / JOINT[first].sum()
        second, third = law.sum(1), law.sum(0)
        if second.max() > third.max():
            token = int(second.argmax())
            expected = [token, int(law[token].argmax())]
        else:
            token = int(third.argmax())
            expected = [int(law[:, token].argmax()), token]
        assert greedy_continuation(diffusion(model, ABSORBING, schedule), [first], 2) == expected
    for context in range(5):
        assert greedy_continuation(diffusion(TrueScore(UNIFORM), UNIFORM, schedule), [context], 1) == [0]


def test_an_answer_is_greedy_if_it_is_what_is_written() -> None:
    model, schedule = JointScore(ABSORBING, JOINT), LogLinear()
    written = greedy_continuation(diffusion(model, ABSORBING, schedule), [1], 2)
    for first in range(5):
        for second in range(5):
            answer = [first, second]
            assert is_greedy(diffusion(model, ABSORBING, schedule), [1], answer) == (answer == written)
    model.rows_scored.clear()  # one entry for each look at the model
    assert not is_greedy(diffusion(model, ABSORBING, schedule), [1], [(token + 1) % 5 for token in written])
    assert len(model.rows_scored) == 1


@pytest.mark.parametrize(("context", "continuation"), [([1], []), ([1, 2], [3, 4, 0])])
def test_what_does_not_fit(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"continuation: expected .*, got {len(continuation)} after {len(context)}"):
        bound(TrueScore(ABSORBING), context, continuation)


# -- the harness -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes e for the likeliest letter, then t, a, o, whatever stands around."""
    torch.manual_seed(0)
    model = SEDD(ModelConfig(16, 1, 2, 8, 32), Absorbing(257), LogLinear(1e-4), "bytes")
    bias = torch.full((258,), -6.0)
    for rank, letter in enumerate("etao"):
        bias[ord(letter)] = 3.0 - rank
    model.output_layer.linear.bias.data = bias + math.log(257) - float(bias[:257].logsumexp(0))
    folder = tmp_path_factory.mktemp("models") / "letters"
    model.save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **options: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "target_delimiter": "",
        **options,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"question": f"{i} which? ", "choices": ["oat", "tee", "oo", "zz"][i % 2 :], "label": 1 - i % 2}
        for i in range(6)
    ]
    accuracy = {"metric_list": [{"metric": "acc"}]}
    choice = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "label", **accuracy}
    write_task(folder, "choose", questions, output_type="multiple_choice", **choice)
    wrong = [{**row, "label": len(row["choices"]) - 1} for row in questions]
    write_task(folder, "choose_wrong", wrong, output_type="multiple_choice", **choice)
    passages = [{"text": f"passage {i} ends in:", "last": "ee" if i < 3 else "te"} for i in range(4)]
    lambada = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    write_task(folder, "last_word", passages, **lambada)
    return folder


def test_tasks_end_to_end(model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tasks.json"
    names = "choose,choose_wrong,last_word"
    line = ["eval", "harness", str(model), "--tasks", names, "--include_path", str(tasks), "--draws", "200"]
    assert main([*line, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["options"] == {"tasks": names.split(","), "include_path": str(tasks), "draws": 200}
    results = written["results"]
    assert results["choose"]["acc,none"] == 1.0
    assert results["choose_wrong"]["acc,none"] == 0.0
    assert results["last_word"]["acc,none"] == 0.75
    law = torch.softmax(SEDD.from_pretrained(model).output_layer.linear.bias[:257].detach().double(), 0)
    e, t = (float(law[ord(letter)].log()) for letter in "et")
    exact = math.exp(-(3 * 2 * e + t + e) / 4)  # the harness's perplexity is of whole answers
    assert results["last_word"]["perplexity,none"] == pytest.approx(exact, rel=0.15)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("choose_wrong", "last_word", "acc"))


def test_the_harness_finds_the_class_by_its_name(model: Path, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sedd.lm_eval_model", "--model", "sedd", "--tasks", "choose"]
    options = [
        "--model_args",
        f"pretrained={model},draws=40",
        "--include_path",
        str(tasks),
        "--limit",
        "2",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pretrained" in done.stdout
    assert "|acc" in done.stdout.replace(" ", "")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective: str, tmp_path: Path) -> None:
    """Untrained models: what they answer is near chance, and the same again."""
    (tmp_path / "text.txt").write_text("which oat tee oo zz? " * 200)
    process = {"udlm": "uniform", "gidd": "hybrid"}.get(objective, "absorbing")
    sizes = "--model.hidden_size 16 --model.n_blocks 1 --model.n_heads 2 --model.cond_dim 8 --model.length 32"
    options = (
        f"--process {process} --data.source {tmp_path / 'text.txt'} --batch_size 4 --report_to none --steps 1 {sizes}"
    )
    run = tmp_path / "run"
    assert main(f"train --objective {objective} --run_dir {run} {options}".split()) == 0
    answers = []
    for _ in range(2):
        lm = SEDDLM(str(run), draws=32, max_gen_toks=7, device="cpu")
        ((answer, greedy),) = lm.loglikelihood([request("which", "oat")], disable_tqdm=True)
        (text,) = lm.loglikelihood_rolling([request("which oat " * 5)], disable_tqdm=True)
        options = {"do_sample": True, "temperature": 1.0}
        (written,) = lm.generate_until([request("which", options)], disable_tqdm=True)
        answers.append((answer, greedy, text, written))
    assert answers[0] == answers[1]
    for nats in (-answer / 3, -text / 50):
        assert nats > 0.7 * math.log(257)
        # far above it for untrained models that predict clean tokens among noised ones
        assert nats < 1.3 * math.log(257) or objective in ("udlm", "gidd")
    assert not greedy
    assert written


def request(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def test_generated_text(model: Path) -> None:
    lm = SEDDLM(str(model), draws=4, max_gen_toks=7, device="cpu")
    assert lm.generate_until([request("a context", {"until": ["x"]})], disable_tqdm=True) == ["eeeeeee"]
    assert lm.generate_until([request("", {"until": "x", "max_gen_toks": 3})], disable_tqdm=True) == ["eee"]
    assert lm.generate_until([request("long " * 20, {"until": ["e"]})], disable_tqdm=True) == [""]
    options = {"until": ["o"], "do_sample": True, "temperature": 3.0, "max_gen_toks": 30}
    (text,) = lm.generate_until([request("a", options)], disable_tqdm=True)
    assert "o" not in text
    assert text[:3] != "eee"
    options["temperature"] = 0.0  # as the harness has it: no chance
    assert lm.generate_until([request("a", options)], disable_tqdm=True) == ["e" * 30]


def test_each_sample_of_a_question_is_another_one(model: Path) -> None:
    lm = SEDDLM(str(model), max_gen_toks=20, device="cpu")
    options = {"do_sample": True, "temperature": 3.0}
    three = lm.generate_until([request("a", options)] * 3, disable_tqdm=True)
    assert len(set(three)) == 3
    assert lm.generate_until([request("a", options)] * 3, disable_tqdm=True) == three
    other = lm.generate_until([request("b", options)], disable_tqdm=True)
    assert other[0] not in three
    assert lm.generate_until([request("a", {})] * 2, disable_tqdm=True) == ["e" * 20] * 2


@pytest.mark.parametrize(("wanted", "question", "written"), [(20, 12, 20), (20, 13, 19), (99, 30, 16), (16, 60, 16)])
def test_a_long_text_leaves_room_for_its_question(
    wanted: int, question: int, written: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, drawn = SEDDLM(str(model), device="cpu"), []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(options["fixed"])
        return sample(*arguments, **options)

    monkeypatch.setattr("sedd.lm_eval_model.sample", spy)
    text = "".join(chr(ord("A") + i % 26) for i in range(question))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (answer,) = lm.generate_until([request(text, {"max_gen_toks": wanted})], disable_tqdm=True)
    assert len(answer) == written
    assert [str(warning.message)[:12] for warning in told] == ["max_gen_toks"] * (written < wanted)
    tokens, given = drawn[0]
    assert bytes(tokens[given].tolist()).decode() == text[-(32 - written) :]
    with pytest.raises(ValueError, match="max_gen_toks: expected at least 1, got 0"):
        lm.generate_until([request("a", {"max_gen_toks": 0})], disable_tqdm=True)


def test_whole_texts_and_long_answers(model: Path) -> None:
    lm = SEDDLM(str(model), draws=300, device="cpu")
    text = "etaoetao" * 8 + "e"  # two windows and a bit
    law = torch.softmax(lm.loaded.model.output_layer.linear.bias[:257].detach().double(), 0)
    exact = float(law[torch.tensor(list(text.encode()))].log().sum())
    (rolling,) = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)
    assert rolling == pytest.approx(exact, rel=0.06)
    ((long, greedy),) = lm.loglikelihood([request("context", text)], disable_tqdm=True)
    assert long == pytest.approx(rolling)
    assert not greedy
    ((_, greedy),) = lm.loglikelihood([request("context", "e" * 32)], disable_tqdm=True)
    assert greedy
    ((_, greedy),) = lm.loglikelihood([request("context", "e" * 31 + "t")], disable_tqdm=True)
    assert not greedy


def test_windows_have_noise_of_their_own_and_all_the_context_there_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, asked = SEDDLM(str(model), draws=2, device="cpu"), []

    def spy(_: Any, context: Any, continuation: Any, *__: Any, seed: int, **options: Any) -> torch.Tensor:
        asked.append((bytes(context).decode(), bytes(continuation).decode(), seed))
        return torch.ones(2)

    monkeypatch.setattr("sedd.lm_eval_model.continuation_bound", spy)
    first, second = "a" * 32, "b" * 30 + "cd"
    assert lm.loglikelihood_rolling([request(first + second + "ef"), request(second)], disable_tqdm=True) == [
        -3.0,
        -1.0,
    ]
    assert [(context, text) for context, text, _ in asked] == [
        ("", first),
        ("", second),
        (second[2:], "ef"),
        ("", second),
    ]
    seeds = [seed for _, _, seed in asked]
    assert len(set(seeds)) == 3
    assert seeds[1] == seeds[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "[no_such_task]"], "tasks: expected tasks of the harness, got no_such_task"),
        (["--tasks", "[]"], "tasks: expected at least one, got none"),
        (["--tasks", "[a]", "--include_path", "none"], "include_path: no such folder: none"),
        (["--tasks", "[a]", "--draws", "0"], "draws: expected at least 1, got 0"),
        (["--tasks", "choose", "--device", "cuda:99"], "device: 'cuda:99' asked for, but torch sees"),
    ],
)
def test_mistakes(options: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "harness", str(model), *options]) == 2
    assert message in capsys.readouterr().err
