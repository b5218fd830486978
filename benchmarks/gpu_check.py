"""The day there is a GPU: build, tests, compute-sanitizer, timings and accuracy in ten minutes, without network.

make gpu-check-offline OUT=results    # on the GPU machine, with the Python that is there: builds, then checks
make gpu-profile OUT=results          # builds, then counts what the memory and the processors do, by ncu
python benchmarks/gpu_check.py --device cpu --quick   # a rehearsal, on any machine

Every step is a process of its own with a time limit: one that fails or hangs costs the later ones nothing but time. The
report is written anew after each, and what a step prints goes to a file at once, so that nothing is lost where the time
runs out. The exit status is about the operators alone: a step that only measures may fail, for want of a package too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_build
from gpu_tables import Record, summary, tables

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TESTED = (
    *("score_entropy", "mean_prediction", "generalized_masked", "reverse", "reverse_mean", "unmask", "transition"),
    *("linear_score_entropy", "linear_mean_prediction", "linear_generalized_masked"),
    *("linear_reverse", "linear_reverse_mean", "linear_unmask", "split", "bad_input", "operators"),
)
OPERATOR_TESTS = [f"tests/test_{name}.py" for name in (*TESTED, "cuda_kernels")]
KINDS = ("about", "operators", "accuracy", "tokens", "timings", "models", "launches", "buffers", "counters")
DEVICES = ("cpu", "cuda")
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # every tensor an allocation of its own, whose ends memcheck sees
FINDINGS = "SUMMARY: [1-9]|========= (Invalid|Uninitialized|Barrier error|Error: Race)"  # of compute-sanitizer
STOPPED = "stopped here: no time for the rest"


@dataclass(frozen=True)
class Step:
    """A command with a time limit, or the reason why there is none.

    Without a ``required`` step that ends well the operators are not known to be right; nothing follows one that is
    ``first``. Where another step fails, they are wrong if what it printed matches ``wrong``.
    """

    name: str
    share: float  # of the budget, at most
    command: Callable[[float], Sequence[str]] = field(default=lambda until: ())  # of the moment to stop at by itself
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    required: bool = False
    first: bool = False
    wrong: str = ""


class Plans:
    """What is run, most telling first: what the budget does not reach is skipped."""

    def __init__(self, device: str, quick: bool, build: bool) -> None:
        self.device, self.quick, self.build = device, quick, build

    def check(self) -> list[Step]:
        """Are the operators right, and how fast are they?"""
        return [
            *self._beginning(),
            Step("operators", 0.08, self._body("operators"), required=True),
            Step("operator tests", 0.35, self._tests(), self._tests_environment(), required=True),
            Step("accuracy", 0.06, self._body("accuracy"), required=True),
            Step("tokens", 0.08, self._body("tokens"), required=True),
            Step("two GPUs", 0.12, self._processes(), wrong="largest relative difference"),
            Step("models", 0.12, self._body("models")),
            Step("timings", 0.18, self._body("timings")),
            self._epilogue(),
            self._sanitizer("memcheck", 0.1),
            self._sanitizer("racecheck", 0.08),
            Step("compiled models", 0.12, self._body("compiled_models")),
            Step("torch.compile", 0.12, self._body("compile_timings")),
            self._sanitizer("synccheck", 0.06),
            self._sanitizer("initcheck", 0.06),
        ]

    def profile(self) -> list[Step]:
        """What do the kernels do with the machine?"""
        command = [sys.executable, str(HERE / "gpu_profile.py"), "--device", self.device]
        why = "" if beside_nvcc("ncu") else "ncu is neither on PATH nor beside nvcc"
        why = "needs a GPU" if self.device == "cpu" else why
        return [
            *self._beginning(),
            Step("buffers", 0.2, self._body("buffers")),
            Step("counters", 0.5, lambda until: [*command, "--until", str(until)], skip=why),
        ]

    def _beginning(self) -> list[Step]:
        command = [sys.executable, str(HERE / "gpu_build.py"), "--device", self.device]
        build = Step("build", 0.7, lambda until: command, required=True, first=True)
        about = Step("about", 0.15, self._body("about"), required=True, first=True)
        return [build, about] if self.build else [about]

    def _tests(self) -> Callable[[float], Sequence[str]]:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=40", "--backend", self.device]
        command += ["-n", "8"] if _has("xdist") and not self.quick else []
        # marked: the other tests of these files do not run on a GPU
        chosen = ["tests/test_transition.py", "-k", "empty"] if self.quick else OPERATOR_TESTS
        return lambda until: [*command, "-m", "operators", *chosen]

    def _tests_environment(self) -> dict[str, str]:
        return {} if self.quick else {"OMP_NUM_THREADS": "2"}

    def _body(self, name: str, *prefix: str) -> Callable[[float], Sequence[str]]:
        command = [*prefix, sys.executable, str(HERE / "gpu_steps.py"), name, "--device", self.device]
        return lambda until: [*command, "--until", str(until), *(["--quick"] if self.quick else [])]

    def _processes(self) -> Callable[[float], Sequence[str]]:
        return lambda until: [sys.executable, str(HERE / "gpu_processes.py"), "--device", self.device]

    def _epilogue(self) -> Step:
        """The tests of a prototype, which decide nothing about the operators."""
        why = "needs a GPU" if self.device == "cpu" else "" if _has("triton") else "needs the package triton"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-k", "not machine", "tests/test_triton_head.py"]
        return Step("triton epilogue", 0.08, lambda until: command, skip=why)

    def _sanitizer(self, tool: str, share: float) -> Step:
        found = beside_nvcc("compute-sanitizer") if self.device == "cuda" else None
        if not found:
            why = "compute-sanitizer is neither on PATH nor beside nvcc" if self.device == "cuda" else "needs a GPU"
            return Step(tool, share, skip=why)
        # our kernels alone: torch's, of which there are many more, would take most of the time
        prefix = [found, "--tool", tool, "--kernel-name", "kernel_substring=sedd", "--error-exitcode", "1"]
        prefix += ["--report-api-errors", "no", "--launch-timeout", "0"]
        uncached = {UNCACHED: "1"} if tool in ("memcheck", "initcheck") else {}
        return Step(tool, share, self._body("launches", *prefix), uncached, wrong=FINDINGS)


def _has(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def beside_nvcc(program: str) -> str | None:
    """Where it lies: on PATH, in CUDA_HOME, or beside the nvcc that is on PATH."""
    nvcc = shutil.which("nvcc")
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*homes, *([Path(nvcc).resolve().parent] if nvcc else [])]
    found = shutil.which(program)
    return found if found or not folders else shutil.which(program, path=os.pathsep.join(map(str, folders)))


def run_step(step: Step, limit: float, log: Path) -> tuple[Record, list[Record]]:
    """Runs a step, for ``limit`` seconds at most; what became of it, and the records that its body printed."""
    result: Record = {"name": step.name, "outcome": "skipped", "why": step.skip, "seconds": 0.0, "decides": False}
    if step.skip or limit < 1:
        return result | {"why": step.skip or "no time left", "decides": step.required and not step.skip}, []
    begin = time.monotonic()
    # the clone's modules, whether they are installed or not
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w", encoding="utf-8", errors="replace") as output:
        # not a pipe, which a process that outlives the step would hold open; a session, so that its children go with it
        process = subprocess.Popen(
            step.command(time.time() + 0.7 * limit),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=gpu_build.tools({**os.environ, "PYTHONPATH": path, **step.environment}),
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
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    records = [json.loads(line) for line in said if re.fullmatch(r'\{"kind": .*\}', line)]  # a last one may be cut off
    said = [line for line in said if not line.startswith('{"kind": ')]
    problems = [record["problem"] for record in records if "problem" in record]
    result |= {"outcome": "failed" if why else "ok", "why": why, "seconds": round(time.monotonic() - begin, 2)}
    if why:
        result |= {"why": "; ".join([why, *(problems or said[-1:])[:1]]), "output": said[-60:]}
        result["decides"] = step.required or bool(step.wrong and re.search(step.wrong, "\n".join(said)))
    elif STOPPED in said:
        result["why"] = STOPPED
    return result | {"said": said[-1] if said else ""}, records


def check(name: str, steps: Sequence[Step], budget: float, out: Path, heading: Record) -> int:
    """Runs the steps in ``budget`` seconds; writes the report after each one.

    Returns 0 if the operators are right as far as the steps can tell, 1 if not, 2 if there is nothing to check.
    """
    begin = time.monotonic()
    report: Record = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **heading, "budget_minutes": budget / 60}
    report |= {"versions": gpu_build.versions(), "steps": [], **{kind: [] for kind in KINDS}}
    print(*(f"{what + ':':27}{version}" for what, version in report["versions"].items()), sep="\n", flush=True)
    logs = out / f"{name}-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        print(f"{step.name}: ", end="", file=sys.stderr, flush=True)
        left = budget - (time.monotonic() - begin)
        log = logs / f"{number:02}-{step.name.replace(' ', '-')}.txt"
        result, records = run_step(step, min(step.share * budget, left), log)
        print(f"{result['outcome']}, {result['seconds']:.0f} s  {result['why']}".rstrip(), file=sys.stderr, flush=True)
        report["steps"].append(result)
        for record in records:
            report[record.pop("kind")].append(record)
        report["seconds"] = round(time.monotonic() - begin, 2)
        _write(out / f"{name}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        _write(out / f"{name}.txt", text(report))
        if step.first and result["outcome"] == "failed":
            break
    print("", text(report), sep="\n")
    print(f"all of it: {out / name}.json, {out / name}.txt, {logs}")
    problem = next((record["problem"] for record in report["about"] if "problem" in record), "")
    if problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    return 1 if any(step["decides"] for step in report["steps"]) else 0


def text(report: Record) -> str:
    """The report as somebody reads it."""
    lines = [f"{what + ':':27}{value}" for about in report["about"] for what, value in about.items()]
    lines += [
        f"{step['name'] + ':':27}{step['outcome']}, {step['seconds']:.0f} s  {step['why']}" for step in report["steps"]
    ]
    return "\n\n".join(part for part in ("\n".join(lines), tables(report), summary(report)) if part) + "\n"


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """See :func:`check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu rehearses (default: cuda)")
    parser.add_argument("--profile", action="store_true", help="ncu and tile sizes in place of the check")
    parser.add_argument("--build", action="store_true", help="build the kernels first, within the budget")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks/results"),
        metavar="FOLDER",
        help="for the report (default: what OUT names, or benchmarks/results)",
    )
    parser.add_argument(
        "--budget", type=minutes, default=9.5, metavar="MINUTES", help="for all steps (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few tests and repeats, and no real torch.compile")
    options = parser.parse_args(arguments)
    plans = Plans(options.device, options.quick, options.build)
    name, steps = ("gpu-profile", plans.profile()) if options.profile else ("gpu-check", plans.check())
    heading = {"device": options.device, "quick": options.quick}
    return check(name, steps, 60 * options.budget, options.out.resolve(), heading)


def minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
