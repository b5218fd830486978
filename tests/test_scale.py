"""The memory and communication that the formulas predict are those of processes here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from sedd.config import ModelOptions, ParallelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.data.tokenizer import get_tokenizer
from sedd.footprint import Layout, collectives, memory

WORKER = Path(__file__).with_name("scale_worker.py")
Engine = Literal["ddp", "fsdp", "hsdp"]


def config(data: Engine = "ddp", precision: Literal["bf16", "fp32"] = "fp32", **more: Any) -> TrainConfig:
    """Sizes that 4 does not divide; gradients fill two of DDP's buckets."""
    sizes = {"hidden_size": 68, "n_blocks": 4, "n_heads": 2, "cond_dim": 31, "length": 128, "dropout": 0.1}
    model = ModelOptions(**{**sizes, **more.pop("model", {})})
    parallel = ParallelOptions(data=data, shard=more.pop("shard", None), vocab=more.pop("vocab", 1))
    options = {"batch_size": 4, "precision": precision, "report_to": "none", **more}
    return TrainConfig(model=model, parallel=parallel, **options)


WIDE = {"hidden_size": 260, "length": 16}  # parameters count most
SHALLOW = {"hidden_size": 16, "n_blocks": 1, "length": 4}  # embedding and head count most
CASES: dict[str, tuple[int, TrainConfig]] = {
    "ddp": (2, config()),
    "ddp, accumulated": (2, config(accumulate=3)),
    "ddp, wide, bfloat16": (2, config(precision="bf16", model=WIDE)),
    "ddp, bfloat16": (2, config(precision="bf16", model={"dropout": 0.0})),
    "ddp, checkpointed": (2, config(activation_checkpointing=True)),
    "fsdp": (2, config("fsdp")),
    "fsdp, wide, accumulated": (2, config("fsdp", model=WIDE, accumulate=2)),
    "fsdp, shallow": (2, config("fsdp", model=SHALLOW, batch_size=1)),
    "ddp, 4": (4, config()),
    "fsdp, 4": (4, config("fsdp", activation_checkpointing=True, precision="bf16")),
    "fsdp, wide, 4": (4, config("fsdp", model=WIDE)),
    "hsdp, 4": (4, config("hsdp", shard=2)),
    "ddp, vocabulary": (2, config(vocab=2, process="uniform", accumulate=2)),
    "ddp, vocabulary, 4": (4, config(vocab=2, process="uniform")),
    "fsdp, vocabulary, 4": (4, config("fsdp", vocab=2, process="uniform", model=WIDE, accumulate=2)),
    "hsdp, wide, accumulated, 4": (4, config("hsdp", shard=2, model=WIDE, accumulate=2)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scale")
    (folder / "text.txt").write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(500)))
    results: dict[str, Any] = {}
    # a second model with a divided vocabulary needs processes of its own
    splits = [[name] for name in CASES if "vocabulary" in name]
    plain = [[name for name in CASES if "vocabulary" not in name and CASES[name][0] == n] for n in (2, 4)]
    for names in (*plain, *splits):
        processes = CASES[names[0]][0]
        files = []
        for name in names:
            case = CASES[name][1]
            case.run_dir, case.data = str(folder / name), DataConfig(source=str(folder / "text.txt"))
            files.append(folder / f"{name}.json")
            files[-1].write_text(json.dumps(case.to_dict()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(WORKER), *map(str, files)], capture_output=True, text=True, env=environment, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results |= zip(names, map(json.loads, done.stdout.splitlines()), strict=True)
    return results


def layout(name: str) -> Layout:
    processes, case = CASES[name]
    return Layout(case, get_tokenizer("bytes").vocab_size, processes, device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_predicted_collectives(name: str, measured: dict[str, Any]) -> None:
    counts: Counter[tuple[str, int]] = Counter()
    for one in collectives(layout(name)):
        counts[one.kind, one.size] += one.count
    assert measured[name]["collectives"] == sorted([*key, count] for key, count in counts.items())


@pytest.mark.parametrize("name", CASES)
def test_a_process_keeps_what_is_predicted(name: str, measured: dict[str, Any]) -> None:
    assert measured[name]["kept"] == memory(layout(name)).kept


@pytest.mark.parametrize("name", CASES)
def test_a_step_needs_about_the_predicted_memory(name: str, measured: dict[str, Any]) -> None:
    """Between 6 % less and 12 % more than what tensors hold at most."""
    ratio = memory(layout(name)).peak / measured[name]["peak"]
    print(f"{name}: {ratio:.3f}")
    assert 0.94 < ratio < 1.12
