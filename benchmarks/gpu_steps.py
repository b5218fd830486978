"""What the steps of gpu_check.py measure, each in a process of its own that prints a JSON record a line.

python benchmarks/gpu_steps.py {operators,accuracy,tokens,timings,compile_timings} [--device cpu] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bench_linear import head
from bench_reverse import dense_step
from bench_transition import dense_probabilities
from cases import (
    COLUMN,
    EULER,
    FORWARD,
    GRAPHS,
    LARGE,
    ROW,
    SAMPLE,
    SMALL,
    SMALL_ROWS,
    TWEEDIE,
    Case,
    Inputs,
    Run,
    compiled,
    plain_read,
)
from torch import Tensor

import sedd_ext
from sedd_ext import RankOne, reference
from sedd_ext._dispatch import stationary_for

TESTS = Path(__file__).resolve().parent.parent / "tests"
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # every tensor an allocation of its own, whose ends memcheck sees
ERROR_BOUND = 1e-6  # what the kernel's error may exceed plain PyTorch's by, as in tests/test_score_entropy.py
DIFFERING_DRAWS = 1e-3  # share of draws that rounding may put on the other side of a boundary between tokens
GRAPH = "a CUDA graph"
STOPPED = "stopped here: no time for the rest"
Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- the devices


class Cpu:
    """Where everything is rehearsed: the same steps on tiny shapes."""

    name = "cpu"
    clock = "time.perf_counter around each call"
    shapes = ((4, 1025), (64, SMALL))

    def missing(self) -> str:
        return ""

    def describe(self) -> Record:
        return {"name": platform.machine(), "cores": os.cpu_count()}

    def seconds(self, run: Run, calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times

    def variants(self, run: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {"a second call": run}


class Cuda:
    """The GPU that torch calls cuda:0."""

    name = "cuda"
    clock = "CUDA events around each call; before it 1 GiB is written, which empties L2 and hides the launch"

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        rows, free = 8192, torch.cuda.mem_get_info()[0]
        while rows * LARGE * 96 > free:  # bytes an element that the eager reference and its gradient may take
            rows //= 2
        return (rows, LARGE), (128, LARGE), (SMALL_ROWS, SMALL)

    def missing(self) -> str:
        if not torch.cuda.is_available():
            return f"no GPU that torch {torch.__version__} can use; --device cpu rehearses without one"
        if not sedd_ext.has_cuda_kernels:
            return "sedd_ext was built without CUDA kernels; `make clean gpu-check`, with nvcc on PATH, builds them"
        return ""

    def describe(self) -> Record:
        properties = torch.cuda.get_device_properties(0)
        query = ["--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.max.memory", "--format=csv"]
        smi = shutil.which("nvidia-smi")
        said = subprocess.run([smi, *query], capture_output=True, text=True, timeout=30).stdout if smi else ""
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "torch_cuda": torch.version.cuda,
            "nvidia_smi": said.splitlines(),
        }

    @functools.cached_property
    def _flush(self) -> Tensor:
        return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def seconds(self, run: Run, calls: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def variants(self, run: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        def on_another_stream() -> Tensor:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = run()
            torch.cuda.synchronize()
            return result

        def from_a_graph() -> Tensor:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
            torch.manual_seed(0)  # the replay takes the generator as it is then
            graph.replay()
            return result.clone()

        variants = {"a second call": run, "another stream": on_another_stream}
        # capture allocates from a cached pool
        return variants if UNCACHED in os.environ else {**variants, GRAPH: from_a_graph}


DEVICES: dict[str, Cpu | Cuda] = {"cpu": Cpu(), "cuda": Cuda()}


# ------------------------------------------------------------------------------------------------------- the operations

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Limit:
    """What memory traffic alone costs; and the least bytes that a row moves, given N and an element's size."""

    run: Callable[[Inputs], Run]
    row_bytes: Callable[[int, int], int]


