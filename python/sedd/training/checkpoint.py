"""Checkpoints: folders of safetensors and JSON files, verified on reading. :mod:`sedd.training.saving` writes them.

``RUN/checkpoints/step_00000500/`` holds

* ``model.safetensors``, ``ema.safetensors``: the weights and their moving average, by parameter name;
* ``optimizer.safetensors``: AdamW's moments as ``<parameter>/<moment>``;
* or, if the model was divided among processes, folders ``model``, ``ema`` and ``optimizer`` with the parts of each
  process, see :mod:`sedd.training.shards`;
* ``config.json``: the options of the run; ``tokenizer.json`` and ``tokenizer_config.json``: the tokeniser, unless it is
  a registered one;
* ``state.json``: step, position in the data, validation bound, elapsed time, size and SHA-256 of the files above, and
  as ``sha256`` the SHA-256 of these entries (checkpoints of earlier versions do not have it, and load as well).

No file is a pickle. If a run resumes from an earlier checkpoint because a later one is damaged, the damaged one is
renamed to ``damaged_step_00000500`` and kept until the run has a checkpoint of that step or a later one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sedd.config import TrainConfig, load_config
from sedd.data.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer
from sedd.files import TEMPORARY, naming
from sedd.options import outside_hint

__all__ = [
    "DamagedError",
    "best_checkpoint",
    "checkpoints_of",
    "fingerprint",
    "last_whole_checkpoint",
    "list_checkpoints",
    "prune",
    "read_config",
    "read_state",
    "read_tensors",
    "read_tokenizer",
    "sealed",
    "set_damaged_aside",
    "stored_at",
    "verify",
]

_DAMAGED = "damaged_"
_FILE = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
"""A file of a checkpoint, which may be in a folder of shards."""


class DamagedError(ValueError):
    """The content of a checkpoint file differs from what was written."""


def fingerprint(path: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 of the entries of ``state.json``; it covers the other files, whose SHA-256 are entries."""
    entries = {key: value for key, value in state.items() if key != "sha256"}
    return {**entries, "sha256": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()}


