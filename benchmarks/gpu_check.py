"""The day there is a GPU: tests, compute-sanitizer, timings and accuracy in ten minutes, as one table and one JSON.

make gpu-check                                      # builds the CUDA kernels, then runs this
python benchmarks/gpu_check.py --out check.json     # in an environment with the test extra and CUDA kernels
python benchmarks/gpu_check.py --device cpu --quick # a rehearsal, on any machine

Every step is a process of its own with a time limit: one that fails or hangs costs the later ones nothing but time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps import DEVICES, STOPPED, UNCACHED, Cpu, Cuda, Record

from sedd_ext.__main__ import describe

ROOT = Path(__file__).resolve().parent.parent
BODIES = Path(__file__).with_name("gpu_steps.py")
TESTED = ("score_entropy", "reverse", "transition", "linear_score_entropy", "linear_reverse", "bad_input")
OPERATOR_TESTS = [f"tests/test_{name}.py" for name in TESTED]


@dataclass(frozen=True)
class Step:
    """A command with a time limit, or the reason why there is none."""

    name: str
    share: float  # of the budget, at most
    command: Callable[[float], Sequence[str]] = field(default=lambda until: ())  # of the moment to stop at by itself
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def plan(device: Cpu | Cuda, quick: bool) -> list[Step]:
    """What is run, most telling first: what the budget does not reach is skipped."""

    def tests(*arguments: str) -> Callable[[float], Sequence[str]]:
        return lambda until: [sys.executable, "-m", "pytest", "-q", "--backend", device.name, *arguments]

    def body(name: str, *prefix: str) -> Callable[[float], Sequence[str]]:
        command = [*prefix, sys.executable, str(BODIES), name, "--device", device.name]
        return lambda until: [*command, "--until", str(until), *(["--quick"] if quick else [])]

    def sanitizer(tool: str, share: float) -> Step:
        found = _compute_sanitizer() if device.name == "cuda" else None
        if not found:
            why = "compute-sanitizer is neither on PATH nor beside nvcc" if device.name == "cuda" else "needs a GPU"
            return Step(tool, share, skip=why)
        prefix = [found, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", "--launch-timeout", "0"]
        uncached = {UNCACHED: "1"} if tool in ("memcheck", "initcheck") else {}
        return Step(tool, share, body("operators", *prefix), uncached)

    some = ["-k", "empty"] if quick else []
    elsewhere = [*OPERATOR_TESTS, "tests/test_gpu_check.py"]
    others = ["tests/test_graph.py"] if quick else ["tests", *(f"--ignore={name}" for name in elsewhere)]
    return [
        Step("operators", 0.08, body("operators")),
        Step("operator tests", 0.25, tests(*OPERATOR_TESTS, *some)),
        Step("accuracy", 0.05, body("accuracy")),
        Step("tokens", 0.07, body("tokens")),
        Step("timings", 0.18, body("timings")),
        sanitizer("memcheck", 0.12),
        sanitizer("racecheck", 0.1),
        Step("torch.compile", 0.15, body("compile_timings")),
        sanitizer("synccheck", 0.06),
        sanitizer("initcheck", 0.06),
        Step("other tests", 1.0, tests(*others)),
    ]


def _compute_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which("compute-sanitizer") or (beside and shutil.which("compute-sanitizer", path=beside))


def run_step(step: Step, limit: float) -> tuple[Record, list[Record]]:
    """Runs a step, for ``limit`` seconds at most; what became of it, and the records that its body printed."""
    result: Record = {"name": step.name, "outcome": "skipped", "why": step.skip, "seconds": 0.0}
    if step.skip or limit < 1:
        return result | {"why": step.skip or "no time left"}, []
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # not a pipe, which a process that outlives the step would hold open; a session, so that its children go with it
        process = subprocess.Popen(
            step.command(time.time() + 0.7 * limit),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            why = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = f"not done within {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    records = [json.loads(line) for line in lines if line.startswith('{"kind": ')]
    said = [line for line in lines if not line.startswith('{"kind": ')]
    problems = [record["problem"] for record in records if "problem" in record]
    result |= {"outcome": "failed" if why else "ok", "why": why, "seconds": round(time.monotonic() - begin, 2)}
    if why:
        result |= {"why": "; ".join([why, *(problems or said[-1:])[:1]]), "output": said[-60:]}
    elif STOPPED in said:
        result["why"] = STOPPED
    return result | {"said": said[-1] if said else ""}, records


def table(timings: list[Record]) -> str:
    """A line per operation and shape, with the ratios to all rivals that it was timed in turns with."""
    lines: dict[tuple[Any, ...], Record] = {}
    for record in timings:
        key = tuple(record[name] for name in ("operation", "process", "dtype", "rows", "n"))
        lines.setdefault(key, {**record, "ratios": {}})["ratios"] |= record.get("times_kernel", {})
    rows = [
        (
            "operation",
            "process",
            "dtype",
            "rows x N",
            "time",
            "GB/s",
            "limit",
            "share",
            "x eager",
            "x compile",
            "x unfused",
        )
    ]
    for (operation, process, dtype, count, n), line in lines.items():
        ratios, rates = line["ratios"], line.get("gb_per_s", {})
        spent = _duration(line["seconds"]["kernel"][0]) if "seconds" in line else "failed"
        speed = [f"{rates[who]:.3g}" if who in rates else "-" for who in ("kernel", "limit")]
        share = f"{ratios['limit']:.0%}" if "limit" in ratios else "-"
        factors = [f"{ratios[rival]:.3g}" if rival in ratios else "-" for rival in ("eager", "compile", "unfused")]
        rows.append((operation, process, dtype, f"{count:,} x {n:,}", spent, *speed, share, *factors))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def summary(report: Record) -> str:
    """A line on accuracy, one on the samplers, one on what failed."""
    lines = []
    for what in ("loss", "gradient") if report["accuracy"] else ():
        mine, plain = (max(record[who][what] for record in report["accuracy"]) for who in ("kernel", "plain"))
        lines.append(f"{what}: largest error {mine:.2g} of the terms that are summed; plain PyTorch {plain:.2g}")
    draws, differing = (sum(record[name] for record in report["tokens"]) for name in ("draws", "differing"))
    lines.append(f"samplers: {differing:,} of {draws:,} tokens differ from the CPU's for the same seeds")
    bad = [f"{step['name']} ({step['why']})" for step in report["steps"] if step["outcome"] == "failed"]
    return "\n".join([*lines, f"failed: {', '.join(bad)}" if bad else "nothing failed"])


def check(device: Cpu | Cuda, quick: bool, budget: float, out: Path) -> int:
    """Runs the plan in ``budget`` seconds; writes the report after each step, so that what is done is kept."""
    begin = time.monotonic()
    about = device.describe()
    report: Record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device.name,
        "quick": quick,
        "budget_minutes": budget / 60,
        "build": describe().splitlines(),
        "about": about,
        "clock": device.clock,
        "steps": [],
        **{kind: [] for kind in ("operators", "accuracy", "tokens", "timings")},
    }
    print(*report["build"], *(f"{name + ':':18}{value}" for name, value in about.items()), sep="\n", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    for step in plan(device, quick):
        print(f"{step.name}: ", end="", file=sys.stderr, flush=True)
        left = budget - (time.monotonic() - begin)
        result, records = run_step(step, min(step.share * budget, left))
        print(f"{result['outcome']}, {result['seconds']:.0f} s  {result['why']}".rstrip(), file=sys.stderr, flush=True)
        report["steps"].append(result)
        for record in records:
            report[record.pop("kind")].append(record)
        report["seconds"] = round(time.monotonic() - begin, 2)
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(out)
    print("", table(report["timings"]), "", summary(report), f"all of it: {out}", sep="\n")
    return 1 if any(step["outcome"] == "failed" for step in report["steps"]) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing failed, 1 if a step did, 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu rehearses (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the report (default: %(default)s)")
    parser.add_argument(
        "--budget", type=minutes, default=9.5, metavar="MINUTES", help="for all steps (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few tests and repeats, and no real torch.compile")
    options = parser.parse_args(arguments)
    device = DEVICES[options.device]
    if missing := device.missing():
        print(f"gpu-check: {missing}", file=sys.stderr)
        return 2
    return check(device, options.quick, 60 * options.budget, options.out)


def minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
