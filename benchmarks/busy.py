"""Training and operators on an idle machine, and beside a process that keeps one CPU busy. Linux; needs psutil.

    python benchmarks/busy.py                                           # all settings, some four minutes
    python benchmarks/busy.py --settings "sedd" "one thread" --rounds 1

There is one process for each setting of OpenMP. All load the model first; then they are timed in turns. A turn in which
other processes used more than a tenth of a CPU is thrown away. Prints a table in Markdown for docs/performance.md:
medians, and the number of turns behind each.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]  # accelerate brings it

SETTINGS = {
    "GCC's default: 300,000 spins": {"GOMP_SPINCOUNT": "300000"},
    "50,000 spins": {"GOMP_SPINCOUNT": "50000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "sedd": {},  # what the commands set
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WORK = {
    "training, tiny preset, tokens/s": ("training", 8 * 128),
    "loss 64 x 28, calls/s": ("small loss", 1),
    "loss 1,024 x 50,258, calls/s": ("large loss", 1),
    "noising 8 x 1,024 tokens, calls/s": ("noising", 1),
}
"""What is timed, and how many units a call counts for."""
FOREIGN = 0.1  # CPUs


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="SETTING")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK, metavar="WORK")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a turn (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve()
        return
    workers = {name: start(SETTINGS[name]) for name in options.settings}
    for worker in workers.values():
        answer(worker)  # "ready"
    speeds: dict[tuple[str, str, bool], list[float]] = collections.defaultdict(list)
    try:
        for _ in range(options.rounds):
            for busy in (False, True):
                neighbour = start_neighbour() if busy else None
                try:
                    for work in options.work:
                        for name, worker in workers.items():
                            speed, foreign = timed(worker, neighbour, work, options.seconds)
                            where = "busy" if busy else "idle"
                            print(f"{name}; {work}; {where}; {speed:,.0f}; others {foreign:.2f}", file=sys.stderr)
                            if foreign < FOREIGN:
                                speeds[name, work, busy].append(speed)
                finally:
                    if neighbour is not None:
                        neighbour.kill()
                        neighbour.wait()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
        print(table(speeds, options.settings, options.work))


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process that waits for what to time, under this setting and no other."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.Popen(
        [sys.executable, __file__, "--child"],
        env=plain | environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
    )


def start_neighbour() -> subprocess.Popen[bytes]:
    """A process that keeps a CPU busy while this one lives: in another session, since Linux shares CPUs by session."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def answer(worker: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{worker.args} ended with exit code {worker.wait()}")
    return line


def timed(
    worker: subprocess.Popen[str], neighbour: subprocess.Popen[bytes] | None, work: str, seconds: float
) -> tuple[float, float]:
    """Units a second, and the CPUs that processes other than these used meanwhile."""
    ours = [psutil.Process(process.pid) for process in (worker, neighbour) if process is not None]

    def used() -> float:
        everyone = psutil.cpu_times()
        return everyone.user + everyone.nice + everyone.system - sum(sum(p.cpu_times()[:2]) for p in ours)

    before, began = used(), time.monotonic()
    assert worker.stdin is not None
    worker.stdin.write(f"{seconds} {work}\n")
    return float(answer(worker)), (used() - before) / (time.monotonic() - began)


def serve() -> None:
    """The process of one setting: times what it reads from its standard input."""
    from sedd.threads import set_defaults

    set_defaults()
    calls = prepare()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, _, work = line.strip().partition(" ")
        name, units = WORK[work]
        call = calls[name]
        call()
        count, began = 0, time.monotonic()
        while (passed := time.monotonic() - began) < float(seconds):
            call()
            count += 1
        print(units * count / passed, flush=True)


def prepare() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import torch

    from sedd.diffusion import Diffusion, ScoreEntropy, get_schedule, sample_times
    from sedd.network import DiffusionTransformer
    from sedd_ext import Absorbing, sample_transition, score_entropy_loss

    letters, words = Absorbing(256), Absorbing(50257)
    network = DiffusionTransformer("tiny", letters.dim)
    model = Diffusion(network, letters, get_schedule("loglinear"), ScoreEntropy())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text, tokens = torch.randint(256, (8, 128)), torch.randint(50257, (8, 1024))

    def training() -> None:
        model(text, sample_times(8), scale=1 / text.numel()).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss(rows: int, n: int) -> Callable[[], object]:
        process = Absorbing(n - 1)
        log_score, x_t, x_0 = torch.randn(rows, n), torch.full((rows,), process.mask_id), torch.zeros(rows).long()
        return lambda: score_entropy_loss(log_score, x_t, x_0, 1.0, process)

    return {
        "training": training,
        "small loss": loss(64, 28),
        "large loss": loss(1024, 50258),
        "noising": lambda: sample_transition(tokens, 1.0, words),
    }


def table(speeds: dict[tuple[str, str, bool], list[float]], settings: list[str], works: list[str]) -> str:
    """The medians in Markdown."""
    lines = [
        f"| | {' | '.join(f'{work}: idle | busy' for work in works)} |",
        f"| --- |{' --- | --- |' * len(works)}",
    ]
    for name in settings:
        cells = [speeds[name, work, busy] for work in works for busy in (False, True)]
        shown = [f"{statistics.median(values):,.0f} ({len(values)})" if values else "—" for values in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
