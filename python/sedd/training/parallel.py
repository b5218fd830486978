"""Training on several processes, which torchrun starts: data parallelism by PyTorch's DDP and FSDP2, and a vocabulary
that is split over processes.

Every process trains on its share of a batch, and the optimiser steps are those of one process with the whole batch. The
first process alone writes files, except the checkpoints of a divided model. Decisions that depend on the clock or on
signals are made together.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sedd.config import ParallelOptions
from sedd.diffusion.diffusion import Diffusion
from sedd.runtime import resolve_device
from sedd.training.shards import check_torch
from sedd.training.vocabulary import Averages, split_vocabulary

__all__ = ["World", "by_mesh", "clear_gradients", "clip_gradients", "divided", "is_first", "local", "whole"]

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, for example while the first one prepares the data."""


class World:
    """The processes of a run. Without torchrun, there is one.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        data_rank: the number of the sequences that this process works on; processes that share a vocabulary work on the
            same ones.
        data_size: the number of processes that work on different sequences.
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
        vocab = self.options.vocab if self.size > 1 else 1
        if self.size % vocab:
            raise ValueError(
                f"parallel.vocab: expected a divisor of the number of processes, {self.size}, got {vocab}; set "
                "--parallel.vocab, or start another number of processes"
            )
        self.data_rank, self.data_size = self.rank // vocab, self.size // vocab
        self.mesh: DeviceMesh | None = None
        self.group: dist.ProcessGroup | None = None
        self.writers: dist.ProcessGroup | None = None
        self._grid: DeviceMesh | None = None
        self._averages: Averages | None = None
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
        if vocab > 1:
            check_torch(
                "parallel.vocab: expected PyTorch 2.9 or newer for more than one process, or --parallel.vocab 1"
            )
            self._grid = init_device_mesh(self.device.type, (self.data_size, vocab), mesh_dim_names=("data", "vocab"))
        if self.mesh is not None or self._grid is not None:
            self.writers = dist.new_group(timeout=TIMEOUT, backend="gloo")

    def _make_mesh(self) -> DeviceMesh:
        vocab, size = self.options.vocab, self.data_size
        if self.options.data == "fsdp":
            shard, names = size, ["shard"]
        else:
            shard = self.options.shard or max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or self.size) // vocab)
            names = ["replicate", "shard"]
        if size % shard:
            raise ValueError(
                f"parallel.shard: expected a divisor of the number of processes that work on different sequences, "
                f"{size}, got {shard}; set --parallel.shard"
            )
        sizes = (size // shard, shard)[-len(names) :]
        mesh = init_device_mesh(self.device.type, (*sizes, vocab), mesh_dim_names=(*names, "vocab"))
        return mesh[tuple(names)]

    @property
    def first(self) -> bool:
        """Whether this process writes the files that are not divided."""
        return is_first()

    # -- the model -----------------------------------------------------------------------------------------------------

    def shard(self, diffusion: Diffusion, dtype: torch.dtype | None = None) -> None:
        """Divides the parameters of a model among the processes, as the options say; in place.

        Args:
            diffusion: the model.
            dtype: the dtype of autocast: FSDP gathers the transformer blocks in it, and adds up their gradients in
                float32.
        """
        if self._grid is not None:
            network: Any = diffusion.network
            split_vocabulary(network, self._grid["vocab"])
        if self.mesh is None:
            return
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in getattr(diffusion.network, "blocks", ()):
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # older versions of torch do not have the argument
        ignored: Any = {} if self._grid is None else {"ignored_params": set(_of_vocabulary(diffusion).values())}
        fully_shard(diffusion, mesh=self.mesh, **ignored)
        register_fsdp_forward_method(diffusion, "loss")

    def wrap(self, diffusion: Diffusion) -> nn.Module:
        """The module whose call computes the training loss and whose backward pass averages the gradients."""
        group = None
        if self._grid is not None:
            vocabulary, group = _of_vocabulary(diffusion), self._grid["data"].get_group()
            self._averages = Averages(list(vocabulary.values()), group)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(diffusion, list(vocabulary))
        if self.data_size == 1 or self.mesh is not None:
            return diffusion
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            diffusion, device_ids=devices, process_group=group, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    @contextmanager
    def synchronize(self, model: nn.Module, last: bool) -> Iterator[None]:
        """A context for one forward and backward pass; gradients are averaged in the ``last`` pass of a step only."""
        with ExitStack() as stack:
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last, recurse=False)  # embedding and head are gathered once a step
            elif isinstance(model, DistributedDataParallel) and not last:
                stack.enter_context(model.no_sync())
            if self._averages is not None:
                stack.enter_context(self._averages.during(last))
            yield

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


def _of_vocabulary(diffusion: Diffusion) -> dict[str, nn.Parameter]:
    """The parameters that are divided along the vocabulary, by name; called before FSDP divides the others."""
    return {name: value for name, value in diffusion.named_parameters() if _mesh(value) == ("vocab",)}


def _mesh(tensor: Tensor) -> tuple[str, ...]:
    """The names of the axes along which a tensor is divided."""
    return tuple(tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are divided in the same way, together: an operation on a list of tensors takes no others."""
    found: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(_mesh(parameter), []).append(parameter)
    return list(found.values())


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients so that their norm, over all processes, is at most ``limit``; returns the norm before."""
    groups = by_mesh(parameters)
    if len(groups) == 1:
        return whole(torch.nn.utils.clip_grad_norm_(groups[0], limit))
    gradients = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups]
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for group in gradients:
        torch._foreach_mul_(local(group), factor)
    return norm


def clear_gradients(model: nn.Module) -> None:
    """Clears the gradients of what :meth:`World.wrap` returned.

    Those of DDP are views of its buckets, and become zero. Others would take memory of their own until the last batch
    of a step.
    """
    keep = isinstance(model, DistributedDataParallel)
    for parameter in model.parameters():
        if keep and parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad.zero_()
        else:
            parameter.grad = None


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
