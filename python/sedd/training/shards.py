"""Tensors that several processes write and read together, with PyTorch's Distributed Checkpoint.

A folder of shards has a safetensors file of each process. Its header tells which part of which tensor it holds, so that
any number of processes can read the folder: each its own parts, or one the whole tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

__all__ = ["check_torch", "everywhere", "read_shards", "staged", "write_shards"]

T = TypeVar("T")


def check_torch(what: str) -> None:
    """Raises a ValueError if this version of PyTorch cannot write and read safetensors files of several processes."""
    if torch.__version__ < "2.9":
        raise ValueError(f"{what}, got {torch.__version__}")


def staged(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies tensors, or the parts of them that this process holds, to other memory of the CPU."""
    return {
        name: {key: value.detach().to("cpu", copy=True) for key, value in content.items()}
        for name, content in tensors.items()
    }


def everywhere(group: dist.ProcessGroup | None, action: Callable[[], T]) -> list[T]:
    """Runs an action in all processes of a group, and raises an error in all of them if one of them has one.

    Args:
        group: the processes, all of which must call this; None for this process alone.
        action: what each of them does. It must not wait for another one.

    Returns:
        What the action returned in each process.
    """
    mine: T | None = None
    failed: BaseException | None = None
    try:
        mine = action()
    except BaseException as error:
        failed = error
    if group is None:
        if failed is not None:
            raise failed
        return [mine]  # type: ignore[list-item]
    results: list[Any] = [None] * group.size()
    dist.all_gather_object(results, (mine, None if failed is None else _plain(failed)), group=group)
    for problem in [failed, *(problem for _, problem in results)]:
        if problem is not None:
            raise problem
    return [value for value, _ in results]


def _plain(error: BaseException) -> Exception:
    """An error that can be sent to another process."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror) if error.errno is not None else OSError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises the error of a process instead of the one that PyTorch makes of it."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[Path]:
    """Writes the parts of tensors that this process holds, each part by one of the processes that hold it.

    Args:
        folder: the folder, which may not exist yet.
        tensors: tensors by name, on the CPU. All processes have the same names.
        group: the processes, all of which must call this.

    Returns:
        The files that this process has written and flushed to disk: one, or none if it holds nothing of its own.

    Raises:
        OSError: a file cannot be written. The error is raised in all processes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_errors():
        save(dict(tensors), storage_writer=writer, process_group=group)
    return list(folder.glob(f"shard-{group.rank() + 1:05d}-*.safetensors"))


def read_shards(folder: Path, like: Mapping[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Reads the tensors of a folder of shards.

    Args:
        folder: the folder.
        like: tensors by name. A stored tensor is divided as the one with its name, if that is divided, and only the
            parts of this process are read. Other tensors are read as a whole.
        device: the device of whole tensors.

    Raises:
        ValueError: this version of PyTorch is too old.
        OSError: a file cannot be read.
    """
    check_torch(f"{folder}: written by several processes: expected PyTorch 2.9 or newer")
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Any] = {}
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, found in stored.items():
        model = like.get(name)
        if isinstance(model, DTensor) and model.shape == found.size:
            tensors[name] = torch.empty_like(model.detach(), dtype=found.properties.dtype)
        else:
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype, device=device)
    with warnings.catch_warnings(), _plain_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads by itself
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
