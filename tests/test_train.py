"""The trainer: what a step does, how it stops and goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pty
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

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("tensorboard")

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sedd.train
from sedd.checkpoint import list_checkpoints, read_state, read_tensors
from sedd.cli import main
from sedd.config import ModelOptions, TrainConfig
from sedd.data import DataConfig
from sedd.objective import OBJECTIVES
from sedd.pretrained import load_model
from sedd.train import NonFiniteError, Trainer

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
    ("graph", "precision"), [("absorbing", "fp32"), ("uniform", "fp32"), ("hybrid", "fp32"), ("absorbing", "bf16")]
)
def test_the_loss_falls(make_config: MakeConfig, graph: Any, precision: Any) -> None:
    config = make_config(graph=graph, precision=precision, steps=60, batch_size=16, valid_every=60, checkpoint_every=60)
    outcome = Trainer(config).run()
    values = losses(config.run_dir)
    assert len(values) == outcome.step == 60
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


@pytest.mark.parametrize("changes", [{"fused_head": False}, {"compile": True}], ids=str)
def test_the_same_losses_without_the_fused_head_and_compiled(make_config: MakeConfig, changes: dict[str, bool]) -> None:
    torch.compiler.reset()
    runs = []
    for extra in ({}, changes):
        config = make_config(run_dir=f"{make_config().run_dir}-{len(runs)}", steps=4, precision="fp32", **extra)
        Trainer(config).run()
        runs.append(losses(config.run_dir))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_step_is_adamw_with_warmup_clipping_and_ema(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain statement of the same algorithm, on a loss without noise."""

    weights = torch.randn(257 + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def plain_loss(model: Any, x_0: torch.Tensor, *_: Any, scale: float = 1.0, **__: Any) -> torch.Tensor:
        return scale * (model.head(model.hidden(x_0, torch.ones(len(x_0)).double())) + weights).square().sum((1, 2))

    monkeypatch.setitem(OBJECTIVES, "score_entropy", plain_loss)
    no_dropout = ModelOptions(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=16, dropout=0.0)
    config = make_config(model=no_dropout, accumulate=2, clip=0.5, weight_decay=0.1, ema=0.3, betas=(0.8, 0.9))
    trainer, twin = Trainer(config), Trainer(dataclasses.replace(config, run_dir=config.run_dir + "2"))
    model = twin.model.double()
    trainer.model.double()
    trainer.ema.double()
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(1, 7):
        trainer.train_step()
        tokens = torch.cat([next(twin.batches), next(twin.batches)])
        loss = plain_loss(model, tokens).mean() / 16
        loss.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert norm > config.clip, "the step must be one that is clipped"
        torch.testing.assert_close(
            trainer.pending[-1], torch.stack((loss.detach(), norm)), rtol=1e-5, atol=0.0, check_dtype=False
        )
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
        assert trainer.lr == pytest.approx(lr)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=1e-6, atol=1e-9)
    for name, p in trainer.ema.named_parameters():
        torch.testing.assert_close(p, ema[name], rtol=1e-6, atol=1e-9)


