"""``sedd train``."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sedd.commands.command import Argument, Command
from sedd.config import TrainConfig, read_options
from sedd.data.options import DataConfig
from sedd.diffusion.objectives import OBJECTIVES
from sedd.diffusion.schedule import SCHEDULES, default_numbers
from sedd.files import RunLock
from sedd.hints import program
from sedd.hub.init import read_init
from sedd.options import build, prefixed
from sedd.plain import merged
from sedd.progress import console
from sedd.training.checkpoint import best_checkpoint, list_checkpoints
from sedd.training.parallel import is_first
from sedd.training.run import Run

__all__ = ["COMMAND"]

ABOUT = """Train a model on text.

Without options, trains a small model on the sources and documentation of this Python installation. The run folder
contains config.json, metrics.jsonl, TensorBoard scalars and checkpoints. Ctrl-C, SIGTERM and SIGHUP save a checkpoint
and stop; --resume continues the run, with results bitwise identical to those of an uninterrupted run. Only one process
at a time can train in a run folder.

Without a GPU, training uses all CPUs available to the process, within the CPU quota of a container. If other processes
use them too, set OMP_NUM_THREADS to the number of free CPUs. sedd sets GOMP_SPINCOUNT so that a waiting thread occupies
its CPU for only about 50 microseconds, unless you set GOMP_SPINCOUNT, OMP_WAIT_POLICY or a KMP_ variable.

Lists are written as 0.9,0.98. Option names may contain dashes instead of underscores: --run-dir is --run_dir.

examples:
  sedd train
  sedd train --data.source book.txt --run_dir runs/book --max_minutes 30
  sedd train --data.source Salesforce/wikitext --data.subset wikitext-103-raw-v1 --tokenizer gpt2 \\
      --model.preset small --batch_size 32 --accumulate 16 --lr 3e-4 --warmup 2500 --ema 0.9999 --run_dir runs/small
      the settings of the paper
  sedd train --process uniform --schedule geometric --schedule_params.sigma_max 20 --run_dir runs/uniform
  sedd train --config runs/book/config.json --lr 1e-3 --run_dir runs/book2
  sedd train --run_dir runs/book --resume --steps 40000
  sedd train --init runs/book --data.source mine.txt --run_dir runs/mine --lr 3e-4 --lr_schedule linear --steps 5000
  sedd train --init openai-community/gpt2 --objective md4 --init_anneal 2000 --data.source mine.txt --lr 3e-4 \\
      --run_dir runs/gpt2
      turns GPT-2 into a diffusion model
  sedd train --corpus images --data.source digits --objective md4 --run_dir runs/digits
  sedd train --tokenizer tokenizer.json --data.source book.txt --lr_schedule wsd --max_minutes 60 --run_dir runs/pieces
  tensorboard --logdir runs
"""


def train(given: Mapping[str, Any], config: Sequence[str], resume: bool) -> int:
    """Trains a model. Returns 0, or 128 + the number of the signal that stopped it.

    Args:
        given: options of the command line by name, converted to the types of their fields.
        config: files with other options; options of the command line take precedence.
        resume: whether to continue the run in ``run_dir``.
    """
    files = list(config)
    run_dir = _merged(files, given).get("run_dir", TrainConfig.run_dir)
    saved = Path(run_dir) / "config.json"
    # torchrun starts all processes again if one has ended
    resume = resume or (int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0 and saved.is_file())
    if resume and not saved.is_file():
        raise FileNotFoundError(f"run_dir: expected a run to resume, got {run_dir}, which has no config.json")
    if not resume:
        options = build(TrainConfig, _merged(files, given))  # before the folder is created
    with RunLock(Path(run_dir)) if is_first() else nullcontext() as lock:
        if resume:
            # options given now override those of the run
            options = dataclasses.replace(build(TrainConfig, _merged([saved, *files], given)), run_dir=run_dir)
        return _train(options, resume, lock)


def _merged(files: Sequence[Path | str], given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        values = merged(values, read_options(file))
    return merged(values, given)


def _train(options: TrainConfig, resume: bool, lock: RunLock | None) -> int:
    out = console(stderr=True)
    out.quiet = not is_first()
    with prefixed("data.", DataConfig):
        run = Run(options, resume=resume, console=out, lock=lock, load_init=read_init)
    state = run.state
    parameters = sum(p.numel() for p in state.diffusion.parameters())
    model = f"{options.model.preset} model" if options.init is None else f"model initialised from {options.init}"
    noise = "no noise (autoregressive)" if options.model.causal else f"{options.process} noise"
    out.print(
        f"{model}, {parameters / 1e6:.2f} M parameters, {noise}, "
        f"{run.corpus.describe()}, {state.device} "
        f"({str(state.autocast_dtype or torch.float32)[6:]}){_processes(run)}; output folder: {run.run_dir}"
    )
    first = state.step
    with prefixed("data.", DataConfig):  # a stream is read during training
        outcome = run.train()
    best = best_checkpoint(run.run_dir)
    kept = list_checkpoints(run.run_dir)
    last = f"last checkpoint: {kept[-1] if kept else 'none yet'}"
    sedd, folder = program(), shlex.quote(str(run.run_dir))
    if outcome.signum is None:
        finished = "nothing to do: the run was already finished" if first == outcome.step else "finished"
        out.print(f"\n{finished} at step {outcome.step:,}: {outcome.ended}; {last}")
    else:
        name = signal.Signals(outcome.signum).name
        out.print(f"\nstopped by {name} at step {outcome.step:,} of {options.steps:,}, not finished; {last}")
        out.print(f"  {sedd} train --run_dir {folder} --resume    resumes the run")
    if best is not None:
        out.print(f"best checkpoint: {best} ({run.best:.4f} nats per token)")
    live = " --live" if len(run.corpus.shape) == 1 else ""
    out.print(f"  {f'{sedd} sample {folder}{live}':40}  samples {options.corpus}")
    out.print(f"  {f'{sedd} eval perplexity {folder}':40}  measures the likelihood of {options.corpus}")
    return 0 if outcome.signum is None else 128 + outcome.signum


def _processes(run: Run) -> str:
    """The number of processes and how the model is divided; empty for one process."""
    return f", {run.world.size} processes ({run.config.parallel.data})" if run.world.size > 1 else ""


def _params(noun: str, registry: Mapping[str, type]) -> dict[str, str]:
    """Help for the parameters of all classes of a registry, by name of the parameter."""
    found: dict[str, list[str]] = {}
    for name, kind in registry.items():
        for parameter, default in default_numbers(kind).items():
            found.setdefault(parameter, []).append(f"{name} (default: {default:g})")
    return {name: f"Parameter of the {noun} {' and of '.join(kinds)}." for name, kinds in found.items()}


COMMAND = Command(
    "train",
    ABOUT,
    train,
    TrainConfig,
    arguments=(
        Argument(
            "--config",
            "Read options from a JSON or YAML file, such as the config.json of a run. Options on the command line "
            "take precedence.",
            {"action": "append", "default": []},
        ),
        Argument("--resume", "Continue the run in --run_dir.", {"action": "store_true"}),
    ),
    keys={
        "schedule_params": partial(_params, "schedule", SCHEDULES),
        "objective_params": partial(_params, "objective", OBJECTIVES),
    },
    reads_files=True,
)
