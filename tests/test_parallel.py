"""Training on several processes: the same numbers as on one, whatever the engine, and one run folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import (
    PROCESS,
    SEQUENCES,
    WORKER,
    children_of,
    difference,
    options,
    rows,
    torchrun,
    train_together,
    write_source,
)

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from sedd.cli import main
from sedd.config import TrainConfig
from sedd.diffusion import Diffusion, get_schedule
from sedd.diffusion.objectives import OBJECTIVES, get_objective, sample_times
from sedd.network import DiffusionTransformer, ModelConfig
from sedd.training.checkpoint import list_checkpoints, read_tensors

SIZES = ModelConfig(16, 1, 2, 8, 8, 0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("text"))


WAYS = {  # name: processes that work on different sequences, and options
    "ddp": (2, {"parallel.data": "ddp"}),
    "ddp, accumulated": (2, {"parallel.data": "ddp", "accumulate": 3}),
    "fsdp": (2, {"parallel.data": "fsdp"}),
    "fsdp, accumulated": (2, {"parallel.data": "fsdp", "accumulate": 3, "activation_checkpointing": True}),
    "vocab": (1, {"parallel.vocab": 2}),
    "vocab, accumulated": (1, {"parallel.vocab": 2, "parallel.data": "fsdp", "accumulate": 3}),
    "vocab, not fused": (1, {"parallel.vocab": 2, "fused_head": False}),
}
SQUARE = {  # on four processes, two of which share a vocabulary
    "vocab, ddp": (2, {"parallel.vocab": 2, "accumulate": 3}),
    "vocab, fsdp": (2, {"parallel.vocab": 2, "parallel.data": "fsdp", "accumulate": 3}),
    "vocab, hsdp": (2, {"parallel.vocab": 2, "parallel.data": "hsdp", "parallel.shard": 1}),
}


def check_same(run: Path, other: Path) -> None:
    """Losses, gradient norms, validations and weights of two runs are equal up to rounding."""
    assert difference(run, other) < 1e-4, run.name
    ours, theirs = (read_tensors(list_checkpoints(path)[-1], "ema", None) for path in (run, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_vocabulary_and_the_data_are_divided(source: Path, tmp_path: Path) -> None:
    """Four processes, in a square."""
    assert main(options(tmp_path / "one", source)) == 0
    lines = [options(tmp_path / way, source, processes=processes, **more) for way, (processes, more) in SQUARE.items()]
    train_together(tmp_path, 4, lines)
    for way in SQUARE:
        check_same(tmp_path / way, tmp_path / "one")


def test_one_run_on_two_processes(source: Path, tmp_path: Path) -> None:
    """Losses, gradient norms, validations and weights are those of one process."""
    objectives = ("score_entropy", "genmd4", "implicit_score_entropy")
    lines = []
    for objective in objectives:
        assert main(options(tmp_path / objective, source, objective)) == 0
        for way, (processes, more) in WAYS.items():
            lines.append(options(tmp_path / f"{objective}, {way}", source, objective, processes, **more))
    train_together(tmp_path, 2, lines)
    for objective in objectives:
        for way in WAYS:
            check_same(tmp_path / f"{objective}, {way}", tmp_path / objective)
    assert {path.name for path in (tmp_path / "genmd4, fsdp").iterdir()} == {
        path.name for path in (tmp_path / "genmd4").iterdir()
    }


def test_bfloat16_on_two_processes(source: Path, tmp_path: Path) -> None:
    """FSDP gathers the blocks in bfloat16: losses are those of one process under autocast, as nearly as DDP's are."""
    precise = {"precision": "bf16", "log_every": 1}
    assert main(options(tmp_path / "one", source, "md4", **precise)) == 0
    ways = {way: WAYS[way] for way in ("ddp", "fsdp", "fsdp, accumulated")}
    lines = [options(tmp_path / way, source, "md4", n, **more, **precise) for way, (n, more) in ways.items()]
    train_together(tmp_path, 2, lines)
    largest = {way: difference(tmp_path / way, tmp_path / "one") for way in ways}
    assert max(largest.values()) < 0.03, largest


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_batch_is_that_of_its_parts(objective: str) -> None:
    """Noise and sampled neighbours belong to the place of a sequence in the batch."""
    config = TrainConfig(objective=objective, process=PROCESS.get(objective, "absorbing"))  # type: ignore[arg-type]
    process, kind = config.make_process(5), get_objective(objective)
    torch.manual_seed(0)
    network = DiffusionTransformer(dataclasses.replace(SIZES, causal=kind.autoregressive), process.dim)
    torch.nn.init.normal_(network.output_layer.linear.weight)
    diffusion = Diffusion(network, process, get_schedule("loglinear"), kind, kind.parameterization(network.config))
    x_0, t = torch.randint(5, (SEQUENCES, 8)), sample_times(SEQUENCES)

    def loss(first: int, last: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        part = slice(first, last)
        return diffusion(x_0[part], t[part], generator=generator, first=first, count=SEQUENCES).detach()

    whole = loss(0, SEQUENCES)
    torch.testing.assert_close(torch.cat([loss(0, 3), loss(3, 4), loss(4, SEQUENCES)]), whole, rtol=1e-4, atol=1e-5)
    assert len(whole.unique()) > SEQUENCES / 2  # those without noise have no loss


@pytest.mark.costly("python/sedd/training/parallel.py", "python/sedd/training/state.py", "python/sedd/diffusion")
@pytest.mark.timeout(1800)
def test_every_objective_for_200_steps(source: Path, tmp_path: Path) -> None:
    """Rounding grows from step to step, most where single terms of the loss are huge."""
    long = {"steps": 200, "valid_every": 200, "lr": 1e-3}
    for objective in OBJECTIVES:
        assert main(options(tmp_path / objective, source, objective, **long)) == 0
    ddp, fsdp, vocab = {"parallel.data": "ddp"}, {"parallel.data": "fsdp"}, {"parallel.vocab": 2}
    hsdp = {"parallel.data": "hsdp", "parallel.shard": 2}
    square = {**fsdp, **vocab}
    runs: list[tuple[str, str]] = []
    for processes, engines, objectives in (
        (2, (ddp, fsdp, vocab), tuple(OBJECTIVES)),
        (4, (ddp, fsdp, hsdp, square), ("score_entropy", "genmd4")),
    ):
        lines = []
        for objective, engine in itertools.product(objectives, engines):
            words = ", ".join(f"{name.removeprefix('parallel.')} {value}" for name, value in engine.items())
            runs.append((objective, f"{objective}, {words}, {processes} processes"))
            data = processes // int(engine.get("parallel.vocab", 1))
            lines.append(options(tmp_path / runs[-1][1], source, objective, data, **long, **engine))
        train_together(tmp_path, processes, lines)
    largest = {name: difference(tmp_path / name, tmp_path / objective) for objective, name in runs}
    print("\n".join(f"{name}: {value:.1e}" for name, value in largest.items()))
    for objective, name in runs:
        assert largest[name] < (1e-2 if objective in ("udlm", "concrete_score") else 2e-4), name


def test_samples_of_a_split_vocabulary() -> None:
    """By samplers that unmask: the same in both processes, and without randomness those of one process."""
    done = torchrun(2, str(WORKER.with_name("parallel_samples.py")))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for alone, greedy, drawn in lines:
        assert greedy == [alone, alone]
        assert drawn[0] == drawn[1] != alone
        assert 21 <= max(map(max, drawn[0])) < 40, "a token of the second process, and no MASK"


def test_embedding_and_head_are_gathered_once_a_step(source: Path, tmp_path: Path) -> None:
    """Two blocks, gathered for each forward and each backward pass, and once all the rest; gradients go out once."""
    assert counts(2, source, tmp_path, "fsdp 1 1", "fsdp 3 1", "ddp 3 1") == [
        [1 + 2 * 2, 3, 0],
        [1 + 3 * 2 * 2, 3, 0],
        [0, 0, 1],
    ]


def test_the_gradients_of_a_vocabulary_are_averaged_once_a_step(source: Path, tmp_path: Path) -> None:
    """Those of the embedding, and of the head's weight and bias, each by itself; DDP has one bucket for the rest."""
    assert counts(4, source, tmp_path, "ddp 3 2") == [[0, 0, 3 + 1]]


def counts(processes: int, source: Path, folder: Path, *runs: str) -> list[list[int]]:
    """Gathers, reductions with a scatter, and without one, of an optimiser step of each run."""
    done = torchrun(processes, str(WORKER.with_name("parallel_counts.py")), str(source), str(folder), *runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_a_run_with_a_split_vocabulary_continues_without_one(source: Path, tmp_path: Path) -> None:
    """Written by two and by four processes, which share a vocabulary of two; read by those, by two, and by one."""
    assert main(options(tmp_path / "whole", source, steps=16, checkpoint_every=4)) == 0
    run = tmp_path / "run"
    for steps, processes, more in (
        (4, 1, {"parallel.vocab": 2}),
        (8, 2, {"parallel.vocab": 2, "parallel.data": "fsdp"}),
        (12, 2, {"parallel.vocab": 1, "parallel.data": "ddp"}),
    ):
        line = options(run, source, "score_entropy", processes, steps=steps, checkpoint_every=4, **more)
        count = processes * more["parallel.vocab"]
        done = torchrun(count, "-m", "sedd", *line, *(["--resume"] if run.exists() else []))
        assert done.returncode == 0, done.stderr[-3000:]
    line = options(run, source, steps=16, checkpoint_every=4, **{"parallel.data": "ddp"})
    assert main([*line, "--resume"]) == 0
    losses, wanted = ([row["loss"] for row in rows(path) if "loss" in row] for path in (run, tmp_path / "whole"))
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("earlier", [False, True])
def test_another_batch_is_refused(
    earlier: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of earlier versions do not hold the number; their options do."""
    assert main(options(tmp_path / "run", source, steps=2)) == 0
    if earlier:
        (checkpoint,) = list_checkpoints(tmp_path / "run")
        state = json.loads((checkpoint / "state.json").read_text())
        for name in ("sha256", "seconds_per_step", "sequences_per_step"):
            del state[name]
        (checkpoint / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert main([*options(tmp_path / "run", source, steps=4, processes=2), "--resume"]) == 2
    assert "batch_size: expected 12 sequences per optimiser step as before, got 6" in capsys.readouterr().err


@pytest.fixture
def started(source: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a long run on two processes, in a process group of its own, and waits until it takes steps."""
    running: list[subprocess.Popen[str]] = []

    def start(run: Path, **more: Any) -> subprocess.Popen[str]:
        line = options(run, source, processes=2, steps=100_000, valid_every=100_000, **more)
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "sedd",
            *line,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        running.append(process)
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(rows(run)) < 8:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.2)
        return process

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def check_stopped(run: Path, name: str, messages: str) -> None:
    assert f"{name}: saving step" in messages
    last = int(list_checkpoints(run)[-1].name[5:])
    assert f"stopped by {name} at step {last:,}" in messages
    assert rows(run)[-1]["step"] == last
    assert "Traceback" not in messages.partition("stopped by")[0]


@pytest.mark.parametrize("data", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_of_them(
    data: str, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = started(tmp_path / "run", **{"parallel.data": data})
    (second,) = [
        pid for pid in children_of(process) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(second, signal.SIGTERM)
    check_stopped(tmp_path / "run", "SIGTERM", process.communicate(timeout=120)[1])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_twice(name: str, started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """As Slurm does it: each process gets the signal, and then that which torchrun passes on.

    Steps take long enough for the second signal to come before the checkpoint is written.
    """
    process = started(tmp_path / "run", **{"model.length": 512, "model.hidden_size": 128, "log_every": 1})
    for _ in range(2):
        for pid in children_of(process):
            os.kill(pid, getattr(signal, name))
        time.sleep(0.05)
    check_stopped(tmp_path / "run", name, process.communicate(timeout=120)[1])


def test_a_process_that_dies_is_started_again_from_the_last_checkpoint(source: Path, tmp_path: Path) -> None:
    """torchrun does it; the second process kills itself once, after a checkpoint.

    The first process is slow to tell its error, and torchrun sends it SIGTERM in the meantime.
    """
    run, code = tmp_path / "run", tmp_path / "dies.py"
    line = options(run, source, processes=2, steps=40, checkpoint_every=10)
    code.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from sedd import cli\n"
        "from sedd.training.state import TrainState\n"
        "printable = cli.printable\n"
        "cli.printable = lambda text: time.sleep(2) or printable(text)\n"
        "step = TrainState.train_step\n"
        "def dies(self):\n"
        f"    mark = Path({str(tmp_path / 'died')!r})\n"
        "    if os.environ['RANK'] == '1' and self.step == 15 and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "TrainState.train_step = dies\n"
        f"sys.exit(cli.main({line!r}))\n"
    )
    done = torchrun(2, "--max-restarts=1", str(code))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert "sedd: error: the connection to another process of this run was lost" in done.stderr
    assert f"resuming {run} at step 10" in done.stderr
    assert main(options(tmp_path / "whole", source, steps=40, checkpoint_every=10)) == 0
    assert difference(run, tmp_path / "whole") < 1e-4


def test_mistakes_are_told_once_or_by_the_process_that_has_them(source: Path, tmp_path: Path) -> None:
    line = options(tmp_path / "run", source, processes=2, **{"parallel.data": "hsdp", "parallel.shard": 3})
    done = torchrun(2, "-m", "sedd", *line)
    assert done.returncode == 1
    assert re.search(r"parallel.shard: expected a divisor of the number of processes .*, 2, got 3", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parallel.shard 0", "parallel.shard: expected at least 1, got 0"),
        ("--parallel.shard 2", "parallel.shard: expected --parallel.data hsdp with it, got ddp"),
        ("--parallel.data dp", "parallel.data"),
    ],
)
def test_options_that_do_not_fit(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run_dir", str(tmp_path / "run"), *words.split()]) == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 12, 64, 97, 512])
def test_any_consecutive_times_are_spread(count: int) -> None:
    times = sample_times(count, 0.0, generator=torch.Generator().manual_seed(1))
    gaps = times.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / count))
    for first in range(0, count - 8, 5):
        part = times[first : first + 8].sort().values
        around = torch.cat([part.diff(), part[:1] + 1 - part[-1:]])
        assert float(around.max()) < 3 / 8
