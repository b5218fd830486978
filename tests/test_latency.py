"""Latency: the twin has the shape and really uses its cache, the crossing point is right, and the whole command.

Nothing here depends on how long anything takes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch

import sedd.commands.latency
from sedd.cli import main
from sedd.commands.latency import (
    LatencyOptions,
    _crossings,
    _sentence,
    crossing,
    make_twin,
    plot_latency,
    write_with_twin,
)
from sedd.diffusion import SAMPLERS
from sedd.diffusion.schedule import LogLinear
from sedd.hints import pip_install
from sedd.hub import SEDD
from sedd.network import DiffusionTransformer, ModelConfig
from sedd_ext import Absorbing, Uniform


@pytest.mark.parametrize("process", [Absorbing(27), Uniform(27)], ids=["absorbing", "uniform"])
def test_the_twin_has_the_shape_of_the_model(process: Any) -> None:
    model = DiffusionTransformer(ModelConfig(32, 3, 4, 16, 12), process.dim)
    twin = make_twin(model, process, 12)
    assert tuple(twin.transformer.wte.weight.shape) == (27, 32), "MASK is no token of the twin"
    assert len(twin.transformer.h) == 3
    assert {block.attn.num_heads for block in twin.transformer.h} == {4}
    blocks = sum(p.numel() for p in twin.transformer.h.parameters())
    expected = sum(p.numel() for n, p in model.blocks.named_parameters() if "adaLN" not in n)
    assert blocks == pytest.approx(expected, rel=0.05)  # but for biases and norms


def test_the_twin_writes_each_token_in_one_call_with_the_cache() -> None:
    process = Absorbing(27)
    twin = make_twin(DiffusionTransformer(ModelConfig(16, 2, 2, 8, 12), process.dim), process, 12)
    seen: list[tuple[int, int]] = []

    def record(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        seen.append((options["input_ids"].shape[1], output.past_key_values.get_seq_length()))

    twin.register_forward_hook(record, with_kwargs=True)
    written = write_with_twin(twin, 3, 12)
    assert written.shape == (3, 12)
    assert int(written.max()) < 27
    assert seen == [(1, i + 1) for i in range(12)]


@pytest.mark.parametrize(
    ("steps", "seconds", "twin", "expected"),
    [
        ([10, 20, 40], [1.0, 2.0, 4.0], 3.0, (30.0, True)),
        ([10, 20, 40], [1.0, 2.0, 4.0], 1.0, (10.0, True)),
        ([10, 20, 40], [1.5, 2.0, 4.0], 5.0, (50.0, False)),
        ([10, 20, 40], [1.0, 2.0, 4.0], 0.5, (5.0, False)),
        ([10, 20], [2.0, 3.0], 0.5, (0.0, False)),  # the line reaches 0.5 s at -5 steps
        ([10, 20], [2.0, 1.0], 5.0, (math.nan, False)),
        ([10], [2.0], 5.0, (math.nan, False)),
    ],
)
def test_crossing(steps: list[int], seconds: list[float], twin: float, expected: tuple[float, bool]) -> None:
    assert crossing(steps, seconds, twin) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ({0: 0.5, 10: 2.0, 20: 3.0}, "diffusion takes longer than the autoregressive model with any number of steps"),
        ({0: 5.0, 10: 2.0}, "these numbers of steps do not determine where diffusion takes as long as"),
        ({0: 0.5, 10: 2.0}, "these numbers of steps do not determine where diffusion takes as long as"),
        ({0: 5.0, 10: 2.0, 20: 1.9}, "these numbers of steps do not determine where diffusion takes as long as"),
        ({0: 5.0, 10: 2.0, 20: 3.0}, "diffusion takes as long as the autoregressive model at 40.0 steps (extrapolated"),
    ],
)
def test_what_is_told_is_no_more_than_the_times_tell(times: dict[int, float], told: str, tmp_path: Path) -> None:
    options = LatencyOptions(steps=[steps for steps in times if steps], batch_sizes=[1])
    (found,) = _crossings(options, {(1, steps): [seconds] for steps, seconds in times.items()})
    assert _sentence(found).startswith(f"batch 1: {told}")
    rows = [{"batch": 1, "steps": n or None, "seconds": s, "fastest": s, "slowest": s} for n, s in times.items()]
    report = {"rows": rows, "crossings": [found], "length": 8, "device": "cpu", "dtype": "float32"}
    plot_latency(report, tmp_path / "times.svg")
    stars = re.findall(r"<!-- \d+ steps.* -->", (tmp_path / "times.svg").read_text())
    assert len(stars) == told.startswith("diffusion takes as long")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    SEDD(ModelConfig(16, 1, 2, 8, 12), Absorbing(27), LogLinear(), "text8").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_whole_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock that gives every contestant a known time."""
    order: list[Any] = []
    times: dict[Any, float] = {0: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}

    def clock(contestant: Any, device: torch.device) -> float:
        assert not torch.is_inference_mode_enabled(), "autocast would cast the twin's weights anew for every token"
        contestant()
        batch, steps = contestant.args if len(contestant.args) == 2 else (contestant.args[1], 0)
        order.append((batch, steps))
        return times[steps] * batch + 0.01 * (len(order) > 12)

    monkeypatch.setattr(sedd.commands.latency, "_time", clock)
    out, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    line = ["eval", "latency", str(model), "--steps", "[8,2,4]", "--batch_sizes", "[3,1,3]", "--repeats", "3"]
    assert main([*line, "--json", str(out), "--plot", str(picture)]) == 0
    one_round = [(batch, steps) for batch in (1, 3) for steps in (0, 2, 4, 8)]
    assert order == 3 * one_round
    found = json.loads(out.read_text())
    assert [(row["batch"], row["steps"] or 0) for row in found["rows"]] == one_round
    for row in found["rows"]:
        assert row["seconds"] == pytest.approx(times[row["steps"] or 0] * row["batch"], abs=0.011)
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 12 / row["seconds"])
    assert [round(row["steps"], 1) for row in found["crossings"]] == [6.0, 6.0]
    printed = capsys.readouterr().out
    assert "batch 3: diffusion takes as long as the autoregressive model at 6.0 steps" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    plot_latency(found, tmp_path / "both.svg")  # matplotlib repeats texts as comments
    drawn = (tmp_path / "both.svg").read_text()
    assert drawn.count("<!-- 6 steps -->") == 2
    assert all(f"<!-- {seconds} -->" in drawn for seconds in (1, 5, 10)), "times can be read off"
    found["crossings"] = [
        {"batch": 1, "steps": 99.0, "measured": False},
        {"batch": 3, "steps": None, "measured": False},
    ]
    plot_latency(found, tmp_path / "beyond.svg")
    assert re.findall(r"<!-- (\d+ steps.*) -->", (tmp_path / "beyond.svg").read_text()) == ["99 steps (extrapolated)"]


