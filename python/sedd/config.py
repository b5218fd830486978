"""The typed configuration of a training run: what ``sedd train`` takes, and what is saved as ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sedd.curves import WRITERS
from sedd.data import DataConfig
from sedd.learning_rate import LR_SCHEDULES
from sedd.model import PRESETS, ModelConfig
from sedd.objective import OBJECTIVES
from sedd.options import build, check_one_of, checked, renamed
from sedd.plain import read_plain
from sedd.schedule import SCHEDULES, get_schedule
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, has_cuda_kernels

__all__ = [
    "ModelOptions",
    "ProcessName",
    "TrainConfig",
    "autocast_dtype",
    "check_options",
    "flat",
    "load_config",
    "read_options",
    "resolve_device",
]

ProcessName = Literal["absorbing", "uniform", "hybrid"]

# What a resumed run may change: where it lives, when it ends, what it reports and keeps, and, after a divergence, the
# step size. Everything else would make it another run.
RESUMABLE = frozenset(
    {
        "run_dir",
        "device",
        "steps",
        "max_minutes",
        "lr",
        "lr_schedule",
        "lr_final",
        "lr_decay",
        "clip",
        "log",
        "log_every",
        "valid_every",
        "valid_blocks",
        "valid_draws",
        "valid_samples",
        "checkpoint_every",
        "keep_last",
        "data.num_proc",
        "data.cache_dir",
    }
)


@dataclass
class ModelOptions:
    """The size of the model: a preset, and what to change of it."""

    preset: str = "tiny"
    """Starting point: tiny (for a laptop), small or medium (the sizes of the SEDD paper)."""
    hidden_size: int | None = None
    """Width of the transformer; default: the preset's. So for every option below."""
    n_blocks: int | None = None
    """Number of transformer blocks."""
    n_heads: int | None = None
    """Number of attention heads; divides hidden_size."""
    cond_dim: int | None = None
    """Width of the noise-level conditioning."""
    length: int | None = None
    """Tokens in a block of text: what one sequence holds in training, and at most in sampling."""
    dropout: float | None = None
    """Dropout probability while training."""
    scale_by_sigma: bool | None = None
    """Divide the scores by exp(total noise) - 1 (absorbing process only), as the released models do."""
    time_conditioning: bool | None = None
    """Tell the network how much noise there is. Without, sampling calls it only where a token has changed."""
    hybrid_shift: bool | None = None
    """Start a hybrid process from the scores of unknown text, as scale_by_sigma does for an absorbing one."""

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        check_one_of("preset", self.preset, PRESETS)
        self.build()

    def build(self) -> ModelConfig:
        """Returns the model configuration that these options describe."""
        changed = {name: value for name, value in dataclasses.asdict(self).items() if name != "preset"}
        return dataclasses.replace(
            PRESETS[self.preset], **{name: value for name, value in changed.items() if value is not None}
        )


