"""The README shows what an example does, and the example works."""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sedd_ext import Absorbing, linear_score_entropy_loss, score_entropy_loss

ROOT = Path(__file__).parent.parent


def test_own_trainer_learns() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_trainer.py"))
    first, last = example["train"](steps=300)
    # the bound cannot fall below the entropy of the tokens, 1.208 nats, but for the noise of 50 steps
    assert last < first
    assert last == pytest.approx(1.208, abs=0.06)


def test_readme_shows_the_example() -> None:
    source = (ROOT / "examples" / "own_trainer.py").read_text(encoding="utf-8")
    shown = source.split("# [five lines]\n")[1].split("        # [/five lines]")[0]
    lines = [line.removeprefix("        ") for line in shown.splitlines()]
    assert len(lines) == 5
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_without_the_log_scores() -> None:
    """The snippet of the fused head runs as it stands, and gives the unfused gradients."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "body(" in block)
    generator = torch.Generator().manual_seed(0)
    batch, length, d, n = 2, 5, 8, 11
    graph = Absorbing(n)
    states = torch.randn(batch, length, d, generator=generator, requires_grad=True)
    head = torch.nn.Linear(d, graph.dim)
    sigma_bar, sigma = torch.tensor([0.3, 1.5]), torch.tensor([0.7, 2.0])
    x_0 = torch.randint(n, (batch, length), generator=generator)
    x_t = torch.where(torch.rand(batch, length, generator=generator) < 0.6, n, x_0)
    names = {
        "linear_score_entropy_loss": linear_score_entropy_loss,
        "body": lambda x_t, sigma_bar: states,
        **{"head": head, "x_t": x_t, "x_0": x_0, "sigma_bar": sigma_bar, "sigma": sigma, "graph": graph},
    }
    exec(snippet, names)
    leaves = (states, head.weight, head.bias)
    fused = [leaf.grad for leaf in leaves]
    loss = (sigma[:, None] * score_entropy_loss(head(states), x_t, x_0, sigma_bar[:, None], graph)).sum()
    torch.testing.assert_close(names["loss"], loss)
    torch.testing.assert_close(fused, list(torch.autograd.grad(loss, leaves)))


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
    (tmp_path / "train.txt").write_text("the dog the cow a cat at at")
    words = ["--words", str(tmp_path / "train.txt")]
    subprocess.run([*command, "--out", str(tmp_path / "comparison"), *words], check=True, capture_output=True)
    assert "| 0.100 | 0.562 ± 0.062 | 0.20 |" in (tmp_path / "comparison.md").read_text()
    done = subprocess.run([*command, str(tmp_path), "--out", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no eval/perplexity.json" in done.stderr
    done = subprocess.run([*command, f"{tmp_path}/two/../one", "--out", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "a run of that name is given already" in done.stderr.replace("\n", " ")
    judged["settings"] = {"judge": "another"}
    (tmp_path / "two" / "eval" / "generative.json").write_text(json.dumps(judged))
    done = subprocess.run([*command, "--out", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "judges differ (one: somebody, two: another)" in done.stderr.replace("\n", " ")
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
