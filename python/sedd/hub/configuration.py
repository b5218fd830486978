"""The ``config.json`` of a stored model: :func:`to_config` writes it, :func:`from_config` reads it.

Its keys are those of the released SEDD repositories.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedd.config import TrainConfig
from sedd.data.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer
from sedd.diffusion.objectives import check_adapted, get_objective, objective_params
from sedd.diffusion.schedule import SCHEDULES, Schedule, get_schedule
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

__all__ = ["SCHEDULE", "StoredModel", "from_config", "schedule_of", "to_config"]

PROCESSES = {"absorb": "absorbing", "absorbing_state": "absorbing", "uniform_state": "uniform"}
SCHEDULE = "schedule."
"""Prefix of the parameters of a learned schedule in the files of tensors."""
ALGORITHMS = dict.fromkeys(("duo", "duo_base", "distillation"), "uniform") | {"mdlm": "absorbing"}
"""The process of each algorithm of DUO's code."""
PARAMETERIZATIONS = {"sedd": "score_entropy", "subs": "mean_prediction", "mean": "mean_prediction"}
"""The objective for each ``parameterization`` of MDLM's and DUO's code: SUBS is a mean prediction without MASK."""
VOCABULARIES = {50_257: "gpt2", 257: "bytes", 27: "text8"}
"""The tokeniser of a model without a ``tokenizer`` entry, by its number of tokens."""


@dataclass(frozen=True)
class StoredModel:
    """A model as it is stored.

    Attributes:
        path: the checkpoint folder of a run; otherwise the folder or file of the model.
        file: the file of the tensors.
        sizes: the dimensions of the network.
        process: the noise process.
        schedule: the noise schedule.
        tokenizer: a tokeniser, its name, or None if it is unknown.
        tensors: the averaged weights by name.
        config: the options of the run; None if it is not a run of ``sedd train``.
        state: the ``state.json`` of the checkpoint; None if it is not a run of ``sedd train``.
        objective: the loss of the training, a key of :data:`sedd.diffusion.OBJECTIVES`.
        objective_params: parameters of the objective.
    """

    path: Path
    file: Path
    sizes: ModelConfig
    process: RankOne
    schedule: Schedule
    tokenizer: str | Tokenizer | None
    tensors: Mapping[str, Tensor]
    config: TrainConfig | None = None
    state: dict[str, Any] | None = None
    objective: str = "score_entropy"
    objective_params: Mapping[str, float] = field(default_factory=dict)


