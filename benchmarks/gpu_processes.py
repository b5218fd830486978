"""Do two GPUs train as one does? A step of gpu_check.py; --device cpu rehearses it with two processes.

The same 20 steps on one process and, started by torchrun, on two of them: DDP, FSDP, and a vocabulary that is split.
Losses and gradient norms must be equal up to rounding. It is the first time that our collectives run on NCCL.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

WORKER = Path(__file__).resolve().parent.parent / "tests" / "parallel_worker.py"
SEQUENCES = 8
LIMIT = 1e-3  # relative; float32 sums in another order, for 20 steps
WAYS = {
    "ddp": {"batch_size": SEQUENCES // 2},
    "fsdp": {"batch_size": SEQUENCES // 2, "parallel.data": "fsdp"},
    "vocabulary": {"batch_size": SEQUENCES, "parallel.vocab": 2},
    "vocabulary, mean prediction": {"batch_size": SEQUENCES, "parallel.vocab": 2, "objective": "md4"},
}


def command(run: Path, text: Path, device: str, **more: object) -> list[str]:
    """The words of ``sedd`` for a run."""
    options = {
        "run_dir": run,
        "data.source": text,
        "device": device,
        "batch_size": SEQUENCES,
        "steps": 20,
        "lr": 1e-3,
        "valid_every": 20,
        "valid_blocks": 4,
        "precision": "fp32",
        "report_to": "none",
        "model.preset": "tiny",
        **more,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def numbers(run: Path) -> list[float]:
    """Losses, gradient norms and bounds of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if name != "step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and torch.cuda.device_count() < 2:
        print(f"not run: needs two GPUs, this machine has {torch.cuda.device_count()}")
        return 0
    try:
        importlib.import_module("sedd.training.run")
    except ModuleNotFoundError as error:
        print(f"not run: needs the package {error.name}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(2000)))
        objectives = {str(more.get("objective", "score_entropy")) for more in WAYS.values()}
        for objective in objectives:
            words = command(folder / objective, text, device, objective=objective)
            subprocess.run([sys.executable, "-m", "sedd", *words], check=True)
        lines = [command(folder / way, text, device, **more) for way, more in WAYS.items()]
        (folder / "lines.json").write_text(json.dumps(lines))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if device == "cpu" else None
        subprocess.run([*torchrun, str(WORKER), str(folder / "lines.json")], check=True, env=environment)
        worst = {}
        for way, more in WAYS.items():
            pairs = zip(
                numbers(folder / way), numbers(folder / str(more.get("objective", "score_entropy"))), strict=True
            )
            worst[way] = max(abs(mine - one) / max(abs(one), 1e-3) for mine, one in pairs)
    print("largest relative difference from one process:", ", ".join(f"{way} {x:.1e}" for way, x in worst.items()))
    return 1 if max(worst.values()) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
