"""What the commands set for torch before it is loaded, and that the kernels' loops go with torch's threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sedd.threads import cpu_quota
from sedd_ext import Absorbing, Tweedie, Uniform, reverse_sample, sample_transition, score_entropy_loss

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GCC's OpenMP, /proc and control groups")
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


def after_defaults(code: str = "", **environment: str) -> dict[str, str]:
    """The variables that `set_defaults` adds to a process of this environment, without torch."""
    script = (
        "import os, sys\nimport sedd.threads\nsedd.threads.cpu_quota = lambda: None\n"
        f"{code}\nbefore = dict(os.environ)\nsedd.threads.set_defaults()\n"
        "assert all(os.environ[name] == value for name, value in before.items())\n"
        "print(*(f'{name}={value}' for name, value in os.environ.items() if name not in before), sep='\\n')"
    )
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, env=PLAIN | environment, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in printed.split())


@linux_only
def test_command_bounds_the_spin_of_torch() -> None:
    """As torch's OpenMP itself says what it has read, loaded where the command would load torch."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    if not loaded:
        pytest.skip("this torch does not use GCC's OpenMP")
    script = (
        "import ctypes, sys, types\nfrom sedd.__main__ import main\n"
        f"sys.modules['sedd.cli'] = types.SimpleNamespace(main=lambda: ctypes.CDLL({loaded.pop()!r}) and 0)\nmain()"
    )
    environment = PLAIN | {"OMP_DISPLAY_ENV": "verbose"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    spins = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    assert spins is not None, run.stderr
    assert spins[1] == after_defaults()["GOMP_SPINCOUNT"]
    assert 0 < int(spins[1]) < 300_000


@pytest.mark.parametrize(
    "chosen",
    [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}],
    ids=lambda chosen: next(iter(chosen)),
)
def test_user_decides_how_threads_wait(chosen: dict[str, str]) -> None:
    assert after_defaults(**chosen).keys() == {"THP_MEM_ALLOC_ENABLE"}


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@linux_only
@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this system has no huge pages")
def test_large_tensors_are_in_huge_pages() -> None:
    """As the system counts them, with what the command sets; the user's choice stays."""
    script = (
        "import re, torch\nx = torch.ones(1 << 24)\n"
        "print(sum(map(int, re.findall(r'AnonHugePages: *(\\d+)', open('/proc/self/smaps').read()))))"
    )
    command = [sys.executable, "-c", script]
    environment = PLAIN | after_defaults()
    pages = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(pages) > 32 << 10  # of 64 MiB
    assert "THP_MEM_ALLOC_ENABLE" not in after_defaults(THP_MEM_ALLOC_ENABLE="0")


def test_nothing_is_set_once_torch_is_loaded() -> None:
    assert after_defaults("sys.modules['torch'] = sys") == {}


@linux_only
@pytest.mark.parametrize(
    ("quota", "cpus", "threads"), [(0.5, 64, "1"), (3.9, 64, "3"), (4.0, 4, None), (64.0, 2, None), (None, 64, None)]
)
def test_threads_obey_the_quota(quota: float | None, cpus: int, threads: str | None) -> None:
    code = f"sedd.threads.cpu_quota = lambda: {quota}\nos.sched_getaffinity = lambda pid: range({cpus})"
    assert after_defaults(code).get("OMP_NUM_THREADS") == threads
    assert "OMP_NUM_THREADS" not in after_defaults(code, OMP_NUM_THREADS="5")


V1 = {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2.0),
        ("0::/docker/of/the/host", {"cpu.max": "25000 50000"}, 0.5),
        ("5:memory:/m\n3:cpu,cpuacct:/c\n0::/", {f"cpu/c/{name}": value for name, value in V1.items()}, 0.5),
        ("3:cpu:/docker/of/the/host", {f"cpu/{name}": value for name, value in V1.items()}, 0.5),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/\n2:cpuacct:/", {f"cpu/{name}": value for name, value in V1.items()}, None),
        ("0::/", {}, None),
    ],
)
def test_quota_of_control_groups(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    own.write_text(f"{groups}\n")
    assert cpu_quota(root, own) == quota
    assert cpu_quota(root, tmp_path / "not Linux") is None


@linux_only
def test_threads_of_torch_live_on(threads: Callable[[int], None]) -> None:
    """A loop with less work than threads must not end those that torch's next operator needs."""
    threads(8)
    numbers, process = torch.zeros(1 << 20), Absorbing(1000)
    tokens = torch.zeros(1100, dtype=torch.int64)  # three pieces of work

    def living() -> set[str]:
        numbers.add_(1)
        return set(os.listdir("/proc/self/task"))

    before = living()
    sample_transition(tokens, 1.0, process)
    assert living() <= before


@pytest.mark.parametrize(("rows", "n"), [(1, 40_000), (2, 40_000), (7, 20_000), (1500, 300), (2999, 27)])
def test_same_bits_for_any_number_of_threads(rows: int, n: int, threads: Callable[[int], None]) -> None:
    """Every row is computed, whichever thread takes it and however rows are joined into pieces."""
    process = Uniform(n)
    generator = torch.Generator().manual_seed(0)
    log_score = torch.randn(rows, n, generator=generator, requires_grad=True)
    x_t, x_0 = torch.randint(n, (2, rows), generator=generator)

    def results() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        loss = score_entropy_loss(log_score, x_t, x_0, 1.0, process)
        (gradient,) = torch.autograd.grad(loss.sum(), log_score)
        drawn = reverse_sample(log_score.detach(), x_t, Tweedie(1.0), process, generator=generator)
        return [loss.detach(), gradient, drawn, sample_transition(x_0, 1.0, process, generator=generator)]

    threads(1)
    alone = results()
    for count in (2, 3, 8):
        threads(count)
        assert all(map(torch.equal, results(), alone)), count
