"""The vocabulary split over processes, each of which has some rows of the output head.

Process r of P has the rows [r c, (r + 1) c) of the N rows of the head, with c = ⌈N / P⌉, as ``weight.chunk(P)[r]`` and
DTensor's ``Shard(0)`` divide them. All processes pass the same hidden states and tokens, and get the same results. The
gradient of the hidden states is the whole one, and those of weight and bias are of the process's own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._dispatch import kind_of

__all__: list[str] = []


class Share(NamedTuple):
    """The part of the vocabulary whose rows of the head this process has.

    Attributes:
        dim: N.
        first: the first of its rows, as a token.
        group: the name of the processes over which the vocabulary is split; empty if this process has all of it.
    """

    dim: int
    first: int
    group: str


class Sums:
    """Sums of tensors over the processes of a group, which run while the process computes something else."""

    def __init__(self, group: str) -> None:
        self._group = _resolve(group) if group else None
        self._works: list[Any] = []

    def start(self, values: Tensor) -> None:
        """Starts to replace a contiguous tensor by its sum over the processes. Does nothing without a group."""
        if self._group is not None:
            self._works.append(torch.distributed.all_reduce(values, group=self._group, async_op=True))

    def wait(self) -> None:
        """Waits for the sums; on a GPU, only the current stream does."""
        for work in self._works:
            work.wait()
        self._works.clear()


def gather(values: Tensor, group: str) -> Tensor:
    """The values of all processes of a group, [P, *shape], in the order of their rows of the head."""
    processes = _resolve(group)
    gathered = values.new_empty((processes.size(), *values.shape))
    torch.distributed.all_gather(list(gathered), values.contiguous(), group=processes)
    return gathered


def most_rows(rows: int, dim: int, group: str) -> int:
    """The largest number of rows of the head that a process has, given that of this process."""
    return -(-dim // _resolve(group).size()) if group else rows


def _resolve(name: str) -> Any:
    groups: Any = torch.distributed.distributed_c10d
    return groups._resolve_process_group(name)


def check_split(
    weight: Tensor, bias: Tensor | None, dim: int | None, group: object
) -> tuple[Tensor, Tensor | None, Share]:
    """Checks which rows of the head this process has.

    Args:
        weight: the whole weight or the rows of this process, or a DTensor of all rows.
        bias: likewise, or None.
        dim: N, or None for the number of rows of a weight that is not split.
        group: the processes that share the rows, or None for that of a DTensor.

    Returns:
        The rows of weight and bias that this process has, and which ones they are.
    """
    if not (type(weight) in (Tensor, nn.Parameter) and (bias is None or type(bias) in (Tensor, nn.Parameter))):
        dim = weight.shape[:1].numel() if dim is None else dim
        weight, bias, group = _local(weight, bias, group)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight: expected shape [N, d], got {list(weight.shape)}")
    rows = weight.shape[0]
    if group is None:
        if dim is not None and rows != dim:
            raise ValueError(f"weight: expected shape [{dim}, d] for {dim} tokens, got {list(weight.shape)}")
        return weight, bias, Share(rows, 0, "")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {kind_of(group)}")
    size, rank = group.size(), group.rank()
    dim = rows * size if dim is None else dim
    most = -(-dim // size)
    if most * (size - 1) >= dim:
        raise ValueError(f"group: expected at least one row of the head for each process, got {size} for {dim} rows")
    first = most * rank
    if rows != min(most, dim - first):
        raise ValueError(
            f"weight: expected shape [{min(most, dim - first)}, d], the rows from {first} on of {dim} for process "
            f"{rank} of {size}, as weight.chunk({size})[{rank}], got {list(weight.shape)}"
        )
    return weight, bias, Share(dim, first, group.group_name if size > 1 else "")


def _local(weight: Tensor, bias: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None, object]:
    """The rows of this process of a head whose weight and bias are DTensors, and the processes that share the rows."""
    if not torch.distributed.is_available():
        return weight, bias, group
    from torch.distributed.tensor import DTensor, Shard

    parts = []
    for name, value in (("weight", weight), ("bias", bias)):
        if isinstance(value, DTensor) is not isinstance(weight, DTensor) and value is not None:
            raise TypeError(f"{name}: expected a DTensor exactly if weight is one, got {kind_of(value)}")
        if not isinstance(value, DTensor):
            parts.append(value)
            continue
        if tuple(value.placements) != (Shard(0),):
            raise ValueError(
                f"{name}: expected a DTensor divided along its first axis on a mesh of one axis, got {value.placements}"
            )
        own = value.device_mesh.get_group()
        ranks = torch.distributed.get_process_group_ranks
        if group is not None and ranks(group) != ranks(own):
            raise ValueError(f"group: expected None or that of {name}'s mesh, got another one")
        group = own
        parts.append(value.to_local())
    assert parts[0] is not None
    return parts[0], parts[1], group
