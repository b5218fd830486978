"""Reads weights from untrusted files without executing code from them.

Pickles are read by torch's ``weights_only`` unpickler. Objects of configuration libraries, which Lightning stores with
the weights, become inert records; a file with any other object is refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd.files import load_tensors

__all__ = ["PICKLES", "read_weights"]

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PREFIXES = ("backbone.", "module.", "_orig_mod.")
"""Prefixes that Lightning modules, DistributedDataParallel and torch.compile add to parameter names."""
INERT = re.compile(r"(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|typing|pathlib)\.[\w.]+|"
                   r"(builtins|__builtin__)\.(dict|list|tuple|set|int|float|str|bool|bytes|type|NoneType)|"
                   r"collections\.defaultdict")  # fmt: skip
"""Classes of data that a pickle may contain besides the weights. They are not imported, see :class:`_Inert`."""

MAX_VALUES, MAX_LEVELS = 1_000_000, 64


class _Inert:
    """Replaces an object of another library in a pickle: stores its data, imports nothing and runs nothing."""

    data: Any = None

    def __init__(self, *data: Any) -> None:
        if data:
            self.data = data

    def __setstate__(self, state: Any) -> None:
        self.data = state


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Copies containers and values as plain data, and unwraps objects of OmegaConf.

    A pickle can contain a list that contains itself, or the same list many times. ``budget`` is a list with the number
    of values that may still be copied.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_LEVELS:
        raise ValueError(f"hyper_parameters: expected at most {MAX_VALUES:,} values and {MAX_LEVELS} levels, got more")
    if isinstance(value, _Inert):
        data = value.data if isinstance(value.data, dict) else {}
        return _plain(data.get("_content", data.get("_val")), budget, depth + 1)
    if isinstance(value, dict):
        return {str(key): _plain(entry, budget, depth + 1) for key, entry in value.items()}
    return [_plain(entry, budget, depth + 1) for entry in value] if isinstance(value, list) else value


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file or a pickle of ``torch.save``.

    Args:
        file: weights by name; or a checkpoint with the weights as ``model`` (the released SEDD code) or ``state_dict``
            (Lightning), moving averages as ``ema`` and the configuration in ``hyper_parameters``.

    Returns:
        Tensors by the names of :class:`sedd.SEDD`, averaged if the file contains averages; and the configuration in the
        file, empty if there is none.

    Raises:
        ValueError: the file is damaged, contains objects that are not data, no tensors, or averages that do not fit.
    """
    if file.suffix == ".safetensors":
        return load_tensors(file)[0], {}
    found = _unpickle(file)
    state = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    weights = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    if not weights:
        raise ValueError(f"{file}: expected tensors by name, got none")
    averages = found.get("ema")
    if isinstance(averages, dict) and "shadow_params" in averages:
        weights = _averaged(weights, averages["shadow_params"], file)
    try:
        hyper = _plain(found.get("hyper_parameters"), [MAX_VALUES])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    hyper = hyper.get("config", hyper) if isinstance(hyper, dict) else {}
    return weights, hyper if isinstance(hyper, dict) else {}


def _unpickle(file: Path) -> dict[str, Any]:
    """Reads the dictionary in a file of ``torch.save`` without executing code from it."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # an older format, another protocol, or damaged: the unpickler below reads or refuses it
        unknown = []
    refused = [name for name in unknown if not INERT.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{file}: refused, no code was executed: expected only tensors and data, got {', '.join(sorted(refused))}, "
            "which could execute code. If you trust its author, load it where it was made and save only the state dict"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand 149" in str(error):  # FRAME
            raise ValueError(
                f"{file}: expected pickle protocol 2 or 3, got 4 or newer, which torch reads only by executing code. "
                "Load the file where it was written, and save it with the default protocol of torch.save"
            ) from error
        raise ValueError(f"{file}: refused, no code was executed: {_reason(error)}") from error
    except Exception as error:  # the operations of an invalid pickle can raise any exception
        raise ValueError(f"{file}: damaged, or not written by torch.save: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(found).__name__}")
    return found


def _reason(error: Exception) -> str:
    """The error in a pickle, without torch's advice to read it with ``weights_only=False``."""
    text = str(error)
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"expected only tensors and data, got {name[1]}"
    if known := re.search(r"Unsupported operand \d+|unsupported persistent id|TorchScript archive", text):
        return f"{known[0]}: not supported"
    if "weights_only" in text:
        return "it contains objects that torch reads only by executing code"
    return f"{type(error).__name__}: {text}"


def _averaged(weights: dict[str, Tensor], averages: Any, file: Path) -> dict[str, Tensor]:
    """The weights, replaced by their averages, which are a list in the order of the parameters."""
    if not isinstance(averages, (list, tuple)):
        raise ValueError(f"{file}: ema.shadow_params: expected a list of tensors, got {type(averages).__name__}")
    # a state dict has the parameters in the same order, with buffers in between
    names = [name for name in weights if not name.endswith("inv_freq")]
    if len(averages) < len(names):
        raise ValueError(
            f"{file}: ema.shadow_params: expected at least {len(names)} tensors (parameters), got {len(averages)}"
        )
    for name, average in zip(names, averages, strict=False):
        if not isinstance(average, Tensor) or average.shape != weights[name].shape:
            shape = list(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise ValueError(f"{file}: ema.shadow_params: expected {list(weights[name].shape)} for {name}, got {shape}")
    return {**weights, **dict(zip(names, averages, strict=False))}
