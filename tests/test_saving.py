"""Checkpoints written while training goes on: one at a time, of the step at which they began, and whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import write_source

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sedd.training.run
from sedd.config import ModelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.training.checkpoint import list_checkpoints, read_state, read_tensors, verify
from sedd.training.run import NonFiniteError, Run
from sedd.training.saving import Saver
from sedd.training.state import TrainState

Save = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    source = write_source(tmp_path)

    def make(name: str = "run", **changes: Any) -> Run:
        options: dict[str, Any] = {"steps": 12, "checkpoint_every": 4, "valid_every": 100, "valid_blocks": 4, **changes}
        config = TrainConfig(
            run_dir=str(tmp_path / name),
            data=DataConfig(source=str(source), cache_dir=str(tmp_path / "cache")),
            model=ModelOptions(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=16),
            batch_size=4,
            lr=1e-2,
            warmup=4,
            log_every=1,
            valid_draws=1,
            valid_samples=0,
            **options,
        )
        return Run(config, console=Console(quiet=True))

    return make


@pytest.fixture
def replace_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Save, int], None]], None]:
    """Calls a function in place of writing a checkpoint; it gets what writes the checkpoint, and the step."""

    def replace(instead: Callable[[Save, int], None]) -> None:
        real = sedd.training.run.save_checkpoint
        monkeypatch.setattr(
            sedd.training.run,
            "save_checkpoint",
            lambda run_dir, step, *args: instead(lambda: real(run_dir, step, *args), step),
        )

    return replace


def steps_of(run: Run) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run.run_dir)]


def test_training_goes_on_and_a_checkpoint_is_that_of_its_step(make_run: Any, replace_save: Any) -> None:
    run, reached, at_once = make_run(), {}, []

    def slow(save: Save, step: int) -> None:
        at_once.append(step)
        assert len(at_once) == 1, "one at a time"
        deadline = time.monotonic() + 20
        while run.state.step < min(step + 4, 12) and time.monotonic() < deadline:
            time.sleep(0.001)
        reached[step] = run.state.step
        save()
        at_once.remove(step)

    replace_save(slow)
    run.train()
    assert reached == {4: 8, 8: 12, 12: 12}, "training took all steps up to the next checkpoint, and no more"
    whole = make_run("whole", steps=8)
    whole.train()
    ours, theirs = list_checkpoints(run.run_dir)[0], list_checkpoints(whole.run_dir)[-1]
    assert ours.name == theirs.name == "step_00000008"
    for name in ("model", "ema", "optimizer"):
        left, right = read_tensors(ours, name, read_state(ours)), read_tensors(theirs, name, read_state(theirs))
        assert all(torch.equal(left[key], right[key]) for key in right), name
    assert read_state(ours)["data"] == read_state(theirs)["data"]
    assert read_state(ours)["step"] == 8


@pytest.mark.parametrize(("fails", "stops"), [(4, 8), (12, 12)])
def test_an_error_stops_training_at_the_next_checkpoint(
    make_run: Any, replace_save: Any, fails: int, stops: int
) -> None:
    run = make_run()

    def broken(save: Save, step: int) -> None:
        if step == fails:
            raise OSError("the disk is gone")
        save()

    replace_save(broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run.train()
    assert run.state.step == stops
    assert steps_of(run) == ([] if fails == 4 else [4, 8])
    assert Run(run.config, console=Console(quiet=True), resume=True).state.step == (0 if fails == 4 else 8)


def test_old_checkpoints_are_kept_until_the_new_one_is_there(make_run: Any, replace_save: Any) -> None:
    run, before = make_run(keep_last=1, valid_every=4), {}

    def watched(save: Save, step: int) -> None:
        before[step] = steps_of(run)
        save()
        assert step in steps_of(run)

    replace_save(watched)
    run.train()
    assert before[4] == []
    assert before[8] == [4]
    best = min(read_state(path)["valid"] for path in list_checkpoints(run.run_dir))
    assert run.best == pytest.approx(best)
    assert steps_of(run)[-1] == 12


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_written(make_run: Any, replace_save: Any, signum: int) -> None:
    run, told = make_run(steps=1000), threading.Event()

    def signalled(save: Save, step: int) -> None:
        if not told.is_set():
            told.set()
            os.kill(os.getpid(), signum)
            time.sleep(0.3)
        save()

    replace_save(signalled)
    outcome = run.train()
    assert outcome.signum == signum
    assert steps_of(run) == sorted({4, outcome.step})
    for path in list_checkpoints(run.run_dir):
        verify(path)


class BrokenError(Exception):
    pass


def test_a_checkpoint_in_the_making_is_finished_when_training_fails(
    make_run: Any, replace_save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take_step = make_run(), TrainState.train_step

    def slow(save: Save, step: int) -> None:
        time.sleep(0.5)
        save()

    def fails(state: TrainState) -> torch.Tensor:
        if state.step == 5:
            raise BrokenError
        return take_step(state)

    replace_save(slow)
    monkeypatch.setattr(TrainState, "train_step", fails)
    with pytest.raises(BrokenError):
        run.train()
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_loss_that_is_not_finite_names_the_checkpoint_in_the_making(
    make_run: Any, replace_save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take_step = make_run(), TrainState.train_step

    def slow(save: Save, step: int) -> None:
        time.sleep(0.3)
        save()

    replace_save(slow)
    monkeypatch.setattr(
        TrainState,
        "train_step",
        lambda state: take_step(state) * (float("nan") if state.step > 4 else 1.0),
    )
    with pytest.raises(NonFiniteError, match="step_00000004"):
        run.train()


def test_how_long_training_waits_is_a_curve(make_run: Any, replace_save: Any) -> None:
    run = make_run()

    def slow(save: Save, step: int) -> None:
        time.sleep(0.5)
        save()

    replace_save(slow)
    run.train()
    curves = EventAccumulator(str(run.run_dir / "tensorboard"))
    curves.Reload()
    waits = {point.step: point.value for point in curves.Scalars("time/checkpoint_wait_seconds")}
    assert list(waits) == [4, 8, 12]
    assert waits[4] < 0.4
    assert waits[12] > 0.5, "the last one is waited for"
    writes = {point.step: point.value for point in curves.Scalars("time/checkpoint_write_seconds")}
    assert list(writes) == [8, 12]
    assert min(writes.values()) > 0.5


def test_an_interrupt_while_it_waits_does_not_lose_the_checkpoint() -> None:
    saver, written = Saver(), threading.Event()

    def write() -> None:
        time.sleep(0.5)
        written.set()

    def save() -> None:
        with saver:
            saver.start(write)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            saver.wait(None)

    # a process that was started in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            save()
    finally:
        signal.signal(signal.SIGINT, before)
    assert written.is_set()
