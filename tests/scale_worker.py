"""Measures what a process allocates and sends in an optimiser step; started by torchrun from test_scale.py.

The arguments are a text, a folder, and the options of each run as JSON. The first process prints JSON for each.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from sedd.config import ModelOptions, ParallelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.training.parallel import clear_gradients, local
from sedd.training.run import Run

NAMES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
}
SMALL = 512
"""Bytes: norms and votes, which are not counted, have no more."""


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block, and the bytes of the whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.nbytes > SMALL:
            self.counts[name] += 1
            self.bytes[name] += tensor.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name = NAMES.get(func.__name__.split(".")[0])
        if name is not None and func.namespace in ("c10d", "_c10d_functional"):
            # a gather's first argument is its result; a reduction with a scatter takes the whole tensor second
            tensor = {"all_gather": args[0], "reduce_scatter": args[1] if len(args) > 1 else args[0]}.get(name, args[0])
            self.add(name, tensor[0] if isinstance(tensor, list) else tensor)
        return func(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[Collectives]:
    """Those inside our operators too, where no mode looks."""
    original, found = dist.all_reduce, Collectives()

    def recording(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if _get_current_dispatch_mode() is None:
            found.add("all_reduce", tensor)
        return original(tensor, *args, **options)

    dist.all_reduce = recording
    try:
        with found:
            yield found
    finally:
        dist.all_reduce = original


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in local(tensors))


def peak(run: Run) -> int:
    """Bytes that a step allocates at most beside what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run.state.train_step()
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def measure(text: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    model = ModelOptions(**options.pop("model"))
    parallel = ParallelOptions(**options.pop("parallel"))
    config = TrainConfig(
        run_dir=str(folder),
        data=DataConfig(source=text),
        model=model,
        parallel=parallel,
        report_to="none",
        precision="fp32",
        **options,
    )
    run = Run(config)
    state = run.state
    for _ in range(2):  # the first makes the optimiser's state; DDP rebuilds its buckets after it
        state.train_step()
    with collectives() as found:
        state.train_step()
    state._backward()
    gradients = size(p.grad for p in state.diffusion.parameters() if p.grad is not None)
    clear_gradients(state.model)
    moments = [value for values in state.optimizer.state.values() for value in values.values() if value.dim()]
    held = {
        "weights": size(state.diffusion.parameters()),
        "gradients": gradients,
        "AdamW": size(moments),
        "average": size(state.ema.parameters()),
    }
    return {"held": held, "peak": peak(run), "counts": found.counts, "bytes": found.bytes}


if __name__ == "__main__":
    for number, words in enumerate(sys.argv[3:]):
        result = measure(sys.argv[1], Path(sys.argv[2]) / str(number), json.loads(words))
        if int(torch.distributed.get_rank()) == 0:
            print(json.dumps(result))
