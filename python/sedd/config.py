"""The typed configuration of a training run: what ``sedd train`` takes, and what is saved as ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sedd.data.corpora import CORPORA
from sedd.data.options import DataConfig
from sedd.diffusion.diffusion import Objective
from sedd.diffusion.objectives import OBJECTIVES, check_adapted, get_objective, objective_params
from sedd.diffusion.schedule import SCHEDULES, get_schedule, schedule_params
from sedd.network import PRESETS, ModelConfig
from sedd.options import build, check_one_of, checked, renamed
from sedd.plain import read_plain
from sedd.training.curves import WRITERS
from sedd.training.learning_rate import LR_SCHEDULES
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

__all__ = [
    "ModelOptions",
    "ParallelOptions",
    "ProcessName",
    "TrainConfig",
    "flat",
    "load_config",
    "read_options",
]

ProcessName = Literal["absorbing", "uniform", "hybrid"]

# What a resumed run may change: where it lives, how its batches are divided and computed, when it ends, what it
# reports and keeps, and, after a divergence, the step size. Everything else would make it another run.
RESUMABLE = frozenset(
    {
        "run_dir",
        "device",
        "batch_size",
        "accumulate",
        "parallel.data",
        "parallel.shard",
        "parallel.vocab",
        "activation_checkpointing",
        "head_capacity",
        "steps",
        "max_minutes",
        "lr",
        "lr_schedule",
        "lr_final",
        "lr_decay",
        "clip",
        "report_to",
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
    """Sizes to start from: tiny (for a laptop), small or medium (those of the SEDD paper), or large (1.45 billion
    parameters)."""
    hidden_size: int | None = None
    """Width of the transformer. Default, here and below: the preset's."""
    n_blocks: int | None = None
    """Number of transformer blocks."""
    n_heads: int | None = None
    """Number of attention heads; divides hidden_size."""
    cond_dim: int | None = None
    """Width of the noise-level conditioning."""
    length: int | None = None
    """Tokens in a block of text: the length of training sequences, and the default length of samples."""
    dropout: float | None = None
    """Dropout probability while training."""
    scale_by_sigma: bool | None = None
    """For process absorbing: divide the scores by exp(total noise) - 1, as the released models do."""
    time_conditioning: bool | None = None
    """Give the network the noise level. If false, sampling calls it only for sequences whose tokens have changed."""
    hybrid_shift: bool | None = None
    """For process hybrid: what scale_by_sigma is for absorbing."""
    causal: bool | None = None
    """Let each position see only those before it. The default, and the only possible value, is what the objective
    needs: true for autoregressive, false for the others."""
    shape: tuple[int, ...] | None = None
    """Rows, columns and channels of images; not needed: those of the data."""
    positions: Literal["rotary", "learned"] | None = None
    """With rotary, attention depends on distances (for images in rows and columns); with learned, each position has an
    embedding."""
    classes: int | None = None
    """Condition the model on the class of an image: the number of classes of the data."""
    trunk: dict[str, Any] = field(default_factory=dict)
    """The configuration of the model of transformers that init has adapted; not needed: that of init."""
    shift: bool | None = None
    """With init of a model of transformers: read the output of a position from the position before it, which predicts
    the next token in a causal model. Default: true for a causal model."""

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        check_one_of("preset", self.preset, PRESETS)
        self.build()

    def given(self) -> dict[str, Any]:
        """Returns the values that are given, without the preset."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "preset"}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def build(self) -> ModelConfig:
        """Returns the model configuration that these options describe."""
        return dataclasses.replace(PRESETS[self.preset], **self.given())

    def of_shape(self, shape: tuple[int, ...]) -> ModelOptions:
        """Returns these options with the length and the shape of blocks of several axes.

        Raises:
            ValueError: another length or shape is given.
        """
        if len(shape) == 1:
            return self
        values: dict[str, Any] = {"length": math.prod(shape), "shape": shape}
        for name, value in values.items():
            given = getattr(self, name)
            if given not in (None, value):
                raise ValueError(f"model.{name}: expected {value}, which the data have, got {given}; leave it out")
        return dataclasses.replace(self, **values)


@dataclass
class ParallelOptions:
    """How several processes, started by torchrun, divide the work."""

    data: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every process has the whole model. fsdp: parameters, gradients, optimiser state and moving average are
    divided among all processes, for models that need the memory of several GPUs. hsdp: they are divided within groups
    of processes, and every group has the whole model, which needs less communication between machines than fsdp."""
    shard: int | None = None
    """For hsdp: processes in a group. Default: the processes of a machine."""
    vocab: int = 1
    """Processes that share a vocabulary: each has some rows of the embedding and of the head, and they work on the same
    sequences. For large vocabularies. A divisor of the number of processes."""

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.shard is not None and self.shard < 1:
            raise ValueError(f"shard: expected at least 1, got {self.shard}")
        if self.shard is not None and self.data != "hsdp":
            raise ValueError(f"shard: expected --parallel.data hsdp with it, got {self.data}")
        if self.vocab < 1:
            raise ValueError(f"vocab: expected at least 1, got {self.vocab}")


