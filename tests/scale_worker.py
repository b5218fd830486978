"""Measures optimiser steps of several processes; started by torchrun from test_scale.py.

The arguments are files with the options of runs. The first process prints a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sedd.config import load_config
from sedd.training.parallel import local
from sedd.training.run import Run
from sedd_ext import linear_mean_prediction, linear_score_entropy

KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


def within(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Calls an operator; the mode sees the operators in the fused head too."""
    heads = {
        torch.ops.sedd_ext.linear_score_entropy.default: linear_score_entropy._forward,
        torch.ops.sedd_ext.linear_mean_prediction.default: linear_mean_prediction._forward,
    }
    if func in heads:
        with mode:
            return heads[func](*args)
    return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block by kind and by bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls operators on its own part
        kind = KINDS.get(func.__name__.split(".")[0])
        if kind is not None and func.namespace in ("c10d", "_c10d_functional"):
            size = max(sum(value.nbytes for value in tree_leaves(one) if isinstance(value, Tensor)) for one in args)
            self.counts[kind, size] += 1
        return within(self, func, args, kwargs)


class Memory(TorchDispatchMode):
    """The most bytes that tensors hold after an operator in its block, those of ``tensors`` included.

    Temporary memory inside an operator is left out, except in the fused head.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = weakref.ref(storage)
        storages = {key: reference() for key, reference in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in storages.items() if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages.values() if storage is not None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        out = within(self, func, args, kwargs)
        self.add(value for value in tree_leaves(out) if type(value) in (Tensor, nn.Parameter))
        return out


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors share or have."""
    storages = [tensor.untyped_storage() for tensor in local(tensors)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measured(run: Run) -> dict[str, Any]:
    """What the steps of a run need, once DDP has made its buckets again and the optimiser has its state."""
    state = run.state
    parameters, optimizer = list(state.diffusion.parameters()), state.optimizer
    step, gradients = optimizer.step, list[Tensor]()

    def watched() -> None:
        gradients[:] = local(parameter.grad for parameter in parameters if parameter.grad is not None)
        step()

    optimizer.step = watched  # type: ignore[assignment, method-assign]
    for _ in range(2):
        state.train_step()
    with Collectives() as found:
        state.train_step()
    moments = [value for values in optimizer.state.values() for value in values.values()]
    kept = {
        "parameters": size(parameters),
        "gradients": size(gradients),
        "moments": size(moments),
        "average": size(state.ema.parameters()),
    }
    gradients.clear()
    lasting = [parameter.grad for parameter in parameters if parameter.grad is not None]  # DDP's buckets
    with Memory(local([*parameters, *moments, *state.ema.parameters(), *lasting])) as memory:
        optimizer.step = step  # type: ignore[method-assign]
        state.train_step()
    return {"collectives": sorted((*key, n) for key, n in found.counts.items()), "kept": kept, "peak": memory.peak}


if __name__ == "__main__":
    for path in sys.argv[1:]:
        run = Run(load_config(path))
        result = measured(run)
        if run.world.first:
            print(json.dumps(result), flush=True)
