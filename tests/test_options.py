"""Options from the command line and from files, and that nothing in a file can name code, hang or crash."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("rich")

import omegaconf
import torch

from sedd.cli import main
from sedd.commands.judge import load_judge
from sedd.config import TrainConfig, load_config
from sedd.hub import SEDD
from sedd.hub.weights import read_weights
from sedd.options import add_options, build, checked, tree
from sedd.plain import MAX_BYTES, MAX_DEPTH, read_json, read_plain
from sedd.progress import console, printable

# -- dataclasses -------------------------------------------------------------------------------------------------------


@dataclass
class Inner:
    """Details."""

    rate: float = 0.5
    """A rate of 5%."""


@dataclass
class Outer:
    """All."""

    count: int
    """How many."""
    inner: Inner = field(default_factory=Inner)
    """Details"""
    name: str | None = None
    """A name."""
    on: bool = False
    """Whether."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    numbers: list[int] = field(default_factory=lambda: [1, 2])
    """Some."""
    pair: tuple[float, float] = (0.0, 1.0)
    """Two."""
    either: int | str = 3
    """A number or a word."""
    extra: dict[str, float] = field(default_factory=dict)


def parse(*words: str) -> Outer:
    parser = ArgumentParser()
    add_options(parser, Outer, keys={"extra": {"x": "An entry."}})
    given = vars(parser.parse_args(words))
    return build(Outer, checked(Outer, tree(given), "--", words=True))


def test_words_of_the_command_line_become_values() -> None:
    assert parse("--count", "3") == Outer(3)
    line = "--count=1_000 --inner.rate 1e-3 --name x,y --on --kind b --pair 0.5,2 --either 7 --extra.x 1"
    expected = Outer(1000, Inner(1e-3), "x,y", True, "b", pair=(0.5, 2.0), either=7, extra={"x": 1.0})
    assert parse(*line.split()) == expected
    assert parse("--count", "1", "--name", "null", "--on=false", "--either", "word") == Outer(1, either="word")
    for words in ("16,64", "[16,64]", "[16, 64]", "(16,64)", "16, 64", '["16","64"]'):
        assert parse("--count", "1", "--numbers", words).numbers == [16, 64]
    assert parse("--count", "1", "--numbers", "[]").numbers == []


def test_help_is_made_of_the_docstrings() -> None:
    parser = ArgumentParser()
    add_options(parser, Outer, keys={"extra": {"x": "An entry."}})
    text = " ".join(parser.format_help().split())
    for words in ("--count INT How many.", "--inner.rate NUMBER A rate of 5%. (default: 0.5)", "--extra.x NUMBER An"):
        assert words in text
    for words in ("--kind {a,b} Which. (default: a)", "--numbers INT,... Some. (default: 1,2)", "--name TEXT A name."):
        assert words in text


