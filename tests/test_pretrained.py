"""Models in and out: the formats of others, what a wrong file is told, and that no file can execute code."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("rich")

import huggingface_hub
import omegaconf
import released
import torch
import yaml
from huggingface_hub import errors
from torch import Tensor

from sedd.cli import main
from sedd.diffusion.position_loss import MeanPrediction
from sedd.diffusion.schedule import Cosine, Geometric, LogLinear
from sedd.hub import SEDD, load_model
from sedd.hub.weights import PICKLES
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, reference

D, BLOCKS, HEADS, COND, LENGTH = 32, 2, 4, 16, 24
MODEL = {
    **{"name": "toy", "type": "ddit", "hidden_size": D, "cond_dim": COND, "length": LENGTH, "n_blocks": BLOCKS},
    **{"n_heads": HEADS, "scale_by_sigma": True, "dropout": 0.1},
}
CONFIG = {
    "tokens": 257,
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": MODEL,
    "training": {"batch_size": 512},
}
WEIGHTS = released.random_weights(D, BLOCKS, HEADS, 258, COND)
AVERAGED = {name: value * 1.1 if "inv_freq" not in name else value for name, value in WEIGHTS.items()}
EMA = {
    "decay": 0.9999,
    "num_updates": 7,
    "shadow_params": [value for name, value in AVERAGED.items() if "inv_freq" not in name],
}


def write_hub(folder: Path) -> Path:
    """A repository as the released models are: a pickle of nothing but tensors."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    return folder


def write_run(folder: Path) -> Path:
    """A training run of the released code."""
    for part in (".hydra", "checkpoints-meta"):
        (folder / part).mkdir()
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    saved = {"optimizer": optimizer, "model": WEIGHTS, "ema": EMA, "step": 7}
    torch.save(saved, folder / "checkpoints-meta" / "checkpoint.pth")
    return folder