def test_validation_is_repeatable_and_leaves_training_alone(make_config: MakeConfig) -> None:
    often, rarely = make_config(valid_every=1, run_dir="often"), make_config(valid_every=8)
    often.run_dir = rarely.run_dir + "_often"
    Trainer(often).run()
    Trainer(rarely).run()
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
            Trainer(config, resume=True)
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
    Trainer(whole).run()
    assert (run / "metrics.jsonl").read_bytes() == Path(whole.run_dir, "metrics.jsonl").read_bytes()
    ours, theirs = list_checkpoints(run)[-1], list_checkpoints(Path(whole.run_dir))[-1]
    for name in ("model", "ema", "optimizer", "rng"):
        left, right = (read_tensors(path, name, read_state(path)) for path in (ours, theirs))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name

    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    steps = [point.step for point in curves.Scalars("train/nats_per_token")]
    assert steps == list(range(1, last + 7)), "TensorBoard has each step once"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    config = make_config()
    take_step = Trainer.train_step

    def step_and_signal(self: Trainer) -> None:
        take_step(self)
        if self.step == 5:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signal.SIGHUP)  # as a terminal that closes sends after all, and twice

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)
    before = signal.getsignal(signum)
    outcome = Trainer(config).run()
    assert (outcome.step, outcome.signum) == (5, signum)
    assert [path.name for path in list_checkpoints(Path(config.run_dir))] == ["step_00000004", "step_00000005"]
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("is_told", [True, False])
def test_a_terminal_that_closes_does_not_take_the_run_with_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Told by SIGHUP, it saves and stops; a disowned job is not told, and goes on in silence."""
    take_step = Trainer.train_step
    terminal, end = pty.openpty()
    config = make_config()

    def step_and_close(self: Trainer) -> None:
        take_step(self)
        if self.step == 3:
            os.close(terminal)
            if is_told:
                os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Trainer, "train_step", step_and_close)
    with suppress(OSError), open(end, "w") as file:  # Python may not have flushed all that is lost
        outcome = Trainer(config, console=Console(file=file)).run()
    assert outcome.step == (3 if is_told else 8)
    assert list_checkpoints(Path(config.run_dir))[-1].name == f"step_0000000{outcome.step}"


def test_nohup_is_obeyed(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Trainer.train_step

    def step_and_signal(self: Trainer) -> None:
        take_step(self)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Trainer(make_config(steps=2)).run().signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(keep_last=3)
    run = Path(config.run_dir)
    Trainer(config).run()
    wanted = (run / "metrics.jsonl").read_bytes()
    last = list_checkpoints(run)[-1]
    tensors = read_tensors(last, "model", None)
    content = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    trainer = Trainer(config, resume=True)
    assert trainer.step == 4
    said = capsys.readouterr().err
    assert "step_00000008/optimizer.safetensors: damaged" in said
    assert "Going on from step_00000004" in said
    assert (last.parent / "damaged_step_00000008").is_dir()
    trainer.run()
    assert (run / "metrics.jsonl").read_bytes() == wanted
    again = read_tensors(last, "model", read_state(last))
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert not (last.parent / "damaged_step_00000008").exists()


@pytest.mark.parametrize(
    ("consumed", "message"), [(-5, "got -5"), (None, "got None"), ("7", "got '7'"), (True, "got True")]
)
def test_a_position_in_the_data_that_is_none_is_refused(make_config: MakeConfig, consumed: Any, message: str) -> None:
    """In a checkpoint of an earlier version, which has no digest to tell of it."""
    config = make_config(steps=4)
    Trainer(config).run()
    (last,) = list_checkpoints(Path(config.run_dir))
    state = read_state(last)
    del state["sha256"]
    state["data"]["consumed"] = consumed
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"state\.json: data: consumed: expected an int of at least 0, {message}"):
        Trainer(config, resume=True)


def test_records_are_on_the_disk_before_a_checkpoint_refers_to_them(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, save = {}, os.fsync, sedd.train.save_checkpoint

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def checked(run_dir: Path, step: int, *args: Any) -> Path:
        records = (run_dir / "metrics.jsonl").resolve()
        assert len(losses(run_dir)) == step
        assert synced[str(records)] == records.stat().st_size
        return save(run_dir, step, *args)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(sedd.train, "save_checkpoint", checked)
    assert Trainer(make_config()).run().step == 8


def test_all_files_of_a_run_have_the_permissions_of_new_files(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    before = os.umask(0o027)
    try:
        Trainer(config).run()
    finally:
        os.umask(before)
    files = [path for path in Path(config.run_dir).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_an_option_that_a_resumed_run_changes_is_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(steps=4)
    Trainer(config).run()
    capsys.readouterr()
    Trainer(dataclasses.replace(config, lr=3e-2), resume=True)
    assert "lr: 0.03 from here on, 0.01 until now" in capsys.readouterr().err


def test_training_stops_when_the_minutes_are_used_up(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        yield from range(10**6)

    clock = ticks()
    monkeypatch.setattr(sedd.train, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second per look
    config = make_config(steps=10**6, max_minutes=0.5)
    outcome = Trainer(config).run()
    assert 0 < outcome.step < 30
    assert outcome.signum is None
    state = read_state(list_checkpoints(Path(config.run_dir))[-1])
    assert state["step"] == outcome.step
    assert state["valid"] is not None, "the last weights are validated"
    assert state["elapsed"] >= 30
    assert Trainer(config, resume=True).run().step == outcome.step, "no time is left"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_stops_the_run_and_saves_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    objective, calls = OBJECTIVES["score_entropy"], 0

    def breaks_at_step_6(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        value = objective(model, *args, **kwargs)
        if calls < 6:
            return value
        if kind == "loss":
            return value * float("nan")
        return value + (0 * model.vocab_embed.embedding.sum()).sqrt()  # a finite value with an infinite slope

    monkeypatch.setitem(OBJECTIVES, "score_entropy", breaks_at_step_6)
    config = make_config(steps=100)
    with pytest.raises(NonFiniteError, match=rf"step 6: the .*{kind}.* is .*step_00000004"):
        Trainer(config).run()
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
    real = sedd.train.elbo

    def told(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        wanted = next(told_bounds) * result.length
        return dataclasses.replace(result, sequences=torch.full_like(result.sequences, wanted))

    monkeypatch.setattr(sedd.train, "elbo", told)
    config = make_config(steps=10, valid_every=2, checkpoint_every=3, keep_last=2)
    trainer = Trainer(config)
    trainer.run()
    assert trainer.best == pytest.approx(best)
    assert [int(path.name[5:]) for path in list_checkpoints(Path(config.run_dir))] == kept


def test_a_run_folder_in_use_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Trainer(config).run()
    with pytest.raises(FileExistsError, match=r"already holds a run \(at step_00000004\); .*--resume.*--run_dir"):
        Trainer(config)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        Trainer(make_config(run_dir=config.run_dir + "_other"), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size: .* was trained with 4 and cannot be resumed with 8"),
        ({"model": ModelOptions(preset="small", length=8)}, r"model\.\w+: "),
        ({"data": DataConfig(source="stdlib")}, r"data\.source: "),
        ({"schedule_params": {"eps": 0.1}}, r"schedule_params\.eps: .*0\.001.*0\.1"),
    ],
)
def test_a_resumed_run_keeps_its_options(make_config: MakeConfig, change: dict[str, Any], message: str) -> None:
    config = make_config(steps=4)
    Trainer(config).run()
    with pytest.raises(ValueError, match=message):
        Trainer(dataclasses.replace(config, **change), resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Path(config.run_dir).mkdir()
    Path(config.run_dir, "config.json").write_text(json.dumps(config.to_dict()))
    Path(config.run_dir, "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    assert Trainer(config, resume=True).run().step == 4
    assert [row["step"] for row in rows(config.run_dir) if "loss" in row] == [1, 2, 3, 4]


def test_a_resumed_run_may_be_made_longer(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    Trainer(config).run()
    longer = dataclasses.replace(config, steps=6, lr=1e-3, log_every=1, schedule_params={"eps": 1e-3})
    assert Trainer(longer, resume=True).run().step == 6
    Trainer(make_config(run_dir=config.run_dir + "_whole", steps=4)).run()
    assert losses(config.run_dir)[:4] == losses(config.run_dir + "_whole")
