"""The program that checks the kernels compiles. Only costly tests run it, so that they alone would notice."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build

DRIVER = build.ROOT / "tests/cuda_on_cpu/driver.cpp"
LAUNCHERS = build.ROOT / "tests/cpu_kernels/launchers.cpp"
"""The CPU's kernels in place of the emulated ones."""


@pytest.mark.parametrize("source", [DRIVER, LAUNCHERS], ids=lambda path: path.stem)
def test_it_compiles(source: Path) -> None:
    compiler, _ = build._compiler()
    include = [f"-I{build.ROOT / folder}" for folder in ("csrc", "tests/cuda_on_cpu/include")]
    done = subprocess.run(
        [*compiler, "-std=c++17", "-fsyntax-only", *include, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_both_kinds_of_kernels_have_what_it_calls() -> None:
    declared = set(re.findall(r'extern "C" \w+\*? (\w+)\(.*\);', DRIVER.read_text()))
    assert "cuda_on_cpu_set_max_shared" in declared
    emulation = "".join(path.read_text() for path in (build.ROOT / "tests/cuda_on_cpu/include").rglob("*.h"))
    for text in (LAUNCHERS.read_text(), emulation):
        assert declared <= set(re.findall(r"(cuda_on_cpu_\w+)\([^;{]*\) \{", text))
