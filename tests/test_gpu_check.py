"""The rehearsal of the GPU check on the CPU, and that what fails is not passed over."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SANITIZERS = {"memcheck", "racecheck", "synccheck", "initcheck"}


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu_build", "gpu_check", "gpu_devices", "gpu_profile", "gpu_steps")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in whose Pythons the packages cannot be imported that a GPU machine may lack."""
    absent = ["accelerate", "datasets", "gguf", "lm_eval", "matplotlib", "mauve", "omegaconf", "rich"]
    absent += ["pytest_benchmark", "pytest_timeout", "tensorboard", "xdist"]
    (tmp_path / "sitecustomize.py").write_text(f"""import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
""")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def positive(values: Any) -> bool:
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)


@pytest.mark.costly(
    "benchmarks", "sedd_ext", "csrc", "python/sedd/network.py", "python/sedd/diffusion", "python/sedd/hub"
)
def test_rehearsal(tmp_path: Path, bare: dict[str, str]) -> None:
    out = tmp_path / "results"
    # one thread: on a busy machine torch's threads wait for each other
    run = check("--device", "cpu", "--quick", "--budget", "60", OUT=str(out), OMP_NUM_THREADS="1", **bare)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))
    assert {path.name for path in out.iterdir()} == {"gpu-check.json", "gpu-check.txt", "gpu-check-logs"}
    assert report["versions"]["torch"] == torch.__version__
    assert (out / "gpu-check.txt").read_text(encoding="utf-8") in run.stdout

    steps = {step["name"]: step for step in report["steps"]}
    skipped = {*SANITIZERS, "triton epilogue"}
    assert {name for name, step in steps.items() if step["outcome"] == "skipped"} == skipped
    assert all(steps[name]["why"] == "needs a GPU" for name in skipped)
    done = steps.keys() - skipped
    measured = {"models", "timings", "compiled models", "torch.compile", "two GPUs"}
    assert {"about", "operators", "operator tests", "accuracy", "tokens"} | measured == done
    assert {steps[name]["outcome"] for name in done} == {"ok"}
    assert positive([steps[name]["seconds"] for name in done])
    assert "passed" in steps["operator tests"]["said"]
    assert steps["two GPUs"]["said"] == "not run: needs the package rich"  # see the test below
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
    contestants = {(record["program"], record["contestant"]) for record in report["models"]}
    who = ("kernel", "unfused", "released", "kernel, compiled", "released, compiled")
    assert contestants == set(itertools.product(("training step", "sampling"), who))
    assert positive([record["tokens_per_s"] for record in report["models"]])
    assert (out / "gpu-check.txt").read_text(encoding="utf-8").splitlines()[-1] == "nothing wrong was found"


def test_rehearsal_on_two_processes() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_processes.py"), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    said = run.stdout.splitlines()[-1]
    assert re.fullmatch(r"largest relative difference from one process:( [\w, ]+ \d\.\de-\d+,?){4}", said)


def test_two_gpus_are_not_to_be_had() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_processes.py")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0
    assert run.stdout == "not run: needs two GPUs, this machine has 0\n"


@pytest.mark.costly(
    "benchmarks", "sedd_ext", "csrc", "python/sedd/network.py", "python/sedd/diffusion", "python/sedd/hub"
)
def test_rehearsal_of_the_profile(tmp_path: Path, bare: dict[str, str]) -> None:
    run = check("--device", "cpu", "--quick", "--budget", "60", "--profile", OUT=str(tmp_path), **bare)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu-profile.json").read_text(encoding="utf-8"))
    outcomes = {step["name"]: step["outcome"] for step in report["steps"]}
    assert outcomes == {"about": "ok", "buffers": "ok", "counters": "skipped"}
    assert {record["buffer_bytes"] for record in report["buffers"]} == {1 << 12, 1 << 14}
    assert len([line for line in run.stdout.splitlines() if " x 27 " in line]) == len(report["buffers"]) == 12


