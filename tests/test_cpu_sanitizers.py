"""The CPU's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and whether they would notice a mistake.

The driver of the CUDA kernels calls the CPU's launchers instead: all shapes, with memory no larger than it must be,
and compares with the formulas.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build, mutants

from sedd_ext import _C

pytestmark = pytest.mark.costly("csrc/*.h", "csrc/common", "csrc/cpu", "tests/cuda_on_cpu", "tests/cpu_kernels")
FLAGS = (*build.sanitized("address"), "-O0", "-g1", "-Wno-psabi")
X86 = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}
"""As in CMakeLists.txt."""
KERNELS = tuple(
    f"{name}.cpp"
    for name in ("generalized_masked", "mean_prediction", "reverse", "reverse_mean", "score_entropy", "unmask")
)


def driver(mutant: tuple[str, Path] | None = None) -> Path:
    """The program with the kernels of every instruction set, or with one file of them changed."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = {"baseline": (), **(X86 if x86 else {})}
    sources: list[Path | str | tuple[Path | str, tuple[str, ...]]] = [
        "tests/cuda_on_cpu/driver.cpp",
        "tests/cpu_kernels/launchers.cpp",
        "csrc/cpu/transition.cpp",
        ("csrc/cpu/dispatch.cpp", ("-DSEDD_X86",) if x86 else ()),
    ]
    for isa, flags in sets.items():
        for name in KERNELS:
            path: Path | str = f"csrc/cpu/{name}"
            if mutant is not None and mutant[0] == name and isa == "baseline":
                path = mutant[1]
            sources.append((path, (f"-DSEDD_ISA={isa}", *flags)))
    try:
        return build.executable("cpu_driver", sources, flags=FLAGS)
    except RuntimeError as error:
        if re.search("cannot find .*(asan|ubsan)", str(error)):
            pytest.skip("the compiler has no address sanitizer")
        raise


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return mutants.run(program, "--in-turn", *arguments)


def test_no_access_beyond_memory() -> None:
    """Every shape on one of this machine's instruction sets in turn."""
    result = run(driver(), *_C.available_isas())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    count = re.fullmatch(r"(\d+) cases, 0 differences\n", result.stdout)
    assert count, result.stdout
    assert int(count[1]) >= 5000


@pytest.mark.parametrize(
    ("name", "text", "replacement"),
    [
        *(
            (
                name,
                "for (; y + kUnroll * width <= end; y += kUnroll * width) add(y, Count<kUnroll>{});",
                "for (; y < end; y += kUnroll * width) add(y, Count<kUnroll>{});",
            )
            for name in ("reverse.cpp", "reverse_mean.cpp")
        ),
        (
            "score_entropy.cpp",
            "for (; y + width <= stop; y += width) add_vectors",
            "for (; y < stop; y += width) add_vectors",
        ),
        (
            "generalized_masked.cpp",
            "for (; y + width <= end; y += width) add_vectors<1>",
            "for (; y < end; y += width) add_vectors<1>",
        ),
        (
            "mean_prediction.cpp",
            "for (; y + width <= end; y += width) {\n        Vec l[1], pi[1];\n        write(l, pi);",
            "for (; y < end; y += width) {\n        Vec l[1], pi[1];\n        write(l, pi);",
        ),
        (
            "unmask.cpp",
            "for (; y + kUnroll * width <= end; y += kUnroll * width) {",
            "for (; y < end; y += kUnroll * width) {",
        ),
    ],
    ids=["reverse", "reverse_mean", "score_entropy", "generalized_masked", "mean_prediction", "unmask"],
)
def test_reads_beyond_a_row_are_noticed(name: str, text: str, replacement: str) -> None:
    """A whole vector where a part of one is left, in the baseline's kernels."""
    source = (build.ROOT / "csrc/cpu" / name).read_text()
    assert source.count(text) == 1
    changed = build.BUILD / "mutants" / name  # always the same, so that the build is kept
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text(source.replace(text, replacement))
    result = run(driver((name, changed)), "--only", name.removesuffix(".cpp"), "baseline")
    assert result.returncode != 0
    assert re.search(rf"AddressSanitizer: heap-buffer-overflow[^\n]*\n(READ|WRITE)[\s\S]*{name}", result.stderr)
