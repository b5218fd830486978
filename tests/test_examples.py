"""The README shows what an example does, and the example works."""

import gzip
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sedd_ext import Absorbing, RankOne, Uniform, score_entropy_loss, transition_column

ROOT = Path(__file__).parent.parent


def test_bert_learns_from_the_first_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["bert.py", "--steps", "1"])
    names = runpy.run_path(str(ROOT / "examples" / "bert.py"), run_name="__main__")
    (printed,) = re.findall(r"^step    1: ([\d.]+) nats per token", capsys.readouterr().out, re.MULTILINE)
    torch.manual_seed(0)
    model = names["make_model"]()
    losses = names["train"](model, names["read_bytes"](50_000), 12)
    assert losses[0] == pytest.approx(math.log(256), abs=0.8)
    assert float(printed) == pytest.approx(math.log(256), abs=0.8)
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    written = names["sample"](model, num=2, steps=3)
    assert written.shape == (2, names["LENGTH"])
    assert int(written.max()) < 256, "no MASK is left"


def test_adapting_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("".join(f"the cat {i} sat on the mat\n" for i in range(2000)))
    words = ["text.txt", "--out", "new", "--pretrain", "40", "--steps", "2", "--blocks", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adapt.py", *words])
    runpy.run_path(str(ROOT / "examples" / "adapt.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(\w.*?) +([\d.]+) ± ", printed, re.MULTILINE))
    assert [*found][1:] == ["random weights", "GPT-2", "GPT-2, attention annealed", "GPT-2, without the shift"]
    assert max(float(found[name]) for name in [*found][2:]) < float(found["random weights"]) - 1
    assert "A sample of the annealed model:" in printed


def test_decoding_with_and_without_logits() -> None:
    """Without randomness, the same tokens."""
    pytest.importorskip("transformers")
    names = runpy.run_path(str(ROOT / "examples" / "decode.py"))
    model = names["make_model"]()
    texts = [names["decode"](model, way, 2, 12, 4, temperature=0.0) for way in ("logits", "fused")]
    assert torch.equal(*texts)
    assert not bool((texts[0] == names["MASK"]).any())
    drawn = names["decode"](model, "fused", 2, 12, 4)
    assert not torch.equal(drawn, texts[0])
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter *= 20.0  # positions differ
        x = torch.arange(24).view(2, 12).masked_fill(torch.arange(12) % 2 == 0, names["MASK"])
        (token, confidence), (other, other_confidence) = (way(model, x, 0.0) for way in names["PREDICTIONS"].values())
    masked = x == names["MASK"]
    assert len(token[masked].unique()) > 5
    assert torch.equal(token[masked], other[masked])
    torch.testing.assert_close(confidence[masked].float(), other_confidence[masked], rtol=1e-4, atol=0)


def snippets(word: str) -> str:
    """The Python of the README's section on trainers, up to the block that contains a word."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Use the loss in your own trainer")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (last,) = (i for i, block in enumerate(blocks) if word in block)
    text = "".join(blocks[: last + 1])
    assert "Absorbing(50257)" in text
    return text.replace("Absorbing(50257)", "Absorbing(6)")  # a small vocabulary, where N is not nearly N - 1


def readme_names() -> dict[str, Any]:
    """What the README takes as given: a network, a batch of text and its times."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 7)
    states = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    return {
        **{"head": head, "body": lambda x_t: states, "model": lambda x_t: head(states), "states": states},
        **{"x_0": torch.randint(6, (2, 5), generator=generator), "t": torch.tensor([0.4, 0.8])},
    }


def test_readme_scales_the_output_so_that_zeros_mean_equal_probabilities() -> None:
    """By hand: the loss of a masked position is then log(N - 1) / (e^σ̄ - 1), that of the others 0."""
    output = torch.zeros(2, 5, 7, requires_grad=True)
    names = {**readme_names(), "model": lambda x_t: output}
    torch.manual_seed(0)
    exec(snippets("model("), names)
    masked = names["x_t"] == 6
    assert masked.any()
    expected = torch.where(masked, math.log(6) / names["sigma_bar"].expm1()[:, None], 0.0)
    torch.testing.assert_close(names["loss"], (names["sigma"][:, None] * expected).mean())
    assert output.grad is not None
    assert bool(output.grad[masked].any(-1).all())


@pytest.mark.parametrize(("process", "shifted"), [(Absorbing(7), True), (Uniform(7), False)])
def test_the_loss_starts_at_log_n(process: RankOne, shifted: bool) -> None:
    """The README's claim for outputs of 0, by an integral over t and the sum over x_t."""
    nodes, weights = (torch.tensor(part) for part in numpy.polynomial.legendre.leggauss(500))
    t = (1 + nodes) / 2
    sigma_bar, sigma = -torch.log1p(-0.999 * t), 0.999 / (1 - 0.999 * t)
    shift = torch.log(torch.expm1(sigma_bar)) + math.log(process.dim - 1) if shifted else torch.zeros_like(t)
    x_0 = torch.zeros(len(t), process.dim, dtype=torch.int64)
    x_t = torch.arange(process.dim).expand_as(x_0)
    output = torch.zeros(*x_t.shape, process.dim, dtype=torch.float64)
    loss = score_entropy_loss(output, x_t, x_0, sigma_bar[:, None], process, log_score_shift=shift[:, None])
    probability = transition_column(x_0[:, 0], sigma_bar, process)
    total = float((weights / 2 * sigma * (probability * loss).sum(-1)).sum())
    assert total == pytest.approx(math.log(7), abs=0.01)


def test_readme_without_a_tensor_of_log_scores() -> None:
    """The snippet of the fused head runs as it stands, and gives the gradients of the snippet before it."""
    gradients = []
    for word in ("model(", "body("):
        names = readme_names()
        torch.manual_seed(0)
        exec(snippets(word), names)
        leaves = (names["states"], names["head"].weight, names["head"].bias)
        gradients.append([leaf.grad for leaf in leaves])
    unfused, both = gradients
    # the second run holds the first snippet too: its gradients are added up
    torch.testing.assert_close(both, [2 * gradient for gradient in unfused])


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [(2.7312, "more context than the previous byte"), (4.0, "table of pairs"), (4.6, "not yet learnt how frequent")],
)
def test_the_demo_ends_with_what_its_figures_mean(bits: float, verdict: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00001200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1200, "elapsed": 300.4}))
    (tmp_path / "eval").mkdir()
    texts = {
        "validation text": {"bits_per_byte": bits, "blocks": 3339, "bytes": 427392},
        "unigram": {"bits_per_byte": 4.49},
        "bigram": {"bits_per_byte": 3.491},
    }
    (tmp_path / "eval" / "perplexity.json").write_text(json.dumps({"model": str(checkpoint), "texts": texts}))
    command = [sys.executable, str(ROOT / "examples" / "demo_summary.py"), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = printed.replace("\n", " ")
    assert f"After 1,200 steps (5.0 minutes) the model needs at most {bits:.2f} bits per byte" in words
    assert "3,339 blocks (427,392 bytes)" in words
    assert verdict in words
    assert words.count("So the model") == 1
    assert f"train --run_dir {tmp_path} --resume --max_minutes 30" in printed


def test_the_page_has_the_marks_between_which_make_bench_writes() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for script in ("report.py", "profiles.py"):
        source = (ROOT / "benchmarks" / script).read_text(encoding="utf-8")
        marks = re.findall(r'"(<!-- [^"]+ -->)"', source)
        assert len(marks) == 2
        assert [page.count(mark) for mark in marks] == [1, 1]


@pytest.mark.parametrize("name", ["text27.sh", "wikitext.sh"])
def test_a_script_without_arguments_says_what_it_wants(name: str) -> None:
    done = subprocess.run(["bash", str(ROOT / "examples" / name)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"bash examples/{name} FOLDER" in done.stderr
    assert "SEDD=sedd (the command)" in done.stderr.replace("\n", " ")
    assert "set -euo" not in done.stderr


def test_a_text_that_a_killed_script_was_writing_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "all.gz").write_bytes(gzip.compress(bytes(range(97, 117)) * 50))
    tail = tmp_path / "bin" / "tail"
    tail.parent.mkdir()
    tail.write_text(f'#!/bin/sh\nif [ "$2" = 50 ]; then printf cut; exit 1; fi\nexec {shutil.which("tail")} "$@"\n')
    tail.chmod(0o755)
    line = ["bash", str(ROOT / "examples" / "text27.sh"), str(tmp_path / "out"), str(tmp_path / "all.gz")]
    environment = {**os.environ, "SEDD": "true"}
    path = f"{tail.parent}:{environment['PATH']}"
    assert subprocess.run(line, capture_output=True, env={**environment, "PATH": path}).returncode == 1
    subprocess.run(line, capture_output=True, env=environment)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes == {"train.txt": 900, "valid.txt": 50, "test.txt": 50}


@pytest.mark.parametrize(
    ("script", "runs"),
    [("text27.sh", "md4-seed1 md5"), ("text27.sh", "md4-seed1 md5-seed1"), ("wikitext.sh", "md4 md5")],
)
def test_a_wrong_name_of_a_run_stops_the_script_before_any_work(script: str, runs: str, tmp_path: Path) -> None:
    (tmp_path / "all.gz").write_bytes(gzip.compress(b"abcde " * 100))
    files = [str(tmp_path / "all.gz")] * (2 if script == "wikitext.sh" else 1)
    line = ["bash", str(ROOT / "examples" / script), str(tmp_path / "out"), *files]
    environment = {**os.environ, "SEDD": f"touch {tmp_path / 'called'} && false", "RUNS": runs}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "RUNS: no run has the name md5" in done.stderr
    assert not (tmp_path / "called").exists()


def test_runs_have_their_options(tmp_path: Path) -> None:
    """With a command that prints its arguments: objective, process and seed of each run."""
    (tmp_path / "all.gz").write_bytes(gzip.compress(b"abcde " * 100))
    line = ["bash", str(ROOT / "examples" / "text27.sh"), str(tmp_path / "out"), str(tmp_path / "all.gz")]
    environment = {**os.environ, "SEDD": "echo", "RUNS": "ar udlm-seed2 d3pm-uniform", "JUDGE": "somebody"}
    printed = subprocess.run(line, capture_output=True, text=True, env=environment).stdout.splitlines()
    trained = [line for line in printed if line.startswith("train ")]
    assert [line.partition("--steps 6000 ")[2] for line in trained] == [
        "--objective autoregressive",
        "--objective udlm --process uniform --seed 2",
        "--objective d3pm --process uniform",
    ]
    judged = [line for line in printed if line.startswith("eval generative ")]
    assert ["--samplers autoregressive" in line for line in judged] == [True, False, False]
    line = ["bash", str(ROOT / "examples" / "wikitext.sh"), str(tmp_path / "out"), "train.raw", "test.raw"]
    printed = subprocess.run(line, capture_output=True, text=True, env={**environment, "RUNS": "ar md4"}).stdout
    trained = [line for line in printed.splitlines() if line.startswith("train ")]
    assert [line.partition("--steps 2000 ")[2] for line in trained] == ["--objective autoregressive", "--objective md4"]


def test_noise_of_losses_and_learned_powers(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from sedd.cli import main

    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 400)
    sizes = "--model.hidden_size 16 --model.n_blocks 1 --model.n_heads 2 --model.cond_dim 8 --model.length 16"
    options = (
        f"--data.source {tmp_path / 'text.txt'} --tokenizer text8 --steps 4 --batch_size 4 --report_to none {sizes}"
    )
    for objective in ("genmd4", "md4", "score_entropy"):
        assert main(f"train --objective {objective} --run_dir {tmp_path / objective} {options}".split()) == 0
    command = [sys.executable, str(ROOT / "examples" / "powers.py"), str(tmp_path / "genmd4")]
    out = str(tmp_path / "powers.png")
    done = subprocess.run([*command, "--out", out, "--most", "10"], check=True, capture_output=True, text=True)
    assert len(done.stdout.split(",")) == 10
    assert Path(out).read_bytes().startswith(b"\x89PNG")
    command[2] = str(tmp_path / "md4")
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a run of sedd train --objective genmd4" in done.stderr
    runs = [str(tmp_path / name) for name in ("md4", "score_entropy")]
    command = [
        sys.executable,
        str(ROOT / "examples" / "loss_variance.py"),
        *runs,
        "--batches",
        "3",
        "--batch_size",
        "4",
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "noise.json")], check=True, capture_output=True, text=True
    )
    rows = json.loads((tmp_path / "noise.json").read_text())
    assert [row["objective"] for row in rows[::2]] == [
        *("md4", "tauldr"),
        *("score_entropy", "implicit_score_entropy", "concrete_score"),
    ]
    assert all(row["standard_deviation"] > 0 < row["gradient_deviation"] for row in rows)
    assert len(done.stdout.splitlines()) == 2 + len(rows)


