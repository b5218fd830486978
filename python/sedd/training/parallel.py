"""Training on several processes, which torchrun starts: data parallelism by PyTorch's DDP and FSDP2.

Every process trains on its share of a batch, and the optimiser steps are those of one process with the whole batch. The
first process alone writes files, except the checkpoints of a divided model. Decisions that depend on the clock or on
signals are made together.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sedd.config import ParallelOptions
from sedd.diffusion.diffusion import Diffusion
from sedd.runtime import resolve_device
from sedd.training.shards import check_torch

__all__ = ["World", "divided", "is_first", "local", "whole"]

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, for example while the first one prepares the data."""


class World:
    """The processes of a run. Without torchrun, there is one.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: the device of this process.
        mesh: the processes as FSDP sees them; None for DDP and for one process.
        group: all processes; None for one process.
        writers: the same processes, to write checkpoints in a thread of each; None if the first one writes alone.

    Args:
        device: the option ``--device``; ``auto`` and ``cuda`` are the GPU with the local number of the process.
        options: how the model is divided.

    Raises:
        ValueError: the device is not available, or the number of processes does not suit the options.
    """

    def __init__(self, device: str = "auto", options: ParallelOptions | None = None) -> None:
        self.options = options or ParallelOptions()
        self.size = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK") or 0)
        self.device = resolve_device(device)
        self.mesh: DeviceMesh | None = None
        self.group: dist.ProcessGroup | None = None
        self.writers: dist.ProcessGroup | None = None
        self._vote: tuple[Tensor, dist.Work] | None = None
        if self.size == 1:
            return
        if self.device.type == "cuda":
            self.device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            _join(self.device)
        self.group = dist.group.WORLD
        if self.options.data != "ddp":
            check_torch("parallel.data: expected PyTorch 2.9 or newer for fsdp and hsdp, or --parallel.data ddp")
            self.mesh = self._make_mesh()
            self.writers = dist.new_group(timeout=TIMEOUT, backend="gloo")

    def _make_mesh(self) -> DeviceMesh:
        kind = self.device.type
        if self.options.data == "fsdp":
            return init_device_mesh(kind, (self.size,), mesh_dim_names=("shard",))
        shard = self.options.shard or int(os.environ.get("LOCAL_WORLD_SIZE") or self.size)
        if self.size % shard:
            raise ValueError(
                f"parallel.shard: expected a divisor of the number of processes, {self.size}, got {shard}; set "
                "--parallel.shard"
            )
        return init_device_mesh(kind, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files that are not divided."""
        return is_first()

    # -- the model -----------------------------------------------------------------------------------------------------

    def shard(self, diffusion: Diffusion) -> None:
        """Divides the parameters of a model among the processes, if FSDP is asked for; in place."""
        if self.mesh is None:
            return
        for block in getattr(diffusion.network, "blocks", ()):
            fully_shard(block, mesh=self.mesh)
        fully_shard(diffusion, mesh=self.mesh)
        register_fsdp_forward_method(diffusion, "loss")

    def wrap(self, diffusion: Diffusion) -> nn.Module:
        """The module whose call computes the training loss and whose backward pass averages the gradients."""
        if self.size == 1 or self.mesh is not None:
            return diffusion
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(diffusion, device_ids=devices, gradient_as_bucket_view=True)

    def synchronize(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """A context for one forward and backward pass; gradients are averaged in the ``last`` pass of a step only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last, recurse=False)  # embedding and head are gathered once a step
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    @contextmanager
    def gathered(self, diffusion: Diffusion) -> Iterator[None]:
        """A context in which the parameters outside the transformer blocks are whole, to evaluate a model."""
        if not isinstance(diffusion, FSDPModule):
            yield
            return
        diffusion.unshard()
        try:
            yield
        finally:
            diffusion.reshard()

    # -- together ------------------------------------------------------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agreed(self, value: T) -> T:
        """The value that the first process has: JSON-ready."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        result: T = values[0]
        return result

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that one process of a machine runs before the others, which then find the files that it has made."""
        local_rank = int(os.environ.get("LOCAL_RANK") or 0) if self.size > 1 else 0
        if local_rank > 0:
            self.barrier()
        yield
        if local_rank == 0:
            self.barrier()
        self.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which the processes work together.

        Raises:
            RuntimeError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error)
            if self.size == 1 or not lost:
                raise
            raise RuntimeError(
                "the connection to another process of this run was lost, most likely because it has ended: see its own "
                "message. Start all of them again with --resume"
            ) from error

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each value over the processes in the previous call, so that no process waits for this one.

        The first call returns zeros. With one process, each call returns its own values.
        """
        if self.size == 1:
            return values
        previous = self._vote
        mine = torch.tensor(values, dtype=torch.float64)
        self._vote = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True)
        if previous is None:
            return [0.0] * len(values)
        previous[1].wait()
        agreed: list[float] = previous[0].tolist()
        return agreed


def _join(device: torch.device) -> None:
    # decisions and messages are exchanged on the CPU, where they do not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun may keep the store when it starts the processes again; the addresses of those that ended are in it
    attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one: it writes the files."""
    return int(os.environ.get("RANK") or 0) == 0


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is divided: all processes must call this. Shares memory if it is not."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of tensors that this process holds, sharing their memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, divided as another one is; one that is divided already is returned."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)
