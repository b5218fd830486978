"""Every command with every objective: what works, and what is refused with which message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from sedd.cli import main
from sedd.diffusion.genmd4 import PerToken
from sedd.diffusion.objectives import OBJECTIVES
from sedd.hub import SEDD, load_model

SIZES = "--model.hidden_size 16 --model.n_blocks 1 --model.n_heads 2 --model.cond_dim 8 --model.length 16"
PROCESS = {"udlm": "uniform", "gidd": "hybrid"}
PARAMS = {"d3pm": "--objective_params.steps 20 --objective_params.ce_weight 0.1"}
REFUSED = {  # (objective, command): the message
    ("autoregressive", "infill"): "template: expected given tokens at the beginning only",
    ("autoregressive", "convert"): "save_pretrained: expected a diffusion model, got an autoregressive one",
    ("genmd4", "euler"): "--sampler: expected tweedie, tweedie_cosine, confidence or another",
    ("autoregressive", "eval latency"): "run: expected a diffusion model",
    ("autoregressive", "euler"): "--sampler: expected 'autoregressive' for an autoregressive model",
    ("autoregressive", "greedy"): "--sampler: expected 'autoregressive' for an autoregressive model",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("text") / "text.txt"
    source.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(500)))
    return source


@pytest.fixture(scope="module")
def baseline(source: Path) -> str:
    """A run that judges samples, and whose speed is compared."""
    run = str(source.parent / "baseline")
    options = (
        f"--objective autoregressive --data.source {source} --batch_size 4 --report_to none {SIZES} --precision fp32"
    )
    assert main(f"train --run_dir {run} {options} --steps 4".split()) == 0
    return run


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_command(
    objective: str,
    source: Path,
    baseline: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    threads: Callable[[int], None],
) -> None:
    threads(1)
    run, model, whole = str(tmp_path / "run"), str(tmp_path / "model"), str(tmp_path / "whole")
    options = (
        f"--objective {objective} --process {PROCESS.get(objective, 'absorbing')} {PARAMS.get(objective, '')} "
        f"--data.source {source} --batch_size 4 --report_to none {SIZES} --precision fp32 --lr 1e-3 --valid_blocks 4 "
        "--checkpoint_every 3 --seed 3"
    )

    def call(command: str, words: str | list[str], name: str = run) -> bool:
        """Runs a command and returns whether it works, which must be what the table above says."""
        line = [*command.split(), name, *(words.split() if isinstance(words, str) else words)]
        capsys.readouterr()
        code = main(line)
        error = re.sub(r"\s+", " ", capsys.readouterr().err)
        expected = REFUSED.get((objective, command))
        expected = REFUSED.get((objective, line[line.index("--sampler") + 1])) if "--sampler" in line else expected
        assert code == (0 if expected is None else 2), f"{line}: {error}"
        assert expected is None or expected in error
        return code == 0

    # six steps in one go, and with a break after three
    for folder, steps in ((whole, 6), (run, 3)):
        assert main(f"train --run_dir {folder} {options} --steps {steps}".split()) == 0
    assert main(f"train --run_dir {run} --resume --steps 6".split()) == 0
    for file in ("model", "ema", "optimizer"):
        name = f"checkpoints/step_00000006/{file}.safetensors"
        assert Path(run, name).read_bytes() == Path(whole, name).read_bytes()
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)

    figures = tmp_path / "figures.json"
    assert call("eval perplexity", f"--blocks 4 --draws 4 --json {figures}")
    result = json.loads(figures.read_text())["texts"]["validation text"]
    assert 2 < result["bits_per_token"] < 15
    # far from trained: near log2 of the vocabulary, above it for processes whose prediction has the noise in it
    assert call("sample", "--num 2 --steps 4")
    for sampler in ("euler", "greedy"):
        call("sample", f"--steps 4 --sampler {sampler}")
    call("infill", ["the {{4}} sat", "--steps", "4"])
    judge = f"--judge {baseline} --num 2 --steps 2,4"
    assert call("eval generative", f"{judge} --json {tmp_path / 'generative.json'} --plot {tmp_path / 'g.png'}")
    rows = json.loads((tmp_path / "generative.json").read_text())["rows"]
    usual = {"genmd4": ["tweedie"], "autoregressive": ["autoregressive"]}.get(objective, ["tweedie", "euler"])
    assert list(dict.fromkeys(row["sampler"] for row in rows)) == usual
    call("eval latency", f"--twin {baseline} --steps 1,2 --batch_sizes 1 --repeats 1")
    assert call("report", f"--samples 1 --steps 4 --out {tmp_path / 'report.html'}")
    assert call("info", "")

    # the same model after saving and loading
    if call("convert", [model]):
        config = json.loads(Path(model, "config.json").read_text())
        assert config.get("objective", "score_entropy") == objective
        assert call("eval perplexity", f"{source} --blocks 4 --draws 4 --json {figures}")
        saved = Path(tmp_path / "saved.json")
        assert call("eval perplexity", f"{source} --blocks 4 --draws 4 --json {saved}", model)
        first, second = (json.loads(path.read_text())["texts"] for path in (figures, saved))
        # a run is evaluated in its own precision, other models in bfloat16 where there are instructions for it
        assert [row["nats_per_token"] for row in second.values()] == pytest.approx(
            [row["nats_per_token"] for row in first.values()], rel=1e-4
        )
        assert call("sample", "--steps 4", model)


def test_learned_powers_are_trained_averaged_and_stored(source: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    options = (
        f"--data.source {source} --batch_size 4 --report_to none {SIZES} --precision fp32 --lr 1e-2 --valid_blocks 4"
    )
    assert main(f"train --objective genmd4 --run_dir {run} {options} --steps 20".split()) == 0
    schedule: Any = load_model(run).diffusion.schedule
    assert isinstance(schedule, PerToken)
    moved = (schedule.power()[:-1] - 1).abs()
    assert float(moved.detach().max()) > 1e-3  # tokens of the text
    assert main(["convert", str(run), str(model)]) == 0
    again: Any = SEDD.from_pretrained(model).schedule
    torch.testing.assert_close(again.raw_power, schedule.raw_power, rtol=0, atol=0)
    # a run that starts from it has them too
    again_dir = tmp_path / "again"
    more = f"train --init {run} --objective genmd4 --run_dir {again_dir} {options} --steps 1 --warmup 1000000"
    assert main(more.split()) == 0
    torch.testing.assert_close(load_model(again_dir).diffusion.schedule.raw_power, schedule.raw_power)
    # a file that lacks them is refused, not filled with the initial ones
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["schedule.raw_power"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match="tensors: expected those of a learned schedule of genmd4, got none"):
        SEDD.from_pretrained(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--objective genmd4 --schedule cosine", "schedule: expected loglinear or polynomial for the objective genmd4"),
        ("--objective genmd4 --process uniform", "process: expected absorbing for the objective genmd4, got uniform"),
        ("--objective tauldr --process hybrid", "process: expected absorbing for the objective tauldr, got hybrid"),
        ("--objective d3pm --objective_params.steps 0", "--objective_params.steps: expected a whole number"),
        ("--objective d3pm --objective_params.start 0.1", "objective 'd3pm' has the parameters steps, ce_weight"),
        ("--objective_params.steps 4", "objective 'score_entropy' has no parameters; got 'steps'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_exists(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"train --run_dir {tmp_path / 'run'} {words}".split()) == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_objective_and_parameters(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        f"--data.source {source} --batch_size 4 --report_to none {SIZES} --precision fp32 --valid_blocks 4 --steps 2"
    )
    assert main(f"train --objective d3pm --run_dir {tmp_path / 'run'} {options}".split()) == 0
    resume = f"train --run_dir {tmp_path / 'run'} --resume --steps 4 --objective_params.steps 50"
    assert main(resume.split()) == 2
    assert "objective_params.steps" in re.sub(r"\s+", " ", capsys.readouterr().err)
