"""Fine-tuning: runs that start from the weights of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sedd.adapted import FAMILIES
from sedd.config import ModelOptions, TrainConfig
from sedd.data.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer
from sedd.diffusion.schedule import Schedule
from sedd.network import ModelConfig
from sedd_ext import RankOne

__all__ = ["Pretrained", "check_causal", "checked_init", "with_sizes", "with_tokenizer"]

FREE_SIZES = ("length", "dropout")
"""Sizes of a model that no weight depends on: a run may change them when it starts from a trained model."""


class Pretrained(Protocol):
    """A trained network to start from, such as :class:`sedd.hub.SEDD` or the result of :func:`sedd.hub.read_init`."""

    config: ModelConfig
    process: RankOne | None
    """None for a model that is not a diffusion model yet."""
    tokenizer: str | Tokenizer | None
    schedule: Schedule | None

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights by name."""
        ...


def checked_init(config: TrainConfig, begin: Pretrained, tokenizer: Tokenizer) -> TrainConfig:
    """Returns the options of a run that starts from a trained model: its sizes are those of the model.

    Args:
        config: the options that were given; ``config.init`` names the model in error messages.
        begin: the model.
        tokenizer: the tokeniser of the run.

    Raises:
        ValueError: the model has another tokeniser, process or size than ``config`` asks for.
    """
    if begin.config.shape:
        raise ValueError(
            f"init: expected a model of text, got {config.init}, one of images, which cannot be trained on"
        )
    if begin.config.trunk:  # first checks that the other options suit it
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, trunk=begin.config.trunk))
    vocabulary = tokenizer.vocab_size
    theirs = begin.tokenizer if isinstance(begin.tokenizer, str | None) else begin.tokenizer.name
    wanted = config.make_process(vocabulary)
    if theirs not in (None, tokenizer.name):
        raise ValueError(
            f"tokenizer: {config.init} was trained on {begin.tokenizer if theirs == begin.tokenizer else 'other'} "
            f"tokens, and cannot start a run on {config.tokenizer} tokens; give its own by --tokenizer"
        )
    if begin.process is not None and not _same(begin.process, wanted):
        raise ValueError(
            f"process: {config.init} was trained with {begin.process}, and cannot start a run with {wanted}; give "
            "its own by --process and --uniform_fraction, and the tokeniser by --tokenizer"
        )
    free = (*FREE_SIZES, "shift") if begin.process is None else FREE_SIZES
    fixed = {name: value for name, value in dataclasses.asdict(begin.config).items() if name not in free}
    given = config.model.given()
    if config.model.preset != ModelOptions().preset:
        given = dataclasses.asdict(config.model.build())
    for name in fixed.keys() & given.keys():
        if given[name] != fixed[name]:
            raise ValueError(
                f"model.{name}: {config.init} has {fixed[name]}, and cannot start a model with {given[name]}; "
                "leave the size out"
            )
    return with_sizes(config, ModelOptions(preset=config.model.preset, **dataclasses.asdict(begin.config)))


def with_tokenizer(config: TrainConfig, begin: Pretrained) -> TrainConfig:
    """Returns the options with the tokeniser of the model to start from, unless another than the default is given."""
    if config.tokenizer != TrainConfig.tokenizer or begin.tokenizer is None:
        return config
    own = begin.tokenizer
    if isinstance(own, Tokenizer):
        file = Path(str(config.init))
        folder = file.parent if file.is_file() else config.init
        own = own.name if own.name in TOKENIZERS else f"{folder}/{TOKENIZER_FILES[0]}"
    return dataclasses.replace(config, tokenizer=own)


def check_causal(config: TrainConfig) -> None:
    """Raises a ValueError if an option for causal models is given and the network is not adapted from one."""
    family = FAMILIES.get(str(config.model.trunk.get("model_type")))
    is_causal = family is not None and family.causal
    for name, value, none in (("init_anneal", config.init_anneal, 0), ("model.shift", config.model.shift, "false")):
        if value and not is_causal:
            raise ValueError(
                f"{name}: expected {none} unless --init is a causal model of transformers, got {str(value).lower()}"
            )


def with_sizes(config: TrainConfig, sizes: ModelOptions) -> TrainConfig:
    """Returns the options with these sizes of the model where none are given."""
    given = {"preset": config.model.preset, **config.model.given()}
    return dataclasses.replace(config, model=dataclasses.replace(sizes, **given))


def _same(first: RankOne, second: RankOne) -> bool:
    same = first.family == second.family and first.dim == second.dim
    return same and torch.equal(first.stationary, second.stationary)
