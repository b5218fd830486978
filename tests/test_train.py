"""A training run: what a step does, how it stops and goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

import tokenizers_made_here
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sedd.training.run
from sedd.cli import main
from sedd.config import ModelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.data.tokenizer import get_tokenizer
from sedd.diffusion import OBJECTIVES, Diffusion, LossOptions, Objective, ScoreEntropy, get_schedule
from sedd.hub import SEDD, load_model
from sedd.progress import is_interactive, progress_bar
from sedd.training.checkpoint import list_checkpoints, read_state, read_tensors
from sedd.training.run import NonFiniteError, Run
from sedd.training.state import TrainState

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture
def make_config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(2000)))
    tiny = ModelOptions(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=16, dropout=0.1)

    def make(**changes: Any) -> TrainConfig:
        config = TrainConfig(
            run_dir=str(tmp_path / "run"),
            data=DataConfig(source=str(text), cache_dir=str(tmp_path / "cache")),
            model=tiny,
            batch_size=4,
            steps=8,
            warmup=4,
            lr=1e-2,
            log_every=3,
            valid_every=4,
            valid_blocks=4,
            valid_draws=2,
            valid_samples=0,
            checkpoint_every=4,
        )
        return dataclasses.replace(config, **changes)

    return make


def rows(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: str | Path) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


# -- a step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "precision"), [("absorbing", "fp32"), ("uniform", "fp32"), ("hybrid", "fp32"), ("absorbing", "bf16")]
)
def test_the_loss_falls(make_config: MakeConfig, process: Any, precision: Any) -> None:
    config = make_config(
        process=process, precision=precision, steps=60, batch_size=16, valid_every=60, checkpoint_every=60
    )
    outcome = Run(config).train()
    values = losses(config.run_dir)
    assert len(values) == outcome.step == 60
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


@pytest.mark.parametrize("changes", [{"fused_head": False}, {"compile": True}], ids=str)
def test_the_same_losses_without_the_fused_head_and_compiled(make_config: MakeConfig, changes: dict[str, bool]) -> None:
    torch.compiler.reset()
    runs = []
    for extra in ({}, changes):
        config = make_config(run_dir=f"{make_config().run_dir}-{len(runs)}", steps=4, precision="fp32", **extra)
        Run(config).train()
        runs.append(losses(config.run_dir))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_step_is_adamw_with_warmup_clipping_and_ema(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain statement of the same algorithm, on a loss without noise."""

    weights = torch.randn(257 + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Plain(Objective):
        def loss(self, diffusion: Diffusion, x_0: torch.Tensor, x_t: Any, t: Any, options: LossOptions) -> torch.Tensor:
            network = diffusion.network
            output = network.head(network.hidden(x_0, torch.ones(len(x_0)).double()))
            return options.scale * (output + weights).square().sum((1, 2))

    monkeypatch.setitem(OBJECTIVES, "score_entropy", Plain)
    no_dropout = ModelOptions(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=16, dropout=0.0)
    config = make_config(model=no_dropout, accumulate=2, clip=0.5, weight_decay=0.1, ema=0.3, betas=(0.8, 0.9))
    state, twin = Run(config).state, Run(dataclasses.replace(config, run_dir=config.run_dir + "2")).state
    model = twin.diffusion.double()
    state.diffusion.double()
    state.ema.double()
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(1, 7):
        reported = state.train_step()
        tokens = torch.cat([next(twin.batches), next(twin.batches)])
        loss = Plain().loss(model, tokens, None, None, LossOptions()).mean() / 16
        loss.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert norm > config.clip, "the step must be one that is clipped"
        torch.testing.assert_close(reported, torch.stack((loss.detach(), norm)), rtol=1e-5, atol=0.0, check_dtype=False)
        lr, decay = config.lr * min(1, step / 4), min(0.3, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name] * config.clip / norm
                m, v = moments[name]
                m.lerp_(g, 0.2)
                v.lerp_(g * g, 0.1)
                p.mul_(1 - lr * 0.1).sub_(lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + config.eps))
                ema[name].mul_(decay).add_(p, alpha=1 - decay)
                p.grad = None
        assert state.lr == pytest.approx(lr)
    for name, p in state.diffusion.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=1e-6, atol=1e-9)
    for name, p in state.ema.named_parameters():
        torch.testing.assert_close(p, ema[name], rtol=1e-6, atol=1e-9)


