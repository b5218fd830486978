"""Checkpoints: whole or not there at all, and explicit about damage."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sedd.config
from sedd.config import ModelOptions, TrainConfig
from sedd.files import write_json
from sedd.hub import SEDD, load_model
from sedd.training.checkpoint import (
    DamagedError,
    best_checkpoint,
    fingerprint,
    list_checkpoints,
    prune,
    read_state,
    read_tensors,
    sealed,
    set_damaged_aside,
    verify,
)
from sedd.training.saving import save_checkpoint

TENSORS = ("model", "ema", "optimizer", "rng")


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(
        model=ModelOptions(hidden_size=8, n_blocks=1, n_heads=2, cond_dim=8, length=8), tokenizer="text8"
    )


@pytest.fixture
def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(SEDD(config.model.build(), config.make_process(27)).state_dict())


@pytest.fixture
def save(config: TrainConfig, weights: dict[str, torch.Tensor], tmp_path: Path) -> Callable[..., Path]:
    def save_step(step: int, valid: float | None = None) -> Path:
        tensors = {
            "model": weights,
            "ema": {name: value + step for name, value in weights.items()},
            "optimizer": {
                f"{name}/{moment}": torch.full_like(value, step)
                for name, value in weights.items()
                for moment in ("exp_avg", "exp_avg_sq")
            },
            "rng": {"cpu": torch.get_rng_state()},
        }
        state = {"valid": valid, "elapsed": 1.5, "device": "cpu", "data": {"consumed": 3}}
        return save_checkpoint(tmp_path, step, tensors, state, config)

    return save_step


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(save: Callable[..., Path], config: TrainConfig, weights: dict[str, torch.Tensor]) -> None:
    path = save(500, 1.25)
    assert path.name == "step_00000500"
    assert {file.name for file in path.iterdir()} == {
        *(f"{name}.safetensors" for name in TENSORS),
        "config.json",
        "state.json",
    }
    state = read_state(path)
    assert (state["step"], state["valid"], state["elapsed"], state["data"]) == (500, 1.25, 1.5, {"consumed": 3})
    loaded = load_model(path)
    assert loaded.config.model.build() == config.model.build()
    assert (loaded.tokenizer.name, loaded.diffusion.process.dim) == ("text8", 28)
    assert not loaded.diffusion.training
    assert not loaded.model.training
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, weights[name] + 500), "the averaged weights are loaded"


def test_a_later_preset_does_not_change_an_old_checkpoint(
    save: Callable[..., Path], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(1)
    sizes = config.model.build()
    monkeypatch.setitem(sedd.config.PRESETS, "tiny", sedd.config.PRESETS["small"])
    assert load_model(path).config.model.build() == sizes


def test_the_best_checkpoint_of_a_run_is_loaded_and_the_last_without_validation(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    save(1), save(2)
    assert load_model(tmp_path).state["step"] == 2
    save(3, 2.0), save(4, 1.0), save(5, 3.0), save(6)
    assert load_model(tmp_path).state["step"] == 4
    prune(tmp_path, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000006"]
    assert best_checkpoint(tmp_path) == list_checkpoints(tmp_path)[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*(f"{name}.safetensors" for name in TENSORS), "config.json", "state.json"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip_last_byte])
def test_damage_is_named(save: Callable[..., Path], name: str, damage: Callable[[Path], None]) -> None:
    path = save(1, 1.0)
    damage(path / name)

    def read_all() -> None:
        load_model(path)
        state = read_state(path)
        for tensors in TENSORS:
            read_tensors(path, tensors, state)

    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: (missing|truncated|damaged)"):
        read_all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 300}, r"step: expected that of the folder step_00000400, got 300"),
        ({"step": True}, r"step: expected an int of at least 1, got True"),
        ({"step": None}, r"step: expected an int of at least 1, got no entry"),
        ({"valid": "1"}, r"valid: expected a finite number or null"),
        ({"valid": float("nan")}, r"valid: expected a finite number or null"),
        ({"elapsed": -1.0}, r"elapsed: expected a number of at least 0, got -1\.0"),
        ({"device": "tpu"}, r"device: expected cpu or cuda"),
        ({"data": [1]}, r"data: expected an object"),
        ({"data": None}, r"data: expected an object, got no entry"),
        ({"files": {"config.json": "abc"}}, r"files: expected an object with bytes and sha256"),
        ({"stop": 400}, r"sha256: expected because of the entries stop, got none"),
    ],
    ids=str,
)
def test_a_state_that_is_not_one_is_refused(save: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    """Also where no digest tells of it, as in the checkpoints of earlier versions."""
    path = save(400, 1.0)
    state = {**json.loads((path / "state.json").read_text()), **change}
    state = {key: value for key, value in state.items() if value is not None}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedError, match=r"state\.json: damaged.*\(SHA-256\)"):
        read_state(path)
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedError, match=rf"state\.json: damaged or not the state of a checkpoint: {message}"):
        read_state(path)


def test_a_checkpoint_of_an_earlier_version_loads(save: Callable[..., Path]) -> None:
    path = save(400, 1.0)
    state = read_state(path)
    del state["sha256"]
    write_json(path / "state.json", state)
    assert load_model(path).state == state
    verify(path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", '{"step": 1', "\x00" * 100, '{"step": ' + "9" * 9999 + "}"], ids=len
)
def test_what_is_no_state_at_all_is_refused(save: Callable[..., Path], content: str) -> None:
    path = save(1)
    (path / "state.json").write_text(content)
    with pytest.raises(DamagedError, match=r"state\.json: damaged"):
        read_state(path)


def test_another_checkpoint_is_offered_in_place_of_a_damaged_one(save: Callable[..., Path], tmp_path: Path) -> None:
    save(1, 2.0), save(2, 3.0), save(3, 1.0)
    first, second, third = list_checkpoints(tmp_path)
    flip_last_byte(third / "ema.safetensors")
    for path in (tmp_path, third):
        with pytest.raises(
            DamagedError, match=rf"ema\.safetensors: damaged: .*; .* complete .* {second}: use that one"
        ):
            load_model(path)
    flip_last_byte(third / "state.json")
    (second / "optimizer.safetensors").unlink()
    with pytest.raises(DamagedError, match=rf"state\.json: damaged.*; .* complete .* {first}: use that one"):
        SEDD.from_pretrained(tmp_path)


def test_damaged_checkpoints_are_set_aside_and_kept_until_there_is_a_newer_one(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    save(1, 2.0), save(2, 1.0), save(3, 3.0), save(4)
    damaged = list_checkpoints(tmp_path)
    truncate(damaged[3] / "model.safetensors")
    flip_last_byte(damaged[1] / "state.json")
    contents = everything_in(damaged[3])
    prune(tmp_path, keep_last=1)
    assert list_checkpoints(tmp_path)[0].name == "step_00000001"
    last, lines = set_damaged_aside(tmp_path)
    assert last is not None
    assert last.name == "step_00000001"
    assert re.search(
        r"step_00000004/model\.safetensors: truncated .* from step_00000001; .* damaged_step_00000004", lines[0]
    )
    aside = tmp_path / "checkpoints" / "damaged_step_00000004"
    assert everything_in(aside) == contents
    prune(tmp_path, keep_last=1)
    save(3)
    prune(tmp_path, keep_last=1)
    assert everything_in(aside) == contents
    save(4)
    prune(tmp_path, keep_last=1)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000001", "step_00000004"]
    for path in list_checkpoints(tmp_path):
        truncate(path / "rng.safetensors")
    before = everything_in(tmp_path)
    with pytest.raises(
        DamagedError, match=r"step_00000004/rng\.safetensors: .*no checkpoint of .* is complete.*--run_dir"
    ):
        set_damaged_aside(tmp_path)
    assert everything_in(tmp_path) == before


def test_a_file_that_fits_neither_the_model_nor_the_list_is_named(save: Callable[..., Path]) -> None:
    path = save(1)
    options = json.loads((path / "config.json").read_text())
    options["model"]["hidden_size"] = 16
    write_json(path / "config.json", options)
    state = read_state(path)
    state["files"]["config.json"] = fingerprint(path / "config.json")
    write_json(path / "state.json", sealed(state))
    with pytest.raises(ValueError, match=r"ema\.safetensors: .* 16 misshapen .*norm1\.weight \[8\] instead of \[16\]"):
        load_model(path)
    with pytest.raises(ValueError, match=r"other\.safetensors: not listed in state\.json"):
        read_tensors(path, "other", state)


@pytest.mark.parametrize(
    ("what", "message"), [("nothing", "no such file or folder"), ("empty", "expected checkpoints .* sedd train")]
)
def test_no_run(tmp_path: Path, what: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path / what)


@pytest.mark.parametrize("first_too_large", ["model", "optimizer"])
def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_half_written(
    save: Callable[..., Path], tmp_path: Path, first_too_large: str
) -> None:
    """The file size limit of the process stands in for the disk: writing stops with an error after so many bytes."""
    limit = (save(1, 1.0) / f"{first_too_large}.safetensors").stat().st_size - 100
    before = everything_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"step_00000002: could not write.*earlier ones are unchanged.*too large"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(tmp_path) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    save(2)
    assert load_model(tmp_path / "checkpoints" / "step_00000002").state["step"] == 2


def test_what_a_kill_leaves_is_ignored_and_cleaned(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1, 1.0)
    kept = everything_in(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process cleans nothing
    monkeypatch.setattr(Path, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(2)
    monkeypatch.undo()
    assert everything_in(tmp_path) != kept
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert load_model(tmp_path).state["step"] == 1
    prune(tmp_path, keep_last=1)
    assert everything_in(tmp_path) == kept


def test_json_is_the_old_or_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"new": 2})
    assert everything_in(tmp_path) == {"value.json": b'{\n  "old": 1\n}\n'}
