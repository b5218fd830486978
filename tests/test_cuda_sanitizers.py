"""The CUDA kernels under sanitizers, and whether mistakes in them would be noticed.

The driver calls every launcher with memory that is no larger than it must be; ``cuda_on_cpu/mutants.py`` has the
mistakes.
"""

from __future__ import annotations

import re
import subprocess
from typing import Literal

import pytest
from cuda_on_cpu import build, mutants

pytestmark = pytest.mark.costly("csrc/*.h", "csrc/common", "csrc/cuda", "tests/cuda_on_cpu")
SOURCES = ("tests/cuda_on_cpu/driver.cpp", *(f"csrc/cuda/{family}.cu" for family in mutants.FAMILIES))


def run_driver(kind: Literal["address", "thread"], *arguments: str) -> subprocess.CompletedProcess[str]:
    # without optimisation: with it the compiler takes four times as long, and saves less
    flags = (*build.sanitized(kind), "-O0", "-g1")
    try:
        program = build.executable("driver", SOURCES, flags=flags)
    except RuntimeError as error:
        if re.search("cannot find .*(asan|tsan|ubsan)", str(error)):
            pytest.skip(f"the compiler has no {kind} sanitizer")
        raise
    result = mutants.run(program, *arguments, limit=900)  # five minutes are too few where the cores are busy
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer cannot live with this system's address space randomisation")
    return result


def check_clean(result: subprocess.CompletedProcess[str], at_least: int) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    count = re.fullmatch(r"(\d+) cases, 0 differences\n", result.stdout)
    assert count, result.stdout
    assert int(count[1]) >= at_least


@pytest.mark.timeout(1200)
def test_no_access_beyond_memory() -> None:
    """All shapes, each under one of the schedules in turn: also where values would not show it."""
    check_clean(run_driver("address", "--in-turn"), 5000)


@pytest.mark.timeout(1200)
def test_no_races() -> None:
    check_clean(run_driver("thread", "--quick", "--in-turn", "greedy", "random"), 500)


def test_kernels_without_a_mistake_pass() -> None:
    """Else anything would look like a mutant that is noticed."""
    include = '#include "score_entropy.h"\n'
    controls = [
        mutants.Mutant(check, "score_entropy.cu", include, include, check, "score_entropy") for check in mutants.CHECKS
    ]
    include = '#include "reverse.h"\n'
    controls.append(mutants.Mutant("values of reverse steps", "reverse.cu", include, include))
    assert mutants.catch_all(controls) == dict.fromkeys(controls)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", mutants.FAMILIES)
def test_mutants(family: str) -> None:
    """A mutant that survives is a hole in the driver, or no mistake."""
    caught = mutants.catch_all([mutant for mutant in mutants.MUTANTS if mutant.family == family])
    assert caught
    print(mutants.table(caught))
    assert {mutant.name for mutant, report in caught.items() if report is None} == set()
