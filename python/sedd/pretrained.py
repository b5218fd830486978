"""Models in: a run of ours, a Hugging Face repository, or a checkpoint of the code that others train SEDD with.

What :func:`load_model` and ``SEDD.from_pretrained`` read:

* a run folder of ``sedd train``, or one checkpoint folder in it;
* a Hugging Face repository or a folder like one: ``config.json`` with ``model.safetensors`` (as ``save_pretrained``
  writes it) or ``pytorch_model.bin`` (as the released SEDD models have it);
* a training run of the released SEDD code: ``.hydra/config.yaml`` with ``checkpoints-meta/checkpoint.pth``;
* a Lightning checkpoint whose network is called ``backbone`` and has the released names (MDLM's and its descendants'
  SEDD); its configuration is taken from its hyper-parameters or from a ``.hydra`` folder above it.

The averaged weights are taken where there are any. No file can execute code (:mod:`sedd.weights`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd.checkpoint import (
    DamagedError,
    best_checkpoint,
    last_whole_checkpoint,
    list_checkpoints,
    load_weights,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
)
from sedd.config import TrainConfig, autocast_dtype
from sedd.hints import program
from sedd.model import SEDD, ModelConfig, device_of
from sedd.plain import merged, read_plain
from sedd.schedule import SCHEDULES, Schedule, get_schedule
from sedd.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer
from sedd.weights import PICKLES, read_weights
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

__all__ = ["LoadedModel", "load_model", "load_pretrained", "model_card", "to_config"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROCESSES = {"absorb": "absorbing", "absorbing_state": "absorbing", "uniform_state": "uniform"}
VOCABULARIES = {50_257: "gpt2", 257: "bytes", 27: "text8"}
"""The tokeniser of a model that does not name its own, by its number of tokens."""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model and what is needed to use it.

    Attributes:
        path: the checkpoint folder of a run, else the folder or file of the model.
        model: in evaluation mode, with the averaged weights.
        process: the forward process.
        schedule: the noise schedule.
        tokenizer: text to tokens and back.
        config: the options of its run; None for a model that is not a run of ours.
        state: the ``state.json`` of its checkpoint; None for a model that is not a run of ours.
    """

    path: Path
    model: SEDD
    process: RankOne
    schedule: Schedule
    tokenizer: Tokenizer
    config: TrainConfig | None = None
    state: dict[str, Any] | None = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast where the model is now, None for float32 without autocast."""
        return autocast_dtype(self.config.precision if self.config else "auto", device_of(self.model))


def load_model(name_or_path: Path | str, device: torch.device | str = "cpu") -> LoadedModel:
    """Loads a model with averaged weights, its process, schedule and tokeniser, for sampling or evaluation.

    Args:
        name_or_path: a run folder (its best checkpoint is taken, or its last where none was validated), a checkpoint
            folder of a run, or whatever :func:`load_pretrained` reads.
        device: where the model goes.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as :func:`load_pretrained`; a model whose tokeniser is unknown.
    """
    path = _find(name_or_path)
    while (checkpoint := _checkpoint(path)) is not None:
        try:
            with _offering_another(checkpoint.parent.parent):
                return _load_checkpoint(checkpoint, device)
        except FileNotFoundError:
            # a run that is still training has deleted it while it was read, and has a better one
            if checkpoint == path or checkpoint.exists():
                raise
    model = load_pretrained(path, device=device)
    assert model.schedule is not None
    if model.tokenizer is None:
        raise ValueError(
            f"{path}: a model of {model.process.dim} tokens that does not say how text becomes tokens; its "
            f"config.json may say so: tokenizer, one of {', '.join(TOKENIZERS)}, or tokenizer.json beside it"
        )
    tokenizer = model.tokenizer if isinstance(model.tokenizer, Tokenizer) else get_tokenizer(model.tokenizer)
    return LoadedModel(path, model, model.process, model.schedule, tokenizer)


def _load_checkpoint(checkpoint: Path, device: torch.device | str) -> LoadedModel:
    state, config = read_state(checkpoint), read_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint, config)
    process = config.make_process(tokenizer.vocab_size)
    schedule = get_schedule(config.schedule, **config.schedule_params)
    model = _build(config.model.build(), process, schedule, tokenizer)
    load_weights(model, read_tensors(checkpoint, "ema", state), checkpoint / "ema.safetensors")
    return LoadedModel(checkpoint, model.to(device).eval(), process, schedule, tokenizer, config, state)


@contextmanager
def _offering_another(run_dir: Path) -> Iterator[None]:
    """Adds to the errors of a damaged checkpoint which other one of the run is whole."""
    try:
        yield
    except (FileNotFoundError, DamagedError) as error:
        whole = last_whole_checkpoint(run_dir)
        if whole is None:
            raise
        raise type(error)(f"{error}; the last checkpoint that is whole is {whole}: give that one") from error


def load_pretrained(
    name_or_path: Path | str,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    **hub: Any,
) -> SEDD:
    """Loads a model in any of the formats of this module; ``SEDD.from_pretrained`` is this function.

    Args:
        name_or_path: a folder, a checkpoint file, or the name of a repository on the Hugging Face hub.
        config: entries of ``config.json`` (:func:`to_config` shows them) that come before what the checkpoint says, for
            one that says too little: ``{"graph": {"type": "uniform"}, "noise": {"type": "geometric"}}``.
        device: where the model goes.
        **hub: for a repository on the hub, what ``huggingface_hub.snapshot_download`` takes: ``revision``, ``token``,
            ``cache_dir``, ``force_download``, ``local_files_only``.

    Returns:
        The model in evaluation mode and float32, with ``process``, ``schedule`` and ``tokenizer`` (a name, a tokeniser
        that was saved with it, or None where it is unknown) as attributes.

    Raises:
        FileNotFoundError: there is no such file, folder or repository, or it holds no model.
        ConnectionError: it must be a repository, and the hub cannot be reached.
        ValueError: a file is damaged, holds objects that are not data, does not say what the model is, or its tensors
            are not those of the model: missing, unexpected and misshapen ones are named.
    """
    path = _find(name_or_path, **hub)
    if _checkpoint(path) is not None:
        if config:
            raise ValueError(f"config: {path} is a run of sedd train, which says itself what it is; leave config out")
        return load_model(path, device).model
    file, found = _contents(path)
    weights, inside = read_weights(file)
    found = merged(inside or found, config or {})
    if not found:
        raise ValueError(f"{file}: no configuration in it or beside it; give one (sedd convert --config FILE)")
    try:
        model = _from_config(found, weights, file.parent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: its configuration will not do: {error}") from error
    load_weights(model, weights, file)
    return model.to(device).eval()


# -- what a model is ---------------------------------------------------------------------------------------------------


def to_config(model: SEDD) -> dict[str, Any]:
    """What ``config.json`` says of a model, with the keys of the released SEDD repositories.

    Returns:
        ``tokens`` (size of the vocabulary without MASK), ``tokenizer`` (a name, "tokenizer.json" for that file beside
        it, or None), ``process`` (``type`` absorb, uniform or hybrid), ``noise`` (``type`` and the parameters of the
        schedule) and ``model`` (the sizes).

    Raises:
        ValueError: the model was made without a schedule, or its process or schedule has no name.
    """
    process, schedule = model.process, model.schedule
    if schedule is None:
        raise ValueError("schedule: the model does not know its noise schedule; make it as SEDD(..., schedule=...)")
    names = [name for name, kind in SCHEDULES.items() if type(schedule) is kind]
    if not names:
        raise ValueError(f"schedule: {type(schedule).__name__} is none of {', '.join(SCHEDULES)}, so it has no name")
    tokens = process.dim - (process.mask_id is not None)
    kind: dict[str, Any] = {"type": "absorb" if process.family == "absorbing" else process.family}
    if process.family == "rank_one":
        kind = {"type": "hybrid", "uniform_fraction": round(float(process.stationary[0]) * tokens, 12)}
        if process.mask_id != tokens or not torch.allclose(
            process.stationary, Hybrid(tokens, kind["uniform_fraction"]).stationary, rtol=1e-9, atol=0
        ):
            raise ValueError("process: a process with a stationary distribution of its own has no name to be saved by")
    return {
        "tokens": tokens,
        "tokenizer": TOKENIZER_FILES[0] if isinstance(model.tokenizer, Tokenizer) else model.tokenizer,
        "graph": kind,
        "noise": {"type": names[0], **vars(schedule)},
        "model": dataclasses.asdict(model.config),
    }


def model_card(model: SEDD) -> dict[str, str]:
    """What a model card says of a model, by the names of :data:`sedd.model.CARD`."""
    config = to_config(model)
    sizes = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    noise = ", ".join(f"{key} {value:g}" for key, value in config["noise"].items() if key != "type")
    return {
        "facts": f"{count / 1e6:.1f} M parameters ({sizes.n_blocks} blocks of width {sizes.hidden_size}, "
        f"{sizes.n_heads} heads), {config['graph']['type']} noise, {config['noise']['type']} schedule ({noise}), "
        f"{config['tokenizer'] or 'unnamed'} tokens ({config['tokens']:,}) in blocks of {sizes.length}",
        "length": str(sizes.length),
    }


def _from_config(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> SEDD:
    """The model that a configuration with the released keys describes; its tensors say what it leaves out."""
    if config.get("parameterization", "sedd") != "sedd":
        raise ValueError(f"parameterization: {config['parameterization']!r} predicts no scores; wanted 'sedd'")
    embedding = weights.get("vocab_embed.embedding")
    frequencies = weights.get("rotary_emb.inv_freq")
    if embedding is None or embedding.dim() != 2 or frequencies is None or not frequencies.numel():
        found = ", ".join(list(weights)[:5])
        raise ValueError(
            f"not the tensors of a SEDD: wanted vocab_embed.embedding and rotary_emb.inv_freq, got {found}, ..."
        )
    dim, hidden_size = embedding.shape
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "n_blocks": max(1, len(blocks)),
        "n_heads": max(1, hidden_size // (2 * frequencies.numel())),
    }
    if (conditioning := weights.get("sigma_map.mlp.0.bias")) is not None:
        sizes["cond_dim"] = conditioning.numel()
    given = {**_section(config, "model")}
    if "time_conditioning" in config:
        given.setdefault("time_conditioning", config["time_conditioning"])
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for name, value in given.items():
        if name in fields and value is not None:
            whole = isinstance(fields[name], float) and type(value) is int
            if type(value) is not type(fields[name]) and not whole:
                raise ValueError(f"model.{name}: {value!r}, wanted {type(fields[name]).__name__}")
            if name in sizes and value != sizes[name]:
                raise ValueError(f"model.{name}: {value}, but the tensors are those of {sizes[name]}")
            sizes[name] = value
    process = _process(config, dim)
    if process.family == "rank_one":  # a model that was saved before the shift existed was trained without it
        sizes.setdefault("hybrid_shift", False)
    tokens = dim - (process.mask_id is not None)
    if config.get("tokens", tokens) != tokens or isinstance(config.get("tokens"), bool):
        raise ValueError(f"tokens: {config['tokens']}, but the embedding has {dim} rows, MASK counted")
    return _build(ModelConfig(**sizes), process, _schedule(config), _tokenizer(config, tokens, folder))


def _tokenizer(config: Mapping[str, Any], tokens: int, folder: Path) -> str | Tokenizer | None:
    """A tokeniser known by name, or that of ``tokenizer.json`` beside the weights: never one from somewhere else."""
    beside = folder / TOKENIZER_FILES[0]
    name = config.get("tokenizer") or VOCABULARIES.get(tokens) or (beside.name if beside.is_file() else None)
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"tokenizer: {name!r} is not a tokeniser of {tokens} tokens")
    tokenizer: str | Tokenizer = get_tokenizer(str(beside)) if name == beside.name else name
    sized = tokenizer if isinstance(tokenizer, Tokenizer) else TOKENIZERS.get(tokenizer)
    if sized is None or sized.vocab_size != tokens:
        raise ValueError(f"tokenizer: {name!r} is not a tokeniser of {tokens} tokens")
    return tokenizer


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: {section!r}, wanted an object")
    return section


def _process(config: Mapping[str, Any], dim: int) -> RankOne:
    section = _section(config, "graph")
    name = section.get("type") or config.get("diffusion")
    kind = PROCESSES.get(str(name), str(name))
    if kind == "absorbing":
        return Absorbing(dim - 1)
    if kind == "uniform":
        return Uniform(dim)
    if kind == "hybrid":
        return Hybrid(dim - 1, _number(section, "graph.uniform_fraction"))
    raise ValueError(f"graph.type: {'missing' if name is None else repr(name)}, wanted absorb, uniform or hybrid")


def _schedule(config: Mapping[str, Any]) -> Schedule:
    section = _section(config, "noise")
    name = section.get("type")
    if not isinstance(name, str) or name not in SCHEDULES:
        given = "missing" if name is None else repr(name)
        raise ValueError(f"noise.type: {given}, wanted one of {', '.join(SCHEDULES)}")
    # the released configurations have sigma_min and sigma_max for every schedule, log-linear too, which has neither
    known = [field.name for field in dataclasses.fields(SCHEDULES[name])]  # type: ignore[arg-type]
    return get_schedule(
        name, **{key: _number(section, f"noise.{key}") for key in known if section.get(key) is not None}
    )


def _number(section: Mapping[str, Any], name: str) -> float:
    value = section.get(name.rpartition(".")[2])
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)  # YAML has 1e-4 as a string
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: {'missing' if value is None else repr(value)}, wanted a finite number")
    return number


def _build(config: ModelConfig, process: RankOne, schedule: Schedule, tokenizer: str | Tokenizer | None) -> SEDD:
    """A model whose weights are not set yet: nothing is drawn that would be overwritten."""
    with torch.device("meta"):
        return SEDD(config, process, schedule=schedule, tokenizer=tokenizer)


# -- where it is -------------------------------------------------------------------------------------------------------


def _find(name_or_path: Path | str, **hub: Any) -> Path:
    """A local path as it is, or the folder that a repository on the hub is downloaded to."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix in (*PICKLES, ".safetensors"):
        raise FileNotFoundError(
            f"{path}: no such folder or file; expected a run folder, as `sedd train --run_dir` makes it, a model folder"
            " or file, or the name of a repository on the Hugging Face hub"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["config.json", *WEIGHTS, *TOKENIZER_FILES], **hub)
        )
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            wanted = "no such repository" if isinstance(error, RepositoryNotFoundError) else "could not be downloaded"
            raise FileNotFoundError(
                f"{name}: no such folder here, and on the Hugging Face hub {wanted}: {error}"
            ) from error
        raise ConnectionError(
            f"{name}: no such folder here, and the Hugging Face hub could not be reached ({type(error).__name__}: "
            f"{error}). Give a run folder, a model folder or file, or connect to the network"
        ) from error


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint folder of a run of ours; None if ``path`` is something else that may be a model."""
    if path.is_dir() and (re.fullmatch(r"step_\d+", path.name) or (path / "state.json").exists()):
        return Path(os.path.abspath(path))  # its run is two folders above, which a relative name need not reach
    if checkpoints := list_checkpoints(path):
        with _offering_another(path):
            return best_checkpoint(path) or checkpoints[-1]
    if path.is_file() or (path / ".hydra").is_dir() or any((path / name).exists() for name in WEIGHTS):
        return None
    raise FileNotFoundError(
        f"{path}: no checkpoints in this folder, and no {' or '.join(WEIGHTS)}; train first: {program()} train "
        f"--run_dir {shlex.quote(str(path))}"
    )


def _contents(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and the configuration that lies beside it; empty if there is none."""
    if path.is_dir():
        hydra = path / ".hydra" / "config.yaml"
        wanted = ["checkpoints-meta/checkpoint.pth"] if hydra.is_file() else WEIGHTS
        file = next((path / name for name in wanted if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: there is no {' or '.join(wanted)} in this folder")
    else:
        file = path
    beside = [file.parent / "config.json"]
    beside += [folder / ".hydra" / "config.yaml" for folder in list(file.resolve().parents)[:3]]
    config = next((candidate for candidate in beside if candidate.is_file()), None)
    return file, {} if config is None else read_plain(config)
