"""What a model writes: the judge reads right, diversity by hand, MAUVE tells texts apart, and the whole command."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sedd.commands.generative
from sedd.cli import main
from sedd.commands.judge import load_judge
from sedd.commands.text_quality import _mauve, diversity, measure
from sedd.diffusion import SAMPLERS
from sedd.diffusion.schedule import LogLinear
from sedd.hub import SEDD, load_model
from sedd.network import ModelConfig
from sedd_ext import Absorbing

LENGTH = 16


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 over bytes, with random weights."""
    folder = tmp_path_factory.mktemp("judges") / "tiny-judge"
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=40, n_embd=16, n_layer=2, n_head=2, eos_token_id=256)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SEDD(ModelConfig(16, 1, 2, 8, LENGTH), Absorbing(257), LogLinear(), "bytes")
    bias = torch.full((258,), -9.0)
    bias[97:123] = torch.linspace(0, 2, 26)  # a to z, and now and then an end-of-text
    bias[256] = 0.0
    model.output_layer.linear.bias.data = bias
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_judge_reads_each_text_as_if_alone(judge_folder: Path) -> None:
    judge = load_judge(str(judge_folder))
    assert judge.name == "tiny-judge"
    texts = ["abc", "", "a", "the cat sat on the mat", "x" * 100]
    nats, counts = judge.read(texts, batch_size=3)
    for i, text in enumerate(texts):
        ids = list((text or " ").encode())[:40]
        tokens = judge.tokenizer(text or " ")["input_ids"][:40]
        assert len(tokens) == len(ids)
        log_p = judge.model(torch.tensor([tokens])).logits[0].detach().double().log_softmax(-1)
        expected = -sum(float(log_p[k, token]) for k, token in enumerate(tokens[1:]))
        assert int(counts[i]) == len(tokens) - 1
        assert float(nats[i]) == pytest.approx(expected, abs=1e-4)
    features = judge.features(texts, batch_size=2)
    alone = judge.model.transformer(torch.tensor([judge.tokenizer("abc")["input_ids"]])).last_hidden_state[0, -1]
    torch.testing.assert_close(features[0], alone.detach(), rtol=1e-4, atol=1e-4)


def test_judges_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(tmp_path / "none.gguf"), str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="judge: no such"):
            load_judge(name)
    with pytest.raises(ConnectionError, match="judge: no such folder: 'someone/gpt', and it cannot be loaded"):
        load_judge("someone/gpt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "sedd_ext\[eval\]"'):
        load_judge(str(tmp_path))


@pytest.mark.parametrize("missing", ["*", "model.safetensors", "config.json"])
def test_a_folder_that_is_no_whole_judge(missing: str, judge_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(judge_folder, tmp_path / "judge"))
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=f"judge: expected a causal language model, got {folder}, which cannot be "):
        load_judge(str(folder))


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_judge(damaged: str, judge_folder: Path, tmp_path: Path) -> None:
    """Whatever error the library that reads the file raises."""
    folder = Path(shutil.copytree(judge_folder, tmp_path / "judge"))
    content = (folder / damaged).read_text(errors="replace").replace('"n_embd": 16', '"n_embd": "wide"')
    (folder / damaged).write_text(content if damaged == "config.json" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"judge: expected a causal language model, got {folder}, which cannot be "):
        load_judge(str(folder))