BAD: list[tuple[Any, str]] = [
    ({"coumt": 1}, "coumt: no such option; did you mean 'count'?"),
    ({"inner": {"class_path": "os.system"}}, "inner.class_path: no such option"),
    ({"inner": "other.yaml"}, "inner: expected options by name, got 'other.yaml'"),
    ({"inner": {"rate": "1"}}, "inner.rate: expected a number, got '1'"),
    ({"count": 1.0}, "count: expected a whole number, got 1.0"),
    ({"count": True}, "count: expected a whole number, got True"),
    ({"count": None}, "count: expected a whole number, got None"),
    ({"name": 5}, "name: expected text, got 5"),
    ({"name": ["x" * 1000]}, "name: expected text, got ['xxx"),
    ({"on": "true"}, "on: expected true or false, got 'true'"),
    ({"on": 1}, "on: expected true or false, got 1"),
    ({"kind": "c"}, "kind: expected one of a, b; got 'c'"),
    ({"kind": ["a"]}, "kind: expected one of a, b; got"),
    ({"numbers": 3}, "numbers: expected a list, got 3"),
    ({"numbers": [1, "2"]}, "numbers: expected a whole number, got '2'"),
    ({"pair": [1]}, "pair: expected 2 values, got 1"),
    ({"extra": [1]}, "extra: expected names with values, got [1]"),
    ({"extra": {"x": {"class_path": "a"}}}, "extra.x: expected a number, got {'class_path': 'a'}"),
    ({"inner": {"rate": 10**400}}, "inner.rate: expected a number, got 1000"),
    ([], "file: expected options by name, got []"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_values_of_another_type_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        checked(Outer, given)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


def test_the_command_line_comes_before_files_and_later_files_before_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.yaml"
    first.write_text(json.dumps({"lr": 0.1, "seed": 1, "model": {"length": 8, "n_heads": 2}}))
    second.write_text("lr: 2e-1\nwarmup: 7\nmodel: {length: 9}\n")
    seen: list[TrainConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sedd.commands.train._train", lambda options, resume, lock: seen.append(options) or 0)
        run_dir = f"--run_dir={tmp_path / 'run'}"
        line = ["train", "--seed=3", run_dir, "--config", str(first), "--config", str(second), "--model.n-heads=4"]
        assert main(line) == 0
    (config,) = seen
    assert (config.lr, config.seed, config.warmup, config.model.length, config.model.n_heads) == (0.2, 3, 7, 9, 4)


# -- files that others have written ------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the module ``canary``, which can be imported, has been."""
    trace = tmp_path / "imported"
    code = f"open({str(trace)!r}, 'w').close()\nclass Evil: ...\n"
    (tmp_path / "canary.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    return trace


EVIL = {"class_path": "canary.Evil", "init_args": {}}
FILES = [
    *(
        (
            {"data": EVIL},
            EVIL,
            {"model": EVIL},
            {"lr": EVIL},
            {"betas": [EVIL, EVIL]},
            {"schedule_params": {"eps": EVIL}},
        )
    ),
    *({"data": "canary.Evil"}, {"__path__": "canary.py"}, {"config": "other.json"}, {"data": {"source": EVIL}}),
    *({"$ref": "canary.Evil"}, {"_target_": "canary.Evil"}, {"model": {"__class__": "canary.Evil"}}),
]


@pytest.mark.parametrize("options", FILES, ids=map(json.dumps, FILES))
def test_nothing_that_a_file_of_options_names_is_imported(
    options: dict[str, Any], canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "other.json"):
        Path(name).write_text(json.dumps(options if name == "config.json" else {"data": EVIL}))
    Path("config.yaml").write_text(json.dumps(options))
    lines = [["train", "--config", "config.json"], ["train", "--config", "config.yaml"]]
    lines += [["train", "--run_dir", ".", "--resume"]]
    for line in lines:
        assert main(line) == 2
    with pytest.raises(ValueError, match=r"^config\.json: not the options of a run: "):
        load_config("config.json")
    assert not canary.exists()


def test_yaml_tags_name_nothing(canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for tag in (
        "python/object:canary.Evil {}",
        "python/name:canary.Evil",
        "python/module:canary",
        "python/object/apply:os.system [ls]",
    ):
        path.write_text(f"data: !!{tag}\n")
        with pytest.raises(ValueError, match=r"config\.yaml: damaged or not YAML: could not determine a constructor"):
            read_plain(path)
    assert not canary.exists()


DEEP = 100_000
LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
)
TOO_DEEP = f"nested too deeply: expected at most {MAX_DEPTH} levels"
HOSTILE = {
    "deep.json": ("[" * DEEP + "]" * DEEP, TOO_DEEP),
    "objects.json": ('{"a":' * DEEP + "1" + "}" * DEEP, TOO_DEEP),
    "no_end.json": ("[" * DEEP, TOO_DEEP),
    "a_little_deep.json": ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", TOO_DEEP),
    "deep.yaml": ("lr: " + "[" * DEEP + "]" * DEEP, TOO_DEEP),
    "blocks.yaml": ("lr: " + "\n" + "- " * DEEP, TOO_DEEP),
    "laughs.yaml": (LAUGHS, "expected no aliases, got one (*name)"),
    "cycle.yaml": ("a: &a [*a]", "expected no aliases, got one (*name)"),
    "large.json": (" " * MAX_BYTES + "{}", "too large: expected at most 1,048,576 bytes"),
    "large.yaml": ("a: 1\n" + "#" * MAX_BYTES, "too large"),
    "digits.json": ('{"lr": ' + "9" * 10_000 + "}", "damaged or not JSON"),
    "list.json": ("[]", "expected an object (names with values), got list"),
    "bytes.json": (b"\xff\xfe{}", "codec can't decode"),
    "tabs.yaml": ("\t- a: [", "damaged or not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reads: list[Callable[[Path], Any]] = [read_plain, load_config]
    reads += [read_json] if path.suffix == ".json" and "large" not in name else []
    for read in reads:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)
    for line in (
        ["train", "--config", str(path)],
        ["convert", str(tmp_path), str(tmp_path / "out"), "--config", str(path)],
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err


def test_plain_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-3\nb: [1, 2.5, .5e1]\nc: {d: null, e: true, f: 'x'}\n")
    assert read_plain(path) == {"lr": 1e-3, "b": [1, 2.5, 5.0], "c": {"d": None, "e": True, "f": "x"}}
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}]}')  # with a byte-order mark
    assert read_plain(tmp_path / "a.json") == {"a": [1, {"b": None}]}
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read_plain(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["config.json", ".hydra/config.yaml"])
@pytest.mark.parametrize("kind", ["class_path", "deep"])
def test_the_configuration_beside_weights_of_others(name: str, kind: str, canary: Path, tmp_path: Path) -> None:
    config = tmp_path / name
    weights = tmp_path / ("pytorch_model.bin" if name == "config.json" else "checkpoints-meta/checkpoint.pth")
    for file in (config, weights):
        file.parent.mkdir(exist_ok=True)
    torch.save({"vocab_embed.embedding": torch.ones(258, 8), "rotary_emb.inv_freq": torch.ones(2)}, weights)
    evil = json.dumps({"graph": EVIL, "noise": EVIL, "model": EVIL, "auto_map": {"AutoModel": "canary.Evil"}})
    config.write_text(evil if kind == "class_path" else "[" * DEEP)
    with pytest.raises(ValueError, match="graph.type: .* got none" if kind == "class_path" else "nested too deeply"):
        SEDD.from_pretrained(tmp_path)
    assert not canary.exists()


def many(levels: int) -> list[Any]:
    """A list that holds the same list ten times, and so on: small in a pickle, huge when it is written out."""
    result: list[Any] = []
    for _ in range(levels):
        result = [result] * 10
    return result


def test_hyper_parameters_of_others(canary: Path, tmp_path: Path) -> None:
    import canary as module

    canary.unlink()
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    path, weights = tmp_path / "last.ckpt", {"a": torch.ones(1)}
    for name, value in (("cycle", cycle), ("deep", deep), ("many", many(12))):
        torch.save({"state_dict": weights, "hyper_parameters": {name: value}}, path)
        with pytest.raises(ValueError, match=r"last\.ckpt: hyper_parameters: expected at most 1,000,000 values and 64"):
            read_weights(path)
    config = omegaconf.OmegaConf.create({"graph": EVIL, "other": "${oc.env:HOME}"})
    torch.save({"state_dict": weights, "hyper_parameters": {"config": config}}, path)
    monkey = sys.modules.pop("canary")
    assert read_weights(path)[1] == {"graph": EVIL, "other": "${oc.env:HOME}"}, "nothing is resolved"
    sys.modules["canary"] = monkey
    torch.save({"state_dict": weights, "hyper_parameters": module.Evil()}, path)
    del sys.modules["canary"]
    with pytest.raises(ValueError, match=r"expected only tensors and data, got canary\.Evil"):
        read_weights(path)
    assert not canary.exists()


def test_torch_does_not_advise_to_execute_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    scripted = path.read_bytes()
    hostile = [b"\x80\x02K\x01Q.", b"\x80\x02(lp0\n\xff", b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", scripted]
    for content in (*hostile, b"\x80\x02c\x1b[31m\nx\n."):
        path.write_bytes(content)
        assert main(["convert", str(path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error
        for word in ("weights_only", "trust the source", "allowlist", "arbitrary code", "\x1b"):
            assert word not in error


def test_a_judge_brings_no_code_of_its_own(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers may ask whether to run the folder's code
    folder = tmp_path / "judge"
    folder.mkdir()
    classes = {
        "AutoConfig": "canary.Evil",
        "AutoTokenizer": ["canary.Evil", None],
        "AutoModelForCausalLM": "canary.Evil",
    }
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "mine", "tokenizer_class": "Mine", "auto_map": classes}))
    (folder / "canary.py").write_text((tmp_path / "canary.py").read_text())
    with pytest.raises(ValueError, match=r"judge: expected a causal language model, got .*, which cannot be loaded"):
        load_judge(str(folder))
    assert not canary.exists()


# -- the terminal ------------------------------------------------------------------------------------------------------


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31mred\x9b2J\u202e\x07\udcff\n.txt"
    assert printable(name) == "a␛[31mred�2J�␇�␊.txt"
    assert main(["sample", str(tmp_path / name)]) == 2
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    assert main([f"--{name}"]) == 2
    assert main(["train", f"--{name}"]) == 2
    console().print(name)
    printed = "".join(capsys.readouterr())
    assert printed.count("␛[31m") == 4
    assert not set("\x1b\x9b\u202e\x07\udcff") & set(printed)
