"""Weights by their names in files, and copying them into a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

__all__ = ["load_weights", "stored_name"]


def stored_name(name: str) -> str:
    """Name in a file for a tensor of :class:`sedd.diffusion.Diffusion`; tensors of the network have released names."""
    return name.removeprefix("network.")


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a module, which may be on the meta device.

    Args:
        module: a network, or a :class:`sedd.diffusion.Diffusion`.
        tensors: tensors by their names in the file, see :func:`stored_name`.
        path: the file, for the error message.

    Raises:
        ValueError: names or shapes differ from those of the module. The message lists missing, unexpected and misshapen
            tensors, up to ten of each.
    """
    names = {stored_name(name): name for name in module.state_dict()}
    wanted = {stored_name(name): list(value.shape) for name, value in module.state_dict().items()}
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
        raise ValueError(f"{path}: expected the tensors of the configuration, got {'; '.join(lists)}")
    if any(value.is_meta for value in module.state_dict().values()):
        module.to_empty(device="cpu")
    module.load_state_dict({names[name]: value for name, value in tensors.items()})
