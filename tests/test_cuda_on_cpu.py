"""The emulation of CUDA on the CPU: every primitive under every schedule, the reports of mistakes, the sanitizers.

The kernels are in ``cuda_on_cpu/selftest``, where a ``CASE`` is a test that has a name.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from backends import BACKENDS, emulated_kernels, running_on
from cuda_on_cpu import build

from sedd_ext import Tweedie, Uniform, _dispatch, reverse_sample, sample_transition

SELFTEST = build.HERE / "selftest"
SCHEDULES = ("forward", "reverse", "greedy", "random")
FILES = ("primitives.cu", "mistakes.cu", "schedules.cu", "main.cpp")


def cases(file: str, pattern: str = r"\w+") -> list[str]:
    return re.findall(rf"^CASE\(({pattern})\)", (SELFTEST / file).read_text(), re.MULTILINE)


def lines(file: str, comment: str) -> set[str]:
    """Places, as reports name them, of the lines that end with the comment."""
    numbered = enumerate((SELFTEST / file).read_text().splitlines(), 1)
    return {f"{file}:{number}" for number, line in numbered if line.endswith(f"// {comment}")}


class Library:
    """The self-tests, loaded."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.selftest_run.restype = ctypes.c_char_p

    def schedule(self, name: str, seed: int = 1) -> None:
        assert self.functions.cuda_on_cpu_set_schedule(name.encode(), ctypes.c_ulonglong(seed)) == 0

    def run(self, case: str) -> str | None:
        """What was wrong."""
        wrong = self.functions.selftest_run(case.encode())
        return None if wrong is None else wrong.decode()

    def order(self, blocks: int, threads: int) -> list[int]:
        order = (ctypes.c_int * (3 * blocks * threads))()
        assert self.functions.order_of_threads(blocks, threads, order) == len(order)
        return list(order)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build.shared_library("selftest", [SELFTEST / file for file in FILES]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", cases("primitives.cu"))
def test_primitive(library: Library, case: str, schedule: str) -> None:
    library.schedule(schedule)
    assert library.run(case) is None


def test_without_assembly() -> None:
    """Other processors than x86-64 switch fibers by ucontext."""
    flags = ("-O0", "-DCUDA_ON_CPU_UCONTEXT")
    program = build.executable("ucontext", [SELFTEST / "primitives.cu", SELFTEST / "main.cpp"], flags=flags)
    names = [case for case in cases("primitives.cu") if case != "impossible_launches"]
    run = subprocess.run([program, "random", "3", *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed") == len(names)


# ---- Numbers of 16 bits ----

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


def all_patterns(name: str) -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(DTYPES[name])


@pytest.mark.parametrize("name", DTYPES)
def test_widening_of_all_numbers(library: Library, name: str) -> None:
    narrow, wide = all_patterns(name), torch.empty(2**16)
    widen = library.functions[f"widen_{name}"]
    widen.restype = ctypes.c_bool
    assert widen(ctypes.c_void_p(narrow.data_ptr()), ctypes.c_void_p(wide.data_ptr()), ctypes.c_int64(2**16))
    numbers = ~narrow.isnan()
    assert torch.equal(wide.isnan(), ~numbers)
    assert torch.equal(wide.view(torch.int32)[numbers], narrow.float().view(torch.int32)[numbers])  # -0.0 as well


@pytest.mark.parametrize("name", DTYPES)
def test_narrowing(library: Library, name: str) -> None:
    """All numbers, what lies halfway between neighbours, just above and below that, beyond the largest, and others."""
    exact = all_patterns(name).double()
    exact = exact[exact.isfinite()].sort().values
    step = exact[-1] - exact[-2]
    beyond = torch.stack([exact[-1] + step * share for share in (0.25, 0.5, 0.75, 1.0, 2.0)])
    exact = torch.cat([-beyond, exact, beyond])
    halfway = ((exact[1:] + exact[:-1]) / 2).float()
    infinity = torch.tensor([float("inf")])
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    special = torch.tensor([0x7F800000, -0x800000, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, 1, 0x7FFFFF], dtype=torch.int32)
    patterns = torch.cat([bits, special]).view(torch.float32)
    wide = torch.cat([exact.float(), halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity), patterns])
    narrow = torch.empty(len(wide), dtype=DTYPES[name])
    function = library.functions[f"narrow_{name}"]
    function.restype = ctypes.c_bool
    assert function(ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(narrow.data_ptr()), ctypes.c_int64(len(wide)))
    numbers = ~wide.isnan()
    assert torch.equal(narrow.isnan(), ~numbers)
    assert torch.equal(narrow.view(torch.int16)[numbers], wide.to(DTYPES[name]).view(torch.int16)[numbers])


# ---- Schedules ----


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("forward", [*range(64)] * 3),
        ("reverse", [*reversed(range(64))] * 3),
        (  # who completes a shuffle or the barrier goes on, then its warp
            "greedy",
            [
                *[*range(32), 31, *range(31)],
                *[*range(32, 64), 63, *range(32, 63)],
                *[62, *range(32, 62), 63, *range(32)],
            ],
        ),
    ],
)
def test_order_of_threads(library: Library, schedule: str, expected: list[int]) -> None:
    library.schedule(schedule)
    assert library.order(1, 64) == expected


