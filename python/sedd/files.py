"""Atomic writes, checksums, and a lock that lets only one process train in a folder.

The package writes all files with :func:`whole_file`, or with :func:`begin_folder` and :func:`finish_folder`: to a
temporary name, flushed to disk and then renamed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TEMPORARY",
    "RunLock",
    "begin_folder",
    "finish_folder",
    "finite",
    "flush",
    "flush_folder",
    "load_tensors",
    "move_all",
    "naming",
    "save_tensors",
    "whole_file",
    "write_json",
    "write_text",
]

TEMPORARY = ".writing-"
"""Prefix of the names of files and folders while they are written."""

_SPACE = "free some space, or write to another disk"
_PERMISSION = "change the permissions of the folder, or write to another one"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: _PERMISSION,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
}


@contextmanager
def naming(path: Path, what: str = "could not be written") -> Iterator[None]:
    """Converts errors of writing, also those of safetensors, to an OSError with the file, the reason and the remedy."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError":  # it contains the error number only in its text
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found[1]) if found else None
        elif not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error)
        remedy = f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
        raise OSError(f"{path}: {what}: {reason}{remedy}") from error


def flush(path: Path) -> None:
    """Waits until a file, or the directory entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, what: str = "could not be written") -> Iterator[Path]:
    """Atomic write: yields a temporary file, which replaces ``path`` when the block ends without an error.

    Args:
        path: the file; another process sees the old content or the new one, never a part.
        what: text of the error message after the path.

    Yields:
        The path of an empty file in the same folder with the same suffix.

    Raises:
        OSError: the file cannot be written. An existing file is not changed.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with naming(path, what):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777
            os.close(descriptor)
            yield temporary
            temporary.chmod(mode)  # safetensors creates files that only their owner can read
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        flush(path.parent)


def begin_folder(path: Path) -> Path:
    """Makes an empty temporary folder beside ``path``, in which its files are written; see :func:`finish_folder`."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Renames a temporary folder to ``path``, which must not exist, when its files are on disk."""
    flush_folder(temporary)
    temporary.rename(path)
    flush(path.parent)
    flush(path.parent.parent)


def flush_folder(folder: Path) -> None:
    """Gives all files of a folder the permissions of new files, and waits until the folder is on disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_dir():
            flush_folder(path)
        else:
            path.chmod(mode)  # safetensors creates files that only their owner can read
            flush(path)
    flush(folder)


def move_all(new: Path, folder: Path, *, last: str) -> None:
    """Moves all files of a folder to another folder and replaces files of the same names; either all of them or none.

    Args:
        new: the source folder, on the same disk. Replaced files are kept in its subfolder ``old``.
        folder: the destination; created if it does not exist.
        last: name of the file that the others depend on. The old one is removed first and the new one is moved last:
            if the process is killed in between, the file is missing, and new files are never used with old ones.

    Raises:
        OSError: a file cannot be moved. The previous files are restored.
    """
    names = sorted((file.name for file in new.iterdir()), key=lambda name: name == last)
    old, moved = new / "old", []
    old.mkdir()
    folder.mkdir(exist_ok=True)
    try:
        for name in reversed(names):
            if (folder / name).exists():
                (folder / name).rename(old / name)
        for name in names:
            (new / name).rename(folder / name)
            moved.append(name)
        flush(folder)
        flush(folder.parent)
    except BaseException:
        for name in moved:
            (folder / name).unlink()
        for file in old.iterdir():
            file.rename(folder / file.name)
        if not os.listdir(folder):
            folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically.

    Raises:
        OSError: the file cannot be written; an existing one is not changed.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        OSError: the file cannot be written; an existing one is not changed.
        TypeError, ValueError: JSON cannot represent the value.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """Returns the number, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None


# -- tensors with a checksum -------------------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of CPU tensors, and of the metadata."""
    import torch

    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically, with the SHA-256 of its content in its metadata, as ``sha256``.

    Args:
        path: the file.
        tensors: tensors by name, on any device.
        metadata: other metadata of the file.

    Raises:
        OSError: the file cannot be written; an existing one is not changed.
    """
    from safetensors.torch import save_file

    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file(content, temporary, {**metadata, "sha256": _digest(content, metadata)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file, and verifies it if its metadata contains a SHA-256.

    Returns:
        The tensors by name, on the CPU, and the metadata, both as given to :func:`save_tensors`. The metadata also
        contains ``sha256`` if the file has it; files of other programs do not, and are not verified.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or incomplete: not a valid safetensors file: {error}") from error
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, said):
        raise ValueError(
            f"{path}: damaged: its content does not have the SHA-256 in its metadata; copy, download or write the file "
            "again"
        )
    return tensors, metadata


# -- one process in a folder -------------------------------------------------------------------------------------------


class RunLock:
    """Lock on a run folder: prevents other processes from training in it until it is released or this process ends.

    Locks the file ``.lock`` in the folder (``flock``). The file also contains the process that holds the lock. Readers
    need no lock.

    Args:
        folder: folder of the run; created if it does not exist.

    Raises:
        BlockingIOError: another process, or another trainer in this process, is training in the folder.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        while True:
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._acquire(folder)
            except BaseException:
                os.close(self._descriptor)
                raise
            if self._is_there():
                break
            os.close(self._descriptor)  # the holder has removed the file meanwhile
        _held.add(self)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)

    def _acquire(self, folder: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                f"run_dir: {folder} is in use by {holder}, and only one process can train in it. Wait for it, stop it, "
                "or give another --run_dir"
            ) from error
        except OSError as error:  # a network file system without locks
            warnings.warn(
                f"{self.path}: could not be locked ({error.strerror}); make sure that no other process trains there",
                stacklevel=3,
            )

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises an OSError if the folder was deleted or replaced: the lock then no longer protects it."""
        if not self._is_there():
            raise OSError(f"{self.path.parent}: was deleted or replaced while this process trained in it")

    def release(self) -> None:
        """Releases the lock. Folders that were created for it are removed if they contain nothing else."""
        try:
            if self._close.alive and self._is_there() and os.listdir(self.path.parent) == [self.path.name]:
                self.path.unlink()
                for folder in self._made:
                    with suppress(OSError):  # it is not empty
                        folder.rmdir()
        finally:
            self._close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in _held:  # the lock is held while any process has the file open, so workers must close it
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)
