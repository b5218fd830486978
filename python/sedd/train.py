"""The trainer: algorithm 1 of SEDD with AdamW, an average of the weights, validation and exact resumption.

The number that is minimised is the mean over sequences of ``σ(t) Σ_i L(x_t^i, x_0^i)``, divided by the length of a
sequence: nats per token. It estimates the likelihood bound of theorem 3.6 but for its prior term.

Folder of a run: ``config.json``, ``metrics.jsonl`` (one JSON object a line: loss and gradient norm of every step, bound
of every validation; no clock times, so two runs can be compared with ``cmp``), ``tensorboard/``, ``checkpoints/``, and
``eval/``, where evaluations may be put for ``sedd report`` to find.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sedd.checkpoint import (
    best_checkpoint,
    finite,
    list_checkpoints,
    load_weights,
    prune,
    read_config,
    read_state,
    read_tensors,
    save_checkpoint,
    write_json,
)
from sedd.config import TrainConfig, autocast_dtype, resolve_device
from sedd.data import batches, load_blocks, valid_batches
from sedd.evaluate import elbo
from sedd.model import SEDD, compile_network
from sedd.objective import OBJECTIVES, sample_times
from sedd.schedule import get_schedule
from sedd.tokenizer import count_bytes, get_tokenizer

__all__ = ["NonFiniteError", "Outcome", "Trainer"]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: optimiser steps taken.
        signum: the signal that stopped it, None if it came to its end.
    """

    step: int
    signum: int | None