@pytest.mark.parametrize(("schedule", "first"), [("forward", 0), ("greedy", 0), ("reverse", 127)])
def test_order_of_blocks(library: Library, schedule: str, first: int) -> None:
    library.schedule(schedule)
    order = library.order(4, 32)
    assert order[0] == first
    assert [sorted(order[i : i + 96])[::3] for i in range(0, 384, 96)] == [
        list(range(b * 32, b * 32 + 32)) for b in ([3, 2, 1, 0] if first else [0, 1, 2, 3])
    ]


def test_random_order_depends_on_the_seed_alone(library: Library) -> None:
    library.schedule("random", 5)
    order = library.order(3, 64)
    assert library.order(3, 64) == order
    library.schedule("random", 6)
    others = library.order(3, 64)
    assert others != order
    assert sorted(others) == sorted(order)
    firsts = set()
    for seed in range(200):
        library.schedule("random", seed)
        firsts.add(library.order(1, 64)[0])
    assert len(firsts) > 48  # of 64: any thread can be the first


def test_unknown_schedule(library: Library) -> None:
    assert library.functions.cuda_on_cpu_set_schedule(b"backward", ctypes.c_ulonglong(0)) == -1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_shows_a_missing_barrier(library: Library, schedule: str) -> None:
    """Going round the block hides it: when a warp reads the others' sums, they have just been written."""
    library.schedule(schedule)
    assert library.functions.sum_of_a_tree(True) == 64
    if schedule == "greedy":
        assert library.functions.sum_of_a_tree(False) != 64
    elif schedule != "random":
        assert library.functions.sum_of_a_tree(False) == 64


