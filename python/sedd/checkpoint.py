"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and that say so when damaged.

``RUN/checkpoints/step_00000500/`` holds

* ``model.safetensors``, ``ema.safetensors``: the weights and their moving average, by parameter name;
* ``optimizer.safetensors``: AdamW's moments as ``<parameter>/<moment>``; ``rng.safetensors``: generator states;
* ``config.json``: the options of the run; ``tokenizer.json`` and ``tokenizer_config.json``: its tokeniser, unless that
  is one known by name;
* ``state.json``: step, position in the data, validation bound, elapsed time, size and SHA-256 of the files above, and
  as ``sha256`` the SHA-256 of all that (a checkpoint of an earlier version, which has no such entry, loads as well).

Nothing in it is a pickle. A checkpoint is written to a folder with a temporary name, flushed to the disk and
then renamed. A damaged one that a resumed run went back from is kept as ``damaged_step_00000500``, until the run has
passed that step.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sedd.config import TrainConfig, load_config
from sedd.files import TEMPORARY, naming, whole_folder
from sedd.tokenizer import TOKENIZER_FILES, TOKENIZERS, Tokenizer, get_tokenizer

__all__ = [
    "DamagedError",
    "best_checkpoint",
    "last_whole_checkpoint",
    "list_checkpoints",
    "load_weights",
    "prune",
    "read_config",
    "read_state",
    "read_tensors",
    "read_tokenizer",
    "save_checkpoint",
    "set_damaged_aside",
    "verify",
]

_DAMAGED = "damaged_"


class DamagedError(ValueError):
    """A file of a checkpoint is not what was written."""


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``state.json`` with their SHA-256, which covers the other files through theirs."""
    entries = {key: value for key, value in state.items() if key != "sha256"}
    return {**entries, "sha256": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()}


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: TrainConfig,
    texts: Mapping[str, str] = MappingProxyType({}),
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
    final = _folder(run_dir) / f"step_{step:08d}"
    with whole_folder(final, "could not write this checkpoint; earlier ones are untouched") as temporary:
        for name, content in tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in content.items()}, temporary / f"{name}.safetensors"
            )
        (temporary / "config.json").write_text(_json(config.resolved().to_dict()), encoding="utf-8")
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        entries = json.loads(_json({"step": step, **state, "files": files}))  # as they will be read
        (temporary / "state.json").write_text(_json(_sealed(entries)), encoding="utf-8")
    return final


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first; what a killed run left unfinished is not among them."""
    found = [path for path in _folder(run_dir).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _best(states: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    bounds = {path: state["valid"] for path, state in states.items() if state["valid"] is not None}
    return min(bounds, key=lambda path: bounds[path], default=None)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Returns the checkpoint with the lowest validation bound, None if no checkpoint has one.

    Raises:
        FileNotFoundError, DamagedError: the ``state.json`` of a checkpoint is missing or damaged.
    """
    return _best({path: read_state(path) for path in list_checkpoints(run_dir)})


def last_whole_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest checkpoint of which nothing is missing or damaged, None if there is none."""
    for path in reversed(list_checkpoints(run_dir)):
        with suppress(FileNotFoundError, DamagedError):
            verify(path)
            return path
    return None


def set_damaged_aside(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint that a run goes on from, and renames the damaged ones so that they are in nobody's way.

    Args:
        run_dir: folder of the run. No other process may be training in it.

    Returns:
        The newest checkpoint that is whole, None if there is no checkpoint at all; and a line about each that was
        renamed. Of checkpoints older than the first, ``state.json`` alone is looked at.

    Raises:
        DamagedError: there are checkpoints, and none is whole. Nothing is renamed.
        OSError: a damaged one cannot be renamed.
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
            f"{next(iter(damaged.values()))}; no checkpoint of {run_dir} is whole, so it cannot be resumed. Train "
            "again with another --run_dir"
        )
    lines = []
    for path, why in damaged.items():
        aside = path.with_name(_DAMAGED + path.name)
        with naming(path, "could not be renamed"):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        lines.append(
            f"{why}. Going on from {last.name if last else None}; the damaged checkpoint is kept as {aside.name} "
            "until there is a newer one"
        )
    return last, lines


def prune(run_dir: Path, keep_last: int) -> None:
    """Deletes checkpoints but the last ``keep_last`` and the best, and what a killed run left unfinished.

    A checkpoint whose state cannot be read stays. One that was set aside as damaged goes when there is a newer one.

    Raises:
        OSError: something cannot be deleted.
    """
    states = {}
    for path in list_checkpoints(run_dir):
        with suppress(FileNotFoundError, DamagedError):
            states[path] = read_state(path)
    paths, best = list(states), _best(states)
    old = [path for path in paths[:-keep_last] if path != best]
    aside = _folder(run_dir).glob(f"{_DAMAGED}step_*")
    old += [path for path in aside if paths and _step(path) <= _step(paths[-1])]
    for path in old:
        with naming(path, "could not be deleted"):
            # renamed first: a checkpoint half deleted must not look like one
            path.rename(path.with_name(TEMPORARY + path.name))
    for path in _folder(run_dir).glob(TEMPORARY + "*"):
        with naming(path, "could not be deleted"):
            shutil.rmtree(path)


# -- reading -----------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # NaN is not


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
        lambda value: isinstance(value, dict) and all(map(_is_fingerprint, value.values())),
    ),
}
"""The entries of ``state.json``: what each must be, and whether it is."""