def test_a_judge_that_reads_no_token_after_the_given_ones(
    model: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge has 40 positions."""
    (model.parent / "real.txt").write_text("the quick brown fox jumps over the lazy dog " * 10)
    words = ["--text", str(model.parent / "real.txt"), "--length", "60", "--num", "2", "--steps", "2"]
    line = ["eval", "generative", str(model), "--judge", str(judge_folder), *words, "--mauve", "[prefix]"]
    assert main([*line, "--given", "45", "--compared", "55"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "judge: expected one that reads more than the 45 given tokens of a text, got tiny-judge" in error


def test_texts_that_the_judge_does_not_read_have_no_perplexity(model: Path, judge_folder: Path) -> None:
    loaded, judge = load_model(model), load_judge(str(judge_folder))
    letters = torch.tensor([[97, 98, 99], [120, 113, 113]])
    figures = measure(letters, loaded, judge, 2, False)
    one_byte = torch.tensor([[0xC3, 0xC3, 0xC3]]) * 0 + 255  # three bytes that are no text: one replacement each

    class Deaf(type(judge)):  # type: ignore[misc]
        def read(self, texts: Any, *rest: Any) -> Any:
            nats, counts = super().read(texts, *rest)
            lost = torch.tensor(["\ufffd" in text for text in texts])
            return nats.masked_fill(lost, 0.0), counts.masked_fill(lost, 0)

    deaf = Deaf(judge.name, judge.model, judge.tokenizer)
    some = measure(torch.cat([letters, one_byte]), loaded, deaf, 3, False)
    assert some["perplexity"] == pytest.approx(figures["perplexity"])
    assert some["perplexity_mean_of_exp"] == pytest.approx(figures["perplexity_mean_of_exp"])
    assert (figures["num"], some["num"]) == (2, 3)


def test_rows_of_a_sampler_that_is_not_known_now(model: Path, judge_folder: Path) -> None:
    options = ["--samplers", "tweedie", "--steps"]
    found = evaluate(model, judge_folder, *options, "2")
    path = model.parent / "figures.json"
    own = {**found["rows"][0], "sampler": "mine:Own"}
    path.write_text(json.dumps({**found, "rows": [own, *found["rows"]]}))
    rows = evaluate(model, judge_folder, *options, "3")["rows"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [("tweedie", 2), ("tweedie", 3), ("mine:Own", 2)]


def test_real_text_is_read_as_training_text_was(model: Path, judge_folder: Path) -> None:
    (model.parent / "real.txt").write_text("a , b .\n\n" * 30)
    options = ["--samplers", "tweedie", "--steps", "1", "--text", str(model.parent / "real.txt"), "--length", "8"]
    found = evaluate(model, judge_folder, *options)
    path = model.parent / "figures.json"
    path.unlink()
    other = evaluate(model, judge_folder, *options, "--documents", "paragraph", "--detokenizer", "wikitext")
    assert (other["settings"]["documents"], other["settings"]["detokenizer"]) == ("paragraph", "wikitext")
    assert other["real"]["unique"] > found["real"]["unique"], "the spaces before punctuation are gone"


def test_diversity_by_hand() -> None:
    found = diversity(torch.tensor([[1, 1, 2, 3], [4, 4, 4, 4], [1, 2, 3, 1]]), window=2)
    half, quarter = 0.5 * math.log(2), 0.25 * math.log(4)
    assert found["entropy"].tolist() == pytest.approx([half + 2 * quarter, 0.0, half + 2 * quarter])
    assert found["unique"].tolist() == [0.75, 0.25, 0.75]
    assert found["repetition"].tolist() == [0.25, 0.75, 0.0], "the last 1 is three tokens after the first"
    assert diversity(torch.tensor([[1, 2, 3, 1]]))["repetition"].tolist() == [0.25]


def test_mauve_tells_texts_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    real, same, other = (torch.randn(200, 8, generator=generator) + shift for shift in (0.0, 0.0, 3.0))
    assert _mauve(real, other) < 0.2 < 0.8 < _mauve(real, same)


def evaluate(model: Path, judge: Path, *options: str) -> dict[str, Any]:
    out = model.parent / "figures.json"
    line = ["eval", "generative", str(model), "--judge", str(judge), "--json", str(out), "--num", "6", *options]
    assert main(line) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_whole_command(
    model: Path, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real.txt"
    real.write_text("the quick brown fox jumps over the lazy dog " * 10)
    options = [
        *("--steps", "[2,8]", "--samplers", "[tweedie,euler]", "--text", str(real), "--batch_size", "4"),
        *("--mauve", "[unconditional,prefix,infill]", "--given", "6", "--compared", "12"),
    ]
    picture = tmp_path / "steps.png"
    found = evaluate(model, judge_folder, *options, "--plot", str(picture))
    printed = capsys.readouterr().out
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [
        *(("tweedie", 2), ("tweedie", 8)),
        *(("euler", 2), ("euler", 8)),
    ]
    assert "tiny-judge" in printed
    judge = load_judge(str(judge_folder))
    for row in [*found["rows"], found["real"]]:
        assert f"{row['perplexity']:.2f} ± {row['perplexity_error']:.2f}" in printed
        assert row["perplexity_mean_of_exp"] > 1
    for row in found["rows"]:
        assert len(row["texts"]) == 6
        nats, counts = judge.read([text.replace("<|endoftext|>", "\n\n") for text in row["texts"]], 6)
        assert row["perplexity"] == pytest.approx(math.exp(float(nats.sum() / counts.sum())), rel=1e-6)
        assert 0 < row["entropy"] < math.log(LENGTH)
        mauve = [row[f"mauve_{setting}"] for setting in ("unconditional", "prefix", "infill")]
        assert all(0 <= value <= 1 + 1e-9 for value in mauve), mauve
    assert found["real"]["unique"] > 0.3
    assert picture.read_bytes().startswith(b"\x89PNG")

    # what is there is kept, what is missing is made, and the same seed writes the same
    written: list[tuple[str, int]] = []
    row = sedd.commands.generative._row
    monkeypatch.setattr(
        sedd.commands.generative,
        "_row",
        lambda sampler, steps, *rest: written.append((sampler, steps)) or row(sampler, steps, *rest),
    )
    more = evaluate(model, judge_folder, *options, "--steps", "[2,4,8]")
    assert written == [("tweedie", 4), ("euler", 4)]
    assert [r for r in more["rows"] if r["steps"] != 4] == found["rows"]
    # what is not asked for again is not lost
    less = evaluate(model, judge_folder, *options, "--steps", "[8,1,8]", "--samplers", "[euler]")
    assert written[2:] == [("euler", 1)]
    assert [row for row in less["rows"] if row["steps"] != 1] == more["rows"]
    assert [row["steps"] for row in less["rows"]] == [2, 4, 8, 1, 2, 4, 8]
    (tmp_path / "figures.json").unlink()
    again = evaluate(model, judge_folder, *options, "--steps", "[2]", "--samplers", "[tweedie]")
    assert again["rows"][0]["texts"] == found["rows"][0]["texts"]
    line = ["eval", "generative", str(model), "--judge", str(judge_folder), "--json", str(tmp_path / "figures.json")]
    assert main([*line, *options, "--num", "6", "--seed", "5"]) == 2
    assert "json: expected results with the same options" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model", "judge", "text"])
def test_figures_of_other_weights_or_texts_are_not_taken(
    changed: str, model: Path, judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though all names are the same."""
    judge, real = tmp_path / judge_folder.name, tmp_path / "real.txt"
    shutil.copytree(judge_folder, judge)
    real.write_text("the quick brown fox " * 10)
    options = ["--steps", "[2]", "--samplers", "[tweedie]", "--text", str(real)]
    before = evaluate(model, judge, *options)
    assert evaluate(model, judge, *options) == before
    if changed == "model":
        other = SEDD.from_pretrained(model)
        with torch.no_grad():
            other.vocab_embed.embedding[0, 0] += 1
        other.save_pretrained(model)
    elif changed == "judge":
        other = transformers.AutoModelForCausalLM.from_pretrained(judge)
        with torch.no_grad():
            other.transformer.wte.weight[0, 0] += 1
        other.save_pretrained(judge)
    else:
        real.write_text("the lazy brown dog " * 10)
    out = tmp_path / "figures.json"
    kept = out.read_text()
    line = ["eval", "generative", str(model), "--judge", str(judge), *options, "--num", "6", "--json", str(out)]
    assert main(line) == 2
    assert "json: expected results with the same options, weights and data" in capsys.readouterr().err
    assert out.read_text() == kept


def test_a_run_whose_text_is_gone(
    judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real text is beside the point, but for MAUVE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    train = "train --data.source text.txt --run_dir run --steps 2 --model.length 32 --device cpu"
    assert main(train.split()) == 0
    Path("text.txt").unlink()
    line = ["eval", "generative", "run", "--judge", str(judge_folder), "--steps", "[2]", "--num", "2"]
    assert main([*line, "--samplers", "[tweedie]"]) == 0
    assert "real text is not evaluated; to evaluate some, give --text FILE" in capsys.readouterr().out
    assert main([*line, "--mauve", "[unconditional]", "--given", "4", "--compared", "8"]) == 2
    assert "text: cannot load the validation text of the run; give a file: source: " in capsys.readouterr().err


def test_given_tokens_are_kept(model: Path, judge_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model.parent / "real.txt"
    real.write_text("".join(chr(65 + i % 26) for i in range(200)))  # capitals, which the model does not write
    seen: list[tuple[Any, torch.Tensor]] = []
    sample = sedd.commands.generative.sample

    def record(*args: Any, fixed: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((fixed, sample(*args, fixed=fixed, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(sedd.commands.generative, "sample", record)
    options = ["--steps", "[4]", "--samplers", "[tweedie]", "--text", str(real), "--given", "5", "--compared", "9"]
    evaluate(model, judge_folder, *options, "--mauve", "[prefix,infill]", "--batch_size", "6")
    assert [fixed is None for fixed, _ in seen] == [True, False, False]
    assert seen[1][0][1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert seen[2][0][1].nonzero().flatten().tolist() == [0, 1, 2, 7, 8]
    for (tokens, given), written in seen[1:]:
        assert torch.equal(written[:, given], tokens[:, given])
        assert bool((written[:, ~given] >= 97).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "[0]"], "steps: expected numbers of at least 1, got [0]"),
        (["--steps", "[]"], "steps: expected numbers of at least 1, got []"),
        (
            ["--samplers", "magic"],
            f"samplers: expected one of {', '.join(SAMPLERS)}; got 'magic'",
        ),
        (["--mauve", "[all]"], "mauve: expected one of unconditional, prefix, infill; got 'all'"),
        (["--mauve", "[prefix]"], "compared: expected at most 16, the length of a text, got 100"),
        (["--mauve", "[unconditional]", "--compared", "8"], "text: expected real text for MAUVE, got none"),
        (["--detokenizer", "ptb"], "detokenizer: expected only with text, got 'ptb'; the run has its own"),
        (["--mauve", "[prefix]", "--given", "4", "--compared", "8"], "text: expected real text for MAUVE, got none"),
        (["--text", "none.txt"], "--text: expected a file or folder, got 'none.txt', which does not exist"),
        (["--num", "0"], "num: expected at least 1, got 0"),
        (
            ["--samplers", "[]"],
            f"samplers: expected at least one of {', '.join(SAMPLERS)}; got none",
        ),
        (["--mauve", "[infill]", "--given", "8", "--compared", "8"], "given: expected fewer than the 8 compared"),
        (["--top_p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--temperature", "0"], "temperature: expected a positive number, got 0.0"),
        (["--length", "1", "--num", "1"], "judge: expected texts of at least 2 tokens of tiny-judge, got 1"),
        (["--classifier", "x"], "classifier: expected no value for a model of texts, got 'x'"),
        (["--guidance", "2"], "guidance: expected no value for a model of texts, got 2.0"),
        (["--plot", "steps.foo"], "plot: expected a file name that ends in"),
    ],
)
def test_mistakes(
    options: list[str], message: str, model: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "generative", str(model), "--judge", str(judge_folder), *options]) == 2
    assert message in capsys.readouterr().err
