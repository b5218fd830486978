"""Loads trained models with their process, schedule and tokeniser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sedd.config import TrainConfig
from sedd.data.corpora import CORPORA
from sedd.data.corpus import Corpus
from sedd.data.options import DataConfig
from sedd.data.tokenizer import TOKENIZERS, Tokenizer, get_tokenizer
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.objectives import get_objective
from sedd.hub.formats import read_model
from sedd.hub.model import SEDD
from sedd.options import prefixed
from sedd.runtime import autocast_dtype

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its process, schedule and tokeniser.

    Attributes:
        path: the checkpoint folder of a run; otherwise the folder or file of the model.
        diffusion: in evaluation mode, with the averaged weights.
        tokenizer: converts text to tokens and back.
        config: the options of the run; None for a model that is not a run of ``sedd train``.
        state: the ``state.json`` of the checkpoint; None for a model that is not a run of ``sedd train``.
    """

    path: Path
    diffusion: Diffusion
    tokenizer: Tokenizer
    config: TrainConfig | None = None
    state: dict[str, Any] | None = None

    @property
    def model(self) -> SEDD:
        """The network, with the process, schedule and tokeniser that are saved with it."""
        assert isinstance(self.diffusion.network, SEDD)
        return self.diffusion.network

    @property
    def is_text(self) -> bool:
        """Whether the model is one of text."""
        return self.config is None or self.config.corpus == "text"

    def need_text(self) -> None:
        """Raises a ValueError if the model is not one of text."""
        if not self.is_text:
            assert self.config is not None
            raise ValueError(f"run: expected a model of text, got {self.path}, a model of {self.config.corpus}")

    def corpus(self, cache_dir: str | None = None) -> Corpus:
        """Loads the data of the run.

        Args:
            cache_dir: folder for downloads; None: that of the run.

        Raises:
            ValueError: the model is not a run of ``sedd train``, or as the corpus.
            FileNotFoundError, ConnectionError, ImportError: as the corpus.
        """
        if self.config is None:
            raise ValueError(f"run: expected a run of sedd train, got {self.path}, a model without data")
        data = dataclasses.replace(self.config.data, cache_dir=cache_dir or self.config.data.cache_dir)
        with prefixed("data.", DataConfig):
            return CORPORA[self.config.corpus](data, self.tokenizer, self.model.config.length)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast on the model's device; None for float32 without autocast."""
        return autocast_dtype(self.config.precision if self.config else "auto", self.diffusion.device)


def load_model(name_or_path: Path | str, device: torch.device | str = "cpu") -> LoadedModel:
    """Loads a model with averaged weights, process, schedule and tokeniser, for sampling or evaluation.

    Args:
        name_or_path: see :func:`sedd.hub.formats.read_model`.
        device: the device of the model.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`sedd.hub.formats.read_model`.
        ValueError: as there; or the tensors do not fit the model, or its tokeniser is unknown.
    """
    stored = read_model(name_or_path)
    if stored.sizes.shape and stored.config is None:
        raise ValueError(
            f"{stored.path}: expected a model of text or a run of sedd train, got a model of images without "
            "the options of its data; SEDD.from_pretrained loads it"
        )
    model = SEDD.from_stored(stored, device)
    if stored.tokenizer is None:
        raise ValueError(
            f"{stored.path}: tokenizer: expected the tokeniser of {model.dim} tokens, got none; in config.json, set "
            f"tokenizer to one of {', '.join(TOKENIZERS)}, or put a tokenizer.json in the same folder"
        )
    tokenizer = stored.tokenizer if isinstance(stored.tokenizer, Tokenizer) else get_tokenizer(stored.tokenizer)
    objective = get_objective(stored.objective, **stored.objective_params)
    parameterization = objective.parameterization(stored.sizes)
    diffusion = Diffusion(model, stored.process, stored.schedule, objective, parameterization).to(device).eval()
    return LoadedModel(stored.path, diffusion, tokenizer, stored.config, stored.state)
