"""Builds the kernels in the clone without network, with the tools that this Python has: what gpu_check.py --build runs.

By pip, as README says; where that fails, as with a setuptools that is older than pyproject.toml's licence field needs,
by CMake alone, into sedd_ext/. Nothing has to be installed then: PYTHONPATH has the clone and its folder python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pip", "setuptools", "cmake", "ninja", "numpy", "torch", "pytest", "pytest-xdist", "hypothesis")
PACKAGES += ("scipy", "safetensors", "tiktoken", "transformers", "rich", "datasets", "triton")


def tools(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this Python's own scripts, such as cmake and ninja of pip, before all others."""
    return {**environment, "PATH": sysconfig.get_path("scripts") + os.pathsep + environment.get("PATH", "")}


def versions() -> dict[str, str]:
    """Of the build's tools, this Python's packages and the card; "-" for what is not there."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    path = tools(os.environ)["PATH"]
    for command in ("cmake", "ninja", os.environ.get("CXX", "c++"), "nvcc", "compute-sanitizer", "ncu"):
        found[f"{command} command"] = _last_line(path, command, "--version")
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    found["card"] = _last_line(path, "nvidia-smi", query, "--format=csv,noheader")
    return found


def _last_line(path: str, *command: str) -> str:
    """Of what a command says that has a number in it, with where the command lies."""
    program = shutil.which(command[0], path=path)
    if program is None:
        return "-"
    try:
        said = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__} ({program})"
    lines = [line.strip() for line in said.splitlines() if re.search(r"\d\.\d", line)]
    return f"{lines[0 if 'c++' in command[0] else -1]} ({program})" if lines else f"? ({program})"


def settings(device: str) -> dict[str, str]:
    """SEDD_CUDA and SEDD_CUDA_ARCHS: what the user says, else kernels for the GPU that torch finds."""
    if device == "cpu":
        return {"SEDD_CUDA": "off"}
    chosen = {"SEDD_CUDA": "on", "SEDD_CUDA_ARCHS": os.environ.get("SEDD_CUDA_ARCHS", "")}
    if not chosen["SEDD_CUDA_ARCHS"]:
        import torch

        if torch.cuda.is_available():
            chosen["SEDD_CUDA_ARCHS"] = "{}{}".format(*torch.cuda.get_device_capability())
    return chosen


def pip_problem() -> str:
    """Why pip need not be tried; empty if it may work."""
    wanted = re.search(r'"setuptools>=(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert wanted is not None
    for package, least in (("pip", 0), ("setuptools", int(wanted[1]))):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if int(version.split(".")[0]) < least:
            return f"setuptools {version} is older than {least}, which pyproject.toml needs"
    return ""


def by_pip() -> list[list[str]]:
    """The commands of an editable install that downloads nothing."""
    options = "-v --no-build-isolation --no-index --no-deps"
    return [[sys.executable, "-m", "pip", "install", *options.split(), "-e", str(ROOT)]]


def in_place(environment: Mapping[str, str]) -> list[list[str]]:
    """The commands that build the one extension where Python finds it in the clone."""
    build = ROOT / "build" / "in-place"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version is not None
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "sedd_ext",
        "Python_EXECUTABLE": sys.executable,
        "SEDD_VERSION": version[1],
        "SEDD_CUDA": environment["SEDD_CUDA"],
        "SEDD_CUDA_ARCHS": environment.get("SEDD_CUDA_ARCHS", ""),
    }
    for old in (ROOT / "sedd_ext").glob("_C.*so"):  # of another build, which Python might prefer to this one
        old.unlink()
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    shutil.rmtree(build, ignore_errors=True)  # what CMake remembers may be another Python's
    defines = [f"-D{name}={value}" for name, value in options.items()]
    return [
        ["cmake", *generator, "-S", str(ROOT), "-B", str(build), *defines],
        ["cmake", "--build", str(build), "--target", "_C", "--parallel"],
    ]


def run(commands: list[list[str]], environment: Mapping[str, str]) -> str:
    """Why one of the commands failed; empty if none did."""
    for command in commands:
        print("$", *command, flush=True)
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            return f"{command[0]} is neither on PATH nor beside {sys.executable}"
        status = subprocess.run([program, *command[1:]], env=dict(environment), cwd=ROOT).returncode
        if status:
            return f"{' '.join(command[:4])} ...: exit status {status}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if the kernels are built, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: without the CUDA kernels")
    device = parser.parse_args(arguments).device
    environment = tools({**os.environ, **settings(device)})
    for name in ("SEDD_CUDA", "SEDD_CUDA_ARCHS"):
        print(f"{name}={environment.get(name, '')}")
    problem = pip_problem() or run(by_pip(), environment)
    how = "by pip"
    if problem:
        print(f"not by pip: {problem}", flush=True)
        how, problem = "in place, by CMake", run(in_place(environment), environment)
    print(f"not built: {problem}" if problem else f"built {how}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
