"""Files that are there whole or not at all, that say so when damaged, and a folder that one process may write to.

Everything that the package writes goes through :func:`whole_file` or :func:`whole_folder`: it is written under a
temporary name, flushed to the disk, and only then gets its own name.
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
    "finite",
    "flush",
    "flush_folder",
    "load_tensors",
    "move_all",
    "naming",
    "save_tensors",
    "whole_file",
    "whole_folder",
    "write_json",
    "write_text",
]

TEMPORARY = ".writing-"
"""What the names of files and folders begin with while they are written."""

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
    """Turns the errors of writing, safetensors' too, into an OSError that names the file, the reason and the remedy."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError":  # it keeps the number of the error in its text alone
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found[1]) if found else None
        elif not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error)
        remedy = f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
        raise OSError(f"{path}: {what}: {reason}{remedy}") from error


def flush(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, what: str = "could not be written") -> Iterator[Path]:
    """Gives a temporary name to write to; if that goes well, what was written there becomes the file.

    Args:
        path: the file; another process sees the old one or the new one, never a part.
        what: what the error says of the file.

    Yields:
        A path in the same folder with the same suffix. The file is there already, and is empty.

    Raises:
        OSError: it could not be written. The file that was there before is still there.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with naming(path, what):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777
            os.close(descriptor)
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that nobody else may read
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        flush(path.parent)


@contextmanager
def whole_folder(path: Path, what: str = "could not be written") -> Iterator[Path]:
    """Gives a temporary folder to fill; if that goes well, it becomes the folder ``path``, which must not exist.

    Raises:
        OSError: it could not be written, and nothing of it is left.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    with naming(path, what):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            flush_folder(temporary)
            temporary.rename(path)
            flush(path.parent)
            flush(path.parent.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Gives the files of a folder the permissions of new files, and waits until all of it is on the disk."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors makes files that nobody else may read
        flush(file)
    flush(folder)


def move_all(new: Path, folder: Path, *, last: str) -> None:
    """Moves all files of a folder to another one, in place of those of the same names there; all of them or none.

    Args:
        new: where they are, on the same disk. What they replace stays there, in ``old``.
        folder: where they go; made if it is not there.
        last: name of the file without which the others are of no use: the old one goes first and the new one comes
            last, so that a process that is killed meanwhile leaves none, and never new files beside old ones.

    Raises:
        OSError: a file cannot be moved. What was there before is there again.
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
    """Writes a text file, UTF-8, that is either the old one or the new one, whatever happens.

    Raises:
        OSError: it could not be written; the old one stays.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as :func:`write_text` does.

    Raises:
        OSError: it could not be written; the old one stays.
        TypeError, ValueError: JSON cannot say the value.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """Returns the number, None if it is NaN or infinite, which JSON cannot say."""
    return value if math.isfinite(value) else None


# -- tensors that say so when damaged ----------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values of tensors on the CPU, and over what is said of them."""
    import torch

    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with a digest of all of it in its metadata, as ``sha256``.

    Args:
        path: the file.
        tensors: tensors by name, on any device.
        metadata: what else is said in the file.

    Raises:
        OSError: it could not be written; the old one stays.
    """
    from safetensors.torch import save_file

    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file(content, temporary, {**metadata, "sha256": _digest(content, metadata)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file; one with a digest in its metadata is compared with it.

    Returns:
        The tensors by name, on the CPU, and the metadata, both as :func:`save_tensors` took them, with ``sha256``
        among the metadata if there is a digest: files of others have none, and are taken as they are.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, not a whole safetensors file: {error}") from error
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, said):
        raise ValueError(
            f"{path}: damaged: its contents are not what it was written with (SHA-256 in its metadata); copy or "
            "download it again, or write it anew"
        )
    return tensors, metadata


# -- one process in a folder -------------------------------------------------------------------------------------------


class RunLock:
    """Keeps other processes from training in a folder, until it is released or this process ends, however it ends.

    It locks the file ``.lock`` in the folder (``flock``), which also says who holds it. Reading needs no lock.

    Args:
        folder: folder of the run; made if it is not there.

    Raises:
        BlockingIOError: another process, or another trainer in this one, is at work in the folder.
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
            os.close(self._descriptor)  # its holder removed the file in the meantime
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
                f"run_dir: {folder} is in use by {holder}; two would overwrite each other's records. Wait for it, stop "
                "it, or give another --run_dir"
            ) from error
        except OSError as error:  # a network file system without locks
            warnings.warn(
                f"{self.path}: could not be locked ({error.strerror}); see that no other process trains in {folder}",
                stacklevel=3,
            )

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises an OSError if the folder was deleted or replaced, so that another process may be at work in it."""
        if not self._is_there():
            raise OSError(f"{self.path.parent}: was deleted or replaced while this process trained in it")

    def release(self) -> None:
        """Lets others in. Folders that were made for the lock, and hold nothing else, are removed."""
        try:
            if self._close.alive and self._is_there() and os.listdir(self.path.parent) == [self.path.name]:
                self.path.unlink()
                for folder in self._made:
                    with suppress(OSError):  # it holds something else
                        folder.rmdir()
        finally:
            self._close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in _held:  # a lock lives as long as any process has it open: workers must not outlive their parent's
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)