def write_lightning(folder: Path, hyper_parameters: Any = None) -> Path:
    """A Lightning checkpoint with a configuration of OmegaConf among its hyper-parameters."""
    config = {
        "model": {key: value for key, value in MODEL.items() if key != "name"},
        "noise": CONFIG["noise"],
        "diffusion": "absorbing_state",
        "parameterization": "sedd",
        "data": {"tokenizer_name_or_path": "gpt2"},
        "time_conditioning": True,
        "same": "${model.length}",
    }
    saved = {
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": {f"backbone.{name}": value for name, value in WEIGHTS.items()} | {"other.weight": torch.ones(3)},
        "hyper_parameters": hyper_parameters or {"config": omegaconf.OmegaConf.create(config)},
        "ema": EMA,
    }
    torch.save(saved, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_ours(folder: Path) -> Path:
    """What save_pretrained writes."""
    model = SEDD(
        ModelConfig(D, BLOCKS, HEADS, COND, LENGTH, dropout=0.1), Absorbing(257), LogLinear(), tokenizer="bytes"
    )
    model.load_state_dict(WEIGHTS)
    model.save_pretrained(folder)
    return folder


FORMATS: dict[str, tuple[Callable[[Path], Path], dict[str, Tensor]]] = {
    "hub": (write_hub, WEIGHTS),
    "released run": (write_run, AVERAGED),
    "lightning": (write_lightning, AVERAGED),
    "safetensors": (write_ours, WEIGHTS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_round_trips(name: str, tmp_path: Path) -> None:
    """Read, written as ours by the command line, read again: the same model, equal to the independent statement."""
    write, weights = FORMATS[name]
    (tmp_path / "theirs").mkdir()
    source = write(tmp_path / "theirs")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_sedd.py",
    ]
    x, sigma = torch.randint(258, (3, 10), generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 5.0])
    expected = released.log_score(weights, x, sigma, scale_by_sigma=True)
    for path in (source, tmp_path / "ours"):
        loaded = load_model(path)
        assert loaded.model.config == ModelConfig(D, BLOCKS, HEADS, COND, LENGTH, dropout=0.1)
        assert not loaded.diffusion.training
        assert not loaded.model.training
        assert (loaded.diffusion.process.family, loaded.diffusion.process.dim) == ("absorbing", 258)
        assert loaded.diffusion.schedule == LogLinear()
        assert loaded.tokenizer.name == "bytes"
        for key, tensor in loaded.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=0)
        torch.testing.assert_close(loaded.model(x, sigma).detach(), expected, rtol=1e-5, atol=1e-5)
    model = SEDD.from_pretrained(tmp_path / "ours")
    assert model.tokenizer == "bytes"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("process", "schedule"),
    [
        (Uniform(27), Geometric(1e-4, 10.0)),
        (Hybrid(27, 0.3), Cosine(1e-2)),
        (Absorbing(27), LogLinear(1e-4)),
    ],
    ids=["uniform", "hybrid", "absorbing"],
)
def test_what_is_saved_is_what_is_loaded(process: RankOne, schedule: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(16, 1, 2, 8, 12, 0.25, False, False)
    model = SEDD(sizes, process, schedule, "text8")
    torch.nn.init.normal_(model.output_layer.linear.weight)
    model.save_pretrained(tmp_path / "model")
    loaded = SEDD.from_pretrained(str(tmp_path / "model"))
    assert loaded.to_config() == model.to_config()
    assert loaded.config == sizes
    torch.testing.assert_close(loaded.process.stationary, process.stationary, rtol=1e-9, atol=0)
    x, sigma = torch.randint(27, (2, 5)), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(loaded(x, sigma), model.eval()(x, sigma), rtol=0, atol=0)


def trained(folder: Path) -> Path:
    """A run of ours."""
    text, run = folder / "text.txt", folder / "run"
    text.write_text("the cat sat on the mat " * 100)
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=16", "--model.length=8"]
    options = [f"--data.source={text}", f"--data.cache_dir={folder}", "--tokenizer=text8", "--process=hybrid"]
    assert main(["train", *sizes, *options, "--steps=2", f"--run_dir={run}"]) == 0
    return run


def test_a_run_is_loaded_by_the_same_name(tmp_path: Path) -> None:
    run = trained(tmp_path)
    model = SEDD.from_pretrained(run)
    assert (model.process.family, model.schedule, model.tokenizer) == ("rank_one", LogLinear(), "text8")
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    again = load_model(tmp_path / "out")
    assert again.model.to_config() == model.to_config()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.model.parameters(), strict=True))
    assert "hybrid noise" in (tmp_path / "out" / "README.md").read_text()


