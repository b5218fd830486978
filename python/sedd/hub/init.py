"""Reads models that a run can start from: those of :mod:`sedd.hub.formats`, and language models of ``transformers``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd.adapted import FAMILIES, Trunk, sizes_of, trunk_class, trunk_config
from sedd.data.tokenizer import TOKENIZER_FILES, Tokenizer, get_tokenizer
from sedd.diffusion.schedule import Schedule
from sedd.hub.formats import find_model, read_model
from sedd.hub.weights import read_weights
from sedd.network import ModelConfig
from sedd.options import check_one_of
from sedd.plain import read_json, read_plain
from sedd_ext import RankOne

__all__ = ["Begin", "read_init"]

MASKS = ("[MASK]", "<mask>", "<|mask|>")
"""Spellings of MASK in a tokenizer.json."""


@dataclass
class Begin:
    """A model that a run can start from.

    Attributes:
        config: the sizes of the network.
        process: the noise process; None for a model of ``transformers``, which is not a diffusion model yet.
        schedule: the noise schedule, or None.
        tokenizer: a tokeniser, its name, or None if it is unknown.
        tensors: the weights by name. For a model of ``transformers``, those of the vocabulary have one row more than it
            has tokens: the last one is that of MASK.
    """

    config: ModelConfig
    process: RankOne | None
    schedule: Schedule | None
    tokenizer: str | Tokenizer | None
    tensors: Mapping[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        """The weights by name."""
        return self.tensors


def read_init(name_or_path: Path | str) -> Begin:
    """Reads a model to start from, for ``Run(config, load_init=read_init)``.

    Args:
        name_or_path: see :func:`sedd.hub.formats.read_model`; or a folder or repository with a model of
            ``transformers`` of one of :data:`sedd.adapted.FAMILIES`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as :func:`sedd.hub.formats.read_model`.
        ImportError: ``transformers`` is needed and not installed.
    """
    path = find_model(name_or_path)
    described = path / "config.json"
    found = read_plain(described) if described.is_file() else {}
    if "model_type" in found and "graph" not in found:
        return _of_transformers(path, found)
    stored = read_model(path)
    return Begin(stored.sizes, stored.process, stored.schedule, stored.tokenizer, stored.tensors)


def _of_transformers(path: Path, found: Mapping[str, Any]) -> Begin:
    """A model of ``transformers``, whose class is one of :data:`FAMILIES`, whatever its files say."""
    try:
        check_one_of("model_type", str(found["model_type"]), FAMILIES)
    except ValueError as error:
        raise ValueError(f"init: {path / 'config.json'}: {error}") from None
    file = path / TOKENIZER_FILES[0]
    tokenizer = get_tokenizer(str(file)) if file.is_file() else None
    trunk = Trunk(model := _read_transformers(path, found), found["model_type"])
    mask = _mask_token(file)
    own = set(trunk.vocabulary())
    tensors = {
        f"trunk.{name}": _with_mask(value, mask) if name in own else value for name, value in trunk.state_dict().items()
    }
    return Begin(sizes_of(model.config, found["model_type"]), None, None, tokenizer, tensors)


def _read_transformers(path: Path, found: Mapping[str, Any]) -> Any:
    """The model in float32, from safetensors or from a pickle without code."""
    kind = trunk_class(found)
    try:
        config = kind.config_class.from_dict(dict(found))
    except Exception as error:  # the checks of the library raise errors of their own
        raise ValueError(f"{path / 'config.json'}: expected a model of {found['model_type']}, got: {error}") from error
    # only entries that describe the network: others may name code
    config = trunk_config(sizes_of(config, found["model_type"]).trunk, vocab_size=config.vocab_size)
    pickle = path / "pytorch_model.bin"
    safe = any(path.glob("model*.safetensors"))
    if not safe and not pickle.is_file():
        raise FileNotFoundError(f"{path}: expected model.safetensors or {pickle.name} in this folder, got neither")
    source: dict[str, Any] = {"use_safetensors": True} if safe else {"state_dict": read_weights(pickle)[0]}
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                str(path) if safe else None,
                config=config,
                attn_implementation="sdpa",
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                **source,
            )
    except Exception as error:  # whatever the library raises for values and tensors that do not fit
        raise ValueError(f"{path}: expected the weights of its config.json, got: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path}: expected the weights of {kind.__name__}, got none for {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without the progress bars of ``transformers``."""
    from transformers.utils import logging as library

    logging: Any = library
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _mask_token(file: Path) -> int | None:
    """The number of the MASK token in a tokenizer.json; None if there is none."""
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    return next((token["id"] for token in added if token["content"] in MASKS), None)


def _with_mask(rows: Tensor, mask: int | None) -> Tensor:
    """Rows of the vocabulary, and one for MASK: that of the model's own MASK, or their mean."""
    row = rows.mean(0, keepdim=True) if mask is None else rows[mask : mask + 1]
    return torch.cat([rows, row])