def test_validation_is_repeatable_and_leaves_training_alone(make_config: MakeConfig) -> None:
    often, rarely = make_config(valid_every=1, run_dir="often"), make_config(valid_every=8)
    often.run_dir = rarely.run_dir + "_often"
    Run(often).train()
    Run(rarely).train()
    assert losses(often.run_dir) == losses(rarely.run_dir)
    assert rows(often.run_dir)[-1] == rows(rarely.run_dir)[-1], "the same weights have the same bound"


# -- stopping and going on ---------------------------------------------------------------------------------------------


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        time.sleep(0.01)


def test_kill_and_sigterm_and_resume_equal_one_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=5000, log_every=1)
    run = Path(config.run_dir)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "sedd", "train", "--config", str(tmp_path / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, text=True)

    def passed(step: int) -> Callable[[], bool]:
        return lambda: bool(list_checkpoints(run)) and int(list_checkpoints(run)[-1].name[5:]) >= step

    with start() as killed:
        wait_for(killed, passed(8))
        with pytest.raises(BlockingIOError, match=rf"in use by process {killed.pid} on .*--run_dir"):
            Run(config, resume=True)
        load_model(run)  # reading is no reason to wait
        time.sleep(0.02)  # somewhere behind a checkpoint
        killed.kill()
    with start("--resume") as ended:
        first = int(list_checkpoints(run)[-1].name[5:])
        wait_for(ended, passed(first + 8))
        ended.send_signal(signal.SIGTERM)
        _, messages = ended.communicate()
    assert ended.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in messages
    assert "--resume" in messages
    last = int(list_checkpoints(run)[-1].name[5:])
    assert main(["train", "--run_dir", str(run), "--resume", "--steps", str(last + 6)]) == 0

    whole = make_config(steps=last + 6, run_dir=str(run) + "_whole", log_every=1)
    Run(whole).train()
    assert (run / "metrics.jsonl").read_bytes() == Path(whole.run_dir, "metrics.jsonl").read_bytes()
    ours, theirs = list_checkpoints(run)[-1], list_checkpoints(Path(whole.run_dir))[-1]
    for name in ("model", "ema", "optimizer"):
        left, right = (read_tensors(path, name, read_state(path)) for path in (ours, theirs))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name

    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    steps = [point.step for point in curves.Scalars("train/nats_per_token")]
    assert steps == list(range(1, last + 7)), "TensorBoard has each step once"


@pytest.fixture
def sighup() -> Iterator[None]:
    """Not ignored, as it is where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("sighup")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    config = make_config()
    take_step = TrainState.train_step

    def step_and_signal(self: TrainState) -> torch.Tensor:
        result = take_step(self)
        if self.step == 5:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signal.SIGHUP)  # as a terminal that closes sends after all, and twice
        return result

    monkeypatch.setattr(TrainState, "train_step", step_and_signal)
    before = signal.getsignal(signum)
    outcome = Run(config).train()
    assert (outcome.step, outcome.signum) == (5, signum)
    assert [path.name for path in list_checkpoints(Path(config.run_dir))] == ["step_00000004", "step_00000005"]
    assert signal.getsignal(signum) == before


@pytest.mark.usefixtures("sighup")
@pytest.mark.parametrize("is_told", [True, False])
def test_a_terminal_that_closes_does_not_take_the_run_with_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Told by SIGHUP, it saves and stops; a disowned job is not told, and goes on in silence."""
    take_step = TrainState.train_step
    terminal, end = pty.openpty()
    config = make_config()

    def step_and_close(self: TrainState) -> torch.Tensor:
        result = take_step(self)
        if self.step == 3:
            os.close(terminal)
            if is_told:
                os.kill(os.getpid(), signal.SIGHUP)
        return result

    monkeypatch.setattr(TrainState, "train_step", step_and_close)
    with suppress(OSError), open(end, "w") as file:  # Python may not have flushed all that is lost
        outcome = Run(config, console=Console(file=file)).train()
    assert outcome.step == (3 if is_told else 8)
    assert list_checkpoints(Path(config.run_dir))[-1].name == f"step_0000000{outcome.step}"