def test_a_repository_is_downloaded_and_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the hub, which is a folder here."""
    hub = tmp_path / "hub"
    hub.mkdir()
    asked: list[Any] = []

    def upload(self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        if repo_id == "someone/offline":
            raise errors.OfflineModeIsEnabled("no network")
        for file in Path(folder_path).iterdir():
            (hub / file.name).write_bytes(file.read_bytes())
        return f"address of {repo_id}"

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        wanted = {"config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"}
        shards = {"model-*.safetensors", "model.safetensors.index.json"}
        assert wanted | shards == set(options["allow_patterns"])
        return str(hub)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_run(tmp_path)
    model = SEDD.from_pretrained(tmp_path)
    with pytest.raises(errors.OfflineModeIsEnabled):
        model.save_pretrained(tmp_path / "kept", push_to_hub=True, repo_id="someone/offline")
    assert SEDD.from_pretrained(tmp_path / "kept").config == model.config
    assert model.save_pretrained(tmp_path / "both", push_to_hub=True) == "address of both"
    assert model.push_to_hub("someone/toy", model_card_kwargs={"text": "It is a toy."}) == "address of someone/toy"
    card = (hub / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# someone/toy" in card
    assert 'load_model("someone/toy")' in card
    assert "bytes tokens (257) in blocks of 24" in card
    assert "It is a toy." in card
    again = SEDD.from_pretrained("someone/toy", revision="main")
    assert asked == [("someone/toy", "main")]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_hub_that_cannot_be_reached_or_has_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"someone/toy: no such file or folder, and the .* cannot be reached"):
        SEDD.from_pretrained("someone/toy")

    def missing(*_: Any, **__: Any) -> None:
        raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(FileNotFoundError, match=r"someone/toy: .* the Hugging Face hub has no such repository"):
        SEDD.from_pretrained("someone/toy")


# -- wrong files -------------------------------------------------------------------------------------------------------


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    saved = torch.load(file)
    edit(saved)
    torch.save(saved, file)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    write_hub(tmp_path)

    def edit(saved: dict[str, Any]) -> None:
        del saved["blocks.0.norm1.weight"], saved["output_layer.linear.bias"]
        saved["blocks.0.extra.weight"] = torch.ones(1)
        saved["blocks.1.attn_out.weight"] = torch.ones(D, D + 1)

    change(tmp_path / "pytorch_model.bin", edit)
    with pytest.raises(
        ValueError,
        match=r"pytorch_model\.bin: .* 2 missing \(blocks\.0\.norm1\.weight, output_layer\.linear\.bias\); "
        r"1 unexpected \(blocks\.0\.extra\.weight\); "
        r"1 misshapen \(blocks\.1\.attn_out\.weight \[32, 33\] instead of \[32, 32\]\)",
    ):
        SEDD.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"graph": {"type": "absorbed"}}, "graph.type: expected absorb, uniform or hybrid, got 'absorbed'"),
        ({"graph": None}, "graph.type: expected absorb, uniform or hybrid, got none"),
        ({"graph": "absorb"}, "graph: expected an object, got 'absorb'"),
        ({"noise": {"type": "linear"}}, "noise.type: expected one of loglinear, geometric, "),
        ({"noise": {"type": "geometric", "sigma_min": -1.0}}, "sigma_min: expected a positive number"),
        ({"noise": {"type": ["geometric"]}}, "; got ['geometric']"),
        ({"noise": {"type": "loglinear", "eps": math.nan}}, "noise.eps: expected a finite number, got nan"),
        ({"noise": {"type": "loglinear", "eps": [1]}}, "noise.eps: expected a finite number, got [1]"),
        ({"noise": {"type": "loglinear", "eps": True}}, "noise.eps: expected a finite number, got True"),
        ({"graph": {"type": "hybrid"}}, "graph.uniform_fraction: expected a finite number, got none"),
        ({"graph": {"type": "hybrid", "uniform_fraction": "much"}}, "expected a finite number, got 'much'"),
        ({"graph": {"type": ["absorb"]}}, "graph.type: expected absorb, uniform or hybrid, got ['absorb']"),
        ({"tokenizer": ["bytes"]}, "tokenizer: expected a tokeniser of 257 tokens, got ['bytes']"),
        ({"tokens": True}, "tokens: expected 257 for an embedding of 258 rows (including MASK), got True"),
        ({"tokens": 258}, "tokens: expected 257 for an embedding of 258 rows (including MASK), got 258"),
        ({"tokenizer": "gpt2"}, "tokenizer: expected a tokeniser of 257 tokens, got 'gpt2'"),
        ({"model": {"n_blocks": 10**9}}, "model.n_blocks: expected 2 for these tensors, got 1000000000"),
        ({"model": {"length": "long"}}, "model.length: expected int, got 'long'"),
        ({"model": {"length": 8.0}}, "model.length: expected int, got 8.0"),
        ({"model": {"length": 0}}, "length: expected a positive int, got 0"),
        ({"parameterization": "ar"}, "parameterization: expected one of sedd, subs, mean, got 'ar'"),
        ({"objective": "mse"}, "objective: expected one of score_entropy, "),
    ],
)
def test_a_configuration_that_will_not_do(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_hub(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | entries))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{re.escape(message)}"):
        SEDD.from_pretrained(tmp_path)


def test_networks_that_predict_the_clean_token_round_trip(tmp_path: Path) -> None:
    """As MDLM writes them (SUBS): read, written as ours, read again."""
    write_hub(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"parameterization": "subs"}))
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 0
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["objective"] == "mean_prediction"
    x_t, sigma = torch.randint(258, (3, 10), generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 5.0])
    for path in (tmp_path, tmp_path / "ours"):
        loaded = load_model(path)
        assert isinstance(loaded.diffusion.objective, MeanPrediction)
        assert loaded.diffusion.step_options(sigma, x_t) == {"parameterization": "mean", "sigma": sigma}
        logits = loaded.model.head(loaded.model.hidden(x_t, sigma))
        expected = reference.implied_log_score(logits, x_t, sigma[:, None], loaded.diffusion.process)
        torch.testing.assert_close(loaded.model(x_t, sigma), expected.scatter(-1, x_t[..., None], 0.0))


def test_a_checkpoint_of_duo(tmp_path: Path) -> None:
    """A Lightning file whose entries lie in ``algo``: uniform noise, a mean prediction, and "log-linear"."""
    config = {
        "algo": {"name": "duo", "parameterization": "mean", "time_conditioning": True, "T": 0},
        "noise": {"type": "log-linear", "eps": 1e-4},
        "model": MODEL,
    }
    state = {f"backbone.{name}": value for name, value in WEIGHTS.items()}
    torch.save({"state_dict": state, "ema": EMA, "hyper_parameters": {"config": config}}, tmp_path / "duo.ckpt")
    loaded = SEDD.from_pretrained(tmp_path / "duo.ckpt")
    assert (loaded.process.family, loaded.process.dim, loaded.schedule) == ("uniform", 258, LogLinear(eps=1e-4))
    assert (loaded.objective, loaded.config.time_conditioning) == ("mean_prediction", True)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, AVERAGED[name], msg=name)


def test_what_a_checkpoint_does_not_say_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights alone: sizes follow from the tensors, process and schedule from a file of the user."""
    torch.save({f"module.{name}": value for name, value in WEIGHTS.items()}, tmp_path / "weights.pt")
    assert main(["convert", str(tmp_path / "weights.pt"), str(tmp_path / "out")]) == 2
    assert "weights.pt: expected a configuration in it or its folder, got none; give one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.yaml").write_text("graph: {type: uniform}\nnoise: {type: geometric, sigma_max: 10}\n")
    options = ["--config", str(tmp_path / "mine.yaml")]
    assert main(["convert", str(tmp_path / "weights.pt"), str(tmp_path / "out"), *options]) == 0
    model = SEDD.from_pretrained(tmp_path / "out")
    assert (model.process.family, model.schedule, model.tokenizer) == ("uniform", Geometric(sigma_max=10.0), None)
    assert model.config.n_heads == HEADS
    with pytest.raises(ValueError, match=r"tokenizer: expected the tokeniser of 258 tokens, got none"):
        load_model(tmp_path / "out")


