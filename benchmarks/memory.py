"""Peak memory of what a benchmark runs: in a new process, as an old one has memory that others have freed."""

from __future__ import annotations

import importlib
import multiprocessing
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import Case
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def measure_memory(
    benchmark: BenchmarkFixture, operation: str, case: Case, module: str, function: str, **options: Any
) -> None:
    """Of ``module.function(case, **options)``, which gives what is then run twice. Linux only.

    ``extra_info`` has bytes: what the process has grown by at most (resident), and what torch had allocated at most,
    both since before there were any tensors.
    """
    arguments = (module, function, asdict(case), options, torch.get_num_threads())
    if case.smoke:
        resident, allocated = _peak(*arguments)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            resident, allocated = pool.apply(_peak, arguments)
    benchmark.group = "memory"
    benchmark.extra_info.update(
        memory=operation, contestant=case.contestant, rows=case.rows, resident=resident, allocated=allocated
    )
    benchmark.pedantic(lambda: None)  # type: ignore[no-untyped-call]


def _peak(module: str, function: str, case: dict[str, Any], options: dict[str, Any], threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    build = getattr(importlib.import_module(module), function)
    build(Case(**case | {"rows": 2, "smoke": True}), **options)()  # loads what is loaded once
    before = _status("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = build(Case(**case), **options)
        run()
        run()
    resident = _status("VmHWM") - before
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    total = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return resident, highest


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])