def to_config(
    sizes: ModelConfig,
    process: RankOne,
    schedule: Schedule | None,
    tokenizer: str | Tokenizer | None,
    objective: str = "score_entropy",
    given: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of ``config.json`` for a model, with the keys of the released SEDD repositories.

    Args:
        sizes: the dimensions of the network.
        process: the noise process.
        schedule: the noise schedule.
        tokenizer: a tokeniser, its name, or None.
        objective: a key of :data:`sedd.diffusion.OBJECTIVES`.
        given: parameters of the objective; its defaults where left out.

    Returns:
        ``tokens`` (size of the vocabulary without MASK), ``tokenizer`` (a name, "tokenizer.json" for that file in the
        same folder, or None), ``graph`` (``type`` absorb, uniform or hybrid), ``noise`` (``type`` and the parameters of
        the schedule), ``model`` (the dimensions of the network), and ``objective`` and ``objective_params`` if the
        objective is not score_entropy.

    Raises:
        ValueError: the model has no schedule, or its process or schedule is not a registered one.
    """
    if schedule is None:
        raise ValueError("schedule: expected a noise schedule, got None; create the model with SEDD(..., schedule=...)")
    schedule = schedule.original
    if isinstance(schedule, nn.Module):
        raise ValueError(
            "schedule: expected one without parameters, got a module, which this format cannot store yet; keep the run"
        )
    names = [name for name, kind in SCHEDULES.items() if type(schedule) is kind]
    if not names:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {type(schedule).__name__}")
    tokens = process.dim - (process.mask_id is not None)
    kind: dict[str, Any] = {"type": "absorb" if process.family == "absorbing" else process.family}
    if process.family == "rank_one":
        kind = {"type": "hybrid", "uniform_fraction": round(float(process.stationary[0]) * tokens, 12)}
        if process.mask_id != tokens or not torch.allclose(
            process.stationary, Hybrid(tokens, kind["uniform_fraction"]).stationary, rtol=1e-9, atol=0
        ):
            raise ValueError(
                "process: expected absorbing, uniform or hybrid, got another stationary distribution, which has no name"
            )
    params = objective_params(objective, given or {})
    return {
        "tokens": tokens,
        "tokenizer": TOKENIZER_FILES[0] if isinstance(tokenizer, Tokenizer) else tokenizer,
        "graph": kind,
        "noise": {"type": names[0], **vars(schedule)},
        "model": dataclasses.asdict(sizes),
        **({} if objective == "score_entropy" else {"objective": objective}),
        **({"objective_params": params} if params else {}),
    }


def from_config(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path, file: Path) -> StoredModel:
    """The model of a configuration and its tensors.

    Args:
        config: the content of ``config.json``, with the keys of :func:`to_config`, or the configuration of the released
            SEDD, MDLM or DUO code. Missing entries are inferred from the tensors.
        weights: the averaged weights by name.
        path: the folder or file of the model.
        file: the file of the tensors; ``tokenizer.json`` is beside it.

    Raises:
        TypeError, ValueError: an entry is missing or invalid, or does not fit the tensors.
    """
    algorithm = _section(config, "algo")  # of DUO's checkpoints, whose top level has none of these entries
    config = {"diffusion": ALGORITHMS.get(str(algorithm.get("name"))), **algorithm, **config}
    objective, params = _objective(config)
    given = {**_section(config, "model")}
    dim, sizes = (_adapted_dim(config), {}) if given.get("trunk") else _found_sizes(weights)
    if "time_conditioning" in config:
        given.setdefault("time_conditioning", config["time_conditioning"])
    if given.get("shift") and not given.get("trunk"):
        raise ValueError("model.shift: expected false for a network of this package, got true")
    fields = vars(ModelConfig())
    for name, value in given.items():
        if name in fields and value is not None:
            value = tuple(value) if isinstance(value, list) else value
            whole = isinstance(fields[name], float) and type(value) is int
            if type(value) is not type(fields[name]) and not whole:
                raise ValueError(f"model.{name}: expected {type(fields[name]).__name__}, got {value!r}")
            if name in sizes and value != sizes[name]:
                raise ValueError(f"model.{name}: expected {sizes[name]} for these tensors, got {value}")
            sizes[name] = value
    process = _process(config, dim)
    if process.family == "rank_one":  # models saved before the shift existed were trained without it
        sizes.setdefault("hybrid_shift", False)
    built = ModelConfig(**sizes)
    if built.trunk:
        if built.n_blocks > len(weights):
            raise ValueError(f"model.n_blocks: expected at most {len(weights)}, one per tensor, got {built.n_blocks}")
        check_adapted(get_objective(objective, **params), process, built)
    tokens = dim - (process.mask_id is not None)
    if config.get("tokens", tokens) != tokens or isinstance(config.get("tokens"), bool):
        raise ValueError(
            f"tokens: expected {tokens} for an embedding of {dim} rows (including MASK), got {config['tokens']}"
        )
    tokenizer = _tokenizer(config, tokens, file.parent)
    tensors = dict(weights)
    schedule = schedule_of(_schedule(config), process, objective, params, tensors)
    return StoredModel(
        path,
        file,
        built,
        process,
        schedule,
        tokenizer,
        tensors,
        objective=objective,
        objective_params=params,
    )


def schedule_of(
    schedule: Schedule, process: RankOne, objective: str, params: Mapping[str, float], tensors: dict[str, Tensor]
) -> Schedule:
    """The schedule of a stored model.

    Args:
        schedule: the one of its options.
        process: the noise process.
        objective, params: the objective, which may have a schedule of its own.
        tensors: the tensors of the model. Those of the schedule are taken out.

    Raises:
        ValueError: the schedule has other parameters than the tensors.
    """
    schedule = get_objective(objective, **params).schedule(schedule, process)
    if isinstance(schedule, nn.Module):
        learned = {name: tensors.pop(name) for name in [*tensors] if name.startswith(SCHEDULE)}
        try:
            schedule.load_state_dict({name.removeprefix(SCHEDULE): value for name, value in learned.items()})
        except RuntimeError as error:
            found = ", ".join(f"{name} {list(value.shape)}" for name, value in learned.items()) or "none"
            raise ValueError(f"tensors: expected those of a learned schedule of {objective}, got {found}") from error
    return schedule


def _found_sizes(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    """The size of the vocabulary, MASK included, and the dimensions that the tensors have."""
    embedding = weights.get("vocab_embed.embedding")
    frequencies = weights.get("rotary_emb.inv_freq")
    if embedding is None or embedding.dim() != 2 or frequencies is None or not frequencies.numel():
        found = ", ".join(list(weights)[:5])
        raise ValueError(
            f"tensors: expected those of a SEDD (vocab_embed.embedding, rotary_emb.inv_freq, ...), got {found}, ..."
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
    return dim, sizes


def _adapted_dim(config: Mapping[str, Any]) -> int:
    """The size of the vocabulary, MASK included, of a network adapted from a model of ``transformers``."""
    tokens = config.get("tokens")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens: expected the size of the vocabulary without MASK, got {tokens!r}")
    return tokens + 1


def _tokenizer(config: Mapping[str, Any], tokens: int, folder: Path) -> str | Tokenizer | None:
    """A registered tokeniser, or that of ``tokenizer.json`` in the folder of the weights; never another file."""
    beside = folder / TOKENIZER_FILES[0]
    name = config.get("tokenizer") or VOCABULARIES.get(tokens) or (beside.name if beside.is_file() else None)
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"tokenizer: expected a tokeniser of {tokens} tokens, got {name!r}")
    tokenizer: str | Tokenizer = get_tokenizer(str(beside)) if name == beside.name else name
    sized = tokenizer if isinstance(tokenizer, Tokenizer) else TOKENIZERS.get(tokenizer)
    if sized is None or sized.vocab_size != tokens:
        raise ValueError(f"tokenizer: expected a tokeniser of {tokens} tokens, got {name!r}")
    return tokenizer


def _objective(config: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The objective and its parameters.

    For checkpoints of MDLM and DUO, which do not name it, the objective is that of their ``parameterization``.
    """
    kind = str(config.get("parameterization", "sedd"))
    if kind not in PARAMETERIZATIONS:
        expected = ", ".join(PARAMETERIZATIONS)
        raise ValueError(f"parameterization: expected one of {expected}, got {kind!r}")
    objective = str(config.get("objective", PARAMETERIZATIONS[kind]))
    section = _section(config, "objective_params")
    params = {name: _number(section, f"objective_params.{name}") for name in section}
    get_objective(objective, **params)
    return objective, params


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: expected an object, got {section!r}")
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
    raise ValueError(f"graph.type: expected absorb, uniform or hybrid, got {'none' if name is None else repr(name)}")


def _schedule(config: Mapping[str, Any]) -> Schedule:
    section = _section(config, "noise")
    name = section.get("type")
    name = "loglinear" if name == "log-linear" else name  # DUO's spelling
    if not isinstance(name, str) or name not in SCHEDULES:
        given = "none" if name is None else repr(name)
        raise ValueError(f"noise.type: expected one of {', '.join(SCHEDULES)}; got {given}")
    # the released configurations have sigma_min and sigma_max for every schedule, even log-linear, which uses neither
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
        raise ValueError(f"{name}: expected a finite number, got {'none' if value is None else repr(value)}")
    return number