def checkpoints_of(run_dir: Path) -> Path:
    """The folder of all checkpoints of a run."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first, without incomplete ones of a killed run."""
    found = [path for path in checkpoints_of(run_dir).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _best(states: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    bounds = {path: state["valid"] for path, state in states.items() if state["valid"] is not None}
    return min(bounds, key=lambda path: bounds[path], default=None)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Returns the checkpoint with the lowest validation bound; None if no checkpoint has one.

    Raises:
        FileNotFoundError, DamagedError: the ``state.json`` of a checkpoint is missing or damaged.
    """
    return _best({path: read_state(path) for path in list_checkpoints(run_dir)})


def last_whole_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest complete and undamaged checkpoint; None if there is none."""
    for path in reversed(list_checkpoints(run_dir)):
        with suppress(FileNotFoundError, DamagedError):
            verify(path)
            return path
    return None


def set_damaged_aside(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint from which to resume a run, and renames damaged checkpoints.

    Args:
        run_dir: folder of the run. No other process may train in it.

    Returns:
        The newest complete checkpoint, or None if there is no checkpoint; and a message about each renamed one. Of
        checkpoints older than the newest complete one, only ``state.json`` is checked.

    Raises:
        DamagedError: there are checkpoints, but none is complete. Nothing is renamed.
        OSError: a damaged checkpoint cannot be renamed.
    """
    last: Path | None = None
    damaged: dict[Path, Exception] = {}
    for path in reversed(list_checkpoints(run_dir)):
        try:
            if last is None:
                verify(path)
                last = path
            else:
                read_state(path)
        except (FileNotFoundError, DamagedError) as error:
            damaged[path] = error
    if damaged and last is None:
        raise DamagedError(
            f"{next(iter(damaged.values()))}; no checkpoint of {run_dir} is complete, so the run cannot be resumed. "
            "Train again with another --run_dir"
        )
    lines = []
    for path, why in damaged.items():
        aside = path.with_name(_DAMAGED + path.name)
        with naming(path, "could not be renamed"):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        lines.append(
            f"{why}. Resuming from {last.name if last else None}; the damaged checkpoint is kept as {aside.name} "
            "until there is a newer one"
        )
    return last, lines


def prune(run_dir: Path, keep_last: int) -> None:
    """Deletes all checkpoints except the last ``keep_last`` and the best, and incomplete ones of a killed run.

    A checkpoint whose state cannot be read is kept. A renamed damaged checkpoint is deleted when there is a newer one.

    Raises:
        OSError: a folder cannot be deleted.
    """
    states = {}
    for path in list_checkpoints(run_dir):
        with suppress(FileNotFoundError, DamagedError):
            states[path] = read_state(path)
    paths, best = list(states), _best(states)
    old = [path for path in paths[:-keep_last] if path != best]
    aside = checkpoints_of(run_dir).glob(f"{_DAMAGED}step_*")
    old += [path for path in aside if paths and _step(path) <= _step(paths[-1])]
    for path in old:
        with naming(path, "could not be deleted"):
            # rename first, so that a partly deleted folder is not taken for a checkpoint
            path.rename(path.with_name(TEMPORARY + path.name))
    for path in checkpoints_of(run_dir).glob(TEMPORARY + "*"):
        with naming(path, "could not be deleted"):
            shutil.rmtree(path)


# -- reading -----------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # false for NaN


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and type(value["bytes"]) is int
        and isinstance(value["sha256"], str)
    )


_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("an int of at least 1", lambda value: type(value) is int and value >= 1),
    "valid": ("a finite number or null", lambda value: value is None or _is_number(value)),
    "elapsed": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "device": ("cpu or cuda", lambda value: value in ("cpu", "cuda")),
    "data": ("an object", lambda value: isinstance(value, dict)),
    "files": (
        "an object with bytes and sha256 of each file",
        lambda value: (
            isinstance(value, dict) and all(map(_FILE.fullmatch, value)) and all(map(_is_fingerprint, value.values()))
        ),
    ),
}
"""The entries of ``state.json``: a description of valid values for the error message, and a check."""


def _check_state(state: Any, folder: str) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"expected an object, got {type(state).__name__}")
    if "sha256" in state and state != sealed(state):
        raise ValueError("the entries differ from those that were written (SHA-256)")
    for name, (wanted, is_right) in _STATE.items():
        if name not in state:
            raise ValueError(f"{name}: expected {wanted}, got no entry")
        if not is_right(state[name]):
            raise ValueError(f"{name}: expected {wanted}, got {str(state[name])[:80]}")
    if "sha256" not in state and state.keys() != _STATE.keys():  # earlier versions wrote these entries and no others
        raise ValueError(
            f"sha256: expected because of the entries {', '.join(sorted(state.keys() - _STATE.keys()))}, got none"
        )
    if re.fullmatch(r"step_\d+", folder) and int(folder.removeprefix("step_")) != state["step"]:
        raise ValueError(f"step: expected that of the folder {folder}, got {state['step']}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``state.json`` of a checkpoint.

    Raises:
        FileNotFoundError: it is missing.
        DamagedError: it differs from what was written, or its step is not that of the folder name.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {checkpoint} is incomplete")
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_state(state, checkpoint.name)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged or not the state of a checkpoint: {error}") from error
    return state


def _verify(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    path = checkpoint / name
    if name not in state["files"]:
        raise DamagedError(f"{path}: not listed in state.json of this checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    wanted, found = state["files"][name], fingerprint(path)
    if found["bytes"] != wanted["bytes"]:
        raise DamagedError(f"{path}: truncated or replaced: expected {wanted['bytes']:,} bytes, got {found['bytes']:,}")
    if found["sha256"] != wanted["sha256"]:
        raise DamagedError(f"{path}: damaged: its SHA-256 differs from that in state.json")


def verify(checkpoint: Path) -> None:
    """Verifies the sizes and SHA-256 sums of all files of a checkpoint.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file differs from what was written.
    """
    state = read_state(checkpoint)
    for name in dict.fromkeys([*state["files"], *_shards(checkpoint)]):
        _verify(checkpoint, name, state)


def _shards(checkpoint: Path, folder: str = "*") -> list[str]:
    """The files in a folder of shards, or in all of them."""
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.glob(f"{folder}/*"))


def read_config(checkpoint: Path) -> TrainConfig:
    """Reads and verifies the options of the run of a checkpoint.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file is damaged.
        ValueError: an option is unknown to this version.
    """
    _verify(checkpoint, "config.json", read_state(checkpoint))
    config = load_config(checkpoint / "config.json")
    if config.model.hybrid_shift is None:  # runs that began before the option existed were trained without it
        config.model.hybrid_shift = False
    return config


def read_tokenizer(checkpoint: Path, config: TrainConfig) -> Tokenizer:
    """Returns the tokeniser of a checkpoint: a registered one, or that of its verified tokeniser files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    if config.tokenizer in TOKENIZERS:
        return get_tokenizer(config.tokenizer)
    state = read_state(checkpoint)
    if hint := outside_hint(config.tokenizer):
        raise ValueError(f"{checkpoint}: tokenizer: expected a registered name, got {config.tokenizer}{hint}")
    for name in TOKENIZER_FILES:
        _verify(checkpoint, name, state)
    return get_tokenizer(str(checkpoint / TOKENIZER_FILES[0]))


def stored_at(checkpoint: Path, name: str) -> Path:
    """The tensor file ``name`` of a checkpoint, or the folder with its shards."""
    return checkpoint / name if (checkpoint / name).is_dir() else checkpoint / f"{name}.safetensors"


def read_tensors(
    checkpoint: Path,
    name: str,
    state: Mapping[str, Any] | None,
    device: torch.device | str = "cpu",
    like: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Reads and verifies the tensors of a tensor file, or of a folder of shards, of a checkpoint.

    Args:
        checkpoint: the folder of the checkpoint.
        name: name of the file without ``.safetensors``, or of the folder.
        state: the result of :func:`read_state` for the checkpoint; None if :func:`verify` has already checked it.
        device: the device of the tensors.
        like: from shards, tensors of these names are read divided as these are.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file differs from what was written.
        ValueError: shards need a newer version of PyTorch.
    """
    files = [f"{name}.safetensors"]
    listed = (state or read_state(checkpoint))["files"]
    if shards := [file for file in listed if file.startswith(f"{name}/")]:
        files = list(dict.fromkeys([*shards, *_shards(checkpoint, name)]))
    if state is not None:
        for file in files:
            _verify(checkpoint, file, state)
    if shards:
        from sedd.training.shards import read_shards  # its imports take half a second

        return read_shards(checkpoint / name, like, device)
    return load_file(checkpoint / files[0], device=str(device))