def test_runs_are_compared(tmp_path: Path) -> None:
    for i, name in enumerate(("one", "two")):
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        figures = {"nats_per_token": 2.0 + i, "standard_error": 0.1, "bits_per_byte": 3.0 + i, "perplexity": 7.4}
        texts = {"test.txt": {**figures, "perplexity_mean_of_exp": 7.5}}
        (folder / "perplexity.json").write_text(json.dumps({"texts": texts}))
        row = {"perplexity_error": 2.0, "entropy": 5.0, "unique": 0.5, "repetition": 0.1, "seconds_per_text": 0.2}
        rows = [
            {
                **{**row, "sampler": sampler, "steps": steps, "perplexity": 100.0 + steps},
                "texts": ["he the cat sat", "he the cow at a"],  # 3 of 6 letters, 5 of 8
            }
            for sampler in ("tweedie", "euler")
            for steps in (64, 16)
        ]
        judged = {"settings": {"judge": "somebody"}, "real": {**row, "perplexity": 50.0}, "rows": rows}
        (folder / "generative.json").write_text(json.dumps(judged))
    command = [sys.executable, str(ROOT / "examples" / "compare.py"), str(tmp_path / "one"), str(tmp_path / "two")]
    subprocess.run([*command, "--out", str(tmp_path / "comparison")], check=True, capture_output=True)
    table = (tmp_path / "comparison.md").read_text()
    assert "| two | test.txt | 4.0000 ± 0.1333 | 3.0000 ± 0.1000 | 7.40 | 7.50 |" in table
    assert "| one | euler | 64 | 164.0 ± 2.0 | 5.000 | 0.500 | 0.100 |  | 0.20 |" in table
    assert "| one | real text |" in table
    assert "perplexity (somebody)" in table
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison-bits.png").read_bytes().startswith(b"\x89PNG")
    assert "seeds" not in table
    (tmp_path / "train.txt").write_text("the dog the cow a cat at at")
    words = ["--words", str(tmp_path / "train.txt")]
    subprocess.run([*command, "--out", str(tmp_path / "comparison"), *words], check=True, capture_output=True)
    assert "| 0.100 | 0.562 ± 0.062 | 0.20 |" in (tmp_path / "comparison.md").read_text()
    shutil.copytree(tmp_path / "two", tmp_path / "one-seed1")
    papers = tmp_path / "papers.json"
    papers.write_text('{"one": 1.5, "three": 2.0}')
    more = [str(tmp_path / "one-seed1"), "--out", str(tmp_path / "comparison"), "--papers", str(papers)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    assert "| one | 2 | 3.5000 | 0.7071 |" in (tmp_path / "comparison.md").read_text()
    unused = str(tmp_path / "unused")
    done = subprocess.run([*command, str(tmp_path), "--out", unused], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no eval/perplexity.json" in done.stderr
    done = subprocess.run([*command, f"{tmp_path}/two/../one", "--out", unused], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected runs with different names, got one twice" in done.stderr.replace("\n", " ")
    judged["settings"] = {"judge": "another"}
    (tmp_path / "two" / "eval" / "generative.json").write_text(json.dumps(judged))
    done = subprocess.run([*command, "--out", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected one judge for all runs, got one: somebody, two: another" in done.stderr.replace("\n", " ")
    drawn = runpy.run_path(str(ROOT / "examples" / "compare.py"))["picture"]({"two": {"generative": judged}})
    lines = [list(bars.lines[0].get_xdata()) for panel in drawn.axes for bars in panel.containers]
    assert lines == [[16, 64]] * 4, "two samplers, two panels"


def test_figures_that_json_cannot_say_and_rows_without_errors(tmp_path: Path) -> None:
    """What sedd eval perplexity writes of a run's own text: n-gram models beside it, and null for infinity."""
    (tmp_path / "one" / "eval").mkdir(parents=True)
    figures = {"nats_per_token": 2.0, "standard_error": 0.1, "bits_per_byte": 3.0, "perplexity": 7.4}
    texts = {
        "validation text": {**figures, "perplexity_mean_of_exp": None},
        "unigram": {"nats_per_token": 2.5, "perplexity": 12.2, "bits_per_byte": 3.6},
        "one block": {**figures, "standard_error": None, "perplexity_mean_of_exp": 1.6e31},
        "infinite": {**dict.fromkeys(figures), "perplexity_mean_of_exp": None},
    }
    (tmp_path / "one" / "eval" / "perplexity.json").write_text(json.dumps({"texts": texts}))
    (tmp_path / "one" / "eval" / ".writing-perplexity.json").write_text('{"cut')
    command = [sys.executable, str(ROOT / "examples" / "compare.py"), str(tmp_path / "one")]
    subprocess.run([*command, "--out", str(tmp_path / "comparison")], check=True, capture_output=True)
    table = (tmp_path / "comparison.md").read_text()
    assert "| one | validation text | 3.0000 ± 0.1500 | 2.0000 ± 0.1000 | 7.40 | inf |" in table
    assert "| one | one block | 3.0000 | 2.0000 | 7.40 | 1.60e+31 |" in table
    assert "| one | infinite | inf | inf | inf | inf |" in table
    assert "unigram" not in table