def test_nohup_is_obeyed(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = TrainState.train_step

    def step_and_signal(self: TrainState) -> torch.Tensor:
        result = take_step(self)
        os.kill(os.getpid(), signal.SIGHUP)
        return result

    monkeypatch.setattr(TrainState, "train_step", step_and_signal)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Run(make_config(steps=2)).train().signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(keep_last=3)
    run = Path(config.run_dir)
    Run(config).train()
    wanted = (run / "metrics.jsonl").read_bytes()
    last = list_checkpoints(run)[-1]
    tensors = read_tensors(last, "model", None)
    content = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = Run(config, resume=True)
    assert again.state.step == 4
    said = capsys.readouterr().err
    assert "step_00000008/optimizer.safetensors: damaged" in said
    assert "Resuming from step_00000004" in said
    assert (last.parent / "damaged_step_00000008").is_dir()
    again.train()
    assert (run / "metrics.jsonl").read_bytes() == wanted
    found = read_tensors(last, "model", read_state(last))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not (last.parent / "damaged_step_00000008").exists()


@pytest.mark.parametrize(
    ("consumed", "message"), [(-5, "got -5"), (None, "got None"), ("7", "got '7'"), (True, "got True")]
)
def test_a_position_in_the_data_that_is_none_is_refused(make_config: MakeConfig, consumed: Any, message: str) -> None:
    """In a checkpoint of an earlier version, which has no digest to tell of it."""
    config = make_config(steps=4)
    Run(config).train()
    (last,) = list_checkpoints(Path(config.run_dir))
    state = read_state(last)
    for name in ("sha256", "seconds_per_step", "sequences_per_step"):
        del state[name]
    state["data"]["consumed"] = consumed
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"state\.json: data: consumed: expected an int of at least 0, {message}"):
        Run(config, resume=True)


