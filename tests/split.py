"""Processes that share a vocabulary, as threads of one process: gloo groups over the loopback interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(seconds=60)


def _group(store: Any, rank: int, size: int) -> dist.ProcessGroup:
    """A process group that knows nothing of the default one, which a process has only once."""
    group = dist.ProcessGroup(store, rank, size)
    kind = dist.ProcessGroup.BackendType.GLOO
    backend = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    name = f"test {id(store)} {rank} of {size}"
    group._set_group_name(name)
    torch._C._distributed_c10d._register_process_group(name, group)
    return group


@contextmanager
def groups(size: int) -> Iterator[list[dist.ProcessGroup]]:
    """A group of processes, as each of them sees it."""
    store = dist.HashStore()
    made: list[Any] = [None] * size

    def make(rank: int) -> None:
        made[rank] = _group(store, rank, size)

    in_threads(size, make)
    try:
        yield made
    finally:
        for group in made:
            torch._C._distributed_c10d._unregister_process_group(group.group_name)


def in_threads(size: int, work: Callable[[int], T]) -> list[T]:
    """The results of ``work(rank)`` for each rank, which run at the same time.

    Raises:
        the error of the first rank that has one.
    """
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results