def test_schedules_of_python_threads(library: Library) -> None:
    """ctypes lets go of the GIL: launches overlap, and wait for each other."""
    library.schedule("random", 1)
    expected, found = library.order(2, 96), []
    threads = [threading.Thread(target=lambda: found.append(library.order(2, 96))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# ---- Mistakes ----

THREAD = r"thread \(\d+, \d+, 0\) \[warp \d, lane \d+\]"
REPORTS = {
    **{
        f"thread_{i}_exits_before_a_barrier": rf"divergent barrier: {THREAD} at __syncthreads, \S+, waits for "
        rf"thread \({i}, 0, 0\) \[warp {i // 32}, lane {i % 32}\] at the kernel's end"
        for i in (0, 40, 63)
    },
    "two_barriers_meet": rf"divergent barrier: {THREAD} at __syncthreads, \S+, meets {THREAD} at __syncthreads, \S+",
    "two_kinds_of_barriers_meet": rf"divergent barrier: {THREAD} at __syncthreads_(or, \S+, meets {THREAD} at "
    r"__syncthreads_count|count, \S+, meets .* at __syncthreads_or), \S+",
    **{
        f"lane_{i}_has_exited": rf"absent lane: {THREAD} at __shfl_sync\(0xffffffff\), \S+, waits for "
        rf"thread \({32 + i}, 0, 0\) \[warp 1, lane {i}\] at the kernel's end"
        for i in (0, 3, 31)
    },
    "a_lane_of_the_mask_is_at_a_barrier": rf"absent lane: {THREAD} at __any_sync\(0xffffffff\), \S+, waits for "
    r"thread \(3, 0, 0\) \[warp 0, lane 3\] at __syncthreads, \S+",
    "a_lane_is_not_in_its_mask": rf"absent lane: {THREAD} at __syncwarp\(0x0000ffff\), \S+, is not in its own mask",
    "a_shuffle_reads_from_outside_of_its_mask": rf"absent lane: {THREAD} at __shfl_down_sync\(0x0000ffff\), \S+, "
    r"reads lane (1[6-9]|2\d|3[01]), which is not in its mask",
    "a_mask_names_lanes_that_the_block_lacks": r"absent lane: thread \(\d, [67], 0\) \[warp 1, lane \d\] at "
    r"__syncwarp\(0xffffffff\), \S+, waits for lane 8, which the block does not have",
    "two_collectives_meet": rf"mismatch: {THREAD} at __(shfl_xor|all)_sync\(0xffffffff\), \S+, meets {THREAD} at "
    r"__(shfl_xor|all)_sync\(0xffffffff\), \S+",
    "two_masks_meet": rf"mismatch: {THREAD} at __ballot_sync\(0x(00000003|ffffffff)\), \S+, meets {THREAD} at "
    r"__ballot_sync\(0x(00000003|ffffffff)\), \S+",
    "a_circle_of_lanes_that_wait": rf"deadlock; 1 like thread \(0, 0, 0\) \[warp 0, lane 0\] at "
    rf"__syncwarp\(0x00000003\), \S+; 1 like {THREAD} at __syncwarp\(0x00000006\), \S+; 1 like {THREAD} at "
    rf"__syncwarp\(0x00000005\), \S+; 29 like {THREAD} at the kernel's end",
    "a_width_of_seven": rf"{THREAD}: __shfl_up_sync over 7 lanes, no power of two up to 32, \S+",
    "a_misaligned_copy": rf"{THREAD}: misaligned copy of 16 bytes from 0x[0-9a-f]+ to 0x[0-9a-f]+, \S+",
    "a_copy_beyond_shared_memory": rf"{THREAD}: beyond shared memory: copy of 16 bytes from \S+ to \S+, \S+",
    "a_misaligned_vector": rf"{THREAD}: misaligned address 0x[0-9a-f]+ for 'const struct float4', \S+",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", cases("mistakes.cu"))
def test_mistake(library: Library, case: str, schedule: str) -> None:
    """It is reported, and the next launch works: the case sees to that itself."""
    library.schedule(schedule)
    report = library.run(case)
    assert report is not None
    match = re.fullmatch(rf"kernel (\w+)(?:<\w+>)?, block \((\d, \d, \d)\): {REPORTS[case]}", report)
    assert match, report
    if case == "lane_3_has_exited" and schedule != "random":  # in a grid of 2 x 3
        assert match[2] == ("1, 2, 0" if schedule == "reverse" else "0, 0, 0")
    places = set(re.findall(r"\w+\.cu:\d+", report))
    assert places
    assert places <= lines("mistakes.cu", f"waits: {match[1]}")
    assert len(places) == 2 or len(lines("mistakes.cu", f"waits: {match[1]}")) == 1


# ---- Sanitizers ----

Sanitizer = Literal["address", "thread"]


@cache
def sanitized_program(kind: Sanitizer) -> Path:
    files = ["sanitizers.cu", "main.cpp", *(["primitives.cu"] if kind == "thread" else [])]
    try:
        return build.executable("selftest", [SELFTEST / file for file in files], flags=build.sanitized(kind))
    except RuntimeError as error:
        if re.search("cannot find .*(asan|tsan|ubsan)", str(error)):
            pytest.skip(f"the compiler has no {kind} sanitizer")
        raise


def run_sanitized(kind: Sanitizer, schedule: str, *names: str) -> subprocess.CompletedProcess[str]:
    # a traced process cannot look for leaks, and nothing here tests for them
    options = {"TSAN_OPTIONS": "atexit_sleep_ms=0", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sanitized_program(kind), schedule, "1", *names]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | options)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer cannot live with this system's address space randomisation")
    return run


def check_clean(run: subprocess.CompletedProcess[str], count: int) -> None:
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed") == count
    assert run.stderr == ""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", cases("sanitizers.cu", r"race_\w+"))
def test_race(case: str, schedule: str) -> None:
    run = run_sanitized("thread", schedule, case)
    assert run.returncode != 0, run.stdout + run.stderr
    assert run.stderr.startswith("==================\nWARNING: ThreadSanitizer: data race")
    kernel = {
        "race_of_a_loop_with_itself": "loop",
        "race_of_sums": "add",
        "race_of_values_beside_an_atomic": "hand_on",
    }.get(case, "exchange")
    accesses = re.findall(r"^  (?:Previous )?(?:read|write) of .*\n    #0 (.*)$", run.stderr, re.MULTILINE | re.I)
    assert len(accesses) >= 2
    for access in accesses:
        assert kernel in access
        assert any(place in access for place in lines("sanitizers.cu", f"here: {kernel}"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order(schedule: str) -> None:
    names = cases("sanitizers.cu", r"order_\w+")
    check_clean(run_sanitized("thread", schedule, *names), len(names))


def test_primitives_have_no_races() -> None:
    names = [case for case in cases("primitives.cu") if case != "impossible_launches"]  # which takes long
    check_clean(run_sanitized("thread", "random", *names), len(names))


@pytest.mark.parametrize("case", cases("sanitizers.cu", r"overrun_\w+"))
def test_overrun(case: str) -> None:
    run = run_sanitized("address", "greedy", case)
    assert run.returncode != 0
    (place,) = lines("sanitizers.cu", "here: overrun")
    kind = {"static_shared_memory": "global", "the_stack": "stack"}.get(case.removeprefix("overrun_of_"), "heap")
    assert re.search(rf"SUMMARY: AddressSanitizer: {kind}-buffer-overflow .*/{place} in overrun", run.stderr)


def test_misaligned_load() -> None:
    run = run_sanitized("address", "forward", "misaligned_load")
    assert run.returncode != 0
    (place,) = lines("sanitizers.cu", "here: load")
    assert re.search(rf"{place}:\d+: runtime error: .* misaligned address .*'const struct uint4'", run.stderr)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_overrun(schedule: str) -> None:
    names = ["within_bounds", "aligned_load", *cases("sanitizers.cu", r"order_\w+")]
    check_clean(run_sanitized("address", schedule, *names), len(names))


# ---- The build ----


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Compiles a library from a source and a header that it includes, in a folder of its own."""
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    folder = tmp_path / "include"
    folder.mkdir()

    def compile_it(text: str, header: str = "", **options: tuple[str, ...]) -> Path:
        (folder / "header.h").write_text(header)
        (tmp_path / "source.cpp").write_text(f'#include "header.h"\nextern "C" {text}')
        return build.shared_library("library", [tmp_path / "source.cpp"], include=[folder], **options)

    return compile_it


def test_builds_are_kept_until_something_changes(source: Callable[..., Path]) -> None:
    exported = '__attribute__((visibility("default"))) int f() { return VALUE; }'
    first = source(exported, "#define VALUE 1")
    made = first.stat().st_mtime_ns
    second = source(exported, "#define VALUE 2")
    third = source(exported, "#define VALUE 2", flags=("-O1",))
    assert source(exported, "#define VALUE 1") == first
    assert first.stat().st_mtime_ns == made
    assert len({first, second, third}) == 3
    assert [ctypes.CDLL(str(path)).f() for path in (first, second, third)] == [1, 2, 2]


def test_what_does_not_compile(source: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)source\.cpp.*VALUE.*not declared|VALUE.*undeclared"):
        source("int f() { return VALUE; }")
    assert source("int f() { return 0; }").exists()


def test_other_compilers(source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false --version-of-what")
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        source("int f() { return 0; }")


# ------------------------------------------------------------------------------------- errors of the operators' kernels


def test_the_runtimes_errors_have_the_operators_name() -> None:
    """A row that is too wide for a block's shared memory, and a device that does not exist."""
    with running_on(BACKENDS["emulated"][0]):
        log_score = torch.zeros(1, 7_000_000)
        with pytest.raises(RuntimeError, match=r"^reverse_sample: CUDA: rows too wide"):
            reverse_sample(log_score, torch.zeros(1).long(), Tweedie(0.5), Uniform(7_000_000))
    out = torch.empty(3, dtype=torch.int64)
    for kernel, names in emulated_kernels().cuda_arguments.items():
        function, right = getattr(emulated_kernels(), f"{kernel}_cuda"), dict.fromkeys(names, 0)
        assert function(right) is None
        with pytest.raises(TypeError, match=f"^{kernel}: .*; got other too"):
            function({**right, "other": 0})
        del right["stream"]
        with pytest.raises(TypeError, match=f"^{kernel}: expected an argument stream, got none"):
            function(right)
    arguments = dict.fromkeys(emulated_kernels().cuda_arguments["sample_transition"], 0)
    arguments |= {"x": out, "out": out, "rows": 3, "dim": 7, "device": 99}
    assert emulated_kernels().sample_transition_cuda(arguments) is not None


def test_an_error_of_the_runtime_becomes_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        sample_transition_workspace = staticmethod(lambda *_: 0)
        sample_transition_cuda = staticmethod(lambda *_: "an illegal memory access was encountered")

    def launch(*arguments: Any) -> Any:
        return _dispatch.launch_cuda(*arguments, kernels=Broken, stream=0)

    monkeypatch.setitem(_dispatch.LAUNCHERS, "cpu", launch)
    with pytest.raises(RuntimeError, match=r"^sample_transition: CUDA: an"):
        sample_transition(torch.zeros(3).long(), 0.5, Uniform(7))