def _check_state(state: Any, folder: str) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"expected an object, got {type(state).__name__}")
    if "sha256" in state and state != _sealed(state):
        raise ValueError("its entries are not those that it was written with (SHA-256)")
    for name, (wanted, is_right) in _STATE.items():
        if name not in state:
            raise ValueError(f"{name}: missing")
        if not is_right(state[name]):
            raise ValueError(f"{name}: expected {wanted}, got {str(state[name])[:80]}")
    if "sha256" not in state and state.keys() != _STATE.keys():  # earlier versions wrote these entries and no others
        raise ValueError(f"unknown entries {', '.join(sorted(state.keys() - _STATE.keys()))} and no sha256")
    if re.fullmatch(r"step_\d+", folder) and int(folder.removeprefix("step_")) != state["step"]:
        raise ValueError(f"step: {state['step']}, but the folder is {folder}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``state.json`` of a checkpoint.

    Raises:
        FileNotFoundError: it is missing.
        DamagedError: it is not what was written, or it is of another step than the folder's name says.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {checkpoint} is not a complete checkpoint")
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_state(state, checkpoint.name)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged, not the state of a checkpoint: {error}") from error
    return state


def _verify(path: Path, state: Mapping[str, Any]) -> None:
    if path.name not in state["files"]:
        raise DamagedError(f"{path}: not listed in state.json beside it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; its checkpoint is not complete")
    wanted, found = state["files"][path.name], _fingerprint(path)
    if found["bytes"] != wanted["bytes"]:
        raise DamagedError(f"{path}: truncated or replaced: {found['bytes']:,} bytes, written with {wanted['bytes']:,}")
    if found["sha256"] != wanted["sha256"]:
        raise DamagedError(f"{path}: damaged: its SHA-256 is not the one it was written with")


def verify(checkpoint: Path) -> None:
    """Compares every file of a checkpoint with what was written.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file is not what was written.
    """
    state = read_state(checkpoint)
    for name in state["files"]:
        _verify(checkpoint / name, state)


def read_config(checkpoint: Path) -> TrainConfig:
    """Reads and verifies the options that a checkpoint was trained with.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file is damaged.
        ValueError: it has options that this version does not know.
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
    checkpoint: Path, name: str, state: Mapping[str, Any] | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Reads and verifies one of a checkpoint's tensor files.

    Args:
        checkpoint: the folder.
        name: file name without ``.safetensors``.
        state: what :func:`read_state` returned for the folder; None if :func:`verify` has looked at it already.
        device: where the tensors go.

    Raises:
        FileNotFoundError: the file is missing.
        DamagedError: the file is not the one that was written.
    """
    path = checkpoint / f"{name}.safetensors"
    if state is not None:
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
