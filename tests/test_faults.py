"""Every write, fsync, rename and allocation of a save fails once: nothing is lost, and a run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

import torch
import torch.utils.tensorboard
from faults import KINDS, Faults, PowerCut, summary
from rich.console import Console

import sedd.data.corpora
import sedd.training.checkpoint
import sedd.training.run
from sedd.config import ModelOptions, TrainConfig
from sedd.data.batches import TokenBlocks
from sedd.diffusion.schedule import Geometric, LogLinear
from sedd.files import write_json
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd.training.checkpoint import list_checkpoints, verify
from sedd.training.run import Run
from sedd.training.state import TrainState
from sedd.unfinished import Unfinished
from sedd_ext import Uniform

SIZES = {"hidden_size": 8, "n_blocks": 1, "n_heads": 1, "cond_dim": 4, "length": 8}


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def every_fault(folder: Path, prepare: Callable[[], Any], work: Callable[[], Any]) -> Iterator[tuple[str | None, str]]:
    """Does some work again and again, each time with another fault, and gives control after each.

    Every point has its power cut and one of the other faults, in turn.

    Args:
        folder: where faults happen; made anew each time.
        prepare: brings the folder to the state in which the work begins.
        work: what is done.

    Yields:
        The kind of the fault, None first, after the work was done without one; and what it was that failed.
    """
    counted: list[str] = []
    faults_survived = 0
    for turn in range(3):
        for at in range(1, 1 + len(counted)) if turn else [0]:
            kind = (None, "power", KINDS[at % len(KINDS)])[turn]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            prepare()
            with Faults(folder, kind, at) as faults:
                error = happens(work)
            if kind is None:
                assert error is None
                counted = faults.seen
            elif isinstance(error, OSError):
                assert kind in ("broken", "full")
                assert str(folder) in str(error), f"the file is not named: {faults.seen[at - 1]}"
                assert kind == "broken" or "No space left on device; free some space" in str(error)
            yield kind, faults.seen[at - 1]
            faults_survived += kind is not None
    print(f"{summary(counted)}; {faults_survived} faults survived")


def happens(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except (OSError, MemoryError, PowerCut) as error:
        return error.with_traceback(None)  # which would keep the run and its files alive
    return None


class Toy(torch.nn.Module):
    """A network of few tensors, with dropout, which draws from torch's own generator."""

    time_conditioning = False

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(dim, config.hidden_size)
        self.output_layer = torch.nn.ModuleDict({"linear": torch.nn.Linear(config.hidden_size, dim)})

    def hidden(self, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.embedding(x_t), 0.1, self.training)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output_layer.linear(hidden)

    def head_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.output_layer.linear.weight, self.output_layer.linear.bias


class NoCurves:
    """TensorBoard writes in a thread of its own, to files that nothing reads back."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    add_scalar = add_text = flush = close = __init__


def test_a_run_goes_on_bit_for_bit_after_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 27, 4000).astype(np.uint16)
    splits = SimpleNamespace(train=TokenBlocks([tokens[400:]], 8), valid=TokenBlocks([tokens[:400]], 8))
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", NoCurves)
    monkeypatch.setattr(sedd.data.corpora, "load_blocks", lambda *_: splits)
    monkeypatch.setattr(sedd.training.run, "make_network", Toy)
    run, begun = tmp_path / "disk" / "run", tmp_path / "begun"
    sizes = ModelOptions(**SIZES, scale_by_sigma=False)
    config = TrainConfig(run_dir=str(run), tokenizer="text8", model=sizes, batch_size=2, steps=4)
    # making its parser takes longer than all the rest
    monkeypatch.setattr(sedd.training.checkpoint, "load_config", lambda _: config.resolved())
    often = {"log_every": 1, "valid_every": 2, "valid_blocks": 2, "valid_draws": 1, "checkpoint_every": 1}
    config = dataclasses.replace(config, **often, keep_last=1, warmup=1, lr=0.5, precision="fp32")

    take_step = TrainState.train_step

    def train(resume: bool, until: int = 4) -> None:
        def step_or_stop(state: TrainState) -> torch.Tensor:
            assert isinstance(state.diffusion.network, Toy)
            if state.step == until:
                raise KeyboardInterrupt
            return take_step(state)

        monkeypatch.setattr(TrainState, "train_step", step_or_stop)
        with suppress(KeyboardInterrupt):
            Run(config, console=Console(quiet=True), resume=resume).train()

    def outcome() -> dict[str, bytes]:
        """All that is in the folder, but for how long it took."""
        files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if path.name not in ("state.json", ".lock")}

    train(resume=False)
    wanted = outcome()
    assert len(list_checkpoints(run)) == 2, "the last one and the best"
    shutil.rmtree(run)
    train(resume=False, until=3)
    run.rename(begun)

    for kind, _ in every_fault(run.parent, lambda: shutil.copytree(begun, run), lambda: train(resume=True)):
        checkpoints = list_checkpoints(run)
        assert checkpoints, "nothing is lost"
        for checkpoint in checkpoints:
            verify(checkpoint)
        if kind is not None:
            train(resume=True)
        assert outcome() == wanted
    # from nothing, too
    for kind, _ in every_fault(run.parent, lambda: None, lambda: train(resume=False, until=1)):
        if kind is not None:
            train(resume=(run / "config.json").exists())
            assert outcome() == wanted


def test_an_export_is_the_old_one_or_the_new_one_after_every_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = SEDD(ModelConfig(**SIZES), Uniform(27), LogLinear(), tokenizer="text8")
    new = SEDD(ModelConfig(**SIZES), Uniform(27), Geometric(), tokenizer="text8")
    folder = tmp_path / "disk" / "model"

    def describe(model: SEDD) -> tuple[str, bytes]:
        return str(model.schedule), b"".join(value.numpy().tobytes() for value in model.state_dict().values())

    both = [describe(old), describe(new)]
    for kind, what in every_fault(
        folder.parent, lambda: old.save_pretrained(folder), lambda: new.save_pretrained(folder)
    ):
        if kind == "power" and not (folder / "model.safetensors").exists():
            with pytest.raises(FileNotFoundError, match=r"expected checkpoints or model\.safetensors"):
                SEDD.from_pretrained(folder)
            (kept,) = folder.parent.glob(".writing-*/new/old")
            assert (kept / "model.safetensors").exists(), "the old weights are not lost"
            continue
        assert describe(SEDD.from_pretrained(folder)) in both
        if kind != "power" and what not in ("unlink", "rmdir"):
            assert len(list(folder.parent.iterdir())) == 1, "nothing else is left"


def test_an_unfinished_evaluation_and_json_after_every_fault(tmp_path: Path) -> None:
    folder = tmp_path / "disk"

    def write(count: int) -> None:
        unfinished = Unfinished(folder / "bound.unfinished", "this", seconds=1e9)
        unfinished.update(torch.arange(float(count)))
        unfinished.write()
        write_json(folder / "bound.json", [0] * count)

    for _ in every_fault(folder, lambda: write(3), lambda: write(7)):
        values = torch.zeros(10)
        done = Unfinished(folder / "bound.unfinished", "this").resume(values)
        assert done in (3, 7)
        assert torch.equal(values[:done], torch.arange(float(done)))
        assert (folder / "bound.json").read_text().count("0") in (3, 7)
