"""Whole training steps and samples of a model: fused head, unfused, and as the released code has it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from bench_sample import STEPS, whole
from bench_train import step
from cases import LARGE, SMALL, Case, Run, whole_model
from gpu_check import Record
from gpu_devices import Device

from sedd.diffusion.walk import Walk
from sedd_ext import Tweedie

MODEL = "small"  # SEDD-small: 12 blocks of width 768
STEP = "sampling step"
PROGRAMS: dict[str, Callable[..., Run]] = {"training step": step, "sampling": whole}


def models(device: Device, quick: bool) -> Iterator[Record]:
    """Each contestant's time and peak memory: one after the other, so that none has another's memory beside it."""
    yield from _timed(device, quick, ("kernel", "unfused", "released"))
    for contestant in ("kernel", "whole batch", *(["CUDA graph"] if device.name == "cuda" else [])):
        case = Case("absorbing", SMALL if quick else LARGE, device.length, "bfloat16", contestant, quick, device.name)
        record = {"kind": "models", "program": STEP, "model": "tiny" if quick else MODEL, "dtype": case.dtype}
        measured = _measured(device, partial(_one_step, case, device.length), device.length)
        yield {**record, "contestant": contestant, "sequences": 1, **measured}


def compiled_models(device: Device, quick: bool) -> Iterator[Record]:
    """The same with the network under torch.compile: apart, as compiling takes long and may not end."""
    yield from _timed(device, quick, ("kernel, compiled", "released, compiled"))


def _timed(device: Device, quick: bool, contestants: Sequence[str]) -> Iterator[Record]:
    rows = device.sequences() * device.length
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for program, build in PROGRAMS.items():
            for contestant in contestants:
                case = Case("absorbing", SMALL if quick else LARGE, rows, dtype, contestant, quick, device.name)
                record: Record = {"kind": "models", "program": program, "model": "tiny" if quick else MODEL}
                record |= {"dtype": dtype, "contestant": contestant, "sequences": device.sequences()}
                yield record | _measured(device, partial(build, case, MODEL, device.length), rows)


def _one_step(case: Case, length: int) -> Run:
    """A reverse step of one sequence, half of which is masked."""
    _, diffusion = whole_model(MODEL, case)
    tokens = torch.arange(length, device=case.device)[None] % (case.n - 1)
    tokens[:, ::2] = case.n - 1
    head = torch.bfloat16 if case.dtype == "bfloat16" else None
    free, whole = torch.ones_like(tokens, dtype=torch.bool), case.contestant != "kernel"
    walk = Walk(diffusion.eval(), tokens, free, autocast_dtype=head, whole_batch=whole)
    t, noise = (torch.full((1,), value, dtype=torch.float64, device=case.device) for value in (0.5, 0.01))

    def run() -> None:
        walk.tokens = tokens
        with torch.autocast(case.device, head, enabled=head is not None):
            walk.step(t, Tweedie(noise))

    if case.contestant != "CUDA graph":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _measured(device: Device, build: Callable[[], Run], rows: int) -> Record:
    """A sample's tokens are counted once, whatever its steps."""
    try:
        run = build()
        run()  # makes the optimizer's state, and compiles
        peak = device.peak_bytes(run)
        times = device.seconds(run, 3 if device.name == "cpu" else 7)
    except (Exception, pytest.skip.Exception) as error:
        # torch.compile may not work here; a kernel that fails does so in the tests as well
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    median = statistics.median(times)
    return {
        "length": device.length,
        "steps": STEPS + 1,
        "seconds": [median, min(times), max(times)],
        "tokens_per_s": rows / median,
        "peak_bytes": peak,
    }