class Trainer:
    """Trains one model in one run folder.

    Args:
        config: options of the run.
        resume: go on from the last checkpoint of ``config.run_dir``. The steps that follow are bit for bit those that
            the run would have taken without a break (on the same machine and number of threads).
        console: where progress and messages go; standard error if None.

    Raises:
        FileExistsError: the run folder holds checkpoints and ``resume`` is False.
        FileNotFoundError: nothing to resume, or a file of the checkpoint is missing.
        ValueError: an option, the data or the checkpoint is bad, or an option was changed that a resumed run must keep.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self.run_dir = Path(config.run_dir)
        found = list_checkpoints(self.run_dir)
        if found and not resume:
            raise FileExistsError(
                f"run_dir: {self.run_dir} already holds a run (at {found[-1].name}); go on with it by --resume, "
                "or start another with --run_dir NEW"
            )
        if resume and not (self.run_dir / "config.json").exists():
            raise FileNotFoundError(f"run_dir: nothing to resume in {self.run_dir}: it has no config.json")
        if found:
            saved = read_config(found[-1])
            config = self.config = _with_sizes_of(config, saved)
            changed = config.differences(saved)
            if changed:
                name, (now, then) = next(iter(changed.items()))
                raise ValueError(f"{name}: {self.run_dir} was trained with {then!r} and cannot be resumed with {now!r}")
        self.device = resolve_device(config.device)
        self.autocast_dtype = autocast_dtype(config.precision, self.device)

        torch.manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.tokenizer = get_tokenizer(config.tokenizer)
        self.graph = config.make_graph(self.tokenizer.vocab_size)
        self.schedule = get_schedule(config.schedule, **config.schedule_params)
        self.objective = OBJECTIVES[config.objective]
        self.model = SEDD(config.model.build(), self.graph, self.schedule, config.tokenizer).to(self.device)
        self.length: int = self.model.config.length
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if config.compile:
            compile_network(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        splits = load_blocks(config.data, self.tokenizer, self.length)
        self.valid_blocks = next(valid_batches(splits.valid, config.valid_blocks))
        self.batches = batches(splits.train, config.batch_size, seed=config.seed)

        self.step = 0
        self.elapsed = 0.0  # seconds of training, those before a resumption included
        self.valid: float | None = None  # the validation bound at this step
        self.best: float | None = None  # the lowest one so far
        self.saved_step: int | None = None
        self.signum: int | None = None
        self.pending: list[Tensor] = []  # (loss, gradient norm) of the steps not yet written
        if found:
            self._restore(found[-1])
        elif resume:
            self._say(f"{self.run_dir} has no checkpoint yet: starting at step 0")
        (self.run_dir / "eval").mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "config.json", config.to_dict())

    # -- one step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Takes one optimiser step on ``accumulate`` batches."""
        config = self.config
        self.model.train()
        count = config.batch_size * config.accumulate
        times = sample_times(count, antithetic=config.antithetic, generator=self.generator)
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            tokens = next(self.batches).to(self.device)
            part_times = times[part :: config.accumulate]  # every part sees times from all over (0, 1]
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                losses = self.objective(
                    self.model,
                    tokens,
                    part_times,
                    self.graph,
                    self.schedule,
                    scale=1 / (count * self.length),
                    fused=config.fused_head,
                    generator=self.generator,
                )
            loss = losses.sum()
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.model.parameters()), None)
        self.valid = None
        self.pending.append(torch.stack((total, norm.detach())))

    @property
    def lr(self) -> float:
        """Learning rate of step ``self.step`` (counted from 1)."""
        return self.config.lr * min(1.0, self.step / max(self.config.warmup, 1))

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains until the steps or the minutes are used up, or SIGTERM or Ctrl-C; the last state is saved each time.

        Raises:
            NonFiniteError: the loss or the gradient of a step is not finite. Nothing is saved after the last good
                checkpoint.
            OSError: a file cannot be written.
        """
        config = self.config
        started, before = time.monotonic(), self.elapsed
        first_share = self._share()
        columns = (BarColumn(10), TextColumn("{task.description}"))
        with self._signals(), Log(self.run_dir, self.step) as log, Progress(*columns, console=self.console) as progress:
            task = progress.add_task("training", total=1.0)
            logged_at, logged_step = started, self.step
            while True:
                self.elapsed = before + time.monotonic() - started
                share = self._share()
                done = share >= 1 or self.signum is not None
                if self.signum is not None:  # not said by the handler, which may have interrupted another message
                    self._say(f"{signal.Signals(self.signum).name}: saving step {self.step:,} and stopping")
                due = any(map(self._due, (config.log_every, config.valid_every, config.checkpoint_every)))
                if self.pending and (done or due):
                    loss = self._write_steps(log)
                    seconds, steps = time.monotonic() - logged_at, self.step - logged_step
                    logged_at, logged_step = time.monotonic(), self.step
                    speed = steps * config.batch_size * config.accumulate * self.length / seconds
                    log.curves(self.step, {"train/tokens_per_second": speed})
                    left = (1 - share) * (self.elapsed - before) / max(share - first_share, 1e-9)
                    report = (
                        f"step {self.step:,}  loss {loss:.3f} ({loss / math.log(2):.3f} bits/token)  "
                        f"{speed:,.0f} tok/s  {left / 60:.1f} min left"
                    )
                    progress.update(task, completed=share, description=report)
                better = False
                if self.signum is None and self.valid is None and (done or self._due(config.valid_every)):
                    better = self._validate(log)
                if better or done or self._due(config.checkpoint_every):
                    self._save(log)
                if done:
                    return Outcome(self.step, self.signum)
                self.train_step()

    def _due(self, every: int) -> bool:
        return self.step > 0 and self.step % every == 0

    def _share(self) -> float:
        """The part of the run that is done, 0 to 1, by steps or by minutes, whichever is more."""
        minutes = self.config.max_minutes
        return min(1.0, max(self.step / self.config.steps, self.elapsed / (60 * minutes) if minutes else 0.0))

    def _write_steps(self, log: Log) -> float:
        """Writes the pending steps; returns their mean loss. The only place that waits for the device."""
        values: list[tuple[float, float]] = torch.stack(self.pending).tolist()
        first = self.step - len(values) + 1
        self.pending.clear()
        for step, (loss, norm) in enumerate(values, first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                saved = list_checkpoints(self.run_dir)
                what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
                raise NonFiniteError(
                    f"step {step}: the {what}; stopped, and nothing was saved since "
                    f"{saved[-1] if saved else 'the start'}. Go on from there by --resume with a smaller --lr or "
                    "--clip, or start again with another --precision or --seed"
                )
            log.metrics({"step": step, "loss": loss, "grad_norm": norm})
        mean = sum(loss for loss, _ in values) / len(values)
        log.curves(self.step, {"train/nats_per_token": mean, "train/grad_norm": values[-1][1], "train/lr": self.lr})
        return mean

    def _validate(self, log: Log) -> bool:
        """Scores the averaged weights; returns whether they are the best so far."""
        result = elbo(
            self.ema,
            self.valid_blocks,
            self.graph,
            self.schedule,
            draws=self.config.valid_draws,
            n_bytes=count_bytes(self.valid_blocks, self.tokenizer),
            batch_size=self.config.batch_size,
            # always the same noise: values are comparable, and training's own generators stay where they are
            generator=torch.Generator(self.device).manual_seed(self.config.seed),
            autocast_dtype=self.autocast_dtype,
        )
        self.valid = result.nats_per_token
        better = math.isfinite(self.valid) and (self.best is None or self.valid < self.best)
        self.best = self.valid if better else self.best
        error = result.standard_error
        log.metrics(
            {"step": self.step, "valid_nats_per_token": finite(self.valid), "valid_standard_error": finite(error)}
        )
        log.curves(self.step, {"valid/nats_per_token": self.valid, "valid/bits_per_byte": result.bits_per_byte})
        self._say(
            f"step {self.step:,}, {self.elapsed / 60:.1f} min: validation {self.valid:.4f} ± {error:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte{', the best so far' if better else ''}"
        )
        return better

    def _say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns the first SIGTERM or Ctrl-C into a clean stop; the second one acts as ever."""
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def stop(signum: int, frame: object) -> None:
            self.signum = signum
            restore()

        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self, log: Log) -> None:
        """Writes the checkpoint of this step, if it does not exist yet, and deletes those no longer kept."""
        if self.step in (0, self.saved_step):
            return
        log.flush()
        rng = {"cpu": torch.get_rng_state(), "generator": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        tensors = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments, "rng": rng}
        state = {
            "valid": None if self.valid is None else finite(self.valid),
            "elapsed": self.elapsed,
            "device": self.device.type,
            "data": self.batches.state_dict(),
        }
        save_checkpoint(self.run_dir, self.step, tensors, state, self.config)
        self.saved_step = self.step
        prune(self.run_dir, self.config.keep_last)

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        for module, name in ((self.model, "model"), (self.ema, "ema")):
            load_weights(module, read_tensors(checkpoint, name, state, self.device), checkpoint / f"{name}.safetensors")
        moments = read_tensors(checkpoint, "optimizer", state, self.device)
        indices = {name: index for index, (name, _) in enumerate(self.model.named_parameters())}
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            by_index.setdefault(indices[name], {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        rng = read_tensors(checkpoint, "rng", state)
        torch.set_rng_state(rng["cpu"])
        if state["device"] == self.device.type:
            self.generator.set_state(rng["generator"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        else:  # generators of different devices have nothing in common
            self.generator.manual_seed(self.config.seed + state["step"])
            self._say(f"was trained on {state['device']}: goes on with other random numbers")
        self.batches.load_state_dict(state["data"])
        self.step = self.saved_step = state["step"]
        self.elapsed, self.valid = state["elapsed"], state["valid"]
        if (best := best_checkpoint(self.run_dir)) is not None:
            self.best = read_state(best)["valid"]
        self._say(f"resuming {self.run_dir} at step {self.step:,}")


class Log:
    """The records of a run: ``metrics.jsonl`` and TensorBoard's scalars, without those of steps to be taken again.

    Args:
        run_dir: folder of the run.
        step: the step that training goes on from; later records of an earlier process are dropped.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / "metrics.jsonl"
        if path.exists():
            with open(path, encoding="utf-8") as old, open(path.with_suffix(".tmp"), "w", encoding="utf-8") as kept:
                kept.writelines(line for line in old if _is_before(line, step))
            path.with_suffix(".tmp").replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        self._file.write(json.dumps(row) + "\n")

    def curves(self, step: int, values: dict[str, float | None]) -> None:
        """Adds a point to curves of TensorBoard."""
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes what is buffered: a checkpoint must not be ahead of its records."""
        self._file.flush()
        self._writer.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._writer.close()


def _with_sizes_of(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """Options of a run to be resumed: sizes of the model that are not given are those of its checkpoint."""
    given = {name: value for name, value in dataclasses.asdict(config.model).items() if value is not None}
    return dataclasses.replace(config, model=dataclasses.replace(saved.model, **given))


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # the line that a killed process was writing
        return False
