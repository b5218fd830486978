"""A training run in its folder: records, validation, checkpoints, signals and exact resumption.

Several processes, started by torchrun, train one model together. The first one writes the folder and the messages; if
the model is divided, each process writes its parts of the checkpoints.

The training loss is the mean over sequences of the objective, divided by the length of a sequence: nats per token. For
most objectives it estimates the likelihood bound, without its prior term.

The folder contains ``config.json``, ``metrics.jsonl`` (one JSON object per line: loss and gradient norm of every step,
bound of every validation; no clock times, so two runs can be compared with ``cmp``), ``tensorboard/``,
``checkpoints/``, and ``eval/`` for evaluations that ``sedd report`` shows.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sedd.adapted import AdaptedTransformer, make_network
from sedd.config import TrainConfig
from sedd.data.corpora import CORPORA
from sedd.data.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer
from sedd.diffusion.diffusion import Diffusion, Score
from sedd.diffusion.likelihood import elbo
from sedd.diffusion.objectives import get_objective
from sedd.diffusion.samplers import sample
from sedd.diffusion.schedule import get_schedule
from sedd.files import RunLock, finite, naming, write_json, write_text
from sedd.progress import is_interactive, progress_bar
from sedd.training.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    prune,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
    set_damaged_aside,
)
from sedd.training.init import Pretrained, check_causal, checked_init, with_sizes, with_tokenizer
from sedd.training.log import Log
from sedd.training.parallel import World
from sedd.training.saving import Saver, save_checkpoint
from sedd.training.shards import staged
from sedd.training.signals import StopSignals
from sedd.training.state import TrainState
from sedd.training.weights import load_weights

__all__ = ["NonFiniteError", "Outcome", "Run"]

SAMPLE_STEPS = 64
"""Reverse steps of the texts that a validation writes."""
TENSOR_FILES = ("model", "ema", "optimizer")
"""The tensor files of a checkpoint."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: optimiser steps taken.
        signum: the signal that stopped it, None if the run is finished.
        ended: for a finished run, which limit it reached and which option continues it; otherwise empty.
    """

    step: int
    signum: int | None
    ended: str = ""


@dataclass
class _Meter:
    """When training started or was last reported, for speed and remaining time."""

    logged_at: float
    logged_step: int
    elapsed: float
    share: float


class Run:
    """Trains one model in one run folder, which no other process may write to until :meth:`train` has ended.

    Args:
        config: options of the run.
        resume: continue from the last checkpoint of ``config.run_dir``. The following steps are bit for bit the same as
            without a break (on the same machine and with as many threads). If the run ends by time and has a
            learning-rate schedule, this holds up to the next checkpoint, where the learning rate is adapted to the
            measured time of a step. If the last checkpoint is damaged, the one before it is used.
        console: for progress and messages; standard error if None.
        lock: the lock of ``config.run_dir``, if the caller holds it already. Of several processes, the first one needs
            it.
        load_init: reads the model that ``config.init`` names: :func:`sedd.hub.read_init`, or
            :meth:`sedd.hub.SEDD.from_pretrained`.

    Raises:
        BlockingIOError: another process trains in the run folder.
        FileExistsError: the run folder contains checkpoints and ``resume`` is False.
        FileNotFoundError: there is no run to resume.
        ValueError: an option or the data is invalid, a resumed run has a changed option that it must keep, or no
            checkpoint is whole.
        OSError: the run folder cannot be written to.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        console: Console | None = None,
        lock: RunLock | None = None,
        load_init: Callable[[str], Pretrained] | None = None,
    ) -> None:
        self.config = config
        self.load_init = load_init
        self.console = console or Console(stderr=True)
        self.run_dir = Path(config.run_dir)
        if resume and not (self.run_dir / "config.json").exists():
            raise FileNotFoundError(f"run_dir: expected a run to resume, got {self.run_dir}, which has no config.json")
        self.world = World(config.device, config.parallel)
        if not self.world.first:
            self.console = Console(quiet=True)
        self.lock = (lock or RunLock(self.run_dir)) if self.world.first else None
        try:
            self._set_up(resume)
        except BaseException:
            if self.lock is not None:
                self.lock.release()
            raise

    def _set_up(self, resume: bool) -> None:
        given = self.config
        found = self.world.agreed([path.name for path in list_checkpoints(self.run_dir)])
        if found and not resume:
            raise FileExistsError(
                f"run_dir: {self.run_dir} already contains a run (at {found[-1]}); continue it with "
                "--resume, or start another with --run_dir NEW"
            )
        checkpoint, begin = self._last_checkpoint(), None
        if checkpoint is None:
            begin = self._begin()
            kept = self.run_dir / TOKENIZER_FILES[0]
            again = resume and self.config.tokenizer not in TOKENIZERS and kept.is_file()
            own = None if begin is None or self.config.tokenizer == given.tokenizer else begin.tokenizer
            self.tokenizer = (
                own if isinstance(own, Tokenizer) else get_tokenizer(str(kept) if again else self.config.tokenizer)
            )
        self._make_state(begin)
        self.best: float | None = None  # the lowest validation bound so far
        self.saved_step: int | None = None
        self.signals = StopSignals(self.console)
        self.saver = Saver()
        self.pending: list[Tensor] = []  # (loss, gradient norm) of the steps not yet written
        if checkpoint is not None:
            self._restore(checkpoint)
        elif resume:
            self._say(f"{self.run_dir} has no checkpoint yet: starting at step 0")
        if not self.world.first:
            return
        with naming(self.run_dir):
            (self.run_dir / "eval").mkdir(exist_ok=True)
        for name, text in self.tokenizer.files().items():
            if not found or not (self.run_dir / name).exists():
                write_text(self.run_dir / name, text)
        # the given options: the sizes of a resumed run may come from its checkpoint
        given = dataclasses.replace(given, tokenizer=self.config.tokenizer)  # it may be that of --init
        write_json(self.run_dir / "config.json", (self.config if checkpoint is None else given).to_dict())

    def _begin(self) -> Pretrained | None:
        """The model to start from, whose tokeniser the run takes; None without ``--init``."""
        if self.config.init is None:
            return None
        if self.load_init is None:
            raise ValueError("init: expected load_init, which reads the model, for example sedd.hub.read_init")
        begin = self.load_init(self.config.init)
        self.config = with_tokenizer(self.config, begin)
        return begin

    def _make_state(self, begin: Pretrained | None) -> None:
        """Loads the data and makes the model, from the weights of another one if it is given."""
        config = self.config = self.config if begin is None else checked_init(self.config, begin, self.tokenizer)
        check_causal(config)
        sizes = config.model.build()
        if not is_interactive(self.console):
            self._say(f"preparing the {config.corpus} of {config.data.source}")
        with self.world.in_turn():
            self.corpus = CORPORA[config.corpus](config.data, self.tokenizer, sizes.length)
        config = self.config = dataclasses.replace(config, model=config.model.of_shape(self.corpus.shape))
        sizes = config.model.build()
        self.valid_blocks = self.corpus.valid(config.valid_blocks)
        self.valid_labels: Tensor | None = None
        if sizes.classes:
            if sizes.classes != self.corpus.classes:
                raise ValueError(
                    f"model.classes: expected {self.corpus.classes}, the classes of the data, got {sizes.classes}"
                )
            self.valid_labels = self.corpus.labels("validation", config.valid_blocks)

        torch.manual_seed(config.seed)
        process = config.make_process(self.corpus.vocab_size)
        schedule = get_schedule(config.schedule, **config.schedule_params)
        objective = get_objective(config.objective, **config.objective_params)
        parameterization = objective.parameterization(sizes)
        network = make_network(sizes, process.dim)
        if isinstance(parameterization, Score):
            parameterization.initialize(network.output_layer.linear.bias, process, schedule)
        if begin is not None:
            tensors = begin.state_dict()
            if begin.process is None and isinstance(network, AdaptedTransformer):
                # without --tokenizer and tokenizer.json, nothing says what the rows are
                known = begin.tokenizer is not None or config.tokenizer != TrainConfig.tokenizer
                tensors = network.with_vocabulary(tensors, known=known)
            load_weights(network, tensors, Path(str(config.init)))
        diffusion = Diffusion(network, process, schedule, objective, parameterization)
        mine: Any = diffusion.schedule
        theirs: Any = None if begin is None else begin.schedule
        if isinstance(mine, nn.Module) and isinstance(theirs, type(mine)):  # learned schedules
            mine.load_state_dict(theirs.state_dict())
        diffusion.to(self.world.device)
        batches = self.corpus.labelled_batches if sizes.classes else self.corpus.batches
        self.state = TrainState(
            config, diffusion, batches(config.batch_size * self.world.data_size, seed=config.seed), self.world
        )

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Trains until the steps or the minutes are used up, or SIGTERM, SIGHUP or Ctrl-C; the last state is saved.

        Raises:
            NonFiniteError: the loss or the gradient of a step is not finite. Nothing is saved after the last good
                checkpoint.
            OSError: a file cannot be written.
        """
        state, config = self.state, self.config
        started, before = time.monotonic(), state.elapsed
        with (
            self.lock or nullcontext(),
            self.world.together(),
            self.signals,
            self.saver,
            Log(self.run_dir if self.world.first else None, state.step, config) as log,
            progress_bar(self.console) as show,
        ):
            meter = _Meter(started, state.step, before, self._share())
            while True:
                # the processes stop together, and by one clock
                seconds, number = self.world.largest([time.monotonic() - started, self.signals.signum or 0])
                state.elapsed = before + seconds
                signum = int(number) or None
                share = self._share()
                done = share >= 1 or signum is not None
                if signum is not None:  # the handler cannot print: it may have interrupted another message
                    self._say(f"{signal.Signals(signum).name}: saving step {state.step:,} and stopping")
                save = self._due(config.checkpoint_every) or self._pace_is_old()
                due = save or self._due(config.log_every) or self._due(config.valid_every)
                if self.pending and (done or due):
                    show(share, self._report(log, meter, share))
                better, pause = False, time.monotonic()
                if signum is None and state.valid is None and (done or self._due(config.valid_every)):
                    better = self._validate(log)
                if better or done or save:
                    self._save(log, last=done)
                meter.logged_at += time.monotonic() - pause  # tokens per second are those of training alone
                if done:
                    return Outcome(state.step, signum, "" if signum is not None else self._ended())
                self.pending.append(state.train_step())

    def _report(self, log: Log, meter: _Meter, share: float) -> str:
        """Writes the pending steps and the speed; returns the line that shows them."""
        state = self.state
        loss = self._write_steps(log)
        seconds, steps = time.monotonic() - meter.logged_at, state.step - meter.logged_step
        meter.logged_at, meter.logged_step = time.monotonic(), state.step
        per_step = state.sequences_per_step * self.valid_blocks[0].numel()
        speed = steps * per_step / seconds
        log.curves(state.step, {"train/tokens_per_second": speed, "train/tokens": state.step * per_step})
        left = (1 - share) * (state.elapsed - meter.elapsed) / max(share - meter.share, 1e-9)
        return (
            f"step {state.step:,}  loss {loss:.3f} ({loss / math.log(2):.3f} bits/token)  "
            f"{speed:,.0f} tok/s  {left / 60:.1f} min left"
        )

    def _due(self, every: int) -> bool:
        return self.state.step > 0 and self.state.step % every == 0

    def _share(self) -> float:
        """The part of the run that is done, 0 to 1, by steps or by minutes, whichever is more."""
        minutes = self.config.max_minutes
        return min(
            1.0, max(self.state.step / self.config.steps, self.state.elapsed / (60 * minutes) if minutes else 0.0)
        )

    def _pace_is_old(self) -> bool:
        """Whether a run that ends by time must measure its pace again, which happens at 20 checkpoints of a run."""
        minutes = self.config.max_minutes
        if minutes is None or self.config.lr_schedule == "constant" or self.state.step in (0, self.saved_step):
            return False
        return self.state.elapsed - self.state.pace.elapsed >= 60 * minutes / 20

    def _ended(self) -> str:
        """Why the run is finished, and how to continue it; empty if it is not."""
        steps, minutes = self.config.steps, self.config.max_minutes
        reasons = []
        if self.state.step >= steps:
            reasons.append(f"all {steps:,} steps are taken (continue with --resume --steps N, N above {steps})")
        if minutes is not None and self.state.elapsed >= 60 * minutes:
            reasons.append(
                f"the {minutes:g} minutes are used up (continue with --resume --max_minutes M, M above {minutes:g})"
            )
        return ", and ".join(reasons)

    def _write_steps(self, log: Log) -> float:
        """Writes the pending steps; returns their mean loss. The only place that waits for the device."""
        values: list[tuple[float, float]] = self.world.mean(torch.stack(self.pending)).tolist()
        first = self.state.step - len(values) + 1
        self.pending.clear()
        for step, (loss, norm) in enumerate(values, first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.saver.finish()
                saved = list_checkpoints(self.run_dir)
                what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
                raise NonFiniteError(
                    f"step {step}: the {what}; stopped, and nothing was saved since "
                    f"{saved[-1] if saved else 'the start'}. Continue from there by --resume with a smaller --lr or "
                    "--clip, or start again with another --precision or --seed"
                )
            log.metrics({"step": step, "loss": loss, "grad_norm": norm})
        mean = sum(loss for loss, _ in values) / len(values)
        mean_norm = sum(norm for _, norm in values) / len(values)
        log.curves(
            self.state.step, {"train/nats_per_token": mean, "train/grad_norm": mean_norm, "train/lr": self.state.lr}
        )
        return mean

    def _validate(self, log: Log) -> bool:
        """Scores the averaged weights; returns whether they are the best so far."""
        state = self.state
        samples: list[Any] = []
        with self.world.gathered(state.ema):
            result = elbo(
                state.ema,
                self.valid_blocks,
                draws=self.config.valid_draws,
                n_bytes=self.corpus.n_bytes(self.valid_blocks),
                labels=self.valid_labels,
                batch_size=self.config.batch_size,
                # the same noise at each validation: values are comparable, and training's random numbers do not change
                generator=torch.Generator(state.device).manual_seed(self.config.seed),
                autocast_dtype=state.autocast_dtype,
            )
            if self.config.valid_samples and self.world.agreed(bool(log.writers)):
                samples = self._write_samples()
        state.valid = self.world.agreed(result.nats_per_token)
        better = math.isfinite(state.valid) and (self.best is None or state.valid < self.best)
        self.best = state.valid if better else self.best
        error = result.standard_error
        log.metrics(
            {
                "step": state.step,
                "valid_nats_per_token": finite(state.valid),
                "valid_standard_error": finite(error),
            }
        )
        unit = self.corpus.unit
        log.curves(state.step, {"valid/nats_per_token": state.valid, f"valid/bits_per_{unit}": result.bits_per_byte})
        if samples:
            log.samples(state.step, "valid/samples", samples)
        self._say(
            f"step {state.step:,}, {state.elapsed / 60:.1f} min: validation {state.valid:.4f} ± {error:.4f} nats/token"
            f", {result.bits_per_byte:.4f} bits/{unit}{', the best so far' if better else ''}"
        )
        return better

    def _write_samples(self) -> list[Any]:
        """Texts or pictures of the averaged weights, always from the same random numbers; each class in turn."""
        classes = self.corpus.classes if self.valid_labels is not None else 0
        tokens = sample(
            self.state.ema,
            batch=self.config.valid_samples,
            length=self.valid_blocks.shape[1],
            steps=SAMPLE_STEPS,
            generator=torch.Generator(self.state.device).manual_seed(self.config.seed),
            device=self.state.device,
            autocast_dtype=self.state.autocast_dtype,
            labels=torch.arange(self.config.valid_samples) % classes if classes else None,
        )
        return [self.corpus.show(row) for row in tokens.cpu()]

    def _say(self, message: str) -> None:
        try:
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)
        except OSError:  # the terminal was closed; training continues
            self.console.quiet = True

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self, log: Log, last: bool) -> None:
        """Starts to write the checkpoint of this step, if it does not exist yet.

        Waits for the checkpoint before, and for this one if it is the ``last``.
        """
        if self.state.step == 0:
            return
        started = time.monotonic()
        self.saver.wait(self.world.group)
        if self.lock is not None:
            self.lock.check()
        if self.state.step != self.saved_step:
            self._start_checkpoint(log)
        elif self.world.first:
            prune(self.run_dir, self.config.keep_last)
        if last:
            self.saver.wait(self.world.group)
        curves: dict[str, float | None] = {"time/checkpoint_wait_seconds": time.monotonic() - started}
        if self.saver.seconds > 0:  # of the last one that was waited for
            curves["time/checkpoint_write_seconds"] = self.saver.seconds
        log.curves(self.state.step, curves)

    def _start_checkpoint(self, log: Log) -> None:
        state = self.state
        log.flush()
        state.pace = state.pace.measured(state.step, state.elapsed)
        values = state.state_dict()
        tensors = {name: values.pop(name) for name in TENSOR_FILES}
        values["valid"] = None if state.valid is None else finite(state.valid)
        if self.world.first or self.world.writers is not None:
            self.saver.start(partial(self._write_checkpoint, values.pop("step"), staged(tensors), values))
        self.saved_step = state.step

    def _write_checkpoint(self, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Writes a checkpoint and deletes those no longer kept; in a thread."""
        texts, writers = self.tokenizer.files(), self.world.writers
        save_checkpoint(self.run_dir, step, tensors, values, self.config, texts, writers)
        if self.world.first:
            prune(self.run_dir, self.config.keep_last)

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint to resume, None if there is none. Reports damaged checkpoints and changed options."""
        name = None
        if self.world.first:
            whole, damaged = set_damaged_aside(self.run_dir)
            for line in damaged:
                self._say(line)
            name = None if whole is None else whole.name
        name = self.world.agreed(name)
        if name is None:
            return None
        checkpoint = self.run_dir / "checkpoints" / name
        saved = read_config(checkpoint)
        config = self.config = with_sizes(self.config, saved.model)
        if config.init is not None and config.tokenizer == TrainConfig.tokenizer:
            config = self.config = dataclasses.replace(config, tokenizer=saved.tokenizer)
        self.tokenizer = read_tokenizer(checkpoint, saved)
        changed = config.differences(saved)
        if "tokenizer" in changed and get_tokenizer(config.tokenizer).name == self.tokenizer.name:
            del changed["tokenizer"]  # the same tokeniser under another path
        if changed:
            name, (now, then) = next(iter(changed.items()))
            raise ValueError(f"{name}: {self.run_dir} was trained with {then!r} and cannot be resumed with {now!r}")
        for option in dataclasses.fields(TrainConfig):
            now, then = (getattr(options, option.name) for options in (config.resolved(), saved))
            if now != then and option.name not in ("run_dir", "data", "tokenizer"):
                self._say(f"{option.name}: {now!r} from here on, {then!r} until now")
        return checkpoint

    def _restore(self, checkpoint: Path) -> None:
        state = self.state
        tensors = {name: read_tensors(checkpoint, name, None, state.device, state.like(name)) for name in TENSOR_FILES}
        saved, then = read_state(checkpoint), read_config(checkpoint)
        saved.setdefault("sequences_per_step", then.batch_size * then.accumulate)  # runs of earlier versions
        if not self.state.load_state_dict({**saved, **tensors}, checkpoint):
            self._say(f"was trained on {saved['device']}: continues with other random numbers")
        self.saved_step = self.state.step
        if (best := best_checkpoint(self.run_dir)) is not None:
            self.best = read_state(best)["valid"]
        self._say(f"resuming {self.run_dir} at step {self.state.step:,}")
