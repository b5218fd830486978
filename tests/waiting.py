"""Finds out whether code waits for the device: a GPU would have to finish its work before the CPU can go on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_ext.linear_reverse import _sample
from sedd_ext.linear_unmask import _unmask as _linear_unmask
from sedd_ext.unmask import _unmask

IMPLEMENTATIONS = {
    "linear_reverse_sample": _sample,
    "linear_unmask": _linear_unmask,
    "unmask": _unmask,
}
"""The operators that are looked into."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero", "item"}
"""Operators whose result, or the shape of it, the CPU needs."""


class WaitError(AssertionError):
    """The code waits for the device."""


class NeverWaits(TorchDispatchMode):
    """Raises :class:`WaitError` in its block at an operator that waits, or copies a tensor that is not from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        kwargs = kwargs or {}
        if func.namespace == "sedd_ext":
            if name not in IMPLEMENTATIONS:
                raise NotImplementedError(f"{name}: not in IMPLEMENTATIONS")
            with self:
                return IMPLEMENTATIONS[name](*args)
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # no operator of a program that runs on one device names a device for a tensor that it has
        moved = name == "_to_copy" and kwargs.get("device") is not None
        if name in WAITS or by_mask or moved:
            raise WaitError(f"{name} waits for the device")
        return func(*args, **kwargs)