@dataclass
class TrainConfig:
    """Options of a training run."""

    run_dir: str = "runs/default"
    """Folder of the run: configuration, metrics, TensorBoard scalars and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on"""
    tokenizer: str = "bytes"
    """How text becomes tokens: bytes (256 values), text8 (a-z and space), gpt2 (50,257 word pieces), or a
    tokenizer.json of the tokenizers library: the file, a folder or a repository of the Hugging Face hub. The run keeps
    a copy."""
    init: str | None = None
    """Fine-tuning: start from the weights of this model (a run, folder, file or repository, as for sedd sample). The
    sizes of the model are then its own. --resume does not read it again."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """Size of the model"""
    process: ProcessName = "absorbing"
    """How noise corrupts a token: into MASK, into any token, or a mixture of both."""
    uniform_fraction: float = 0.1
    """For process hybrid: the part of the noise that replaces a token by a random one."""
    schedule: str = "loglinear"
    """How the total noise grows with time: loglinear, geometric, cosine or polynomial."""
    schedule_params: dict[str, float] = field(default_factory=dict)
    """Parameters of the schedule, for example --schedule_params.eps 1e-4."""
    objective: str = "score_entropy"
    """The training loss."""
    fused_head: bool = True
    """Make the loss from the output head tile by tile, without log-scores of the whole vocabulary; false to compare."""
    antithetic: bool = True
    """Spread the times of a batch evenly over (0, 1] in place of independent draws: less noise in the loss."""
    batch_size: int = 8
    """Sequences in one forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step; a step sees batch_size x accumulate sequences."""
    steps: int = 20_000
    """Stop after this many optimiser steps."""
    max_minutes: float | None = None
    """Stop cleanly after this many minutes of training, counting those before a --resume."""
    lr: float = 1e-3
    """Learning rate of AdamW after the warm-up: the peak of lr_schedule."""
    lr_schedule: str = "constant"
    """How the learning rate goes on from its peak to the end of the run (by steps or max_minutes, whichever is nearer):
    constant; linear or cosine, which fall from the start; or wsd (warm-up, stable, decay), which falls at the end."""
    lr_final: float = 0.0
    """Learning rate at the end of the run, as a part of lr (not for lr_schedule constant)."""
    lr_decay: float = 0.2
    """For lr_schedule wsd: length of the decay, as a part of the run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, for example --betas 0.9,0.98."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    ema: float = 0.995
    """Decay of the moving average of the weights (the weights that are validated and sampled from); it starts lower,
    min(ema, (1+n)/(10+n)) at step n."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the model: bf16 autocast or float32. auto: bf16 where the GPU or CPU has instructions for it."""
    compile: bool = False
    """Run the network through torch.compile: the first steps take longer, the others less."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    seed: int = 0
    """Seed of everything random: initial weights, order of the data, times, noise, dropout."""
    log_every: int = 10
    """Optimiser steps between points of the training curves."""
    log: str = "tensorboard"
    """Where curves and samples go besides metrics.jsonl: tensorboard, wandb (Weights & Biases, pip install wandb),
    both as tensorboard,wandb, or none."""
    valid_every: int = 1000
    """Steps between validations."""
    valid_blocks: int = 64
    """Blocks of the validation split that a validation scores, always the same ones."""
    valid_draws: int = 8
    """Noise levels drawn for each of them, always the same ones."""
    valid_samples: int = 1
    """Texts that the averaged weights write at each validation, for TensorBoard and Weights & Biases to show."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. A validation better than all before is saved too."""
    keep_last: int = 2
    """Checkpoints kept, besides the best one."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        for name in self.log_names():
            check_one_of("log", name, [*WRITERS, "none"])
        for name in (
            *("batch_size", "accumulate", "steps", "log_every", "valid_every", "valid_blocks", "valid_draws"),
            *("checkpoint_every", "keep_last"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "eps", "clip", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("lr_final", "lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed", "valid_samples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name, values in (("betas", self.betas), ("ema", (self.ema,))):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not 0 <= self.uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction: expected a number in [0, 1], got {self.uniform_fraction}")
        try:
            with renamed({name: f"schedule_params.{name}" for name in self.schedule_params}):
                get_schedule(self.schedule, **self.schedule_params)
        except TypeError as error:
            raise ValueError(f"schedule_params: {error}") from error

    def log_names(self) -> list[str]:
        """Returns the names in ``log``."""
        return [name.strip() for name in self.log.split(",")]

    def make_process(self, vocab_size: int) -> RankOne:
        """Returns the forward process over a vocabulary of ``vocab_size`` tokens (MASK not counted)."""
        if self.process == "hybrid":
            return Hybrid(vocab_size, self.uniform_fraction)
        return (Absorbing if self.process == "absorbing" else Uniform)(vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON-ready values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def resolved(self) -> TrainConfig:
        """Returns the same configuration with presets and default parameters written out.

        A checkpoint keeps this one, so that it loads although a later version may have other presets.
        """
        model = ModelOptions(preset=self.model.preset, **dataclasses.asdict(self.model.build()))
        schedule = get_schedule(self.schedule, **self.schedule_params)
        return dataclasses.replace(self, model=model, schedule_params=dict(vars(schedule)))

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Returns the options, by dotted name, that differ in ``other`` and that a resumed run may not change."""
        mine, theirs = flat(self.resolved().to_dict()), flat(other.resolved().to_dict())
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if name not in RESUMABLE and mine.get(name) != theirs.get(name)
        }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of dictionaries in one another by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return leaves


def resolve_device(name: str) -> torch.device:
    """Returns the device of that name; ``"auto"`` is the GPU if there are one and kernels for it, else the CPU.

    Raises:
        ValueError: no such device on this machine, or no kernels for it in this build.
    """
    if name == "auto":
        name = "cuda" if has_cuda_kernels and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N (the kernels have no other); got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and not has_cuda_kernels:
        raise ValueError(f"device: {name!r} asked for, but this build of sedd_ext has no CUDA kernels; use cpu")
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast on ``device`` for auto, bf16 or fp32; None for float32 without autocast."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    # without its own instructions a CPU takes longer for bfloat16 than for float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def check_options(options: Any, positive: Sequence[str], outputs: Sequence[str] = ()) -> None:
    """Refuses what could only fail after the work is done.

    Args:
        options: a dataclass.
        positive: names of its fields that must be at least 1, or None.
        outputs: names of its fields that are files to be written, or None.

    Raises:
        ValueError: a number is too small.
        FileNotFoundError: there is no folder to write a file to.
        IsADirectoryError: there is a folder of that name.
        PermissionError: nothing may be written there.
    """
    for name in positive:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    for name in outputs:
        if getattr(options, name) is None:
            continue
        path = Path(getattr(options, name))
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: cannot write {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"{name}: cannot write {path}: it is a folder; give the name of a file")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{name}: cannot write {path}: the folder {path.parent} may not be written to")


def check_choice(temperature: float, top_p: float) -> None:
    """Refuses what no sampler takes.

    Raises:
        ValueError: ``temperature`` is not positive and finite, or ``top_p`` not in (0, 1].
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")


def load_config(path: Path | str) -> TrainConfig:
    """Reads a configuration that a run saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :func:`read_options`, or an option is out of range.
    """
    values = read_options(path)
    try:
        return build(TrainConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: not the options of a run: {error}") from error


def read_options(path: Path | str) -> dict[str, Any]:
    """Reads training options from a JSON or YAML file; the file may have some of them only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read (:func:`sedd.plain.read_plain`), or an option is unknown or of another type.
    """
    options = read_plain(path)
    if "graph" in options and "process" not in options:  # its name in runs of earlier versions
        options["process"] = options.pop("graph")
    try:
        return checked(TrainConfig, options)
    except ValueError as error:
        raise ValueError(f"{path}: not the options of a run: {error}") from error
