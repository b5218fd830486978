"""Where the steps of gpu_check.py run: on the GPU, or on the CPU where they are rehearsed."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable

import torch
from cases import LARGE, SMALL, SMALL_ROWS, Run
from gpu_check import UNCACHED, Record
from torch import Tensor

import sedd_ext

GRAPH = "a CUDA graph"


class Cpu:
    """Where everything is rehearsed: the same steps on tiny shapes."""

    name = "cpu"
    clock = "time.perf_counter around each call"
    shapes = ((4, 1025), (64, SMALL))
    length = 8  # of a model's sequences
    buffers = (1 << 12, 1 << 14)  # bytes for a fused head's tile

    def sequences(self) -> int:
        """Of a model's batch."""
        return 1

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

    def peak_bytes(self, run: Run) -> int:
        """What a call allocates at most beside what was there; 0 where nobody counts."""
        return 0

    def variants(self, run: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {"a second call": run}


class Cuda:
    """The GPU that torch calls cuda:0."""

    name = "cuda"
    clock = "CUDA events around each call; before it 1 GiB is written, which empties L2 and hides the launch"

    length = 1024
    buffers = tuple(n << 20 for n in (8, 16, 32, 64, 128))

    def sequences(self) -> int:
        """Of a model's batch: 16, or as many as the released formulation has memory for."""
        free = torch.cuda.mem_get_info()[0]
        return max(1, min(16, int(free / (self.length * LARGE * 4 * 12))))  # float32 tensors of rows x N at a time

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
            return "sedd_ext was built without CUDA kernels; --build, with nvcc on PATH, builds them"
        return ""

    def describe(self) -> Record:
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "torch_cuda": torch.version.cuda,
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

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

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


Device = Cpu | Cuda
DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}
