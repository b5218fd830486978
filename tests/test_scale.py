"""What benchmarks/scale.py computes, beside what processes really allocate and send in a step."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

HERE = Path(__file__).parent
SIZES = {"hidden_size": 64, "n_blocks": 3, "n_heads": 2, "cond_dim": 16, "length": 64, "dropout": 0.0}
TOKENS = 257  # of the tokeniser of bytes
RUNS: list[dict[str, Any]] = [
    {"engine": "ddp", "accumulate": 2},
    {"engine": "fsdp", "accumulate": 2},
    {"engine": "fsdp", "checkpointing": True},
    {"engine": "ddp", "vocab": 2, "accumulate": 2},
    {"engine": "hsdp", "shard": 2},
    {"engine": "fsdp", "vocab": 2},
]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    return importlib.import_module("scale")


def measure(processes: int, runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    text = folder / "text.txt"
    text.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(500)))
    lines = []
    for run in runs:
        parallel = {"data": run["engine"], "vocab": run.get("vocab", 1)}
        if "shard" in run:
            parallel["shard"] = run["shard"]
        options = {"model": SIZES, "parallel": parallel, "batch_size": 4, "accumulate": run.get("accumulate", 1)}
        options |= {"process": "uniform", "activation_checkpointing": run.get("checkpointing", False)}
        lines.append(json.dumps(options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(HERE / "scale_worker.py"), str(text), str(folder), *lines]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("processes", [2, 4])
def test_memory_and_traffic_are_those_of_a_step(scale: ModuleType, processes: int, tmp_path: Path) -> None:
    runs = [run for run in RUNS if processes == 4 or run["engine"] != "hsdp"]
    for run, found in zip(runs, measure(processes, runs, tmp_path), strict=True):
        options = {"shard": 1, **run}
        plan = scale.Plan(
            scale.ModelConfig(**SIZES), TOKENS, processes=processes, batch_size=4, dtype=torch.float32, **options
        )
        parts = scale.memory(plan)
        for name in ("weights", "gradients", "AdamW", "average"):
            assert parts[name] == found["held"][name], (run, name)
        # DDP keeps its gradients between steps
        held = ("weights", "AdamW", "average", *(["gradients"] if run["engine"] == "ddp" and plan.data > 1 else []))
        computed = sum(size for name, size in parts.items() if name not in held)
        assert found["peak"] <= 1.05 * computed, run
        assert found["peak"] >= 0.75 * computed, run
        counts: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for part in scale.traffic(plan).values():
            counts[part.name] += part.count
            size[part.name] += part.bytes
        assert found["counts"] == counts, run
        assert found["bytes"] == size, run


def test_table(scale: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--processes", "8", "--vocab", "2", "--markdown"]
    assert scale.main(options) == 0
    table = capsys.readouterr().out
    assert "| tiny | 8 | ddp, vocab 2 |" in table
    assert len(table.splitlines()) == 2 + 2 + 2  # hsdp has but one group here


def test_processes_that_cannot_share(scale: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--vocab", "3", "--processes", "8"])
    assert "--vocab: expected a divisor of the number of processes, 8, got 3" in capsys.readouterr().err
