"""Checkpoints that several processes write: read by any number of them, by every command, and refused if damaged."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import options, rows, torchrun, train_together, write_source
from safetensors.torch import load_file

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from sedd import SEDD
from sedd.cli import main
from sedd.files import TEMPORARY
from sedd.hub import load_model
from sedd.training.checkpoint import DamagedError, list_checkpoints, read_state, read_tensors, verify
from sedd.training.shards import read_shards

FSDP, DDP = {"parallel.data": "fsdp"}, {"parallel.data": "ddp"}
HSDP = {"parallel.data": "hsdp", "parallel.shard": 2}
TENSORS = ("model", "ema", "optimizer")
OFTEN = {"checkpoint_every": 2, "valid_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text, a run of one process of 12 steps, and one of four processes of 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    source = write_source(folder)
    assert main(options(folder / "whole", source, steps=12, keep_last=9, **OFTEN)) == 0
    train_together(folder, 4, [options(folder / "begun", source, "score_entropy", 4, steps=4, **OFTEN, **FSDP)])
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run of four processes."""
    return Path(shutil.copytree(folder / "begun", tmp_path / "run"))


def test_every_process_writes_its_part_once(folder: Path) -> None:
    begun, whole = list_checkpoints(folder / "begun")[-1], list_checkpoints(folder / "whole")[1]
    for name in TENSORS:
        rows: Counter[str] = Counter()
        shards = [load_file(path) for path in (begun / name).iterdir()]
        assert len(shards) == 4
        for shard in shards:
            rows.update({key: len(value) if value.dim() else 1 for key, value in shard.items()})
        stored = load_file(whole / f"{name}.safetensors")
        assert rows == {key: len(value) if value.dim() else 1 for key, value in stored.items()}
        divided = [key for key, value in stored.items() if value.dim() and key != "rotary_emb.inv_freq"]
        assert all(len(shard[key]) < len(stored[key]) for key in divided for shard in shards if key in shard)


def test_other_processes_continue_a_run(folder: Path, tmp_path: Path) -> None:
    """From 4 to 1, 2, 3 and 4, with every engine; and on from there, from parts and from whole files."""

    def line(name: str, processes: int, steps: int, **more: Any) -> list[str]:
        words = options(tmp_path / name, folder / "text.txt", "score_entropy", processes, steps=steps, **OFTEN, **more)
        return [*words, "--resume"]

    names = ("1", "2 fsdp", "2 ddp", "3 fsdp", "3 ddp", "4 hsdp")
    for name in names:
        shutil.copytree(folder / "begun", tmp_path / name)
    assert main(line("1", 1, 8, **DDP)) == 0
    train_together(tmp_path, 2, [line("2 fsdp", 2, 8, **FSDP), line("2 ddp", 2, 8, **DDP)])
    train_together(tmp_path, 3, [line("3 fsdp", 3, 8, **FSDP), line("3 ddp", 3, 8, **DDP)])
    train_together(tmp_path, 4, [line("4 hsdp", 4, 8, **HSDP)])
    assert len(list((list_checkpoints(tmp_path / "4 hsdp")[-1] / "ema").iterdir())) == 4
    assert (list_checkpoints(tmp_path / "3 ddp")[-1] / "ema.safetensors").is_file()
    accumulated = line("3 ddp", 2, 12, accumulate=2, **FSDP)
    train_together(tmp_path, 2, [accumulated, line("4 hsdp", 2, 12, **HSDP), line("1", 2, 12, **HSDP)])
    assert main(line("2 fsdp", 1, 12, **DDP)) == 0
    wanted = [row["loss"] for row in rows(folder / "whole") if "loss" in row]
    for name in names:
        losses = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
        assert len(losses) == (12 if name in ("4 hsdp", "3 ddp", "1", "2 fsdp") else 8)
        assert losses == pytest.approx(wanted[: len(losses)], rel=1e-5), name


def test_a_process_reads_its_parts_alone(run: Path, folder: Path, tmp_path: Path) -> None:
    """On two processes: what it reads is divided, and no slice that it reads is a whole tensor."""
    code = tmp_path / "reads.py"
    line = [*options(run, folder / "text.txt", "score_entropy", 2, steps=4, **OFTEN, **FSDP), "--resume"]
    code.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from sedd.cli import main\n"
        "from sedd.training import run\n"
        "read = run.read_tensors\n"
        "def checked(checkpoint, name, state, device, like):\n"
        "    from torch.distributed.tensor import DTensor\n"
        "    tensors = read(checkpoint, name, state, device, like)\n"
        "    whole = read(checkpoint, name, state)\n"
        "    rank = int(os.environ['RANK'])\n"
        "    for key, value in tensors.items():\n"
        "        assert isinstance(value, DTensor) == (not key.endswith(('/step', 'inv_freq'))), key\n"
        "        if isinstance(value, DTensor):\n"
        "            wanted = whole[key].chunk(2)\n"
        "            wanted = wanted[rank] if rank < len(wanted) else whole[key][:0]\n"
        "            assert torch.equal(value.to_local(), wanted), key\n"
        f"    Path({str(tmp_path)!r}, f'{{name}} {{rank}}').touch()\n"
        "    return tensors\n"
        "run.read_tensors = checked\n"
        f"sys.exit(main({line!r}))\n"
    )
    done = torchrun(2, str(code))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TENSORS:
        for rank in range(2):
            assert (tmp_path / f"{name} {rank}").exists()


