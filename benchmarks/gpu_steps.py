"""What the steps of gpu_check.py do, each in a process of its own that prints a JSON record a line.

python benchmarks/gpu_steps.py timings [--device cpu] [--quick]   # or another of BODIES
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORWARD, LARGE, PROCESSES, SMALL, TWEEDIE, Case, Inputs, Run
from gpu_check import STOPPED, Record
from gpu_devices import DEVICES, GRAPH, Device
from gpu_models import compiled_models, models
from gpu_operations import OPERATIONS, Operation
from torch import Tensor

import sedd_ext
from sedd_ext import RankOne, reference
from sedd_ext.__main__ import describe
from sedd_ext._dispatch import stationary_for

TESTS = Path(__file__).resolve().parent.parent / "tests"
ERROR_BOUND = 1e-6  # what the kernel's error may exceed plain PyTorch's by, as in tests/test_score_entropy.py
DIFFERING_DRAWS = 1e-3  # share of draws that rounding may put on the other side of a boundary between tokens


def about(device: Device, quick: bool) -> Iterator[Record]:
    """What runs here, and on what; the problem is that nothing can."""
    if missing := device.missing():
        yield {"kind": "about", "problem": missing}
        return
    yield {"kind": "about", "build": describe().splitlines(), "clock": device.clock, **device.describe()}


def launches(device: Device, quick: bool) -> Iterator[Record]:
    """Every operator once a process, dtype and N: what a sanitizer, which takes its time, looks at."""
    for n, process, dtype in itertools.product((1025, SMALL, LARGE), PROCESSES, ("float32", "bfloat16")):
        case = Case(process, n, 5, dtype, "kernel", device=device.name)
        for operation in OPERATIONS:
            if operation.suits(case):
                operation.contestant("kernel", case)()
        yield {"kind": "launches", **_shape(case)}


def counted(device: Device, quick: bool) -> Iterator[Record]:
    """Every operator once on the main shape: what a profiler, which runs each kernel several times, counts."""
    rows, n = device.shapes[-1 if quick else 0]
    for process, dtype in itertools.product(PROCESSES, ("float32", "bfloat16")):
        for operation in OPERATIONS:
            # a fused head launches the same kernels tile by tile: a part of the rows will do
            case = Case(process, n, min(rows, 1024) if operation.waits else rows, dtype, "kernel", device=device.name)
            if operation.suits(case):
                operation.contestant("kernel", case)()
                yield {"kind": "launches", "operation": operation.name, **_shape(case)}


def buffers(device: Device, quick: bool) -> Iterator[Record]:
    """The fused head with tiles of several sizes: time, and peak memory."""
    rows, n = device.shapes[-1 if quick else 0]
    for dtype, operation in itertools.product(("bfloat16", "float32"), OPERATIONS):
        if not operation.unfused:
            continue
        case = Case("absorbing", n, rows, dtype, "kernel", smoke=quick, device=device.name)
        for buffer_bytes in device.buffers:
            function = functools.partial(getattr(sedd_ext, operation.function), buffer_bytes=buffer_bytes)
            run = functools.partial(operation.call, function, case.inputs)
            run()
            times = device.seconds(run, 2 if quick else 10)
            yield {
                "kind": "buffers",
                "operation": operation.name,
                **_shape(case),
                "buffer_bytes": buffer_bytes,
                "seconds": [statistics.median(times), min(times), max(times)],
                "peak_bytes": device.peak_bytes(run),
            }


def operators(device: Device, quick: bool) -> Iterator[Record]:
    """Every operator once a process, dtype and N, and again in other ways, which must give the same bits."""
    sizes = (1025, SMALL) if quick else (1025, LARGE, SMALL)
    for n, process, dtype in itertools.product(sizes, PROCESSES, ("float32", "bfloat16")):
        case = Case(process, n, 5, dtype, "kernel", device=device.name)
        for operation in filter(lambda operation: operation.suits(case), OPERATIONS):
            record = {"kind": "operators", "operation": operation.name, **_shape(case)}
            try:
                run = functools.partial(operation.call, getattr(sedd_ext, operation.function), case.inputs)
                other = _ways_that_differ(device, run, operation.waits)
                yield record | ({"problem": f"other bits from {', '.join(other)}"} if other else {})
            except RuntimeError as error:
                yield record | {"problem": str(error)}


def _ways_that_differ(device: Device, run: Callable[[], Tensor], waits: bool) -> list[str]:
    def seeded(way: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(0)
        return way()

    first = seeded(run)
    ways = {name: way for name, way in device.variants(run).items() if not (waits and name == GRAPH)}
    return [name for name, way in ways.items() if not torch.equal(seeded(way), first)]


def accuracy(device: Device, quick: bool) -> Iterator[Record]:
    """The loss and its gradient against float64, beside plain PyTorch in the same dtype on the same device."""
    sys.path.insert(0, str(TESTS))
    from explicit import PROCESSES, Rows, largest_error, random_log_score, random_rows, term_scales

    def value_and_gradient(module: Any, log_score: Tensor, rows: Any, process: RankOne) -> list[Tensor]:
        leaf = log_score.requires_grad_()
        loss = module.score_entropy_loss(leaf, *rows, process)
        return [loss.detach().cpu(), torch.autograd.grad(loss.sum(), leaf)[0].cpu()]

    sizes = (1025, SMALL) if quick else (1025, LARGE, SMALL)
    for n, name, dtype in itertools.product(sizes, PROCESSES, (torch.float32, torch.bfloat16)):
        process = PROCESSES[name](n)
        rows, log_score = random_rows(process, 24), random_log_score((24, n), dtype)
        exact = value_and_gradient(reference, log_score.double(), rows, process)
        scales = term_scales(log_score, rows, process)
        there = Rows(*(tensor.to(device.name) for tensor in rows))
        errors = {}
        for who, module in (("kernel", sedd_ext), ("plain", reference)):
            found = value_and_gradient(module, log_score.to(device.name, copy=True), there, process)
            errors[who] = [largest_error(*v) for v in zip(found, exact, scales, strict=True)]
        record = {"kind": "accuracy", "process": name, "n": n, "dtype": str(dtype).removeprefix("torch.")}
        record |= {who: dict(zip(("loss", "gradient"), error, strict=True)) for who, error in errors.items()}
        good = all(mine <= plain + ERROR_BOUND for mine, plain in zip(errors["kernel"], errors["plain"], strict=True))
        yield record | ({} if good else {"problem": "less accurate than plain PyTorch"})


def tokens(device: Device, quick: bool) -> Iterator[Record]:
    """The samplers' tokens beside those of the CPU for the same seeds; a step at which most rows move."""
    shapes = [(1025, 10_000, 10), (LARGE, 500, 20), (SMALL, 10_000, 10)]  # N, rows, seeds
    for (n, rows, seeds), process, dtype in itertools.product(shapes, PROCESSES, ("float32", "bfloat16")):
        rows, seeds = (rows // 10, 1) if quick else (rows, seeds)
        here = Case(process, n, rows, dtype, "kernel")
        inputs = [here.inputs, dataclasses.replace(here, device=device.name).inputs]
        for sampler in ("tweedie", "euler", "transition"):
            differing = 0
            for seed in range(seeds):
                mine, theirs = (_draw(sampler, i, seed) for i in inputs)
                differing += int((mine != theirs).sum())
            draws = rows * seeds
            record = {"kind": "tokens", "sampler": sampler, **_shape(here), "draws": draws, "differing": differing}
            good = differing <= DIFFERING_DRAWS * draws
            yield record | ({} if good else {"problem": f"{differing} of {draws} tokens differ from the CPU's"})


def _draw(sampler: str, i: Inputs, seed: int) -> Tensor:
    device, process, ops = i.x_0.device, i.process, torch.ops.sedd_ext
    key = torch.tensor([seed], device=device)
    if sampler == "transition":
        cumulative = process.cumulative.to(device) if process.family == "rank_one" else None
        drawn = ops.sample_transition(i.x_0, i.sigma.double(), cumulative, process.family, process.dim, key, 0)
    else:
        step, stationary = i.step[sampler].double(), stationary_for(process, i.dtype, device)
        drawn = ops.reverse_sample(i.log_score, i.x_t, step, None, stationary, process.family, sampler, -1, key)
    result: Tensor = drawn.cpu()
    return result


def timings(device: Device, quick: bool) -> Iterator[Record]:
    """Each operator beside its limit and the eager reference, or what it fuses."""
    shapes = device.shapes[-1:] if quick else device.shapes
    for (rows, n), process, dtype in itertools.product(shapes, PROCESSES, ("float32", "bfloat16")):
        case = Case(process, n, rows, dtype, "kernel", smoke=quick, device=device.name)
        for operation in OPERATIONS:
            if operation.suits(case):
                triton = ("triton",) if operation.triton and device.name == "cuda" and find_spec("triton") else ()
                yield _race(device, operation, case, ("kernel", operation.rival, *triton, "limit"))


def compile_timings(device: Device, quick: bool) -> Iterator[Record]:
    """The loss and a sampler beside plain PyTorch under torch.compile: apart, as compiling takes long and may not end.

    On the main shape, where it matters; each compilation takes a good part of a minute.
    """
    (rows, n), told = device.shapes[-1 if quick else 0], (FORWARD + " + backward", TWEEDIE)
    for process, dtype in (("absorbing", "bfloat16"), ("absorbing", "float32"), ("uniform", "bfloat16")):
        case = Case(process, n, rows, dtype, "kernel", smoke=quick, device=device.name)
        for operation in OPERATIONS:
            if operation.name in told and not (process == "uniform" and operation.name == TWEEDIE):
                yield _race(device, operation, case, ("kernel", "compile"))


BODIES = {
    body.__name__: body
    for body in (
        *(about, operators, accuracy, tokens, timings, models, compiled_models, compile_timings),
        *(launches, counted, buffers),
    )
}


def _shape(case: Case) -> Record:
    return {"process": case.process, "rows": case.rows, "n": case.n, "dtype": case.dtype}


def _race(device: Device, operation: Operation, case: Case, contestants: Sequence[str]) -> Record:
    """Median and range of each contestant's times, taken in turns; a rival that fails is noted and left out."""
    runs: dict[str, tuple[Run, int]] = {}
    record: Record = {"kind": "timings", "operation": operation.name, **_shape(case), "failed": {}}
    for name in contestants:
        try:
            run = operation.contestant(name, case)
            run()
            once = statistics.median(device.seconds(run, 3))
            runs[name] = run, max(1, min(int(0.02 / max(once, 1e-6)), 20))
        except (Exception, pytest.skip.Exception) as error:
            record["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "kernel" not in runs:
        return record | {"problem": record["failed"]["kernel"]}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, (run, calls)) in itertools.product(range(2 if case.smoke else 5), runs.items()):
        samples[name] += device.seconds(run, calls)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    moved = case.rows * operation.limit.row_bytes(case.n, case.itemsize)
    return record | {
        "bytes": moved,
        "gb_per_s": {name: moved / medians[name] / 1e9 for name in ("kernel", "limit") if name in medians},
        "seconds": {name: [medians[name], min(times), max(times)] for name, times in samples.items()},
        "times_kernel": {name: medians[name] / medians["kernel"] for name in runs if name != "kernel"},
    }


def main() -> int:
    """Prints a body's records as they come; stops when the time is up. Returns 1 if one of them holds a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("body", choices=BODIES)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer draws and repeats, and no real torch.compile")
    parser.add_argument("--until", type=float, default=float("inf"), metavar="TIME", help="to stop at, as time.time()")
    options = parser.parse_args()
    status = 0
    for record in BODIES[options.body](DEVICES[options.device], options.quick):
        print(json.dumps(record), flush=True)
        status = 1 if "problem" in record else status
        if time.time() > options.until:
            print(STOPPED, flush=True)
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
