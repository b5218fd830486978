"""Processes that are killed at random moments: no checkpoint is lost, and the run goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel_runs import children_of, options, write_source

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from sedd.files import TEMPORARY
from sedd.training.checkpoint import list_checkpoints, read_tensors, verify


def start(run: Path, processes: int, engine: str, steps: int, *more: str) -> subprocess.Popen[str]:
    """Starts a run that saves at every other step; its checkpoints take about as long to write as it trains."""
    often = {"checkpoint_every": 2, "log_every": 1, "valid_every": 10**6, "model.hidden_size": 64}
    line = options(run, run.parent / "text.txt", "score_entropy", processes, steps=steps, **often)
    line += [f"--parallel.data={engine}", *more]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sedd", *line],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(run: Path, processes: int, engine: str, steps: int, *more: str) -> None:
    process = start(run, processes, engine, steps, *more)
    messages = process.communicate(timeout=300)[1]
    assert process.returncode == 0, messages[-3000:]


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in list_checkpoints(run)), default=0)


def records(run: Path) -> tuple[int, int]:
    """Changes when training begins: a resumed run drops the records behind its checkpoint."""
    path = run / "metrics.jsonl"
    return (path.stat().st_ino, path.stat().st_size) if path.exists() else (0, 0)


def kill(process: subprocess.Popen[str], one: int | None) -> None:
    """Kills one of the processes that torchrun has started, and waits for the others to stop; or all of them."""
    workers = children_of(process)
    for pid in [workers[one % len(workers)]] if one is not None and workers else [*workers, process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_kills(tmp_path: Path, processes: int, engine: str, kills: int, seed: int) -> str:
    """Kills a run again and again, and compares it with a run that nothing has stopped; returns what was hit."""
    write_source(tmp_path)
    run, rng = tmp_path / "run", random.Random(seed)
    in_flight = ones = alls = 0
    for number in range(kills):
        before = records(run)
        process = start(run, processes, engine, 10**6, *(["--resume"] if (run / "config.json").exists() else []))
        try:
            seen, wait = newest(run), rng.uniform(0.0, 1.5)
            deadline, at = time.monotonic() + 120, None
            while at is None or time.monotonic() < at:
                assert time.monotonic() < deadline
                assert process.poll() is None, process.communicate()[1][-3000:]
                seen = max(seen, newest(run))
                if at is None and records(run) != before:
                    at = time.monotonic() + wait
                time.sleep(0.001)
            one = rng.randrange(processes) if processes > 1 and rng.random() < 0.5 else None
            in_flight += any((run / "checkpoints").glob(TEMPORARY + "*"))
            kill(process, one)
        finally:
            process.kill()
        ones, alls = ones + (one is not None), alls + (one is None)
        assert newest(run) >= seen, f"kill {number}: a checkpoint is lost"
        for checkpoint in list_checkpoints(run):
            verify(checkpoint)
    steps = newest(run) + 4
    finish(run, processes, engine, steps, "--resume")
    finish(tmp_path / "whole", processes, engine, steps)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (read_tensors(list_checkpoints(path)[-1], name, None) for path in (run, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[key] == theirs[key]).all()) for key in ours), name
    assert not list((run / "checkpoints").glob(TEMPORARY + "*"))
    said = (
        f"{engine}, {processes} processes: {ones} kills of one, {alls} of all; {in_flight} while a checkpoint was "
        f"written; {steps} steps equal an uninterrupted run bit for bit"
    )
    print(said)
    return said


@pytest.mark.parametrize(("processes", "engine"), [(1, "ddp"), (2, "fsdp")])
def test_three_kills(tmp_path: Path, processes: int, engine: str) -> None:
    check_kills(tmp_path, processes, engine, kills=3, seed=1)


@pytest.mark.costly(
    "python/sedd/training/saving.py",
    "python/sedd/training/shards.py",
    "python/sedd/training/checkpoint.py",
    "python/sedd/training/run.py",
    "python/sedd/files.py",
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "engine", "kills"), [(2, "fsdp", 30), (2, "ddp", 10), (1, "ddp", 10)])
def test_kills_at_random_moments(tmp_path: Path, processes: int, engine: str, kills: int) -> None:
    check_kills(tmp_path, processes, engine, kills, seed=7)
