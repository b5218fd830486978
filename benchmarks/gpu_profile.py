"""Counts by NVIDIA's ncu what the kernels do with memory and processors: a step of gpu_check.py --profile.

Prints a JSON record for each kernel: the share of the memory's bandwidth, of the issue slots, and of the L2 cache's
sectors that were hits, as means over its launches weighted by their time. ncu locks the clocks and empties the caches.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpu_check import HERE, beside_nvcc
from gpu_tables import Record

TIME = "gpu__time_duration.sum"
METRICS = {
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "l2_hits": "lts__t_sector_hit_rate.pct",
}


def command(ncu: str, log: Path, device: str, until: float) -> list[str]:
    """Our kernels alone, of everything that the body ``counted`` runs."""
    options = ["--metrics", ",".join([TIME, *METRICS.values()]), "--csv", "--page", "raw", "--print-units", "base"]
    options += ["--kernel-name-base", "demangled", "--kernel-name", "regex:sedd::", "--log-file", str(log)]
    steps = str(HERE / "gpu_steps.py")
    return [ncu, *options, sys.executable, steps, "counted", "--device", device, "--until", str(until)]


def launches(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of ncu's raw page: a line of names, a line of units, then a line a launch; "==" begins what it says."""
    table = csv.DictReader(line for line in lines if line.strip() and not line.startswith("=="))
    yield from (row for row in table if row.get("ID"))  # the line of units has none


def counters(rows: Iterable[dict[str, str]]) -> Iterator[Record]:
    """A record for each kernel, the one with the most time first."""
    seconds: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = short_name(row["Kernel Name"])
        seconds[name].append(number(row[TIME]) / 1e9)
        for short, metric in METRICS.items():
            if row.get(metric):
                shares[name][short].append(seconds[name][-1] * number(row[metric]))
    for name in sorted(seconds, key=lambda kernel: -sum(seconds[kernel])):
        total = sum(seconds[name])
        means = {short: sum(values) / total for short, values in shares[name].items()}
        yield {"kind": "counters", "kernel": name, "launches": len(seconds[name]), "seconds": total, **means}


def number(text: str) -> float:
    """ncu may write thousands apart."""
    return float(text.replace(",", ""))


def short_name(kernel: str) -> str:
    """Without namespaces and arguments: sums_kernel<(Process)0, float>."""
    name = re.sub(r"(\w+|<unnamed>|\(anonymous namespace\))::", "", kernel.removeprefix("void "))
    return re.sub(r"(?<=>)\(.*$|^(\w+)\(.*$", r"\1", name)


def main() -> int:
    """Returns 1 if ncu counted nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--until", type=float, default=float("inf"), metavar="TIME", help="to stop at, as time.time()")
    options = parser.parse_args()
    ncu = beside_nvcc("ncu")
    if ncu is None:
        print("ncu is neither on PATH nor beside nvcc")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        status = subprocess.run(command(ncu, log, options.device, options.until)).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    found = list(counters(launches(lines)))
    for record in found:
        print(json.dumps(record))
    if not found:
        print(*lines[-5:], f"ncu counted nothing (exit status {status})", sep="\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
