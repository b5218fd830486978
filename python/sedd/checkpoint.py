"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and that say so when damaged.

``RUN/checkpoints/step_00000500/`` holds

* ``model.safetensors``, ``ema.safetensors``: the weights and their moving average, by parameter name;
* ``optimizer.safetensors``: AdamW's moments as ``<parameter>/<moment>``; ``rng.safetensors``: generator states;
* ``config.json``: the options of the run; ``tokenizer.json`` and ``tokenizer_config.json``: its tokeniser, unless that
  is one known by name;
* ``state.json``: step, position in the data, validation bound, elapsed time, and size and SHA-256 of the files above.

Nothing in it is a pickle. A checkpoint is written to a folder with a temporary name, flushed to the disk and
then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sedd.config import TrainConfig, load_config
from sedd.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer

__all__ = [
    "best_checkpoint",
    "finite",
    "list_checkpoints",
    "load_weights",
    "prune",
    "read_config",
    "read_state",
    "read_tensors",
    "read_tokenizer",
    "save_checkpoint",
    "write_json",
    "write_text",
]

_TEMPORARY = ".writing-"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is either the old one or the new one, whatever happens."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, whatever happens."""
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def finite(value: float) -> float | None:
    """Returns the number, None if it is NaN or infinite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def _flush(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: TrainConfig,
    texts: Mapping[str, str],
) -> Path:
    """Writes the checkpoint of a step.

    Args:
        run_dir: folder of the run.
        step: optimiser steps taken.
        tensors: per file (``"model"`` makes ``model.safetensors``) the tensors by name.
        state: what else a resumed run needs, JSON-ready; ``"valid"`` is the validation bound at this step, or None.
        config: options of the run.
        texts: the content of each further file, such as those of the tokeniser.

    Returns:
        The new folder.

    Raises:
        OSError: it could not be written (a full disk, for example). Nothing of it is left, and nothing else is touched.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in content.items()}, temporary / f"{name}.safetensors"
            )
        write_json(temporary / "config.json", config.resolved().to_dict())
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "state.json", {"step": step, **state, "files": files})
        for file in temporary.iterdir():
            _flush(file)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{final}: could not write this checkpoint; earlier ones are untouched: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first; what a killed run left unfinished is not among them."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def best_checkpoint(run_dir: Path) -> Path | None:
    """Returns the checkpoint with the lowest validation bound, None if no checkpoint has one."""
    bounds = {path: read_state(path)["valid"] for path in list_checkpoints(run_dir)}
    return min((path for path in bounds if bounds[path] is not None), key=lambda path: bounds[path], default=None)


def prune(run_dir: Path, keep_last: int) -> None:
    """Deletes all checkpoints but the last ``keep_last`` and the best, and what a killed run left unfinished."""
    best = best_checkpoint(run_dir)
    for path in list_checkpoints(run_dir)[:-keep_last]:
        if path != best:
            # renamed first: a checkpoint half deleted must not look like one
            shutil.rmtree(path.rename(path.with_name(_TEMPORARY + path.name)))
    for path in (run_dir / "checkpoints").glob(_TEMPORARY + "*"):
        shutil.rmtree(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``state.json`` of a checkpoint.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {checkpoint} is not a complete checkpoint")
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"step", "valid", "files"} <= state.keys():
            raise ValueError("entries are missing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, not the state of a checkpoint ({error})") from error
    return state


def _verify(path: Path, state: Mapping[str, Any]) -> None:
    if path.name not in state["files"]:
        raise ValueError(f"{path}: not listed in state.json beside it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; its checkpoint is not complete")
    wanted, found = state["files"][path.name], _fingerprint(path)
    if found["bytes"] != wanted["bytes"]:
        raise ValueError(f"{path}: truncated or replaced: {found['bytes']:,} bytes, written with {wanted['bytes']:,}")
    if found["sha256"] != wanted["sha256"]:
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one it was written with")


def read_config(checkpoint: Path) -> TrainConfig:
    """Reads and verifies the options that a checkpoint was trained with.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or has options that this version does not know.
    """
    _verify(checkpoint / "config.json", read_state(checkpoint))
    config = load_config(checkpoint / "config.json")
    if config.model.hybrid_shift is None:  # a run that began before the option existed was trained without it
        config.model.hybrid_shift = False
    return config


def read_tokenizer(checkpoint: Path, config: TrainConfig) -> Tokenizer:
    """Returns the tokeniser that a checkpoint was trained with: one known by name, or the verified files beside it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    if config.tokenizer in TOKENIZERS:
        return get_tokenizer(config.tokenizer)
    state = read_state(checkpoint)
    for name in TOKENIZER_FILES:
        _verify(checkpoint / name, state)
    return get_tokenizer(str(checkpoint / TOKENIZER_FILES[0]))


def read_tensors(
    checkpoint: Path, name: str, state: Mapping[str, Any], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Reads and verifies one of a checkpoint's tensor files.

    Args:
        checkpoint: the folder.
        name: file name without ``.safetensors``.
        state: what :func:`read_state` returned for the folder.
        device: where the tensors go.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not the one that was written.
    """
    path = checkpoint / f"{name}.safetensors"
    _verify(path, state)
    return load_file(path, device=str(device))


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a module, which may be on the meta device.

    Raises:
        ValueError: names or shapes are not those of the module; ``path`` is the file to name. All tensors that are
            missing, unexpected or misshapen are listed, up to ten of each.
    """
    wanted = {name: list(value.shape) for name, value in module.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    wrong = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": [
            f"{name} {found[name]} instead of {wanted[name]}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    if any(wrong.values()):
        lists = [
            f"{len(names)} {kind} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
            for kind, names in wrong.items()
            if names
        ]
        raise ValueError(f"{path}: does not fit the configuration: tensors {'; '.join(lists)}")
    if any(value.is_meta for value in module.state_dict().values()):
        module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))
