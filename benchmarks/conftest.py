"""The race: how a contestant is timed beside its rivals. pytest benchmarks/ --benchmark-only [--smoke]"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]  # pytest-benchmark brings it
import pytest
import torch
from cases import Case, Race, Run, smaller
from pytest_benchmark.fixture import BenchmarkFixture

import sedd_ext
from sedd_ext import _C

# What a contestant and its rivals may take together once each is warm: the kernel's ratios to limits are close ones.
_KERNEL_SECONDS, _OTHER_SECONDS = 0.8, 0.2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="benchmarks: two rows and one round each, to see that they run"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of --benchmark-json, which pytest-benchmark would miss only once everything has run."""
    path = config.getoption("benchmark_json")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = _C.isa()
    machine_info["sedd_ext"] = f"{sedd_ext.__version__}, {_C.compiler}"


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Race:
    """Times ``build(case)``, and before each of its rounds, outside its own clock, every rival once.

    So all that a ratio compares was timed in turns, and a slow spell of the machine hits both sides. A kernel runs
    against the limit of its shape, against absorbing if it is of another process, and against float32 if it is of
    another dtype; a peer runs against the kernel. ``extra_info`` holds the rivals' medians and what follows from them.
    ``bytes_moved`` is the least that the operation can read and write.
    """
    smoke: bool = request.config.getoption("--smoke")
    cpu = _cpu()

    def run(
        operation: str, case: Case, build: Callable[[Case], Run], bytes_moved: int, group: str | None = None
    ) -> None:
        if smoke:
            bytes_moved = bytes_moved // case.rows * min(case.rows, 2)
            case = smaller(case)
        if case.one_thread:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            request.addfinalizer(lambda: torch.set_num_threads(threads))
        contestant = _without_result(build(case))
        rivals = {name: _without_result(build(rival)) for name, rival in _rivals(case, alone=group is not None).items()}
        budget = _KERNEL_SECONDS if case.contestant == "kernel" else _OTHER_SECONDS
        least = 7 if case.contestant == "kernel" and not case.whole else 3
        rounds = 1 if smoke else _rounds([contestant, *rivals.values()], budget, least)
        seconds: dict[str, list[float]] = {name: [] for name in rivals}

        def time_rivals() -> None:
            for name, rival in rivals.items():
                start = time.perf_counter()
                rival()
                seconds[name].append(time.perf_counter() - start)

        benchmark.group = group or f"{operation}, {case.process}, {case.rows} x {case.n}, {case.dtype}"
        benchmark.pedantic(contestant, setup=time_rivals, rounds=rounds)  # type: ignore[no-untyped-call]
        if benchmark.stats is None:  # --benchmark-disable
            return
        own = benchmark.stats.stats.median
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        benchmark.extra_info.update(
            operation=operation,
            **dataclasses.asdict(case),
            linearity=group is not None,
            threads=torch.get_num_threads(),
            isa=_C.isa(),
            cpu=cpu,
            bytes=bytes_moved,
            gb_per_s=bytes_moved / own / 1e9,
            rival_seconds=medians,
            times_rival={name: own / median for name, median in medians.items()},
        )
        if "limit" in medians:
            benchmark.extra_info["share_of_limit"] = medians["limit"] / own

    return run


@functools.cache
def _cpu() -> str:
    info = cpuinfo.get_cpu_info()
    return f"{info.get('brand_raw', 'unknown')} (family {info.get('family', '?')}, model {info.get('model', '?')})"


def _rivals(case: Case, alone: bool) -> dict[str, Case]:
    if alone or case.contestant == "limit":
        return {}
    if case.contestant != "kernel":
        return {"kernel": dataclasses.replace(case, contestant="kernel")}
    if case.whole:
        return {}
    rivals = {"limit": dataclasses.replace(case, contestant="limit")}
    if case.process != "absorbing":
        rivals["absorbing"] = dataclasses.replace(case, process="absorbing")
    if case.dtype != "float32":
        rivals["float32"] = dataclasses.replace(case, dtype="float32")
    return rivals


def _without_result(run: Run) -> Run:
    """Drops the result at once, so that giving its memory back is timed for all alike."""

    def dropped() -> None:
        run()

    return dropped


def _rounds(runs: list[Run], seconds: float, least: int) -> int:
    """Warms every contestant up (torch.compile compiles here), then counts the rounds that the time allows."""
    for run in runs:
        run()
    start = time.perf_counter()
    for run in runs:
        run()
    return min(max(int(seconds / (time.perf_counter() - start)), least), 500)
