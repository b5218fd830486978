"""Small runs on one or several processes, for the tests of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("parallel_worker.py")
PROCESS = {"udlm": "uniform", "gidd": "hybrid"}
SEQUENCES = 12
"""Of an optimiser step, however it is divided."""


def write_source(folder: Path) -> Path:
    """A text to train on."""
    source = folder / "text.txt"
    source.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(500)))
    return source


def options(run: Path, source: Path, objective: str = "score_entropy", processes: int = 1, **more: Any) -> list[str]:
    """A command line of a small run whose steps have 12 sequences."""
    accumulate = more.pop("accumulate", 1)
    values: dict[str, Any] = {
        "run_dir": run,
        "data.source": source,
        "objective": objective,
        "process": PROCESS.get(objective, "absorbing"),
        "batch_size": SEQUENCES // processes // accumulate,
        "accumulate": accumulate,
        "steps": 20,
        "lr": 1e-2,
        "warmup": 5,
        "log_every": 3,
        "valid_every": 10,
        "valid_blocks": 4,
        "report_to": "none",
        "precision": "fp32",
        "model.hidden_size": 16,
        "model.n_blocks": 2,
        "model.n_heads": 2,
        "model.cond_dim": 8,
        "model.length": 16,
        **more,
    }
    return ["train", *(f"--{name}={value}" for name, value in values.items())]


def torchrun(processes: int, *words: str, **run: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, **run)


def train_together(folder: Path, processes: int, lines: list[list[str]]) -> None:
    (folder / f"lines{processes}.json").write_text(json.dumps(lines))
    done = torchrun(processes, str(WORKER), str(folder / f"lines{processes}.json"))
    assert done.returncode == 0, done.stderr[-6000:]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(run: Path, other: Path) -> float:
    """The largest relative difference between the numbers of two runs."""
    left, right = rows(run), rows(other)
    assert [row.keys() for row in left] == [row.keys() for row in right]
    return max(
        abs(mine[key] - yours[key]) / max(abs(yours[key]), 1e-3)
        for mine, yours in zip(left, right, strict=True)
        for key in mine
    )


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
