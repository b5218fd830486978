"""Threads of the commands, decided before torch is loaded: their number, and how long one that waits keeps its core.

torch's threads are OpenMP's. Between two operators they wait in a loop. That costs nothing while every thread has a
core, but where another process takes one, threads in the loop hold the cores that the thread with work to do needs.
GCC's runtime leaves the loop after 300,000 turns, which is several milliseconds. ``docs/performance.md`` has figures.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["cpu_quota", "set_defaults"]

# Turns of the loop, some 50 microseconds: longer than threads that all have a core wait for each other. On x86 a turn
# contains PAUSE (25 ns on an AMD EPYC of Zen 3); elsewhere the loop has nothing like it, and the number is an estimate.
_SPINS = 2_000 if platform.machine() in ("x86_64", "AMD64") else 50_000


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets OpenMP's environment variables for this process, unless it is too late or the user has set them.

    ``GOMP_SPINCOUNT`` bounds the time that a thread waits in a loop. It is set unless one of ``OMP_WAIT_POLICY``,
    ``GOMP_SPINCOUNT`` and ``KMP_*`` (Intel's and LLVM's runtime) is. ``OMP_NUM_THREADS`` becomes the CPU quota of the
    container, rounded down, if that is smaller than the number of CPUs that the process may run on.

    Args:
        environ: what to change. The runtime reads the process's own when torch is imported, and never again.
    """
    if "torch" in sys.modules:
        return
    if not any(name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") or name.startswith("KMP_") for name in environ):
        environ["GOMP_SPINCOUNT"] = str(_SPINS)
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in environ:
        threads = max(1, int(quota))
        if threads < len(os.sched_getaffinity(0)):
            environ["OMP_NUM_THREADS"] = str(threads)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the control groups of this process may use.

    Args:
        root: where the control groups are mounted.
        groups: the file that names those of the process, one a line: ``id:controllers:path``.

    Returns:
        The smallest quota of the groups and those above them, for example 1.5; None without one, or not on Linux.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        group = mount / path.lstrip("/")
        # in a container the path may be the host's, of which only the mount itself is visible
        for folder in (group, *group.parents):
            quota = _quota(folder, version=1 if controllers else 2)
            if quota is not None:
                quotas.append(quota)
            if folder == mount:
                break
    return min(quotas, default=None)


def _quota(folder: Path, version: int) -> float | None:
    """Quota of one control group: microseconds of CPU time over microseconds of time."""
    files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((folder / name).read_text() for name in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or no limit: "max"
        return None
