"""Weights out of files of others, without executing anything that is in them.

Pickles are read by torch's ``weights_only`` unpickler. Objects of configuration libraries, which Lightning keeps beside
the weights, become inert records; any other object has the file refused.
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
"""What Lightning modules, DistributedDataParallel and torch.compile put before the names of the network."""
INERT = re.compile(r"(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|typing|pathlib)\.[\w.]+|"
                   r"(builtins|__builtin__)\.(dict|list|tuple|set|int|float|str|bool|bytes|type|NoneType)|"
                   r"collections\.defaultdict")  # fmt: skip
"""Names in a pickle that stand for data beside the weights: they are not looked up, see :class:`_Inert`."""

MAX_VALUES, MAX_LEVELS = 1_000_000, 64


class _Inert:
    """Stands for an object of another library in a pickle: takes its data, looks nothing up and does nothing."""

    data: Any = None

    def __init__(self, *data: Any) -> None:
        if data:
            self.data = data

    def __setstate__(self, state: Any) -> None:
        self.data = state


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Containers and values, also those that OmegaConf wrapped into objects of its own.

    A pickle can hold a list within itself, or many times over. ``budget`` is a list with the number of values that may
    still be copied.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_LEVELS:
        raise ValueError(f"hyper_parameters: expected at most {MAX_VALUES:,} values and {MAX_LEVELS} levels")
    if isinstance(value, _Inert):
        data = value.data if isinstance(value.data, dict) else {}
        return _plain(data.get("_content", data.get("_val")), budget, depth + 1)
    if isinstance(value, dict):
        return {str(key): _plain(entry, budget, depth + 1) for key, entry in value.items()}
    return [_plain(entry, budget, depth + 1) for entry in value] if isinstance(value, list) else value


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file or a pickle of ``torch.save``.

    Args:
        file: the weights by name; or a checkpoint that has them as ``model`` (the released SEDD code) or ``state_dict``
            (Lightning), with moving averages as ``ema`` and the configuration among ``hyper_parameters``.

    Returns:
        Tensors by the names of :class:`sedd.SEDD`, averaged where the file has averages; and the configuration in the
        file, empty if there is none.

    Raises:
        ValueError: the file is damaged, holds objects that are not data, no tensors, or averages that do not fit.
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
        raise ValueError(f"{file}: no tensors by name in it, so no model")
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
    """The dictionary in a file of ``torch.save``; nothing in it is executed."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # older than zip, another protocol, damaged: the unpickler below reads it, or refuses
        unknown = []
    refused = [name for name in unknown if not INERT.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{file}: refused, and nothing of it was run: beside tensors it holds {', '.join(sorted(refused))}, which "
            "could execute code. If you trust its author, load it there and save the state dict alone"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand 149" in str(error):  # FRAME
            raise ValueError(
                f"{file}: its pickle protocol is 4 or newer, which torch does not read without executing code. Load it "
                "where it was made, and save it with torch.save's default protocol"
            ) from error
        raise ValueError(f"{file}: refused, and nothing of it was run: {_reason(error)}") from error
    except Exception as error:  # whatever an operation of the pickle raises on what it was not made for
        raise ValueError(f"{file}: damaged, or not a file of torch.save: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(found).__name__}")
    return found


def _reason(error: Exception) -> str:
    """What is wrong with a pickle, without torch's advice to read it with ``weights_only=False``."""
    text = str(error)
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"beside tensors it holds {name[1]}"
    if known := re.search(r"Unsupported operand \d+|unsupported persistent id|TorchScript archive", text):
        return f"{known[0]}, which is not read"
    if "weights_only" in text:
        return "it holds what torch reads only by executing code"
    return f"{type(error).__name__}: {text}"


def _averaged(weights: dict[str, Tensor], averages: Any, file: Path) -> dict[str, Tensor]:
    """The weights with the averages, a list in the parameters' order, in their places."""
    if not isinstance(averages, (list, tuple)):
        raise ValueError(f"{file}: ema.shadow_params: expected a list of tensors, got {type(averages).__name__}")
    # a state dict has its parameters in their order, and buffers between them
    names = [name for name in weights if not name.endswith("inv_freq")]
    if len(averages) < len(names):
        raise ValueError(f"{file}: {len(averages)} averaged tensors for {len(names)} parameters")
    for name, average in zip(names, averages, strict=False):
        if not isinstance(average, Tensor) or average.shape != weights[name].shape:
            shape = list(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise ValueError(f"{file}: the average of {name} is {shape}, wanted {list(weights[name].shape)}")
    return {**weights, **dict(zip(names, averages, strict=False))}
