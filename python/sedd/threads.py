"""Settings of the commands for torch on a CPU, set before torch is imported: threads, their spin time, large pages.

torch uses OpenMP threads, which spin (wait in a loop) between two operators. This costs nothing if each thread has its
own core. If other processes use some of the cores, spinning threads occupy cores that working threads need. GCC's
runtime spins for 300,000 iterations, which takes several milliseconds. The first write to new memory costs a page
fault for each page of 4 KiB, unless the system is asked for huge pages. ``docs/performance.md`` has measurements.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["cpu_quota", "set_defaults"]

# Iterations of the loop, about 50 microseconds: longer than threads with their own cores wait for each other. On x86 an
# iteration contains PAUSE (25 ns on an AMD EPYC of Zen 3); on other CPUs it does not, and the number is an estimate.
_SPINS = 2_000 if platform.machine() in ("x86_64", "AMD64") else 50_000


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets environment variables of this process that torch reads, unless torch is imported or the user has set them.

    ``GOMP_SPINCOUNT`` limits the spin time of a waiting thread. It is set unless ``OMP_WAIT_POLICY``,
    ``GOMP_SPINCOUNT`` or a ``KMP_*`` variable (Intel's and LLVM's runtime) is set. ``OMP_NUM_THREADS`` is set to the
    CPU quota of the container, rounded down, if that is smaller than the number of CPUs available to the process.
    ``THP_MEM_ALLOC_ENABLE`` lets torch ask for huge pages for tensors of 2 MB or more.

    Args:
        environ: the environment to change. The runtime reads the environment of the process once, when torch is
            imported.
    """
    if "torch" in sys.modules:
        return
    if not any(name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") or name.startswith("KMP_") for name in environ):
        environ["GOMP_SPINCOUNT"] = str(_SPINS)
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in environ:
        threads = max(1, int(quota))
        if threads < len(os.sched_getaffinity(0)):
            environ["OMP_NUM_THREADS"] = str(threads)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPU quota of the control groups of this process, in CPUs.

    Args:
        root: mount point of the control groups.
        groups: file with the control groups of the process, one per line: ``id:controllers:path``.

    Returns:
        The smallest quota of the groups and their parents, for example 1.5; None without a quota or outside Linux.
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
        # in a container the path may be that of the host, of which only the mount point is visible
        for folder in (group, *group.parents):
            quota = _quota(folder, version=1 if controllers else 2)
            if quota is not None:
                quotas.append(quota)
            if folder == mount:
                break
    return min(quotas, default=None)


def _quota(folder: Path, version: int) -> float | None:
    """Quota of one control group: microseconds of CPU time divided by microseconds of wall time."""
    files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((folder / name).read_text() for name in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or no limit: "max"
        return None