@dataclass(frozen=True)
class Operation:
    """An operator: its name in sedd_ext and in the reference, how it is called, and what it is measured against."""

    name: str
    function: str
    call: Callable[[Function, Inputs], Tensor]
    limit: Limit
    dense: Function | None = None  # what torch.compile gets; absorbing and uniform only
    unfused: Function | None = None  # the rival of an operator that has the head in it, in place of the reference
    waits: bool = False  # for the device, to learn a shape: no CUDA graph can hold that

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the log-scores, if it takes any."""
        return ("float32",) if self.limit in (WRITE, TOKENS) else ("float32", "bfloat16")

    @property
    def rival(self) -> str:
        return "unfused" if self.unfused else "eager"

    def contestant(self, name: str, case: Case) -> Run:
        if name == "limit":
            return self.limit.run(case.inputs)
        if name == "compile":
            assert self.dense is not None
            return functools.partial(self.call, compiled(self.dense, case), case.inputs)
        if name == "unfused":
            assert self.unfused is not None
            return functools.partial(self.call, self.unfused, case.inputs)
        module = {"kernel": sedd_ext, "eager": reference}[name]
        return functools.partial(self.call, getattr(module, self.function), case.inputs)


def _copy(i: Inputs, dtype: torch.dtype) -> Run:
    out = torch.empty_like(i.log_score, dtype=dtype)
    return lambda: out.copy_(i.log_score)


def _read_and_copy(i: Inputs) -> Run:
    read, copy = plain_read(i.log_score), _copy(i, i.dtype)
    return lambda: (read(), copy())


def _write(i: Inputs) -> Run:
    out = torch.empty(len(i.x_0), i.graph.dim, device=i.x_0.device)
    return lambda: out.fill_(0.5)


READ = Limit(lambda i: plain_read(i.log_score), lambda n, size: n * size + 28)
READ_TWICE_AND_WRITE = Limit(_read_and_copy, lambda n, size: 3 * n * size + 56)
READ_AND_WRITE_FLOAT32 = Limit(lambda i: _copy(i, torch.float32), lambda n, size: n * (size + 4) + 16)
WRITE = Limit(_write, lambda n, _: 4 * n + 16)
TOKENS = Limit(lambda i: i.x_0.clone, lambda *_: 24)


def _loss(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, i.x_0, i.sigma, i.graph)


def _gradient(function: Function, i: Inputs) -> Tensor:
    x = i.log_score.detach().requires_grad_()
    return torch.autograd.grad(function(x, i.x_t, i.x_0, i.sigma, i.graph).sum(), x)[0]


def _tweedie(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, i.step["tweedie"], i.graph)


def _euler(function: Function, i: Inputs) -> Tensor:
    return function(i.log_score, i.x_t, i.step["euler"], i.graph)


def _noise(function: Function, i: Inputs) -> Tensor:
    return function(i.x_0, i.sigma, i.graph)


def _dense_step(log_score: Tensor, x_t: Tensor, step: Tensor, graph: RankOne, kind: str) -> Tensor:
    return dense_step(log_score.float(), x_t, step, graph, kind)


# The output head and what comes behind it: of a model's width on a GPU, of a small one where that is rehearsed.


@functools.lru_cache(maxsize=2)
def _head(rows: int, n: int, dtype: str, device: str) -> list[Tensor]:
    return [tensor.to(device) for tensor in head(768 if device == "cuda" else 16, rows, n, dtype)]


def _head_of(i: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias; the bias makes the scores add up to about 1, where that is usual."""
    dtype = str(i.dtype).removeprefix("torch.")
    hidden, weight, bias = _head(len(i.x_0), i.graph.dim, dtype, i.x_0.device.type)
    return hidden, weight, None if i.graph.process == "uniform" else bias


def _linear_gradient(function: Function, i: Inputs) -> Tensor:
    hidden, weight, bias = _head_of(i)
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves, bias, i.x_t, i.x_0, i.sigma, i.graph)
    return torch.autograd.grad(loss.sum(), leaves)[1]


def _linear_tweedie(function: Function, i: Inputs) -> Tensor:
    return function(*_head_of(i), i.x_t, i.step["tweedie"], i.graph)


