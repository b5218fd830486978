"""Reads stored models in all supported formats: their configuration and their tensors.

:func:`read_model` reads

* a run folder of ``sedd train``, or one of its checkpoint folders;
* a Hugging Face repository or a folder of the same layout: ``config.json`` with ``model.safetensors`` (from
  ``save_pretrained``) or ``pytorch_model.bin`` (the released SEDD models);
* a training run of the released SEDD code: ``.hydra/config.yaml`` with ``checkpoints-meta/checkpoint.pth``;
* a Lightning checkpoint whose network is called ``backbone`` and uses the released names (as in MDLM and DUO); its
  configuration is read from its hyper-parameters or from a ``.hydra`` folder above it.

Averaged weights are used if there are any. No file can execute code (:mod:`sedd.hub.weights`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sedd.data.tokenizer import TOKENIZER_FILES
from sedd.diffusion.schedule import get_schedule
from sedd.hints import program
from sedd.hub.configuration import StoredModel, from_config, schedule_of
from sedd.hub.weights import PICKLES, read_weights
from sedd.plain import merged, read_plain
from sedd.training.checkpoint import (
    DamagedError,
    best_checkpoint,
    last_whole_checkpoint,
    list_checkpoints,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
    stored_at,
)

__all__ = ["find_model", "read_model"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SHARDS = ("model-*.safetensors", "model.safetensors.index.json")
"""The weights of a large model of ``transformers``."""


def read_model(name_or_path: Path | str, *, config: Mapping[str, Any] | None = None, **hub: Any) -> StoredModel:
    """Reads a model in any of the formats of this module.

    Args:
        name_or_path: a run folder (its best checkpoint is read, or its last one if none was validated), a checkpoint
            folder of a run, a model folder, a checkpoint file, or the name of a repository on the Hugging Face hub.
        config: entries that take precedence over those of the checkpoint, with the keys of
            :func:`sedd.hub.configuration.to_config`, such as ``{"graph": {"type": "uniform"}}``.
        **hub: for a repository on the hub, arguments of ``huggingface_hub.snapshot_download``: ``revision``, ``token``,
            ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        FileNotFoundError: there is no such file, folder or repository, or it contains no model.
        ConnectionError: there is no such file or folder, and the hub cannot be reached.
        ValueError: a file is damaged, contains objects that are not data, or does not describe the model.
    """
    path = find_model(name_or_path, **hub)
    while (checkpoint := _checkpoint(path)) is not None:
        if config:
            raise ValueError(
                f"config: expected none for {path}, a run of sedd train with its own configuration; omit config"
            )
        try:
            with _offering_another(checkpoint.parent.parent):
                return _read_checkpoint(checkpoint)
        except FileNotFoundError:
            # a run that is still training has deleted it meanwhile, and has a better one
            if checkpoint == path or checkpoint.exists():
                raise
    file, found = _contents(path)
    weights, inside = read_weights(file)
    found = merged(inside or found, config or {})
    if not found:
        raise ValueError(
            f"{file}: expected a configuration in it or its folder, got none; give one (sedd convert --config FILE)"
        )
    try:
        return from_config(found, weights, path, file)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: invalid configuration: {error}") from error


def _read_checkpoint(checkpoint: Path) -> StoredModel:
    state, config = read_state(checkpoint), read_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint, config)
    tensors = read_tensors(checkpoint, "ema", state)
    embedding = tensors.get("vocab_embed.embedding")  # a corpus that is not text has its own vocabulary
    tokens = tokenizer.vocab_size if embedding is None else len(embedding) - (config.process != "uniform")
    process = config.make_process(tokens)
    schedule = get_schedule(config.schedule, **config.schedule_params)
    schedule = schedule_of(schedule, process, config.objective, config.objective_params, tensors)
    return StoredModel(
        checkpoint,
        stored_at(checkpoint, "ema"),
        config.model.build(),
        process,
        schedule,
        tokenizer,
        tensors,
        config,
        state,
        config.objective,
        config.objective_params,
    )


@contextmanager
def _offering_another(run_dir: Path) -> Iterator[None]:
    """Adds the last complete checkpoint of the run to the errors about a damaged one."""
    try:
        yield
    except (FileNotFoundError, DamagedError) as error:
        whole = last_whole_checkpoint(run_dir)
        if whole is None:
            raise
        raise type(error)(f"{error}; the last complete checkpoint is {whole}: use that one") from error


# -- location ----------------------------------------------------------------------------------------------------------


def find_model(name_or_path: Path | str, **hub: Any) -> Path:
    """A local path unchanged, or the folder to which a repository on the hub is downloaded.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`read_model`.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix in (*PICKLES, ".safetensors"):
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a run folder (from sedd train --run_dir), a model folder or "
            "file, or the name of a repository on the Hugging Face hub"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["config.json", *WEIGHTS, *SHARDS, *TOKENIZER_FILES], **hub
            )
        )
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            answer = "has no such repository" if isinstance(error, RepositoryNotFoundError) else "returned an error"
            raise FileNotFoundError(
                f"{name}: no such file or folder, and the Hugging Face hub {answer}: {error}"
            ) from error
        raise ConnectionError(
            f"{name}: no such file or folder, and the Hugging Face hub cannot be reached ({type(error).__name__}: "
            f"{error}). Give a run folder, a model folder or file, or connect to the network"
        ) from error


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint folder of a run of ``sedd train``; None if ``path`` may be a model in another format."""
    if path.is_dir() and (re.fullmatch(r"step_\d+", path.name) or (path / "state.json").exists()):
        return Path(os.path.abspath(path))  # its run is two folders above, which a relative path may not contain
    if checkpoints := list_checkpoints(path):
        with _offering_another(path):
            return best_checkpoint(path) or checkpoints[-1]
    if path.is_file() or (path / ".hydra").is_dir() or any((path / name).exists() for name in WEIGHTS):
        return None
    raise FileNotFoundError(
        f"{path}: expected checkpoints or {' or '.join(WEIGHTS)}, got neither; train first: {program()} train "
        f"--run_dir {shlex.quote(str(path))}"
    )


def _contents(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and the configuration in its folder; empty if there is none."""
    if path.is_dir():
        hydra = path / ".hydra" / "config.yaml"
        wanted = ["checkpoints-meta/checkpoint.pth"] if hydra.is_file() else WEIGHTS
        file = next((path / name for name in wanted if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: expected {' or '.join(wanted)} in this folder, got none")
    else:
        file = path
    beside = [file.parent / "config.json"]
    beside += [folder / ".hydra" / "config.yaml" for folder in list(file.resolve().parents)[:3]]
    config = next((candidate for candidate in beside if candidate.is_file()), None)
    return file, {} if config is None else read_plain(config)