@dataclass
class TrainConfig:
    """Options of a training run."""

    run_dir: str = "runs/default"
    """Folder of the run: configuration, metrics, TensorBoard scalars and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data"""
    corpus: str = "text"
    """Kind of data: text, images, or a class of your own as module:name."""
    tokenizer: str = "bytes"
    """How text becomes tokens: bytes (256 values), text8 (a-z and space), gpt2 (50,257 tokens), or a tokenizer.json of
    the tokenizers library (the file, a folder, or a Hugging Face repository), of which the run keeps a copy. Or a class
    of your own as module:name. With init, the tokeniser of that model takes the place of bytes."""
    init: str | None = None
    """Fine-tuning: start from the weights of this model, in its sizes: a run, folder, file or repository, as for sedd
    sample; or a model of transformers (gpt2, llama, qwen2, bert or modernbert), which becomes a diffusion model.
    --resume does not read it again."""
    init_anneal: int = 0
    """With init of a causal model of transformers: steps over which attention grows from causal to full. In step k,
    counted from 0, each position sees the positions after it with probability k / init_anneal. 0: full attention from
    the start."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """Model"""
    process: ProcessName = "absorbing"
    """Noise process: absorbing (tokens become MASK), uniform (tokens become random tokens) or hybrid (both)."""
    uniform_fraction: float = 0.1
    """For process hybrid: fraction of the noise that replaces a token by a random one."""
    schedule: str = "loglinear"
    """Noise schedule, total noise over time: loglinear, geometric, cosine, polynomial, or a class of your own as
    module:name."""
    schedule_params: dict[str, float] = field(default_factory=dict)
    """Parameters of the schedule, for example --schedule_params.eps 1e-4."""
    objective: str = "score_entropy"
    """Training loss. For log-scores: score_entropy; to compare with it, concrete_score or implicit_score_entropy. For a
    prediction of the clean token: mean_prediction, md4 (absorbing), genmd4 (absorbing, with a learned schedule for each
    token), udlm (uniform), gidd (hybrid), d3pm (in discrete time); to compare with md4, tauldr. As a baseline without
    noise: autoregressive, next-token prediction by a causal network of the same size. Or a class of your own as
    module:name."""
    objective_params: dict[str, float] = field(default_factory=dict)
    """Parameters of the objective, for example --objective d3pm --objective_params.steps 100."""
    fused_head: bool = True
    """Fuse the output head with the loss, without storing log-scores of the whole vocabulary. Use false to compare."""
    head_capacity: float | None = None
    """For a GPU, with the fused head: the share of the positions of a batch, in (0, 1], for which the head is computed.
    A step then never waits for the GPU to count those that have a loss, of which there must not be more. For absorbing
    noise they are about half of a large batch; other noise needs 1. null: they are counted."""
    antithetic: bool = True
    """Spread the times of a batch evenly over (0, 1] instead of drawing them independently: less noise in the loss."""
    label_dropout: float = 0.1
    """With model.classes: part of the sequences whose class is withheld, so that the model is one without classes too,
    as guidance needs."""
    batch_size: int = 8
    """Sequences in one forward pass of one process."""
    accumulate: int = 1
    """Forward passes of each process per optimiser step. A step takes batch_size * accumulate * processes sequences;
    a resumed run may divide the same number in another way."""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    """Several processes (torchrun)"""
    steps: int = 20_000
    """Stop after this many optimiser steps."""
    max_minutes: float | None = None
    """Stop after this many minutes of training, including those before a --resume."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, reached after the warm-up."""
    lr_schedule: str = "constant"
    """Learning rate after the warm-up: constant; linear or cosine decay to the end of the run; or wsd (warm-up, stable,
    decay), which decays in the last part only. The run ends by steps or max_minutes, whichever comes first."""
    lr_final: float = 0.0
    """Learning rate at the end of the run, as a fraction of lr (ignored by lr_schedule constant)."""
    lr_decay: float = 0.2
    """For lr_schedule wsd: length of the decay, as a fraction of the run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, for example --betas 0.9,0.98."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    clip: float = 1.0
    """Gradients with a larger norm than this are scaled down to it."""
    ema: float = 0.995
    """Decay of the moving average of the weights, which validation and sampling use. At step n it is at most
    (1+n)/(10+n)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast, or float32. auto: bf16 if the GPU or CPU has instructions for it."""
    compile: bool = False
    """Run the transformer blocks through torch.compile: the first steps take longer, later ones less."""
    activation_checkpointing: bool = False
    """Compute the activations of the transformer blocks again in the backward pass instead of storing them: less
    memory, about a third more time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    seed: int = 0
    """Seed of everything random: initial weights, order of the data, times, noise, dropout."""
    log_every: int = 10
    """Optimiser steps between points of the training curves."""
    report_to: str = "tensorboard"
    """Where curves and samples go, besides metrics.jsonl: tensorboard, wandb (Weights & Biases; pip install wandb),
    tensorboard,wandb, or none."""
    valid_every: int = 1000
    """Steps between validations."""
    valid_blocks: int = 64
    """Validation blocks that are scored, always the same ones."""
    valid_draws: int = 8
    """Noise levels drawn for each validation block, always the same ones."""
    valid_samples: int = 1
    """Texts or images that are sampled at each validation, for TensorBoard and Weights & Biases."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. The best validation so far is saved too."""
    keep_last: int = 2
    """Checkpoints kept, besides the best one."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_one_of("corpus", self.corpus, CORPORA)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        for name in self.writers():
            check_one_of("report_to", name, [*WRITERS, "none"])
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
        for name in ("lr_final", "lr_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed", "valid_samples", "init_anneal"):
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
        self._check_objective()
        if self.head_capacity is not None:
            self._check_head_capacity(self.head_capacity)

    def _check_head_capacity(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"head_capacity: expected null or a number in (0, 1], got {share}")
        if not self.fused_head:
            raise ValueError(f"head_capacity: expected null without the fused head, got {share}")
        if share < 1 and (self.process != "absorbing" or OBJECTIVES[self.objective].autoregressive):
            kind = f"process {self.process}" if self.process != "absorbing" else f"objective {self.objective}"
            raise ValueError(f"head_capacity: expected null or 1 for {kind}, which needs all positions, got {share}")

    def _check_objective(self) -> None:
        """Checks that model, process and schedule suit the objective, and makes the model causal if it must be."""
        try:
            with renamed({name: f"objective_params.{name}" for name in self.objective_params}):
                objective = get_objective(self.objective, **self.objective_params)
        except TypeError as error:
            raise ValueError(f"objective_params: {error}") from error
        objective.check(self.make_process(2))
        if self.model.trunk:
            self._check_trunk(objective)
        objective.schedule(get_schedule(self.schedule, **self.schedule_params), self.make_process(2))
        if not OBJECTIVES[self.objective].autoregressive:
            if self.model.causal:
                raise ValueError(
                    f"model.causal: expected false for the objective {self.objective}, got true; use --objective "
                    "autoregressive, or --model.causal false"
                )
            return
        for name, wanted in (("causal", True), ("time_conditioning", False)):
            if getattr(self.model, name) not in (None, wanted):
                raise ValueError(
                    f"model.{name}: expected {str(wanted).lower()} for the objective {self.objective}, got "
                    f"{str(not wanted).lower()}; leave it out"
                )
        self.model = dataclasses.replace(self.model, causal=True)

    def _check_trunk(self, objective: Objective) -> None:
        """Checks that the options suit a network that is adapted from a model of transformers."""
        kind = f"for a network adapted from {self.model.trunk.get('model_type')}"
        check_adapted(objective, self.make_process(2), self.model.build())
        wanted: dict[str, tuple[Any, Any]] = {
            "corpus": (self.corpus, "text"),
            "parallel.data": (self.parallel.data, "ddp"),
            "parallel.vocab": (self.parallel.vocab, 1),
        }
        for name, (value, only) in wanted.items():
            if value != only:
                raise ValueError(f"{name}: expected {only} {kind}, got {value}")

    def writers(self) -> list[str]:
        """Returns the names in ``report_to``."""
        return [name.strip() for name in self.report_to.split(",")]

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
        return dataclasses.replace(
            self,
            model=model,
            schedule_params=schedule_params(self.schedule, self.schedule_params),
            objective_params=objective_params(self.objective, self.objective_params),
        )

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
    for now, then in (("process", "graph"), ("report_to", "log")):  # names in runs of earlier versions
        if then in options and now not in options:
            options[now] = options.pop(then)
    try:
        return checked(TrainConfig, options)
    except ValueError as error:
        raise ValueError(f"{path}: not the options of a run: {error}") from error