def _unfused_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return sedd_ext.score_entropy_loss(F.linear(hidden, weight, bias), *rest)


def _unfused_tweedie(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return sedd_ext.tweedie_sample(F.linear(hidden, weight, bias), *rest)


def _products(i: Inputs, *, backward: bool) -> Run:
    hidden, weight, _ = _head_of(i)

    def run() -> None:
        log_score = hidden @ weight.T
        if backward:
            log_score @ weight
            log_score.T @ hidden

    return run


# The matrix products alone; the weight is shared by all rows, so that a row's bytes are next to none.
PRODUCT = Limit(functools.partial(_products, backward=False), lambda *_: 24)
PRODUCTS = Limit(functools.partial(_products, backward=True), lambda *_: 28)
_dense_loss, _partial = reference.dense_score_entropy, functools.partial
OPERATIONS = (
    Operation(FORWARD, "score_entropy_loss", _loss, READ, _dense_loss),
    Operation(FORWARD + " + backward", "score_entropy_loss", _gradient, READ_TWICE_AND_WRITE, _dense_loss),
    Operation(TWEEDIE, "tweedie_sample", _tweedie, READ, _partial(_dense_step, kind="tweedie")),
    Operation(EULER, "euler_sample", _euler, READ, _partial(_dense_step, kind="euler")),
    Operation("tweedie probs", "tweedie_probs", _tweedie, READ_AND_WRITE_FLOAT32),
    Operation("euler probs", "euler_probs", _euler, READ_AND_WRITE_FLOAT32),
    Operation(COLUMN, "transition_column", _noise, WRITE, _partial(dense_probabilities, column=True)),
    Operation(ROW, "transition_row", _noise, WRITE, _partial(dense_probabilities, column=False)),
    Operation(SAMPLE, "sample_transition", _noise, TOKENS),
    Operation(
        "linear score entropy forward + backward",
        "linear_score_entropy_loss",
        _linear_gradient,
        PRODUCTS,
        unfused=_unfused_loss,
        waits=True,
    ),
    Operation(
        "linear tweedie sample", "linear_tweedie_sample", _linear_tweedie, PRODUCT, unfused=_unfused_tweedie, waits=True
    ),
)


# ----------------------------------------------------------------------------- the bodies: each runs in its own process


def operators(device: Cpu | Cuda, quick: bool) -> Iterator[Record]:
    """Every operator once a process, dtype and N, and again in other ways, which must give the same bits."""
    for n, graph, dtype in itertools.product((1025, LARGE, SMALL), GRAPHS, ("float32", "bfloat16")):
        case = Case(graph, n, 5, dtype, "kernel", device=device.name)
        for operation in OPERATIONS:
            record = {"kind": "operators", "operation": operation.name, **_shape(case)}
            try:
                run = functools.partial(operation.call, getattr(sedd_ext, operation.function), case.inputs)
                other = _ways_that_differ(device, run, operation.waits)
                yield record | ({"problem": f"other bits from {', '.join(other)}"} if other else {})
            except RuntimeError as error:
                yield record | {"problem": str(error)}


def _ways_that_differ(device: Cpu | Cuda, run: Callable[[], Tensor], waits: bool) -> list[str]:
    def seeded(way: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(0)
        return way()

    first = seeded(run)
    ways = {name: way for name, way in device.variants(run).items() if not (waits and name == GRAPH)}
    return [name for name, way in ways.items() if not torch.equal(seeded(way), first)]


def accuracy(device: Cpu | Cuda, quick: bool) -> Iterator[Record]:
    """The loss and its gradient against float64, beside plain PyTorch in the same dtype on the same device."""
    sys.path.insert(0, str(TESTS))
    from explicit import PROCESSES, Rows, largest_error, random_log_score, random_rows, term_scales

    def value_and_gradient(module: Any, log_score: Tensor, rows: Any, graph: RankOne) -> list[Tensor]:
        leaf = log_score.requires_grad_()
        loss = module.score_entropy_loss(leaf, *rows, graph)
        return [loss.detach().cpu(), torch.autograd.grad(loss.sum(), leaf)[0].cpu()]

    sizes = (1025, SMALL) if quick else (1025, LARGE, SMALL)
    for n, name, dtype in itertools.product(sizes, PROCESSES, (torch.float32, torch.bfloat16)):
        graph = PROCESSES[name](n)
        rows, log_score = random_rows(graph, 24), random_log_score((24, n), dtype)
        exact = value_and_gradient(reference, log_score.double(), rows, graph)
        scales = term_scales(log_score, rows, graph)
        there = Rows(*(tensor.to(device.name) for tensor in rows))
        errors = {}
        for who, module in (("kernel", sedd_ext), ("plain", reference)):
            found = value_and_gradient(module, log_score.to(device.name, copy=True), there, graph)
            errors[who] = [largest_error(*v) for v in zip(found, exact, scales, strict=True)]
        record = {"kind": "accuracy", "process": name, "n": n, "dtype": str(dtype).removeprefix("torch.")}
        record |= {who: dict(zip(("loss", "gradient"), error, strict=True)) for who, error in errors.items()}
        good = all(mine <= plain + ERROR_BOUND for mine, plain in zip(errors["kernel"], errors["plain"], strict=True))
        yield record | ({} if good else {"problem": "less accurate than plain PyTorch"})


def tokens(device: Cpu | Cuda, quick: bool) -> Iterator[Record]:
    """The samplers' tokens beside those of the CPU for the same seeds; a step at which most rows move."""
    shapes = [(1025, 10_000, 10), (LARGE, 500, 20), (SMALL, 10_000, 10)]  # N, rows, seeds
    for (n, rows, seeds), graph, dtype in itertools.product(shapes, GRAPHS, ("float32", "bfloat16")):
        rows, seeds = (rows // 10, 1) if quick else (rows, seeds)
        here = Case(graph, n, rows, dtype, "kernel")
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
    device, graph, ops = i.x_0.device, i.graph, torch.ops.sedd_ext
    key = torch.tensor([seed], device=device)
    if sampler == "transition":
        cumulative = graph.cumulative.to(device) if graph.process == "rank_one" else None
        drawn = ops.sample_transition(i.x_0, i.sigma.double(), cumulative, graph.process, graph.dim, key)
    else:
        step, stationary = i.step[sampler].double(), stationary_for(graph, i.dtype, device)
        drawn = ops.reverse_sample(i.log_score, i.x_t, step, None, stationary, graph.process, sampler, -1, key)
    result: Tensor = drawn.cpu()
    return result


def timings(device: Cpu | Cuda, quick: bool) -> Iterator[Record]:
    """Each operator beside its limit and the eager reference, or what it fuses."""
    for case in _timed_cases(device, quick, list(GRAPHS)):
        for operation in OPERATIONS:
            if case.dtype in operation.dtypes:
                yield _race(device, operation, case, ("kernel", operation.rival, "limit"))


def compile_timings(device: Cpu | Cuda, quick: bool) -> Iterator[Record]:
    """Each operator beside plain PyTorch under torch.compile: apart, as compiling takes long and may not end."""
    for case in _timed_cases(device, quick, ["absorbing", "uniform"]):
        for operation in OPERATIONS:
            if operation.dense and case.dtype in operation.dtypes:
                yield _race(device, operation, case, ("kernel", "compile"))


BODIES = {body.__name__: body for body in (operators, accuracy, tokens, timings, compile_timings)}


def _timed_cases(device: Cpu | Cuda, quick: bool, graphs: list[str]) -> Iterator[Case]:
    shapes = device.shapes[-1:] if quick else device.shapes
    for graph, (rows, n), dtype in itertools.product(graphs, shapes, ("float32", "bfloat16")):
        yield Case(graph, n, rows, dtype, "kernel", smoke=quick, device=device.name)


def _shape(case: Case) -> Record:
    return {"process": case.graph, "rows": case.rows, "n": case.n, "dtype": case.dtype}


def _race(device: Cpu | Cuda, operation: Operation, case: Case, contestants: Sequence[str]) -> Record:
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
