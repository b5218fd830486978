"""The rehearsal of the GPU check on the CPU, and that what fails is not passed over."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SANITIZERS = {"memcheck", "racecheck", "synccheck", "initcheck"}


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check"), importlib.import_module("gpu_steps")


def positive(values: Any) -> bool:
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)


def test_rehearsal(tmp_path: Path) -> None:
    out = tmp_path / "results" / "check.json"
    # one thread: on a busy machine torch's threads wait for each other
    run = check("--device", "cpu", "--quick", "--out", str(out), OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [path.name for path in out.parent.iterdir()] == ["check.json"]

    steps = {step["name"]: step for step in report["steps"]}
    assert {name for name, step in steps.items() if step["outcome"] == "skipped"} == SANITIZERS
    assert all(steps[name]["why"] == "needs a GPU" for name in SANITIZERS)
    done = steps.keys() - SANITIZERS
    assert {"operators", "operator tests", "accuracy", "tokens", "timings", "torch.compile", "other tests"} == done
    assert positive([steps[name]["seconds"] for name in done])
    assert "passed" in steps["operator tests"]["said"]
    assert all(f"{name}: {step['outcome']}" in run.stderr for name, step in steps.items())

    rivals: dict[tuple[str, str, str], set[str]] = {}
    for record in report["timings"]:
        assert record["failed"] == {}
        assert positive([record["bytes"], *record["gb_per_s"].values(), *record["times_kernel"].values()])
        for median, low, high in record["seconds"].values():
            assert positive([low])
            assert low <= median <= high
        rivals.setdefault((record["operation"], record["process"], record["dtype"]), set()).update(record["seconds"])
    for dtype in ("float32", "bfloat16"):
        assert rivals["tweedie sample", "absorbing", dtype] == {"kernel", "eager", "limit", "compile"}
        assert rivals["tweedie sample", "hybrid", dtype] == {"kernel", "eager", "limit"}
        assert rivals["linear tweedie sample", "hybrid", dtype] == {"kernel", "unfused", "limit"}
    lines = [line for line in run.stdout.splitlines() if " x 27 " in line]
    assert len(lines) == len(rivals)
    assert any(re.match(r"score entropy forward \+ backward +uniform ", line) for line in lines)

    assert {record["operation"] for record in report["operators"]} == {key[0] for key in rivals}
    assert positive([record["kernel"]["loss"] for record in report["accuracy"] if record["n"] > 1000])
    assert {record["sampler"] for record in report["tokens"]} == {"tweedie", "euler", "transition"}
    assert all(record["differing"] == 0 for record in report["tokens"])  # both are the CPU's
    assert run.stdout.splitlines()[-2] == "nothing failed"


def test_a_step_that_fails_is_named_and_stops_nothing(
    modules: tuple[ModuleType, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_check, _ = modules

    def python(name: str, code: str, share: float = 1.0) -> Any:
        return gpu_check.Step(name, share, lambda until: [sys.executable, "-c", code])

    out = tmp_path / "check.json"
    plan = [
        python("broken", "print('a reason'); raise SystemExit(3)"),
        python("hanging", "import time; print('on and on', flush=True); time.sleep(600)", share=0.1),
        python("wrong", """print('{"kind": "tokens", "draws": 5, "differing": 4, "problem": "4 differ"}'); exit(1)"""),
        python("sound", f"print(open({str(out)!r}).read().count('broken'))"),
    ]
    monkeypatch.setattr(gpu_check, "plan", lambda device, quick: plan)
    begin = time.monotonic()
    assert gpu_check.main(["--device", "cpu", "--budget", "0.25", "--out", str(out)]) == 1
    assert time.monotonic() - begin < 15
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(step["name"], step["outcome"], step["why"]) for step in report["steps"]] == [
        ("broken", "failed", "exit status 3; a reason"),
        ("hanging", "failed", "not done within 2 s; on and on"),
        ("wrong", "failed", "exit status 1; 4 differ"),
        ("sound", "ok", ""),
    ]
    assert report["steps"][3]["said"] == "1"  # the report was there before the last step
    assert report["tokens"] == [{"draws": 5, "differing": 4, "problem": "4 differ"}]
    printed = capsys.readouterr().out
    assert "failed: broken (exit status 3; a reason), hanging (not done" in printed
    assert "4 of 5 tokens differ" in printed


def test_steps_beyond_the_budget_are_skipped(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check, _ = modules
    monkeypatch.setattr(gpu_check, "plan", lambda device, quick: [gpu_check.Step("late", 1.0)])
    assert gpu_check.main(["--device", "cpu", "--budget", "0.01", "--out", str(tmp_path / "check.json")]) == 0
    (step,) = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))["steps"]
    assert (step["outcome"], step["why"]) == ("skipped", "no time left")


def test_other_bits_are_a_problem(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, gpu_steps = modules

    class Careless(gpu_steps.Cpu):  # type: ignore[misc,name-defined]
        def variants(self, run: Any) -> Any:
            return {"another stream": lambda: run() + 1, **super().variants(run)}

    monkeypatch.setitem(gpu_steps.DEVICES, "cpu", Careless())
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "operators", "--device", "cpu", "--until", "0"])
    assert gpu_steps.main() == 1
    record, stopped = capsys.readouterr().out.splitlines()
    assert json.loads(record)["problem"] == "other bits from another stream"
    assert stopped == gpu_steps.STOPPED


def test_the_sanitizer_is_looked_for_beside_nvcc(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check, gpu_steps = modules
    toolkit, path = tmp_path / "toolkit", tmp_path / "bin"
    for folder in (toolkit, path):
        folder.mkdir()
    monkeypatch.setenv("PATH", str(path))

    def sanitizers() -> list[Any]:
        return [step for step in gpu_check.plan(gpu_steps.DEVICES["cuda"], False) if step.name in SANITIZERS]

    assert {step.skip for step in sanitizers()} == {"compute-sanitizer is neither on PATH nor beside nvcc"}
    for name in ("nvcc", "compute-sanitizer"):
        (toolkit / name).touch(mode=0o755)
    (path / "nvcc").symlink_to(toolkit / "nvcc")
    for step in sanitizers():
        command = step.command(1e9)
        assert step.skip == ""
        assert command[:3] == [str(toolkit / "compute-sanitizer"), "--tool", step.name]
        assert command[-6:] == [str(BENCHMARKS / "gpu_steps.py"), "operators", "--device", "cuda", "--until", str(1e9)]
        assert bool(step.environment) == (step.name in ("memcheck", "initcheck"))


def test_no_gpu(tmp_path: Path) -> None:
    run = check("--out", str(tmp_path / "check.json"), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("gpu-check: no GPU that torch ")
    assert not any(tmp_path.iterdir())


def test_a_budget_is_a_number_of_minutes() -> None:
    run = check("--budget", "0")
    assert run.returncode == 2
    assert "--budget: expected a number of minutes above 0, got 0" in run.stderr
