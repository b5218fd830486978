"""Makes the n-th thing that is done to a folder on the disk fail, as a broken disk, a full one or a power cut would."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import sedd.training.saving

KINDS = ("broken", "full", "memory")
GROWING = {"open", "write", "mkdir", "tensors"}
"""What needs space."""


class PowerCut(BaseException):
    """The process is gone: nothing can handle this."""


class Faults:
    """Counts the operations on files below a folder, and makes one of them fail.

    Counted are: opening a file to write, every write(2) of Python's files, fsync, rename, mkdir, chmod, unlink, rmdir,
    the writing of a safetensors file, and, as allocations, what makes JSON and tensors out of the state.

    Args:
        folder: where operations count.
        kind: ``"broken"``: one operation fails with EIO. ``"full"``: from it on, whatever needs space fails with
            ENOSPC. ``"memory"``: it raises MemoryError. ``"power"``: it and everything after it does not happen, and
            what was not flushed by fsync is lost. None: nothing fails.
        at: number of the operation, counted from 1.
    """

    def __init__(self, folder: Path, kind: str | None = None, at: int = 0) -> None:
        self.folder, self.kind, self.at = str(folder), kind, at
        self.seen: list[str] = []
        self.is_dead = False
        self.synced: dict[int, int] = {}  # bytes on the disk, by inode, of files that were written to

    def point(self, what: str, path: Any = None) -> None:
        if path is not None and (not str(path).startswith(self.folder) or "tensorboard" in str(path)):
            return
        if self.is_dead:
            raise PowerCut
        self.seen.append(what)
        if self.kind is None or len(self.seen) < self.at:
            return
        is_now = len(self.seen) == self.at
        if self.kind == "full" and what in GROWING:
            self._write_a_part(what, path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not is_now or self.kind == "full":
            return
        if self.kind == "power":
            self.is_dead = True
            raise PowerCut
        if self.kind == "memory" or what == "allocate":
            raise MemoryError
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _write_a_part(self, what: str, path: Any) -> None:
        if what == "tensors":
            with REAL["open"](path, "wb") as file:
                file.write(b"\x10\0\0\0")

    def lose_what_was_not_flushed(self) -> None:
        for path in Path(self.folder).rglob("*"):
            kept = self.synced.get(path.lstat().st_ino)
            if path.is_file() and kept is not None and path.stat().st_size > kept:
                os.truncate(path, kept)

    def __enter__(self) -> Faults:
        self._patch = pytest.MonkeyPatch()
        for name in ("rename", "replace", "mkdir", "chmod", "unlink", "remove", "rmdir"):
            self._patch.setattr(os, name, self._counted("rename" if name == "replace" else name, REAL[name]))
        self._patch.setattr(os, "fsync", self._fsync)
        self._patch.setattr(os, "open", self._os_open)
        self._patch.setattr(builtins, "open", self._open)
        self._patch.setattr(io, "open", self._open)
        self._patch.setattr(json, "dumps", self._dumps)
        for module in (sedd.training.saving, safetensors.torch):
            self._patch.setattr(module, "save_file", self._save_file)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        if self.is_dead:
            self.lose_what_was_not_flushed()

    def _counted(self, what: str, real: Any) -> Any:
        def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
            # what shutil.rmtree deletes has a name relative to a descriptor
            self.point(what, None if kwargs.get("dir_fd") is not None else path)
            return real(path, *args, **kwargs)

        return operation

    def _fsync(self, descriptor: int) -> None:
        self.point("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = status.st_size  # waiting for a real disk would add nothing

    def _os_open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            self.point("open", path)
        descriptor: int = REAL["os.open"](path, flags, *args, **kwargs)
        if flags & os.O_TRUNC:
            self.synced[os.fstat(descriptor).st_ino] = 0
        return descriptor

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *args: Any, **kw: Any
    ):  # type: ignore[no-untyped-def]
        if not set(mode) & set("wax+") or not str(file).startswith(self.folder) or "tensorboard" in str(file):
            return REAL["open"](file, mode, buffering, encoding, *args, **kw)
        self.point("open", file)
        buffered = io.BufferedWriter(CountedFile(self, file, mode.replace("b", "").replace("t", "")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding)

    def _dumps(self, *args: Any, **kwargs: Any) -> str:
        self.point("allocate")
        text: str = REAL["dumps"](*args, **kwargs)
        return text

    def _save_file(self, tensors: Any, path: Any, metadata: Any = None) -> None:
        self.point("allocate")
        self.point("tensors", path)
        REAL["save_file"](tensors, path, metadata)
        self.synced[os.stat(path).st_ino] = 0


class CountedFile(io.FileIO):
    def __init__(self, faults: Faults, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.faults = faults
        status = os.fstat(self.fileno())
        faults.synced[status.st_ino] = min(status.st_size, faults.synced.get(status.st_ino, status.st_size))

    def write(self, data: Any) -> int:
        if self.faults.is_dead:
            return len(data)  # what was still in the buffers of a process that is gone
        try:
            self.faults.point("write")
        except OSError:
            super().write(bytes(data)[: len(data) // 2])
            raise
        return super().write(data)


REAL: dict[str, Any] = {
    "open": open,
    "os.open": os.open,
    "dumps": json.dumps,
    "save_file": safetensors.torch.save_file,
    **{name: getattr(os, name) for name in ("rename", "replace", "mkdir", "chmod", "unlink", "remove", "rmdir")},
}


def summary(seen: list[str]) -> str:
    return f"{len(seen)} points: " + ", ".join(f"{count} {what}" for what, count in sorted(Counter(seen).items()))
