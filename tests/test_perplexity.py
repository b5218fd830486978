"""Perplexity on texts: the papers' sets by name, files, several at once, and an interrupted evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("rich")

import datasets
import torch

import sedd.commands.perplexity
import sedd.data.text
from sedd.cli import main
from sedd.commands.perplexity import TEXTS
from sedd.data.text import DataConfig
from sedd.diffusion.position_loss import ScoreEntropy
from sedd.diffusion.schedule import LogLinear
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd_ext import Absorbing

LENGTH = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SEDD(ModelConfig(16, 1, 2, 8, LENGTH), Absorbing(257), LogLinear(), "bytes")
    torch.nn.init.normal_(model.output_layer.linear.bias, std=2.0)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate(model: Path, *arguments: str) -> dict[str, Any]:
    out = model.parent / "figures.json"
    cache = ["--cache_dir", str(model.parent / "cache"), "--device", "cpu"]
    assert main(["eval", "perplexity", str(model), *arguments, *cache, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["model"] == str(model)
    return found["texts"]


def test_files_in_one_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one two , three\nfour\n" * 20)
    (tmp_path / "b.txt").write_text("zzzz" * 50)
    found = evaluate(model, str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--draws", "2")
    assert list(found) == ["a.txt", "b.txt"]
    a = found["a.txt"]
    assert (a["tokens_of_text"], a["tokens"], a["bytes"]) == (21 * 20 + 1, 416, 416)  # the end-of-text is in no block
    assert a["reading"] == "each file a document, detokeniser none, bytes tokens"
    assert a["bits_per_byte"] == pytest.approx(a["bits_per_token"])
    printed = capsys.readouterr().out
    assert f"{a['perplexity']:.2f} ±" in printed
    assert "416 of 421 tokens, in 52 blocks of 8" in printed
    # a smaller sample of the same text, another reading of it
    assert evaluate(model, str(tmp_path / "a.txt"), "--blocks", "3", "--draws", "2")["a.txt"]["tokens"] == 24
    two = evaluate(model, str(tmp_path / "a.txt"), "--blocks", "2", "--draws", "2")["a.txt"]
    mean, of_both = two["perplexity_mean_of_exp"], two["perplexity"]  # (a + b) / 2, and the root of a b
    assert two["perplexity_mean_of_exp_error"] == pytest.approx(math.sqrt(mean**2 - of_both**2), rel=1e-4)
    lines = evaluate(model, str(tmp_path / "a.txt"), "--documents", "line", "--detokenizer", "lm1b", "--draws", "1")
    assert lines["a.txt"]["tokens_of_text"] == (len("one two, three") + 1 + len("four") + 1) * 20
    assert lines["a.txt"]["reading"] == "each line a document, detokeniser lm1b, bytes tokens"


def test_rows_of_a_file_are_documents(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "one two three"}\n' * 4)
    (found,) = evaluate(model, str(folder / "rows.jsonl"), "--draws", "1").values()
    assert found["reading"] == "each row a document closed with end-of-text, detokeniser none, bytes tokens"
    monkeypatch.chdir(folder)
    assert list(evaluate(model, ".", "--draws", "1")) == ["rows"]
    Path("link.jsonl").symlink_to("rows.jsonl")
    both = ["link.jsonl", str(folder / "rows.jsonl")]
    assert list(evaluate(model, *both, "--draws", "1")) == ["link.jsonl", "rows.jsonl"], "names as they are given"


def test_figures_that_are_no_numbers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond what a number can be: null, and the table is there. NaN: an error that says whose."""
    text = tmp_path / "a.txt"
    text.write_text("one two , three\nfour\n" * 20)
    changed = SEDD.from_pretrained(model)
    with torch.no_grad():
        changed.output_layer.linear.bias[ord("o")] = 30.0
    changed.save_pretrained(tmp_path / "steep")
    (steep,) = evaluate(tmp_path / "steep", str(text), "--draws", "2").values()
    assert steep["nats_per_token"] > 710
    assert steep["perplexity"] is steep["perplexity_mean_of_exp"] is steep["perplexity_mean_of_exp_error"] is None
    assert "inf" in capsys.readouterr().out
    with torch.no_grad():
        changed.output_layer.linear.bias[ord("o")] = math.nan
    changed.save_pretrained(tmp_path / "broken")
    out = tmp_path / "broken.json"
    line = ["eval", "perplexity", str(tmp_path / "broken"), str(text), "--draws", "2", "--json", str(out)]
    assert main([*line, "--cache_dir", str(tmp_path / "cache")]) == 2
    assert "broken: expected finite scores, got NaN for 52 of 52 blocks of a.txt" in capsys.readouterr().err


