"""Fine-tuning: runs that start from the weights of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sedd.config import ModelOptions, TrainConfig
from sedd.data.tokenizer import Tokenizer
from sedd.diffusion.schedule import Schedule
from sedd.network import ModelConfig
from sedd_ext import RankOne

__all__ = ["Pretrained", "checked_init", "with_sizes"]

FREE_SIZES = ("length", "dropout")
"""Sizes of a model that no weight depends on: a run may change them when it starts from a trained model."""


class Pretrained(Protocol):
    """A trained network to start from, such as :class:`sedd.hub.SEDD`."""

    config: ModelConfig
    process: RankOne
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
    vocabulary = tokenizer.vocab_size
    theirs = begin.tokenizer if isinstance(begin.tokenizer, str | None) else begin.tokenizer.name
    wanted = config.make_process(vocabulary)
    if theirs not in (None, tokenizer.name):
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
        given = dataclasses.asdict(config.model.build())
    for name in fixed.keys() & given.keys():
        if given[name] != fixed[name]:
            raise ValueError(
                f"model.{name}: {config.init} has {fixed[name]}, and cannot start a model with {given[name]}; "
                "leave the size out"
            )
    return with_sizes(config, ModelOptions(preset=config.model.preset, **dataclasses.asdict(begin.config)))


def with_sizes(config: TrainConfig, sizes: ModelOptions) -> TrainConfig:
    """Returns the options with these sizes of the model where none are given."""
    given = {name: value for name, value in dataclasses.asdict(config.model).items() if value is not None}
    return dataclasses.replace(config, model=dataclasses.replace(sizes, **given))