def test_really_measured_and_a_preset_without_training(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    line = ["eval", "latency", "tiny", "--length", "4", "--steps", "[1]", "--batch_sizes", "[1]", "--repeats", "1"]
    assert main([*line, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"] == "untrained preset tiny"
    assert all(row["seconds"] > 0 for row in found["rows"])


@pytest.mark.parametrize("package", ["transformers", "matplotlib.figure"])
def test_a_missing_package_is_named_before_anything_is_measured(
    package: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sedd.commands.latency, "_time", lambda *_: pytest.fail("measured"))
    assert main(["eval", "latency", str(model), "--plot", str(tmp_path / "latency.png")]) == 2
    assert f"needs {package.split('.')[0]}: {pip_install('eval', package)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "[0]"], "steps: expected numbers of at least 1, got [0]"),
        (["--batch_sizes", "[]"], "batch_sizes: expected numbers of at least 1, got []"),
        (
            ["--sampler", "magic"],
            f"sampler: expected one of {', '.join(SAMPLERS)}; got 'magic'",
        ),
        (["--repeats", "0"], "repeats: expected at least 1, got 0"),
        (["--plot", "times.foo"], "plot: expected a file name that ends in"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    options: list[str], message: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sedd.commands.latency, "_time", lambda *_: pytest.fail("measured"))
    assert main(["eval", "latency", str(model), *options]) == 2
    assert message in capsys.readouterr().err