def test_a_run_is_not_written_over_nor_told_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for folder in (run, checkpoint):
        assert main(["convert", str(run), str(folder)]) == 2
        assert f"{folder}: expected no run of sedd train there" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (tmp_path / "mine.yaml").write_text("graph: {type: uniform}")
    assert main(["convert", str(run), str(tmp_path / "out"), "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "a run of sedd train with its own configuration; omit config" in capsys.readouterr().err
    checkpoint.rename(tmp_path / "best")  # a checkpoint under another name
    assert load_model(tmp_path / "best").config is not None


def test_a_model_card_that_stays_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hub(tmp_path)
    line = ["convert", str(source), str(tmp_path / "out")]
    for stays in (False, True):
        assert main(line) == 0
        assert ("README.md exists and is not changed" in capsys.readouterr().out) == stays
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "who may read one may read all"


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        (EMA["shadow_params"][:-1], r"ema.shadow_params: expected at least 30 tensors \(parameters\), got 29"),
        ([], r"ema.shadow_params: expected at least 30 tensors \(parameters\), got 0"),
        (torch.ones(30), "ema.shadow_params: expected a list of tensors, got Tensor"),
        ([torch.ones(2), *EMA["shadow_params"][1:]], r"expected \[258, \d+\] for vocab_embed\.embedding, got \[2\]"),
    ],
)
def test_averages_that_do_not_fit(averages: list[Tensor], message: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    change(tmp_path / "checkpoints-meta" / "checkpoint.pth", lambda saved: saved["ema"].update(shadow_params=averages))
    with pytest.raises(ValueError, match=message):
        SEDD.from_pretrained(tmp_path)


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    write_hub(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: (damaged|refused)"):
            SEDD.from_pretrained(tmp_path)
    torch.save([1, 2], weights)
    with pytest.raises(ValueError, match=r"expected a dictionary of tensors, got list"):
        SEDD.from_pretrained(tmp_path)
    torch.save({"step": 1}, weights)
    with pytest.raises(ValueError, match=r"expected tensors by name, got none"):
        SEDD.from_pretrained(tmp_path)
    torch.save({"linear.weight": torch.ones(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"tensors: expected those of a SEDD .*, got linear\.weight"):
        SEDD.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: damaged or not JSON"):
        SEDD.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        SEDD.from_pretrained(tmp_path)
    for name in ("none/at/all", "./none", "none.ckpt"):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
            SEDD.from_pretrained(name)
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("a: 1")
    with pytest.raises(FileNotFoundError, match=r"expected checkpoints-meta/checkpoint\.pth in this folder, got none"):
        SEDD.from_pretrained(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_another_pickle_protocol_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_hub(tmp_path) / "pytorch_model.bin"
    for protocol in (4, 5):
        torch.save(WEIGHTS, file, pickle_protocol=protocol)
        assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"{file}: " in error
        assert "save it with the default protocol of torch.save" in error
        torch.save({**WEIGHTS, "more": Malicious(f"touch {tmp_path / 'executed'}")}, file, pickle_protocol=protocol)
        with pytest.raises(ValueError, match="expected pickle protocol 2 or 3, got 4 or newer"):
            SEDD.from_pretrained(tmp_path)
        assert not (tmp_path / "executed").exists()
    torch.save(WEIGHTS, file, pickle_protocol=3)
    assert SEDD.from_pretrained(tmp_path).config.n_blocks == BLOCKS


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("write", [write_hub, write_run, write_lightning])
def test_flipped_bytes_in_a_pickle_are_an_error_of_its_file_or_do_not_matter(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = write(tmp_path)
    file = next(path for path in tmp_path.rglob("*") if path.suffix in PICKLES)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    start = whole.index(pickled)
    draw = random.Random(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[start + draw.randrange(len(pickled))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            SEDD.from_pretrained(source)
        except ValueError as error:
            messages.append(str(error))
    assert all(str(file) in message for message in messages)
    assert 100 < len(messages) < 300


class Malicious:
    """Runs a command when a pickle of it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def hide(place: str, evil: Malicious, folder: Path) -> Path:
    if place == "hub":
        write_hub(folder)
        torch.save({**WEIGHTS, "output_layer.linear.bias": evil}, folder / "pytorch_model.bin")
        return folder
    if place == "old format":
        write_hub(folder)
        torch.save({**WEIGHTS, "more": evil}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return folder
    if place == "released run":
        write_run(folder)
        torch.save({"model": WEIGHTS, "ema": EMA, "step": evil}, folder / "checkpoints-meta" / "checkpoint.pth")
        return folder
    return write_lightning(folder, hyper_parameters={"config": omegaconf.OmegaConf.create({"a": 1}), "evil": evil})


@pytest.mark.parametrize("place", ["hub", "old format", "released run", "lightning"])
def test_a_checkpoint_that_tries_to_execute_code_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "executed"
    (tmp_path / "theirs").mkdir()
    source = hide(place, Malicious(f"touch {trace}"), tmp_path / "theirs")
    file = next(path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pth", ".ckpt"))
    with pytest.raises(
        ValueError, match=r"refused, no code was executed: expected only tensors and data, got (posix|nt)\.system"
    ):
        SEDD.from_pretrained(source)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "refused, no code was executed" in capsys.readouterr().err
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    """The file size limit of the process stands in for the disk."""
    folder = write_ours(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = SEDD.from_pretrained(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"model: could not be written; existing files are unchanged"):
            model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: SEDD("tiny", Absorbing(27)), "schedule: expected a noise schedule, got None"),
        (lambda: SEDD("tiny", RankOne(torch.tensor([0.5, 0.25, 0.25])), LogLinear()), "process: .* has no name"),
    ],
)
def test_a_model_that_cannot_be_described_is_not_saved(model: Callable[[], SEDD], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        model().save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
