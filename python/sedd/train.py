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
import os
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
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sedd.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_weights,
    prune,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
    save_checkpoint,
    set_damaged_aside,
)
from sedd.config import ModelOptions, TrainConfig, autocast_dtype, resolve_device
from sedd.curves import WRITERS, Writer
from sedd.data import batches, load_blocks, valid_batches
from sedd.evaluate import elbo
from sedd.files import RunLock, finite, naming, whole_file, write_json, write_text
from sedd.learning_rate import learning_rate_factor
from sedd.model import PRESETS, SEDD, compile_network
from sedd.objective import OBJECTIVES, sample_times
from sedd.pretrained import load_pretrained
from sedd.progress import is_interactive, progress_bar
from sedd.sample import sample
from sedd.schedule import get_schedule
from sedd.tokenizer import TOKENIZER_FILES, TOKENIZERS, count_bytes, get_tokenizer

__all__ = ["NonFiniteError", "Outcome", "Trainer"]

FREE_SIZES = ("length", "dropout")
"""Sizes of a model that no weight depends on: a run may change them when it starts from a trained model."""
SAMPLE_STEPS = 64
"""Reverse steps of the texts that a validation writes."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: optimiser steps taken.
        signum: the signal that stopped it, None if the run is finished.
        ended: for a finished run, what is used up, and the option that continues it; else empty.
    """

    step: int
    signum: int | None
    ended: str = ""