def test_every_command_reads_it_on_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "begun"
    ours, theirs = (load_model(path).model.state_dict() for path in (run, list_checkpoints(folder / "whole")[1]))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    model = SEDD.from_pretrained(run)
    assert torch.equal(model.state_dict()["vocab_embed.embedding"], ours["vocab_embed.embedding"])
    assert main(["sample", str(list_checkpoints(run)[-1]), "--num", "1", "--steps", "2"]) == 0
    assert main(["eval", "perplexity", str(run), "--draws", "1", "--device", "cpu"]) == 0
    assert main(["info", str(run)]) == 0
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    again = SEDD.from_pretrained(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-8])


def exchange(shard: Path) -> None:
    other = shard.with_name(shard.name.replace("shard-00002", "shard-00003"))
    shard.rename(shard.with_name("x"))
    other.rename(shard)
    shard.with_name("x").rename(other)


def other_step(shard: Path) -> None:
    old = list_checkpoints(shard.parents[3])[0]
    shutil.copy(old / shard.parent.name / shard.name, shard)


def add(shard: Path) -> None:
    shutil.copy(shard, shard.with_name("shard-00005-model-00001-of-00001.safetensors"))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, exchange, other_step, add])
def test_a_damaged_part_is_named_and_the_run_falls_back(
    run: Path, folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    last = list_checkpoints(run)[-1]
    (shard,) = (last / "ema").glob("shard-00002-*")
    damage(shard)
    number = "0000[23]" if damage is exchange else "00005" if damage is add else "00002"
    message = rf"ema/shard-{number}-.*safetensors: (missing|truncated|damaged|not listed)"
    with pytest.raises((DamagedError, FileNotFoundError), match=message):
        read_tensors(last, "ema", read_state(last))
    with pytest.raises((DamagedError, FileNotFoundError), match=message):
        verify(last)
    with pytest.raises((DamagedError, FileNotFoundError), match=message):
        load_model(last)
    read_tensors(last, "model", read_state(last))
    line = options(run, folder / "text.txt", steps=8, **OFTEN)
    assert main([*line, "--resume"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.search(message, said)
    assert "Resuming from step_00000002; the damaged checkpoint is kept as damaged_step_00000004" in said
    losses, wanted = ([row["loss"] for row in rows(path) if "loss" in row] for path in (run, folder / "whole"))
    assert losses == pytest.approx(wanted[:8], rel=1e-5)


def test_a_folder_without_parts_is_incomplete(run: Path) -> None:
    last = list_checkpoints(run)[-1]
    shutil.rmtree(last / "ema")
    with pytest.raises(FileNotFoundError, match=r"ema/shard-00001-.*missing; the checkpoint is incomplete"):
        load_model(last)


@pytest.mark.parametrize(("engine", "rank"), [(FSDP, 1), (DDP, 0)])
def test_a_disk_that_is_full_for_one_process_stops_all_of_them(
    engine: dict[str, str], rank: int, folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of its files stands in for the disk, from the third checkpoint on."""
    run, code = tmp_path / "run", tmp_path / "full.py"
    line = options(run, folder / "text.txt", "score_entropy", 2, steps=40, **OFTEN, **engine)
    code.write_text(
        "import os, resource, sys\n"
        "from sedd.cli import main\n"
        "from sedd.training import run\n"
        "save = run.save_checkpoint\n"
        "def fills(run_dir, step, *args):\n"
        f"    if os.environ['RANK'] == '{rank}' and step == 6:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))\n"
        "    save(run_dir, step, *args)\n"
        "run.save_checkpoint = fills\n"
        f"sys.exit(main({line!r}))\n"
    )
    done = torchrun(2, str(code))
    assert done.returncode == 1
    said = re.sub(r"\s+", " ", done.stderr)
    message = r"step_00000006: could not write this checkpoint; earlier ones are unchanged: File too large"
    assert len(re.findall(message, said)) == 2, done.stderr[-3000:]
    assert "connection" not in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    for checkpoint in list_checkpoints(run):
        verify(checkpoint)


def test_what_a_kill_leaves_is_no_checkpoint_and_is_removed(run: Path, folder: Path) -> None:
    left = run / "checkpoints" / f"{TEMPORARY}1-step_00000006"
    shutil.copytree(list_checkpoints(run)[-1], left)
    (left / "state.json").unlink()
    assert [path.name for path in list_checkpoints(run)] == ["step_00000002", "step_00000004"]
    assert main([*options(run, folder / "text.txt", steps=6, **OFTEN), "--resume"]) == 0
    assert not left.exists()


def test_an_older_torch_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.1+cpu"))
    with pytest.raises(
        ValueError, match=r"ema: written by several processes: expected PyTorch 2\.9 or newer, got 2\.8"
    ):
        load_model(run)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    read_shards(list_checkpoints(run)[-1] / "ema", {})


def test_no_file_is_a_pickle(folder: Path) -> None:
    for path in list_checkpoints(folder / "begun")[-1].rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors"), path
