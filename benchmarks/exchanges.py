"""What processes that share a vocabulary exchange for a loss and its gradients: ours beside torch's loss parallel.

torchrun --nproc_per_node 2 benchmarks/exchanges.py

Every process has half of the rows of the head. For each loss the table has the collectives whose result is needed
before the gradient of the logits can be computed, those that run beside the computation, and what a process puts into
them, in bytes for each position that goes through the head. "logits" tells whether a process stores its half of the
logits of all positions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_ext import (
    Absorbing,
    RankOne,
    Uniform,
    head,
    linear_generalized_masked_loss,
    linear_mean_prediction_loss,
    linear_score_entropy_loss,
)

ROWS, WIDTH, N = 64, 16, 5000


@dataclass
class Exchange:
    """A collective: what a process puts in, and whether it computes a matrix product before it waits for the result."""

    name: str
    bytes: int
    waits: bool


class _Work:
    """A collective that runs, and the number of matrix products when it began."""

    def __init__(self, work: Any, exchange: Exchange, products: list[int]) -> None:
        self.work, self.exchange, self.products, self.begun = work, exchange, products, products[0]

    def wait(self) -> None:
        self.exchange.waits = self.products[0] == self.begun
        self.work.wait()


class _Functional(TorchDispatchMode):
    """Records the collectives of torch's own tensor parallelism, which waits for each at once."""

    def __init__(self, found: list[Exchange]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls the operators on its parts
        if func.namespace == "_c10d_functional" and func.__name__.startswith(("all_", "reduce_scatter")):
            self.found.append(Exchange(func.__name__.split(".")[0], args[0].nbytes, True))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[Exchange]]:
    """The collectives of a block."""
    found: list[Exchange] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    products, add_product = [0], head._add_product

    def counting(*arguments: Any) -> None:
        products[0] += 1
        add_product(*arguments)

    def recording(name: str) -> Callable[..., Any]:
        def call(*tensors: Tensor, async_op: bool = False, **options: Any) -> Any:
            found.append(Exchange(name, tensors[-1].nbytes, True))
            work = originals[name](*tensors, async_op=async_op, **options)
            return _Work(work, found[-1], products) if async_op else None

        return call

    for name in originals:
        setattr(dist, name, recording(name))
    head._add_product = counting
    try:
        with _Functional(found):
            yield found
    finally:
        head._add_product = add_product
        for name, original in originals.items():
            setattr(dist, name, original)


def losses(mesh: Any) -> dict[str, Callable[[Tensor, DTensor, DTensor], Tensor]]:
    """The contestants: losses of hidden states and a head whose rows are divided, all of whose positions count."""
    mask, x_0 = N - 1, torch.arange(ROWS)
    masked = torch.full((ROWS,), mask)

    def of(operator: Callable[..., Tensor], process: RankOne) -> Callable[..., Tensor]:
        return lambda hidden, weight, bias: operator(hidden, weight, bias, masked, x_0, 0.5, process)

    def generalized(hidden: Tensor, weight: DTensor, bias: DTensor) -> Tensor:
        return linear_generalized_masked_loss(hidden, weight, bias, masked, x_0, 0.5, torch.ones(N))

    def cross_entropy(hidden: Tensor, weight: DTensor, bias: DTensor) -> Tensor:
        logits = F.linear(DTensor.from_local(hidden, mesh, [Replicate()], run_check=False), weight, bias)
        return F.cross_entropy(logits, x_0)

    return {
        "linear_score_entropy_loss, absorbing": of(linear_score_entropy_loss, Absorbing(mask)),
        "linear_score_entropy_loss, uniform": of(linear_score_entropy_loss, Uniform(N)),
        "linear_mean_prediction_loss, absorbing": of(linear_mean_prediction_loss, Absorbing(mask)),
        "linear_mean_prediction_loss, uniform": of(linear_mean_prediction_loss, Uniform(N)),
        "linear_generalized_masked_loss": generalized,
        "F.linear and F.cross_entropy in torch's loss_parallel": cross_entropy,
    }


def line(name: str, found: list[Exchange], logits: str) -> str:
    """A row of the table."""
    before = [exchange for exchange in found if exchange.waits]
    beside = [exchange for exchange in found if not exchange.waits]
    if "loss_parallel" in name:  # the last one is that of the gradient of the hidden states
        before, beside = found[:-1], found[-1:]
    numbers = [len(before), sum(e.bytes for e in before) / ROWS, len(beside), sum(e.bytes for e in beside) / ROWS]
    return f"| {name} | " + " | ".join(f"{number:g}" for number in numbers) + f" | {logits} |"


def main() -> int:
    if not dist.is_torchelastic_launched():
        print("exchanges.py: expected torchrun --nproc_per_node 2 in front of it, got one process", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    hidden, whole = torch.randn(ROWS, WIDTH), torch.randn(N, WIDTH) / WIDTH
    rows = slice(dist.get_rank() * -(-N // mesh.size()), (dist.get_rank() + 1) * -(-N // mesh.size()))
    table = []
    for name, loss in losses(mesh).items():
        leaves = [hidden.clone(), DTensor.from_local(whole[rows], mesh, [Shard(0)])]
        leaves.append(DTensor.from_local(whole[rows, 0], mesh, [Shard(0)]))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with recorded() as found:
            if "loss_parallel" in name:
                with loss_parallel():
                    loss(*leaves).backward()
            else:
                loss(*leaves).sum().backward()
        table.append(line(name, found, "stored" if "loss_parallel" in name else "no"))
    if dist.get_rank() == 0:
        print(f"hidden states of {WIDTH} float32 numbers: {4 * WIDTH} bytes a position\n")
        print(
            "| loss | before the gradient | bytes | beside it | bytes | logits |\n| --- | --- | --- | --- | --- | --- |"
        )
        print(*table, sep="\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