class Trainer:
    """Trains one model in one run folder, which no other process may write to until :meth:`run` has ended.

    Args:
        config: options of the run.
        resume: go on from the last checkpoint of ``config.run_dir``. The steps that follow are bit for bit those that
            the run would have taken without a break (on the same machine and number of threads). If the run ends by
            time and its learning rate follows a schedule, that holds up to the checkpoint after that one: there the
            learning rate is fitted anew to the time that steps take. If the last checkpoint is damaged, the one before
            it is taken.
        console: where progress and messages go; standard error if None.
        lock: the lock of ``config.run_dir`` if the caller has it already.

    Raises:
        BlockingIOError: another process trains in the run folder.
        FileExistsError: the run folder holds checkpoints and ``resume`` is False.
        FileNotFoundError: nothing to resume.
        ValueError: an option or the data is bad, an option was changed that a resumed run must keep, or no checkpoint
            is whole.
        OSError: the run folder cannot be written to.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        console: Console | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self.run_dir = Path(config.run_dir)
        if resume and not (self.run_dir / "config.json").exists():
            raise FileNotFoundError(f"run_dir: nothing to resume in {self.run_dir}: it has no config.json")
        self.lock = lock or RunLock(self.run_dir)
        try:
            self._set_up(resume)
        except BaseException:
            self.lock.release()
            raise

    def _set_up(self, resume: bool) -> None:
        given = self.config
        found = list_checkpoints(self.run_dir)
        if found and not resume:
            raise FileExistsError(
                f"run_dir: {self.run_dir} already holds a run (at {found[-1].name}); go on with it by --resume, "
                "or start another with --run_dir NEW"
            )
        checkpoint = self._last_checkpoint()
        config = self.config
        self.device = resolve_device(config.device)
        self.autocast_dtype = autocast_dtype(config.precision, self.device)

        torch.manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        if checkpoint is None:
            kept = self.run_dir / TOKENIZER_FILES[0]
            again = resume and config.tokenizer not in TOKENIZERS and kept.is_file()
            self.tokenizer = get_tokenizer(str(kept) if again else config.tokenizer)
        begin = None if checkpoint is not None or config.init is None else load_pretrained(config.init)
        if begin is not None:
            config = self.config = self._checked_init(begin)
        self.process = config.make_process(self.tokenizer.vocab_size)
        self.schedule = get_schedule(config.schedule, **config.schedule_params)
        self.objective = OBJECTIVES[config.objective]
        self.model = SEDD(config.model.build(), self.process, self.schedule, self.tokenizer)
        if begin is not None:
            load_weights(self.model, begin.state_dict(), Path(str(config.init)))
        self.model.to(self.device)
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
        if not is_interactive(self.console):
            self._say(f"preparing the text of {config.data.source}")
        splits = load_blocks(config.data, self.tokenizer, self.length)
        self.valid_blocks = next(valid_batches(splits.valid, config.valid_blocks))
        self.batches = batches(splits.train, config.batch_size, seed=config.seed)

        self.step = 0
        self.elapsed = 0.0  # seconds of training, those before a resumption included
        self.valid: float | None = None  # the validation bound at this step
        self.best: float | None = None  # the lowest one so far
        self.saved_step: int | None = None
        self.pace = Pace()
        self.signum: int | None = None
        self.pending: list[Tensor] = []  # (loss, gradient norm) of the steps not yet written
        if checkpoint is not None:
            self._restore(checkpoint)
        elif resume:
            self._say(f"{self.run_dir} has no checkpoint yet: starting at step 0")
        with naming(self.run_dir):
            (self.run_dir / "eval").mkdir(exist_ok=True)
        for name, text in self.tokenizer.files().items():
            if not found or not (self.run_dir / name).exists():
                write_text(self.run_dir / name, text)
        # as it was given: a resumed run's sizes may come from its checkpoint
        write_json(self.run_dir / "config.json", (config if checkpoint is None else given).to_dict())

    def _checked_init(self, begin: SEDD) -> TrainConfig:
        """Options whose model has the sizes of ``--init``, if those that were given agree with it."""
        config, vocabulary = self.config, self.tokenizer.vocab_size
        theirs = begin.tokenizer if isinstance(begin.tokenizer, str | None) else begin.tokenizer.name
        wanted = config.make_process(vocabulary)
        if theirs not in (None, self.tokenizer.name):
            raise ValueError(
                f"tokenizer: {config.init} was trained on {begin.tokenizer if theirs == begin.tokenizer else 'other'} "
                f"tokens, and cannot start a run on {config.tokenizer} tokens; give its own by --tokenizer"
            )
        same = begin.process.family == wanted.family and begin.process.dim == wanted.dim
        if not same or not torch.equal(begin.process.stationary, wanted.stationary):
            raise ValueError(
                f"process: {config.init} was trained with {begin.process}, and cannot start a run with {wanted}; give "
                "its own by --process and --uniform_fraction, and the tokeniser by --tokenizer"
            )
        fixed = {name: value for name, value in dataclasses.asdict(begin.config).items() if name not in FREE_SIZES}
        given = {name: value for name, value in dataclasses.asdict(config.model).items() if value is not None}
        if config.model.preset != ModelOptions().preset:
            given = {**dataclasses.asdict(PRESETS[config.model.preset]), **given}
        for name in fixed.keys() & given.keys():
            if given[name] != fixed[name]:
                raise ValueError(
                    f"model.{name}: {config.init} has {fixed[name]}, and cannot start a model with {given[name]}; "
                    "leave the size out"
                )
        return _with_sizes(config, ModelOptions(preset=config.model.preset, **dataclasses.asdict(begin.config)))

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
                    self.process,
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
        """Learning rate of step ``self.step`` (counted from 1).

        It follows from the step and from what the last checkpoint holds, so that a resumed run has the same: in a run
        that ends by time, the time that steps will take is foreseen from the pace before the last checkpoint.
        """
        config, before = self.config, self.step - 1
        done = before / config.steps
        if config.max_minutes is not None:
            done = max(done, self.pace.elapsed_at(before) / (60 * config.max_minutes))
        factor = learning_rate_factor(config.lr_schedule, min(1.0, done), final=config.lr_final, decay=config.lr_decay)
        return config.lr * min(1.0, self.step / max(config.warmup, 1)) * factor

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains until the steps or the minutes are used up, or SIGTERM, SIGHUP or Ctrl-C; the last state is saved.

        Raises:
            NonFiniteError: the loss or the gradient of a step is not finite. Nothing is saved after the last good
                checkpoint.
            OSError: a file cannot be written.
        """
        config = self.config
        started, before = time.monotonic(), self.elapsed
        first_share = self._share()
        with (
            self.lock,
            self._signals(),
            Log(self.run_dir, self.step, config) as log,
            progress_bar(self.console) as show,
        ):
            logged_at, logged_step = started, self.step
            while True:
                self.elapsed = before + time.monotonic() - started
                share = self._share()
                done = share >= 1 or self.signum is not None
                if self.signum is not None:  # not said by the handler, which may have interrupted another message
                    self._say(f"{signal.Signals(self.signum).name}: saving step {self.step:,} and stopping")
                save = self._due(config.checkpoint_every) or self._pace_is_old()
                due = save or self._due(config.log_every) or self._due(config.valid_every)
                if self.pending and (done or due):
                    loss = self._write_steps(log)
                    seconds, steps = time.monotonic() - logged_at, self.step - logged_step
                    logged_at, logged_step = time.monotonic(), self.step
                    speed = steps * config.batch_size * config.accumulate * self.length / seconds
                    tokens = self.step * config.batch_size * config.accumulate * self.length
                    log.curves(self.step, {"train/tokens_per_second": speed, "train/tokens": tokens})
                    left = (1 - share) * (self.elapsed - before) / max(share - first_share, 1e-9)
                    report = (
                        f"step {self.step:,}  loss {loss:.3f} ({loss / math.log(2):.3f} bits/token)  "
                        f"{speed:,.0f} tok/s  {left / 60:.1f} min left"
                    )
                    show(share, report)
                better, pause = False, time.monotonic()
                if self.signum is None and self.valid is None and (done or self._due(config.valid_every)):
                    better = self._validate(log)
                if better or done or save:
                    self._save(log)
                logged_at += time.monotonic() - pause  # tokens per second are those of training alone
                if done:
                    return Outcome(self.step, self.signum, "" if self.signum is not None else self._ended())
                self.train_step()

    def _due(self, every: int) -> bool:
        return self.step > 0 and self.step % every == 0

    def _share(self) -> float:
        """The part of the run that is done, 0 to 1, by steps or by minutes, whichever is more."""
        minutes = self.config.max_minutes
        return min(1.0, max(self.step / self.config.steps, self.elapsed / (60 * minutes) if minutes else 0.0))

    def _pace_is_old(self) -> bool:
        """Whether a run that ends by time must foresee its end anew: twenty times in a run, each with a checkpoint."""
        minutes = self.config.max_minutes
        if minutes is None or self.config.lr_schedule == "constant" or self.step in (0, self.saved_step):
            return False
        return self.elapsed - self.pace.elapsed >= 60 * minutes / 20

    def _ended(self) -> str:
        """Why the run is finished, and how to continue it; empty if it is not."""
        steps, minutes = self.config.steps, self.config.max_minutes
        reasons = []
        if self.step >= steps:
            reasons.append(f"all {steps:,} steps are taken (continue with --resume --steps N, N above {steps})")
        if minutes is not None and self.elapsed >= 60 * minutes:
            reasons.append(
                f"the {minutes:g} minutes are used up (continue with --resume --max_minutes M, M above {minutes:g})"
            )
        return ", and ".join(reasons)

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
        mean_norm = sum(norm for _, norm in values) / len(values)
        log.curves(self.step, {"train/nats_per_token": mean, "train/grad_norm": mean_norm, "train/lr": self.lr})
        return mean

    def _validate(self, log: Log) -> bool:
        """Scores the averaged weights; returns whether they are the best so far."""
        result = elbo(
            self.ema,
            self.valid_blocks,
            self.process,
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
        if self.config.valid_samples and log.writers:
            log.texts(self.step, "valid/samples", self._write_samples())
        self._say(
            f"step {self.step:,}, {self.elapsed / 60:.1f} min: validation {self.valid:.4f} ± {error:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte{', the best so far' if better else ''}"
        )
        return better

    def _write_samples(self) -> list[str]:
        """Texts of the averaged weights, always from the same random numbers."""
        tokens = sample(
            self.ema,
            self.process,
            self.schedule,
            batch=self.config.valid_samples,
            length=self.length,
            steps=SAMPLE_STEPS,
            generator=torch.Generator(self.device).manual_seed(self.config.seed),
            device=self.device,
            autocast_dtype=self.autocast_dtype,
        )
        return [self.tokenizer.decode(row) for row in tokens.tolist()]

    def _say(self, message: str) -> None:
        try:
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)
        except OSError:  # the terminal is gone, which is no reason to lose the run
            self.console.quiet = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns the first SIGTERM, SIGHUP or Ctrl-C into a clean stop; the second one acts as ever.

        But for SIGHUP: when a terminal closes, the kernel and the shell may both send it.
        """
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        if previous[signal.SIGHUP] == signal.SIG_IGN:  # nohup
            del previous[signal.SIGHUP]

        on_terminal = self.console.is_terminal  # a terminal that is gone says that it is none

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def stop(signum: int, frame: object) -> None:
            self.signum = signum
            restore()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if signum == signal.SIGHUP and on_terminal:
                self.console.quiet = True  # writing to it would be an error

        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self, log: Log) -> None:
        """Writes the checkpoint of this step, if it does not exist yet, and deletes those no longer kept."""
        if self.step == 0:
            return
        self.lock.check()
        if self.step != self.saved_step:
            self._write_checkpoint(log)
        prune(self.run_dir, self.config.keep_last)

    def _write_checkpoint(self, log: Log) -> None:
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
        self.pace = self.pace.measured(self.step, self.elapsed)
        state = {
            "valid": None if self.valid is None else finite(self.valid),
            "elapsed": self.elapsed,
            "seconds_per_step": self.pace.seconds_per_step,
            "device": self.device.type,
            "data": self.batches.state_dict(),
        }
        save_checkpoint(self.run_dir, self.step, tensors, state, self.config, self.tokenizer.files())
        self.saved_step = self.step

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, None if there is none; says what is damaged, and which options have changed."""
        checkpoint, damaged = set_damaged_aside(self.run_dir)
        for line in damaged:
            self._say(line)
        if checkpoint is None:
            return None
        saved = read_config(checkpoint)
        config = self.config = _with_sizes(self.config, saved.model)
        self.tokenizer = read_tokenizer(checkpoint, saved)
        changed = config.differences(saved)
        if "tokenizer" in changed and get_tokenizer(config.tokenizer).name == self.tokenizer.name:
            del changed["tokenizer"]  # the same one, from elsewhere
        if changed:
            name, (now, then) = next(iter(changed.items()))
            raise ValueError(f"{name}: {self.run_dir} was trained with {then!r} and cannot be resumed with {now!r}")
        for option in dataclasses.fields(TrainConfig):
            now, then = (getattr(options, option.name) for options in (config.resolved(), saved))
            if now != then and option.name not in ("run_dir", "data", "tokenizer"):
                self._say(f"{option.name}: {now!r} from here on, {then!r} until now")
        return checkpoint

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        for module, name in ((self.model, "model"), (self.ema, "ema")):
            load_weights(module, read_tensors(checkpoint, name, None, self.device), checkpoint / f"{name}.safetensors")
        moments = read_tensors(checkpoint, "optimizer", None, self.device)
        indices = {name: index for index, (name, _) in enumerate(self.model.named_parameters())}
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            by_index.setdefault(indices[name], {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        rng = read_tensors(checkpoint, "rng", None)
        torch.set_rng_state(rng["cpu"])
        if state["device"] == self.device.type:
            self.generator.set_state(rng["generator"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        else:  # generators of different devices have nothing in common
            self.generator.manual_seed(self.config.seed + state["step"])
            self._say(f"was trained on {state['device']}: goes on with other random numbers")
        try:
            self.batches.load_state_dict(state["data"])
        except ValueError as error:
            raise ValueError(f"{checkpoint / 'state.json'}: data: {error}") from error
        self.step = self.saved_step = state["step"]
        self.elapsed, self.valid = state["elapsed"], state["valid"]
        self.pace = Pace(self.step, self.elapsed, state.get("seconds_per_step", 0.0))
        if (best := best_checkpoint(self.run_dir)) is not None:
            self.best = read_state(best)["valid"]
        self._say(f"resuming {self.run_dir} at step {self.step:,}")


@dataclass(frozen=True)
class Pace:
    """How long steps take, as it was measured at the last checkpoint.

    Attributes:
        step: the step of the last checkpoint.
        elapsed: seconds of training up to it.
        seconds_per_step: seconds that a step took before it, since the checkpoint before; 0 before the first one.
    """

    step: int = 0
    elapsed: float = 0.0
    seconds_per_step: float = 0.0

    def elapsed_at(self, step: int) -> float:
        """Seconds of training up to a step, as they are foreseen."""
        return self.elapsed + (step - self.step) * self.seconds_per_step

    def measured(self, step: int, elapsed: float) -> Pace:
        """The pace at a later step."""
        return Pace(step, elapsed, (elapsed - self.elapsed) / (step - self.step))


class Log:
    """The records of a run: ``metrics.jsonl`` and the curves of ``--log``, without those of steps to be taken again.

    Args:
        run_dir: folder of the run.
        step: the step that training goes on from; later records of an earlier process are dropped.
        config: options of the run.
    """

    def __init__(self, run_dir: Path, step: int, config: TrainConfig) -> None:
        path = self._path = run_dir / "metrics.jsonl"
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as kept:
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as old:
                    kept.writelines(line for line in old if _is_before(line, step))
        with naming(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        options = config.to_dict()
        with naming(run_dir):
            self.writers: list[Writer] = [
                WRITERS[name](run_dir, step, options) for name in config.log_names() if name != "none"
            ]

    def metrics(self, row: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        with naming(self._path):
            self._file.write(json.dumps(row) + "\n")

    def curves(self, step: int, values: dict[str, float | None]) -> None:
        """Adds a point to curves."""
        with naming(self._path):
            self._file.flush()
        with naming(self._path.parent):
            for writer in self.writers:
                writer.scalars(step, values)

    def texts(self, step: int, name: str, texts: list[str]) -> None:
        """Adds texts that the model wrote."""
        with naming(self._path.parent):
            for writer in self.writers:
                writer.texts(step, name, texts)

    def flush(self) -> None:
        """Waits until all lines are on the disk: a checkpoint must not be ahead of its records."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with naming(self._path.parent):
            for writer in self.writers:
                writer.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path.parent):
            for writer in self.writers:
                writer.close()
        with naming(self._path):
            self._file.close()


def _with_sizes(config: TrainConfig, sizes: ModelOptions) -> TrainConfig:
    """Options in which the sizes of the model that are not given are these."""
    given = {name: value for name, value in dataclasses.asdict(config.model).items() if value is not None}
    return dataclasses.replace(config, model=dataclasses.replace(sizes, **given))


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # the line that a killed process was writing
        return False
