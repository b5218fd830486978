"""Compiles CUDA and C++ sources for the CPU with g++, or what ``CXX`` names, and keeps the results.

Everything lies in ``build/cuda_on_cpu``, under a hash of what it was made from: the compiler, the flags, the source and
the headers of all folders that it may include from. A change leads to another name, so nothing is ever out of date.
"""

import fcntl
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fdata-sections")  # the last for shared.ld
ORDINARY = ("-O2",)
# CUDA sources in an ordinary build: a misaligned access is reported like the launch's other failures
ALIGNMENT = ("-fsanitize=alignment", "-DCUDA_ON_CPU_ALIGNMENT")
LINKER_SCRIPT = HERE / "shared.ld"


def sanitized(kind: Literal["address", "thread"]) -> tuple[str, ...]:
    """Flags for AddressSanitizer with UndefinedBehaviorSanitizer, or for ThreadSanitizer; for executables only."""
    checks = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}[kind]
    return ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", checks)


def shared_library(
    name: str, sources: Iterable[Path | str], *, flags: Sequence[str] = (), include: Iterable[Path | str] = ()
) -> Path:
    """The path of ``name.so``, linked from all sources; what is not there yet is compiled.

    ``sources`` are .cu or .cpp files, relative to the repository. ``include`` are folders that are searched before
    ``csrc`` and the emulation's own. ``flags`` are for compiling and for linking, after the usual ones. Raises
    RuntimeError with the compiler's words if it fails.
    """
    return _link(f"{name}.so", sources, flags, include, ("-shared",))


def executable(
    name: str,
    sources: Iterable[Path | str | tuple[Path | str, tuple[str, ...]]],
    *,
    flags: Sequence[str] = (),
    include: Iterable[Path | str] = (),
) -> Path:
    """The path of a program; the arguments are those of :func:`shared_library`.

    A source may come with flags of its own.
    """
    return _link(name, sources, flags, include, ())


def _link(
    name: str,
    sources: Iterable[Path | str | tuple[Path | str, tuple[str, ...]]],
    flags: Sequence[str],
    include: Iterable[Path | str],
    kind: tuple[str, ...],
) -> Path:
    folders = [*(ROOT / folder for folder in include), ROOT / "csrc", HERE / "include"]
    headers = _hash(*(_headers(folder) for folder in folders))

    def compiled(source: Path | str | tuple[Path | str, tuple[str, ...]]) -> Path:
        path, own = source if isinstance(source, tuple) else (source, ())
        return _object(ROOT / path, (*flags, *own), folders, headers)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    script = ("-Wl,-T," + str(LINKER_SCRIPT),)
    command = [*kind, *map(str, objects), *flags, *script, "-pthread"]
    return _made(name, command, _hash(*command, LINKER_SCRIPT.read_bytes()))


def _object(source: Path, flags: Sequence[str], folders: Sequence[Path], headers: str) -> Path:
    is_cuda = source.suffix == ".cu"
    usual = FLAGS if any(flag.startswith("-O") for flag in flags) else (*FLAGS, *ORDINARY)
    if is_cuda and not any(flag.startswith("-fsanitize") for flag in flags):
        usual = (*usual, *ALIGNMENT)
    includes = [f"-I{folder}" for folder in folders]
    command = [*usual, *flags, *includes, "-x", "c++", "-c", str(source)]
    return _made(f"{source.stem}.o", command, _hash(*command, source.read_bytes(), headers))


def _made(name: str, command: Sequence[str], key: str) -> Path:
    """The file of this name and key, made by the command unless it is there: all at once, as others may look for it."""
    compiler, version = _compiler()
    folder = BUILD / _hash(version, key)
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of tests may want the same file
        if path.exists():
            return path
        partial = Path(temporary) / name
        run = subprocess.run([*compiler, *command, "-o", str(partial)], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{shlex.join([*compiler, *command])}\n{run.stdout}{run.stderr}")
        os.replace(partial, path)
    return path


def _compiler() -> tuple[list[str], str]:
    """The command, and what it says of itself."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command, _version(*command)


@cache
def _version(*command: str) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


def _headers(folder: Path) -> str:
    """A hash of all headers in a folder and those within it."""
    files = sorted(path for suffix in ("h", "cuh", "hpp") for path in folder.rglob(f"*.{suffix}"))
    return _hash(*(part for path in files for part in (str(path.relative_to(folder)), path.read_bytes())))


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:%b" % (len(data), data))
    return digest.hexdigest()[:20]
