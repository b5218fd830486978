"""Counts the collectives of an optimiser step; started by torchrun from test_parallel.py.

The arguments are a text, a folder, and of each run the engine, the number of batches in a step, and the number of
processes that share a vocabulary. The first process prints a line for each run.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from sedd.config import ModelOptions, ParallelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.training.run import Run


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    model = ModelOptions(hidden_size=16, n_blocks=2, n_heads=2, cond_dim=8, length=16)
    for words in sys.argv[3:]:
        data, accumulate, vocab = words.split()
        config = TrainConfig(
            run_dir=str(Path(sys.argv[2]) / words),
            data=DataConfig(source=sys.argv[1]),
            model=model,
            batch_size=2,
            accumulate=int(accumulate),
            parallel=ParallelOptions(data=data, vocab=int(vocab)),  # type: ignore[arg-type]
            report_to="none",
            precision="fp32",
        )
        run = Run(config)
        for _ in range(2):  # DDP rebuilds its buckets after the first step
            run.state.train_step()
        with Collectives() as found:
            run.state.train_step()
        if run.world.first:
            print(*(found.counts[name] for name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")))