def test_modules_without_optional_packages(bare: dict[str, str]) -> None:
    """They can be imported, or say which package they need."""
    code = """
import importlib, pathlib, sys
import pytest
tests = pathlib.Path(sys.argv[1])
sys.path[:0] = [str(tests), str(tests.parent / "benchmarks")]
for name in [*sorted(path.stem for path in tests.glob("test_*.py")), "gpu_steps", "gpu_profile"]:
    try:
        importlib.import_module(name)
        print(name)
    except pytest.skip.Exception as reason:
        print(f"{name}: {reason}")
"""
    command = [sys.executable, "-c", code, str(BENCHMARKS.parent / "tests")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | bare)
    assert run.returncode == 0, run.stderr
    imported = {line for line in run.stdout.splitlines() if ":" not in line}
    assert {"gpu_steps", "gpu_profile", *(path.stem for path in operator_tests())} <= imported
    assert "test_train: could not import 'rich'" in run.stdout


def operator_tests() -> list[Path]:
    tests = (BENCHMARKS.parent / "tests").glob("test_*.py")
    return sorted(
        path for path in tests if re.search(r"^(pytestmark = |@)pytest\.mark\.operators", path.read_text(), re.M)
    )


def test_all_tests_that_run_on_a_gpu_are_run(modules: SimpleNamespace) -> None:
    assert sorted(modules.gpu_check.OPERATOR_TESTS) == [f"tests/{path.name}" for path in operator_tests()]


@pytest.mark.parametrize("workers", [True, False])
def test_the_command_of_the_tests(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, workers: bool) -> None:
    monkeypatch.setattr(modules.gpu_check, "_has", lambda module: workers and module == "xdist")
    (step,) = (s for s in modules.gpu_check.Plans("cuda", False, False).check() if s.name == "operator tests")
    command = " ".join(step.command(0.0))
    assert "--backend cuda" in command
    assert ("-n 8" in command) == workers