def test_records_are_on_the_disk_before_a_checkpoint_refers_to_them(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, staged = {}, os.fsync, sedd.training.run.staged
    run = Run(make_config())
    checked = []

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def check(tensors: Any) -> Any:
        records = (run.run_dir / "metrics.jsonl").resolve()
        assert len(losses(run.run_dir)) == run.state.step
        assert synced[str(records)] == records.stat().st_size
        checked.append(run.state.step)
        return staged(tensors)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(sedd.training.run, "staged", check)
    run.train()
    assert checked == [4, 8]


def test_all_files_of_a_run_have_the_permissions_of_new_files(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    before = os.umask(0o027)
    try:
        Run(config).train()
    finally:
        os.umask(before)
    files = [path for path in Path(config.run_dir).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_an_option_that_a_resumed_run_changes_is_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(steps=4)
    Run(config).train()
    capsys.readouterr()
    Run(dataclasses.replace(config, lr=3e-2), resume=True)
    assert "lr: 0.03 from here on, 0.01 until now" in capsys.readouterr().err


def test_training_stops_when_the_minutes_are_used_up(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        yield from range(10**6)

    clock = ticks()
    monkeypatch.setattr(sedd.training.run, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second per look
    config = make_config(steps=10**6, max_minutes=0.5)
    outcome = Run(config).train()
    assert 0 < outcome.step < 30
    assert outcome.signum is None
    state = read_state(list_checkpoints(Path(config.run_dir))[-1])
    assert state["step"] == outcome.step
    assert state["valid"] is not None, "the last weights are validated"
    assert state["elapsed"] >= 30
    again = Run(config, resume=True).train()
    assert again.step == outcome.step, "no time is left"
    assert "the 0.5 minutes are used up (continue with --resume --max_minutes M" in again.ended


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_stops_the_run_and_saves_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls = 0

    class BreaksAtStep6(ScoreEntropy):
        def loss(self, diffusion: Diffusion, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += diffusion.training
            value = super().loss(diffusion, *args, **kwargs)
            if calls < 6:
                return value
            if kind == "loss":
                return value * float("nan")
            # a finite value with an infinite slope
            return value + (0 * diffusion.network.vocab_embed.embedding.sum()).sqrt()

    monkeypatch.setitem(OBJECTIVES, "score_entropy", BreaksAtStep6)
    config = make_config(steps=100)
    with pytest.raises(NonFiniteError, match=rf"step 6: the .*{kind}.* is .*step_00000004"):
        Run(config).train()
    (only,) = list_checkpoints(Path(config.run_dir))
    assert only.name == "step_00000004"
    for name in ("model", "ema"):
        assert all(bool(value.isfinite().all()) for value in read_tensors(only, name, read_state(only)).values())
    assert len(losses(config.run_dir)) == 5


# -- what is kept and what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "best", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.5, 1.5], 1.0, [4, 9, 10]),
        # one draw that overflows is no reason to lose the run, nor to call the rest no better
        ([math.inf, 3.0, math.nan, 1.0, math.inf], 1.0, [8, 9, 10]),
    ],
)
def test_the_last_and_the_best_checkpoints_are_kept(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, bounds: list[float], best: float, kept: list[int]
) -> None:
    told_bounds = iter(bounds)
    real = sedd.training.run.elbo

    def told(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        wanted = next(told_bounds) * result.length
        return dataclasses.replace(result, sequences=torch.full_like(result.sequences, wanted))

    monkeypatch.setattr(sedd.training.run, "elbo", told)
    config = make_config(steps=10, valid_every=2, checkpoint_every=3, keep_last=2)
    run = Run(config)
    run.train()
    assert run.best == pytest.approx(best)
    assert [int(path.name[5:]) for path in list_checkpoints(Path(config.run_dir))] == kept


def test_a_run_folder_in_use_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Run(config).train()
    with pytest.raises(FileExistsError, match=r"already contains a run \(at step_00000004\); .*--resume.*--run_dir"):
        Run(config)
    with pytest.raises(FileNotFoundError, match="expected a run to resume"):
        Run(make_config(run_dir=config.run_dir + "_other"), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_size": 8},
            r"batch_size: expected 4 sequences per optimiser step as before, got 8: batch_size 8 \* accumulate 1 \* 1",
        ),
        ({"model": ModelOptions(preset="small", length=8)}, r"model\.\w+: "),
        ({"data": DataConfig(source="stdlib")}, r"data\.source: "),
        ({"schedule_params": {"eps": 0.1}}, r"schedule_params\.eps: .*0\.001.*0\.1"),
    ],
)
def test_a_resumed_run_keeps_its_options(make_config: MakeConfig, change: dict[str, Any], message: str) -> None:
    config = make_config(steps=4)
    Run(config).train()
    with pytest.raises(ValueError, match=message):
        Run(dataclasses.replace(config, **change), resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Path(config.run_dir).mkdir()
    Path(config.run_dir, "config.json").write_text(json.dumps(config.to_dict()))
    Path(config.run_dir, "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    assert Run(config, resume=True).train().step == 4
    assert [row["step"] for row in rows(config.run_dir) if "loss" in row] == [1, 2, 3, 4]


def test_a_resumed_run_may_be_made_longer(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Run(config).train()
    longer = dataclasses.replace(config, steps=6, lr=1e-3, log_every=1, schedule_params={"eps": 1e-3})
    assert Run(longer, resume=True).train().step == 6
    Run(make_config(run_dir=config.run_dir + "_whole", steps=4)).train()
    assert losses(config.run_dir)[:4] == losses(config.run_dir + "_whole")


# -- the learning rate -------------------------------------------------------------------------------------------------


def resumed_at(config: TrainConfig, step: int) -> TrainConfig:
    """The options of a copy of a run, killed after it had saved a step."""
    copied = Path(config.run_dir + f"_killed_{step}")
    shutil.copytree(config.run_dir, copied)
    for path in list_checkpoints(copied):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return dataclasses.replace(config, run_dir=str(copied))


@pytest.mark.parametrize("name", ["linear", "wsd"])
def test_a_schedule_by_steps_resumes_exactly(make_config: MakeConfig, name: str) -> None:
    config = make_config(lr_schedule=name, lr_final=0.1, lr_decay=0.75, warmup=2)
    run = Run(config)
    run.train()
    assert 0.1 * config.lr < run.state.lr < 0.4 * config.lr
    killed = resumed_at(config, 4)
    Run(killed, resume=True).train()
    assert losses(killed.run_dir) == losses(config.run_dir)
    ours, theirs = (list_checkpoints(Path(options.run_dir))[-1] for options in (config, killed))
    for file in ("model", "ema", "optimizer"):
        left, right = (read_tensors(path, file, read_state(path)) for path in (ours, theirs))
        assert all(torch.equal(left[key], right[key]) for key in left), file


class Clock:
    """Time that passes only when it is told to: ``seconds`` a step. Keeps the learning rate of each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds = 0.0, 1.0
        self.rates: dict[int, float] = {}
        monkeypatch.setattr(sedd.training.run, "time", SimpleNamespace(monotonic=lambda: self.now))
        take_step = TrainState.train_step

        def timed(state: TrainState) -> torch.Tensor:
            self.now += self.seconds
            result = take_step(state)
            self.rates[state.step] = state.lr
            return result

        monkeypatch.setattr(TrainState, "train_step", timed)


def test_a_schedule_by_time_ends_with_the_time_and_resumes_exactly(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    rare = {"valid_every": 50, "checkpoint_every": 50, "keep_last": 100, "warmup": 0}
    config = make_config(steps=10**6, max_minutes=100 / 60, lr_schedule="linear", **rare)
    assert Run(config).train().step == 100, "100 seconds, a step a second"
    whole = dict(clock.rates)
    for step in (10, 40, 80):
        assert whole[step] == pytest.approx(config.lr * (1 - (step - 1) / 100), rel=0.05)
    assert whole[100] < 0.02 * config.lr

    killed = resumed_at(config, 25)
    clock.seconds = 3.0  # the machine is slower now
    assert Run(killed, resume=True).train().step == 50
    following = next(int(p.name[5:]) for p in list_checkpoints(Path(killed.run_dir)) if int(p.name[5:]) > 25)
    assert following == 27
    assert all(clock.rates[step] == whole[step] for step in range(26, following + 1))
    assert losses(killed.run_dir)[:following] == losses(config.run_dir)[:following]
    assert clock.rates[following + 1] != whole[following + 1], "fitted anew"
    assert clock.rates[50] < 0.05 * config.lr, "it falls with the time that is left"


# -- what is logged and shown ------------------------------------------------------------------------------------------


def test_tokens_per_second_are_those_of_training_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of two batches takes a second, a validation 1,000."""
    clock, real = Clock(monkeypatch), sedd.training.run.elbo

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.now += 1000
        return real(*args, **kwargs)

    monkeypatch.setattr(sedd.training.run, "elbo", slow)
    config = make_config(accumulate=2, log_every=1)
    Run(config).train()
    curves = EventAccumulator(str(Path(config.run_dir, "tensorboard")))
    curves.Reload()
    assert {point.value for point in curves.Scalars("train/tokens_per_second")} == {2 * 4 * 16}
    assert [point.value for point in curves.Scalars("train/tokens")] == [128 * step for step in range(1, 9)]
    assert [point.value for point in curves.Scalars("train/nats_per_token")] == pytest.approx(losses(config.run_dir))


class FakeWandb:
    """Stands in for the module wandb: a run that keeps what it is given."""

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def init(self, **options: Any) -> Any:
        rows: list[dict[str, Any]] = []
        self.runs.append({**options, "rows": rows})
        return SimpleNamespace(log=rows.append, finish=lambda: None, define_metric=lambda *_, **__: None)


def test_samples_and_curves_in_tensorboard_and_wandb(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sedd.training.run, "SAMPLE_STEPS", 4)
    config = make_config(report_to="tensorboard,wandb", valid_samples=2)
    plain = make_config(report_to="none", run_dir=config.run_dir + "_plain")
    Run(config).train()
    Run(plain).train()
    assert losses(config.run_dir) == losses(plain.run_dir), "samples leave training alone"
    assert not Path(plain.run_dir, "tensorboard").exists()

    curves = EventAccumulator(str(Path(config.run_dir, "tensorboard")))
    curves.Reload()
    assert [event.step for event in curves.Tensors("valid/samples/1/text_summary")] == [4, 8]
    (run,) = wandb.runs
    tables = [row for row in run["rows"] if "valid/samples" in row]
    assert [row["step"] for row in tables] == [4, 8]
    assert [len(row["valid/samples"].data) for row in tables] == [2, 2]
    rates = {row["step"]: row["train/lr"] for row in run["rows"] if "train/lr" in row}
    assert rates == {point.step: pytest.approx(point.value) for point in curves.Scalars("train/lr")}
    assert run["config"]["tokenizer"] == "bytes"

    Run(dataclasses.replace(config, steps=9), resume=True).train()
    Run(dataclasses.replace(config, run_dir=config.run_dir + "_other", steps=1)).train()
    assert wandb.runs[0]["id"] == wandb.runs[1]["id"] != wandb.runs[2]["id"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Run(dataclasses.replace(config, steps=10), resume=True).train()


def test_plain_lines_without_a_terminal(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd.progress.LINE_EVERY", 0.0)
    plain, terminal = io.StringIO(), io.StringIO()
    Run(make_config(), console=Console(file=plain)).train()
    assert not set("\x1b\r") & set(plain.getvalue())
    lines = [line for line in plain.getvalue().splitlines() if "tok/s" in line]
    assert [line.split("  ")[1] for line in lines] == ["step 3", "step 4", "step 6", "step 8"]
    other = make_config(run_dir=make_config().run_dir + "2", steps=1)
    Run(other, console=Console(file=terminal, force_terminal=True)).train()
    assert "\x1b" in terminal.getvalue()
    assert is_interactive(Console(force_jupyter=True))


def test_lines_come_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("sedd.progress.time", SimpleNamespace(monotonic=lambda: now))
    out = io.StringIO()
    with progress_bar(Console(file=out)) as show:
        for number in range(100):
            now = float(number)
            show(number / 100, f"line {number}")
    assert out.getvalue().splitlines() == ["  0%  line 0", " 30%  line 30", " 60%  line 60", " 90%  line 90"]


def test_finished_and_stopped_are_told_apart(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 0
    told = capsys.readouterr().err
    assert "finished at step 8: all 8 steps are taken (continue with --resume --steps N, N above 8)" in told
    assert "stopped by" not in told
    assert main(["train", "--run_dir", config.run_dir, "--resume"]) == 0
    assert "nothing to do: the run was already finished at step 8: all 8 steps" in capsys.readouterr().err

    take_step = TrainState.train_step

    def interrupted(state: TrainState) -> torch.Tensor:
        result = take_step(state)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(TrainState, "train_step", interrupted)
    assert main(["train", "--run_dir", config.run_dir, "--resume", "--steps", "20"]) == 128 + signal.SIGINT
    told = capsys.readouterr().err
    assert "stopped by SIGINT at step 9 of 20, not finished" in told
    assert "finished at" not in told


# -- tokenisers, and models to start from ------------------------------------------------------------------------------


def test_a_run_keeps_its_tokenizer(make_config: MakeConfig, tmp_path: Path) -> None:
    """The run folder is enough to go on, to load and to convert, although its source is gone or has changed."""
    source, elsewhere = tmp_path / "theirs", tmp_path / "elsewhere"
    source.mkdir()
    tokenizers_made_here.byte_level().save(str(source / "tokenizer.json"))
    tokenizer = get_tokenizer(str(source))
    config = make_config(tokenizer=str(source), steps=4)
    Run(config).train()

    source.rename(elsewhere)
    moved = dataclasses.replace(config, run_dir=str(tmp_path / "moved"))
    Path(config.run_dir).rename(moved.run_dir)
    assert Run(dataclasses.replace(moved, steps=6), resume=True).train().step == 6
    Run(dataclasses.replace(moved, tokenizer=str(elsewhere)), resume=True)
    tokenizers_made_here.metaspace().save(str(elsewhere / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer: .* was trained with '.*theirs' and cannot be resumed with"):
        Run(dataclasses.replace(moved, tokenizer=str(elsewhere)), resume=True)

    loaded = load_model(moved.run_dir)
    assert loaded.tokenizer.name == tokenizer.name
    assert main(["convert", moved.run_dir, str(tmp_path / "model")]) == 0
    converted = load_model(tmp_path / "model")
    assert converted.tokenizer.name == tokenizer.name
    last = list_checkpoints(Path(moved.run_dir))[-1]
    (last / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: truncated or replaced"):
        load_model(last)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_vocabulary_wider_than_uint16(make_config: MakeConfig, tmp_path: Path, streaming: bool) -> None:
    tokenizers_made_here.wide().save(str(tmp_path / "tokenizer.json"))
    words = [f"w{number}" for number in range(65_500, 65_600)]
    for name in ("words", "others"):
        (tmp_path / f"{name}.txt").write_text(" ".join(words * 5) + "\n" + " ".join(words) + "\n")
    data = DataConfig(
        source=str(tmp_path / "words.txt"),
        valid_source=str(tmp_path / "others.txt"),
        cache_dir=str(tmp_path / "cache"),
        documents="line",
        streaming=streaming,
    )
    run = Run(make_config(tokenizer=str(tmp_path / "tokenizer.json"), data=data, steps=1, valid_blocks=37))
    batches, expected = run.state.batches, {0, *range(65_500, 65_600)}
    assert set(run.valid_blocks.flatten().tolist()) == expected
    seen = {token for _ in range(20) for token in next(batches).flatten().tolist()}
    assert seen == expected
    state = batches.state_dict()
    following = next(batches)
    batches.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(next(batches), following)


def test_a_run_starts_from_a_model(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config()
    Run(first).train()
    begin = SEDD.from_pretrained(first.run_dir)
    begin.save_pretrained(tmp_path / "model")
    for source in (first.run_dir, str(tmp_path / "model")):
        config = make_config(init=source, model=ModelOptions(length=8), run_dir=source + "_tuned", seed=5)
        run = Run(config, load_init=SEDD.from_pretrained)
        network = run.state.diffusion.network
        for model in (network, run.state.ema.network):
            assert all(map(torch.equal, model.state_dict().values(), begin.state_dict().values()))
        assert network.config == dataclasses.replace(begin.config, length=8)
    run.train()
    assert losses(config.run_dir)[0] < losses(first.run_dir)[0]
    assert json.loads(Path(config.run_dir, "config.json").read_text())["init"] == source
    shutil.rmtree(source)
    assert Run(dataclasses.replace(config, steps=9), resume=True).train().step == 9
    assert load_model(config.run_dir).model.config == network.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelOptions(hidden_size=32)}, r"model.hidden_size: .* has 16, and cannot start a model with 32"),
        ({"model": ModelOptions(preset="small")}, r"model.\w+: .* has .*, and cannot start a model with"),
        ({"process": "uniform"}, r"process: .*absorbing.*uniform.*--process"),
        ({"tokenizer": "text8"}, r"tokenizer: .* was trained on bytes tokens"),
    ],
)
def test_a_model_that_cannot_be_started_from(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = make_config()
    begin = SEDD(config.model.build(), config.make_process(257), get_schedule(config.schedule), config.tokenizer)
    begin.save_pretrained(tmp_path / "model")
    options = {"init": str(tmp_path / "model"), "run_dir": str(tmp_path / "new"), "model": ModelOptions(), **changes}
    with pytest.raises(ValueError, match=message):
        Run(make_config(**options), load_init=SEDD.from_pretrained)


def test_a_hybrid_run_from_before_the_shift_stays_as_it_was(make_config: MakeConfig) -> None:
    """Its checkpoints do not name the option: loaded and resumed without the shift."""
    tiny = dataclasses.replace(make_config().model, hybrid_shift=False)
    config = make_config(process="hybrid", steps=4, model=tiny)
    Run(config).train()
    checkpoint = list_checkpoints(Path(config.run_dir))[-1]
    options = json.loads((checkpoint / "config.json").read_text())
    del options["model"]["hybrid_shift"]
    (checkpoint / "config.json").write_text(json.dumps(options))
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("sha256", "seconds_per_step", "sequences_per_step"):
        del state[name]
    written = (checkpoint / "config.json").read_bytes()
    state["files"]["config.json"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps(state))
    unnamed = dataclasses.replace(config, model=make_config().model, steps=6)
    again = Run(unnamed, resume=True)
    fresh = Run(dataclasses.replace(unnamed, run_dir=config.run_dir + "_new"))
    masked = torch.ones(1), torch.tensor([257])
    assert again.state.diffusion.step_options(*masked)["log_score_shift"] is None
    loaded = load_model(config.run_dir)
    assert loaded.diffusion.step_options(*masked)["log_score_shift"] is None
    assert loaded.model.parameterization.log_score_shift(loaded.model.process, *masked) is None
    assert fresh.state.diffusion.step_options(*masked)["log_score_shift"] is not None


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid run of the version that called the process ``graph``; it was trained to step 6 there.

    The noise of a step was other than it is now, so the losses agree roughly only.
    """
    earlier = Path(__file__).parent / "data" / "run_before_processes"
    shutil.copytree(earlier, tmp_path / "runs" / "old")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    monkeypatch.chdir(tmp_path)
    loaded = load_model("runs/old")
    assert (loaded.state["step"], loaded.config.process, loaded.diffusion.process.dim) == (3, "hybrid", 258)
    assert main(["train", "--run_dir", "runs/old", "--resume", "--steps", "6"]) == 0

    def steps(run: str | Path) -> list[dict[str, Any]]:
        return [row for row in rows(run) if "loss" in row]

    found, wanted = steps("runs/old"), steps(earlier)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[:3] == wanted[:3]
    assert [row["loss"] for row in found[3:]] == pytest.approx([row["loss"] for row in wanted[3:]], rel=0.3)
    begin, end = (list_checkpoints(path)[-1] for path in (earlier, Path("runs/old")))
    before, after = (read_tensors(path, "optimizer", read_state(path)) for path in (begin, end))
    assert before.keys() == after.keys()
    assert all(float(after[key]) == 6 for key in after if key.endswith("/step"))