def test_the_papers_sets_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the hub that holds each set as it is published."""
    rows = {
        "Salesforce/wikitext": ["", " = Title = \n", "", " A text , of lines @-@ yes . \n"],
        "EleutherAI/lambada_openai": ["“A passage” that ends in a word"] * 2,
        "billion-word-benchmark/lm1b": ["A sentence , and no more ."] * 2,
        "ptb-text-only/ptb_text_only": ["it did n't rise $ N"] * 2,
    }
    train = {"text": [" Training text . \n"]}
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, revision: str | None, **_: Any) -> Any:
        asked.append((name, subset, revision))
        column = "sentence" if name == "ptb-text-only/ptb_text_only" else "text"
        return datasets.DatasetDict(
            {"test": datasets.Dataset.from_dict({column: rows[name]}), "train": datasets.Dataset.from_dict(train)}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = {
        "wikitext2": "\n= Title =\nA text, of lines-yes.\n",
        "wikitext2-train": " Training text.\n",
        "wikitext103": "\n= Title =\nA text, of lines-yes.\n",
        "lambada": '"A passage" that ends in a word█' * 2,
        "lm1b": "A sentence, and no more.█" * 2,
        "ptb": "it didn't rise $N█" * 2,
    }
    assert set(texts) == set(TEXTS)
    found = evaluate(model, *texts, "--draws", "1")
    for name, text in texts.items():
        tokens = len(text) + ("wikitext" in name)  # █ stands for end-of-text here, which closes WikiText too
        assert found[name]["tokens_of_text"] == tokens, name
        assert f"detokeniser {TEXTS[name].data.detokenizer}" in found[name]["reading"]
    assert "one document" in found["wikitext2"]["reading"]
    assert "each row a document" in found["ptb"]["reading"]
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", None)
    assert asked[-1] == ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet")


def test_an_interrupted_evaluation_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one two , three\nfour\n" * 20)
    arguments = [str(text), "--draws", "3", "--batch_size", "10"]
    whole = evaluate(model, *arguments)
    calls, scored = 0, ScoreEntropy.loss

    def stop_in_the_fifth(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return scored(*args, **kwargs)

    monkeypatch.setattr(ScoreEntropy, "loss", stop_in_the_fifth)
    out = tmp_path / "figures.json"
    out.unlink()
    line = ["eval", "perplexity", str(model), *arguments, "--cache_dir", str(tmp_path / "cache"), "--json", str(out)]
    assert main(line) == 130
    (kept,) = tmp_path.glob("*.unfinished")
    assert not out.exists()
    assert main([*line, "--draws", "4"]) == 2
    assert str(kept) in capsys.readouterr().err
    calls = 10
    assert evaluate(model, *arguments) == whole
    assert calls == 10 + 16 - 4, "what was done is not done again"
    assert not kept.exists()


@pytest.mark.parametrize("files", [["a/text.txt", "b/text.txt"], ["ä.txt", "ß.txt"], ["a.1.txt", "a-1.txt"]])
def test_texts_are_told_apart_and_none_is_scored_twice(
    files: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for letter, path in zip("ab", files, strict=True):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(letter * 80)  # 10 blocks
        names.append(str(tmp_path / path))
    arguments = [*names, "--draws", "2", "--batch_size", "10"]
    whole = evaluate(model, *arguments)
    assert list(whole) == (names if "/" in files[0] else files)
    calls, scored = 0, ScoreEntropy.loss

    def stop_in_the_fourth(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second call for the second text
            raise KeyboardInterrupt
        return scored(*args, **kwargs)

    monkeypatch.setattr(ScoreEntropy, "loss", stop_in_the_fourth)
    cache = ["--cache_dir", str(tmp_path / "cache"), "--device", "cpu"]
    line = ["eval", "perplexity", str(model), *arguments, *cache, "--json", str(tmp_path / "figures.json")]
    assert main(line) == 130
    assert evaluate(model, *arguments) == whole
    assert calls == 5, "only the one call that was interrupted is made again"
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_evaluation_bounded_in_time_says_how_much_it_scored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:07d}\n" for i in range(52)))
    clock, scored = 0.0, sedd.commands.perplexity.elbo

    def half_a_minute_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal clock
        clock += 30.0
        return scored(*args, **kwargs)

    monkeypatch.setattr(sedd.commands.perplexity, "elbo", half_a_minute_later)
    monkeypatch.setattr(sedd.commands.perplexity.time, "monotonic", lambda: clock)
    arguments = [str(text), "--draws", "16", "--batch_size", "4"]
    bounded = evaluate(model, *arguments, "--max_minutes", "4.6")["text.txt"]
    assert (bounded["blocks"], bounded["tokens"], bounded["bytes"]) == (20, 160, 160), (
        "10 rounds of 2 blocks, 30 s each"
    )
    assert "160 of 417 tokens, in 20 blocks of 8, after 4.6 minutes." in capsys.readouterr().out
    same = evaluate(model, *arguments, "--blocks", "20")["text.txt"]
    assert bounded["nats_per_token"] == pytest.approx(same["nats_per_token"], abs=5 * same["monte_carlo_error"])
    whole = evaluate(model, *arguments, "--max_minutes", "1e9")["text.txt"]
    assert whole["blocks"] == 52
    assert "minutes" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.unfinished"))
    assert main(["eval", "perplexity", str(model), str(text), "--max_minutes", "0"]) == 2
    assert "max_minutes: expected a positive number, got 0.0" in capsys.readouterr().err


def test_a_saved_folder_of_several_splits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"train": "a" * 40, "test": "b" * 50, "validation": "c" * 60}
    splits = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in texts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for words, split in (((), "test"), (("--split", "train"), "train"), (("--split", "validation"), "validation")):
        found = evaluate(model, str(tmp_path / "saved"), "--draws", "1", *words)["saved"]
        assert found["tokens_of_text"] == len(texts[split]) + 1
    assert main(["eval", "perplexity", str(model), str(tmp_path / "saved"), "--split", "dev"]) == 2
    assert "--split: expected a split of" in capsys.readouterr().err


def test_mistakes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = str(tmp_path / "short.txt")
    Path(short).write_text("a")
    for arguments, message in (
        ([], "text: expected a text, got none; {model} has no validation text: give wikitext2"),
        ([short], "short.txt: expected at least one block of 8 tokens, got 2 tokens"),
        (["ptb", "lambada", "ptb"], "texts: expected different texts, got 'ptb' more than once"),
        ([short, "--split", "test"], "split: expected no value for"),
        (
            ["wikitext2", "--split", "train"],
            "--split: expected only with a file, a folder or a hub data set; wikitext2",
        ),
        (["ptb", "--detokenizer", "lm1b"], "--detokenizer: expected only with a file, a folder or a hub data set; ptb"),
        ([short, "--json", str(tmp_path)], f"json: cannot write {tmp_path}: expected a file, got a folder"),
        (["someone/text"], "could not load 'someone/text': there is no such file or folder, and the Hugging Face hub"),
    ):
        assert main(["eval", "perplexity", str(model), *arguments]) == 2
        assert message.format(model=model) in capsys.readouterr().err


def test_a_detokeniser_may_be_trained_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"detokenizer: expected one of none, wikitext, .* got 'moses'"):
        sedd.data.text._check(DataConfig(detokenizer="moses"), 8)  # type: ignore[arg-type]
