"""The vocabulary split over processes: each has some rows of the embedding and of the head, as DTensors.

The operators of :mod:`sedd_ext` take such a head. What the rows of a process exchange, and when, is in
:mod:`sedd_ext.split`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sedd.network import DiffusionTransformer

__all__ = ["Averages", "split_vocabulary"]


def split_vocabulary(network: DiffusionTransformer, mesh: DeviceMesh) -> None:
    """Divides embedding and head among the processes of a mesh of one axis; in place.

    Raises:
        ValueError: a process would have no row.
    """
    size = mesh.size()
    if -(-network.dim // size) * (size - 1) >= network.dim:
        raise ValueError(f"parallel.vocab: expected at most {network.dim} tokens' worth of processes, got {size}")
    linear = network.output_layer.linear
    for module, name in ((network.vocab_embed, "embedding"), (linear, "weight"), (linear, "bias")):
        old: nn.Parameter = getattr(module, name)
        new = nn.Parameter(distribute_tensor(old.detach(), mesh, [Shard(0)]), old.requires_grad)
        setattr(module, name, new)


class Averages:
    """Averages the gradients of a divided vocabulary over the processes that have the same rows.

    Neither DDP nor FSDP looks after these parameters. The averages start during the backward pass, each as soon as its
    gradient is complete.

    Args:
        parameters: the parameters.
        group: the processes that have the same rows.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._group = group
        self._is_last = False
        self._works: list[tuple[Tensor, dist.Work]] = []
        if group.size() > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._start)

    def _start(self, parameter: Tensor) -> None:
        if not self._is_last:
            return
        gradient: Any = parameter.grad
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self._works.append((mine, dist.all_reduce(mine, group=self._group, async_op=True)))

    @contextmanager
    def during(self, last: bool) -> Iterator[None]:
        """A context for a forward and backward pass. In the ``last`` one of a step, the gradients are averaged."""
        self._is_last = last
        yield
        for mine, work in self._works:
            work.wait()
            mine /= self._group.size()
        self._works.clear()