def run_plan(modules: SimpleNamespace, plan: list[Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(modules.gpu_check.Plans, "check", lambda self: plan)
    status: int = modules.gpu_check.main(["--device", "cpu", *arguments])
    return status


def python(modules: SimpleNamespace, name: str, code: str, share: float = 1.0, **options: Any) -> Any:
    return modules.gpu_check.Step(name, share, lambda until: [sys.executable, "-c", code], **options)


def test_a_step_that_fails_is_named_and_stops_nothing(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu-check.json"
    plan = [
        python(modules, "broken", "print('a reason'); raise SystemExit(3)", required=True),
        python(modules, "hanging", "import time; print('on and on', flush=True); time.sleep(600)", share=0.1),
        python(
            modules,
            "wrong",
            """print('{"kind": "tokens", "draws": 5, "differing": 4, "problem": "4 differ"}'); exit(1)""",
            required=True,
        ),
        python(modules, "sound", f"print(open({str(out)!r}).read().count('broken'))"),
    ]
    begin = time.monotonic()
    assert run_plan(modules, plan, monkeypatch, "--budget", "0.25", "--out", str(tmp_path)) == 1
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
    assert (tmp_path / "gpu-check-logs" / "02-hanging.txt").read_text() == "on and on\n"
    printed = capsys.readouterr().out
    assert "NOT RIGHT: broken (exit status 3; a reason), wrong (exit status 1; 4 differ)\n" in printed
    assert "failed, which says nothing of the operators: hanging (not done" in printed
    assert "4 of 5 tokens differ" in printed


@pytest.mark.parametrize(
    ("code", "options", "status"),
    [
        ("exit(1)", {}, 0),
        ("exit(1)", {"required": True}, 1),
        ("exit(0)", {"required": True}, 0),
        ("exit('========= ERROR SUMMARY: 2 errors')", {"wrong": "FINDINGS"}, 1),
        ("exit('========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)')", {"wrong": "FINDINGS"}, 1),
        ("exit('========= Invalid __global__ read of size 4 bytes')", {"wrong": "FINDINGS"}, 1),
        ("exit('========= Error: Target application terminated early')", {"wrong": "FINDINGS"}, 0),
    ],
)
def test_the_exit_status_is_about_the_operators(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, options: Any, status: int
) -> None:
    """A measurement may fail, and a sanitizer that does not work here; not a test, nor what a sanitizer finds."""
    options = {name: modules.gpu_check.FINDINGS if name == "wrong" else value for name, value in options.items()}
    plan = [python(modules, "a step", code, **options)]
    assert run_plan(modules, plan, monkeypatch, "--out", str(tmp_path)) == status


def test_steps_beyond_the_budget_are_skipped(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where they are required, the operators are not known to be right."""
    for required in (False, True):
        plan = [modules.gpu_check.Step("late", 1.0, required=required)]
        assert run_plan(modules, plan, monkeypatch, "--budget", "0.01", "--out", str(tmp_path)) == required
        (step,) = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))["steps"]
        assert (step["outcome"], step["why"]) == ("skipped", "no time left")


def test_nothing_follows_a_build_that_failed(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [python(modules, "build", "exit('no compiler')", required=True, first=True), python(modules, "about", "")]
    assert run_plan(modules, plan, monkeypatch, "--out", str(tmp_path)) == 1
    (step,) = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))["steps"]
    assert step["why"] == "exit status 1; no compiler"


def test_other_bits_are_a_problem(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_steps = modules.gpu_steps

    class Careless(modules.gpu_devices.Cpu):  # type: ignore[misc,name-defined]
        def variants(self, run: Any) -> Any:
            return {"another stream": lambda: run() + 1, **super().variants(run)}

    monkeypatch.setitem(gpu_steps.DEVICES, "cpu", Careless())
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "operators", "--device", "cpu", "--until", "0"])
    assert gpu_steps.main() == 1
    record, stopped = capsys.readouterr().out.splitlines()
    assert json.loads(record)["problem"] == "other bits from another stream"
    assert stopped == gpu_steps.STOPPED


def test_the_sanitizer_is_looked_for_beside_nvcc(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, path = tmp_path / "toolkit", tmp_path / "bin"
    for folder in (toolkit, path):
        folder.mkdir()
    monkeypatch.setenv("PATH", str(path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def sanitizers() -> list[Any]:
        return [step for step in modules.gpu_check.Plans("cuda", False, False).check() if step.name in SANITIZERS]

    assert {step.skip for step in sanitizers()} == {"compute-sanitizer is neither on PATH nor beside nvcc"}
    for name in ("nvcc", "compute-sanitizer"):
        (toolkit / name).touch(mode=0o755)
    (path / "nvcc").symlink_to(toolkit / "nvcc")
    for step in sanitizers():
        command = step.command(1e9)
        assert step.skip == ""
        assert command[:3] == [str(toolkit / "compute-sanitizer"), "--tool", step.name]
        assert command[3:5] == ["--kernel-name", "kernel_substring=sedd"]
        assert command[-6:] == [str(BENCHMARKS / "gpu_steps.py"), "launches", "--device", "cuda", "--until", str(1e9)]
        assert bool(step.environment) == (step.name in ("memcheck", "initcheck"))


@pytest.mark.parametrize("there", [True, False])
def test_the_triton_epilogue_is_timed_where_it_runs(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    timed, entered = {}, []

    def race(device: Any, operation: Any, case: Any, contestants: Any) -> None:
        timed[operation.name] = operation, contestants

    @contextmanager
    def epilogue() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    monkeypatch.setattr(modules.gpu_steps, "_race", race)
    monkeypatch.setattr(modules.gpu_steps, "find_spec", lambda name: there or None)
    monkeypatch.setattr(modules.gpu_check, "_has", lambda module: there)
    monkeypatch.setitem(sys.modules, "sedd_ext.triton_head", SimpleNamespace(epilogue=epilogue))
    list(modules.gpu_steps.timings(SimpleNamespace(name="cuda", shapes=((4, 27),)), False))
    with_it = [name for name, (_, contestants) in timed.items() if "triton" in contestants]
    assert with_it == (["linear score entropy forward + backward"] if there else [])
    for name in with_it:
        case = modules.gpu_steps.Case("absorbing", 27, 4, "float32", "kernel")
        operation = timed[name][0]
        assert torch.equal(operation.contestant("triton", case)(), operation.contestant("kernel", case)())
        assert entered == ["in", "out"]
    (step,) = (s for s in modules.gpu_check.Plans("cuda", False, False).check() if s.name == "triton epilogue")
    assert step.skip == ("" if there else "needs the package triton")
    assert "tests/test_triton_head.py" in step.command(0.0)
    assert not step.required


def test_no_gpu(tmp_path: Path) -> None:
    run = check("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("gpu-check: no GPU that torch ")
    assert json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))["about"][0]["problem"]


def test_a_budget_is_a_number_of_minutes() -> None:
    run = check("--budget", "0")
    assert run.returncode == 2
    assert "--budget: expected a number of minutes above 0, got 0" in run.stderr
