"""Whole training steps and samples of a model: fused head, unfused, and as the released code has it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from bench_sample import STEPS, whole
from bench_train import step
from cases import LARGE, SMALL, Case, Run
from gpu_check import Record
from gpu_devices import Device

MODEL = "small"  # SEDD-small: 12 blocks of width 768
PROGRAMS: dict[str, Callable[..., Run]] = {"training step": step, "sampling": whole}


def models(device: Device, quick: bool) -> Iterator[Record]:
    """Each contestant's time and peak memory: one after the other, so that none has another's memory beside it."""
    yield from _timed(device, quick, ("kernel", "unfused", "released"))


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
