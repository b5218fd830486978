"""The build of gpu_check.py --build, with programs that only write down how they were called; and ncu's counters."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """For a project that is nothing but a pyproject.toml, on a machine without a GPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_build")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SEDD_CUDA_ARCHS", raising=False)
    needs = (BENCHMARKS.parent / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(needs, encoding="utf-8")
    return module


@pytest.fixture
def calls(gpu_build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that were run, and what of their environment matters; pip fails."""
    made: list[tuple[list[str], dict[str, str]]] = []

    class Done:
        def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
            made.append((command, {name: value for name, value in env.items() if name.startswith(("SEDD", "PATH"))}))
            self.returncode = "pip" in command

    monkeypatch.setattr(gpu_build.subprocess, "run", Done)
    monkeypatch.setattr(gpu_build.shutil, "which", lambda program, path=None: f"/there/{Path(program).name}")
    return made


def test_pip_downloads_nothing_and_cmake_takes_over_where_it_fails(
    gpu_build: ModuleType,
    calls: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gpu_build, "pip_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_build.main([]) == 0
    (pip, environment), (configure, _), (build, _) = calls
    assert {"install", "--no-build-isolation", "--no-index", "--no-deps", "-e"} < set(pip)
    assert (environment["SEDD_CUDA"], environment["SEDD_CUDA_ARCHS"]) == ("on", "90")
    assert environment["PATH"].startswith(gpu_build.sysconfig.get_path("scripts") + os.pathsep)
    assert {"-DSEDD_CUDA=on", "-DSEDD_CUDA_ARCHS=90", f"-DPython_EXECUTABLE={sys.executable}"} < set(configure)
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path / 'sedd_ext'}" in configure
    assert build[:2] == ["/there/cmake", "--build"]
    said = capsys.readouterr().out
    assert "not by pip: " in said
    assert said.endswith("built in place, by CMake\n")


@pytest.mark.parametrize(("version", "tried"), [("70.2.0", False), ("77.0.0", True), ("84.1", True)])
def test_an_old_setuptools_is_not_tried(
    gpu_build: ModuleType,
    calls: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    tried: bool,
) -> None:
    monkeypatch.setattr(gpu_build.importlib.metadata, "version", lambda package: version)
    assert gpu_build.main(["--device", "cpu"]) == 0
    assert any("pip" in command for command, _ in calls) == tried
    assert all(environment["SEDD_CUDA"] == "off" for _, environment in calls)


def test_what_the_user_wants_to_build_for(gpu_build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEDD_CUDA_ARCHS", "80;90a")
    assert gpu_build.settings("cuda") == {"SEDD_CUDA": "on", "SEDD_CUDA_ARCHS": "80;90a"}


def test_a_missing_tool_is_named(
    gpu_build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_build, "pip_problem", lambda: "pip is not installed")
    monkeypatch.setattr(gpu_build, "tools", lambda environment: {**environment, "PATH": "/nowhere"})
    assert gpu_build.main(["--device", "cpu"]) == 1
    assert "not built: cmake is neither on PATH nor beside " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- ncu

# As ncu --csv --page raw writes it: what it has to say, names, units, a launch a line.
COUNTED = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Block Size","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","lts__t_sector_hit_rate.pct","sm__inst_issued.avg.pct_of_peak_sustained_active"
"","","","","%","ns","%","%"
"0","12","void sedd::<unnamed>::sums_kernel<(sedd::Process)0, float>(sedd::P, int)","256","90","3,000","10","40"
"1","12","void sedd::<unnamed>::sums_kernel<(sedd::Process)0, float>(sedd::P, int)","256","50","1,000","30","60"
"2","12","sedd::(anonymous namespace)::sample_kernel(sedd::Params)","128","5","9000","","2.5"
==PROF== Disconnected
""".replace("\\\n", "")


def test_counters_of_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A program of that name writes the file that it was told to, after it has run what it was given."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_profile = importlib.import_module("gpu_profile")
    (tmp_path / "counted.csv").write_text(COUNTED, encoding="utf-8")
    ncu = tmp_path / "ncu"
    ncu.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do echo "$1"; shift; done\ncp {tmp_path / "counted.csv"} "$2"\n'
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py"])
    assert gpu_profile.main() == 0
    lines = capfd.readouterr().out.splitlines()
    assert "regex:sedd::" in lines
    sample, sums = (json.loads(line) for line in lines if line.startswith("{"))
    assert sample == {
        **{"kind": "counters", "kernel": "sample_kernel", "launches": 1, "seconds": 9e-6},
        **{"dram": 5.0, "issue": 2.5},
    }
    assert sums == pytest.approx(
        {
            **{"kind": "counters", "kernel": "sums_kernel<(Process)0, float>", "launches": 2, "seconds": 4e-6},
            **{"dram": 80.0, "issue": 45.0, "l2_hits": 15.0},
        }
    )


def test_ncu_without_counters_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where the driver lets only administrators count."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_profile = importlib.import_module("gpu_profile")
    ncu = tmp_path / "ncu"
    refusal = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    ncu.write_text(f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\necho "{refusal}" > "$2"\nexit 1\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py"])
    assert gpu_profile.main() == 1
    assert capfd.readouterr().out.splitlines() == [refusal, "ncu counted nothing (exit status 1)"]
