"""The command line, end to end, and the configuration it reads and writes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

pytest.importorskip("rich")

import torch

import sedd.cli
import sedd.runtime
from sedd.__main__ import main as program
from sedd.cli import main
from sedd.commands.sample import parse_template, render
from sedd.config import ModelOptions, TrainConfig, load_config
from sedd.data.tokenizer import get_tokenizer
from sedd.hints import pip_install
from sedd.hints import program as command
from sedd.runtime import autocast_dtype, resolve_device

COMMANDS = ("train", "sample", "infill", "eval", "play", "report", "reproduce", "convert", "info")
MEASURES = ("perplexity", "generative", "harness", "latency")
LENGTH = 16
TEXT = "".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(2000))
# one thread wherever the run is trained, and small enough for seconds
TRAIN = [
    *("train", "--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=32", f"--model.length={LENGTH}"),
    *("--steps=200", "--batch_size=16", "--warmup=5", "--lr=1e-2", "--valid_every=50", "--valid_blocks=8", "--seed=3"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, used by all tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "cats"
    source = [f"--data.source={text}", f"--data.cache_dir={text.parent / 'cache'}"]
    assert main([*TRAIN, *source, f"--run_dir={folder}"]) == 0
    return folder


# -- the commands ------------------------------------------------------------------------------------------------------


def test_train_says_where_things_are_and_goes_on_from_there(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.json"), "--run_dir", str(again), "--steps", "60"]) == 0
    printed = capsys.readouterr().err
    assert "validation" in printed
    assert f"sedd sample {again}" in printed
    assert str(again / "checkpoints" / "step_00000060") in printed
    assert main(["train", "--run_dir", str(again), "--resume", "--steps", "200"]) == 0
    assert load_config(again / "config.json").steps == 200

    def losses(folder: Path) -> list[str]:
        return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]

    assert losses(again) == losses(run), "--config and --resume change nothing but what is given"


def test_sample(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(*options: str) -> list[dict[str, object]]:
        out = tmp_path / "texts.json"
        assert main(["sample", str(run), "--json", str(out), *options]) == 0
        found: list[dict[str, object]] = json.loads(out.read_text())
        return found

    three = texts("--num", "3", "--steps", "4", "--batch_size", "2")
    assert "3 of 3" in capsys.readouterr().out
    assert [len(row["tokens"]) for row in three] == [LENGTH] * 3
    assert all(0 <= token < 257 for row in three for token in row["tokens"]), "no MASK is left"
    assert len({row["text"] for row in three}) == 3
    assert texts("--num", "3", "--steps", "4", "--batch_size", "2") == three
    assert texts("--num", "1", "--steps", "4", "--seed", "1") != three[:1]
    assert len(texts("--length", "24", "--sampler", "euler", "--steps", "2")[0]["tokens"]) == 24
    assert texts("--temperature", "0.7", "--top_p", "0.9") != texts()
    margin, grid = ["--steps", "4", "--sampler", "margin"], "--sampler_params.grid"
    assert texts(*margin) == texts(*margin, grid, "uniform") != texts(*margin, grid, "cosine")


@pytest.mark.parametrize("template", ["the cat {{5}}", "{{4}} mat", "the {{3}} sat on {{6}}é{{2}}\n", "{{16}}"])
def test_infill_keeps_every_fixed_token(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    out = tmp_path / "filled.json"
    assert main(["infill", str(run), template, "--num=3", "--steps=4", "--live", "--json", str(out)]) == 0
    tokens, is_fixed = parse_template(template, get_tokenizer("bytes"))
    rows = json.loads(out.read_text())
    assert len(rows) == 3
    for row in rows:
        filled = torch.tensor(row["tokens"])
        assert torch.equal(filled[is_fixed], tokens[is_fixed])
        assert int(filled.max()) < 257
    assert capsys.readouterr().out.count(" of 3") >= 3


def test_eval_prints_and_writes_the_bound_beside_ngrams(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "bound.png"
    arguments = ["eval", "perplexity", str(run), "--draws", "4", "--json", str(figures), "--plot", str(picture)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    model, unigram, bigram = found["texts"].values()
    assert list(found["texts"]) == ["validation text", "unigram", "bigram"]
    assert bigram["bits_per_byte"] < unigram["bits_per_byte"] < 8
    assert model["bits_per_byte"] < unigram["bits_per_byte"], "two hundred steps learn more than letter frequencies"
    for row in (model, unigram, bigram):
        assert f"{row['bits_per_byte']:.4f}" in printed
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** row["nats_per_token"])
    assert 0 < model["standard_error"] < model["nats_per_token"]
    assert picture.stat().st_size > 1000
    first = figures.read_bytes()
    assert main(arguments) == 0
    assert figures.read_bytes() == first, "the same seed gives the same figures"

    perplexity = ["eval", "perplexity", str(run)]
    assert main([*perplexity, "--draws", "1", "--blocks", "1", "--json", str(figures)]) == 0
    one = json.loads(figures.read_text())["texts"]["validation text"]
    assert one["standard_error"] is None, "one block has no standard error"

    other = tmp_path / "other.txt"
    other.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich! " * 20)
    assert main([*perplexity, str(other), "--draws", "4", "--json", str(figures)]) == 0
    (strange,) = json.loads(figures.read_text())["texts"].values()
    assert strange["bits_per_token"] > model["bits_per_token"]


def test_the_python_of_the_readme(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_model" in block)
    exec(code.replace("runs/first", str(run)), {})
    assert len(capsys.readouterr().out) >= 32


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("sedd_ext:", "instruction sets:", "loglinear", "tweedie", "preset medium"))
    assert main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('"hidden_size": 32', "200 steps", "step_00000200"))


@pytest.mark.parametrize("command", [*COMMANDS, *(f"eval {name}" for name in MEASURES)])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  sedd {command}" in text or f"\n  sedd {command} " in text.partition("examples")[2]
    options = re.findall(r"^  (--[\w.]+)[^\n]*?(?:\n\s+|  +)(\S+)", text, re.MULTILINE)
    assert len(options) == text.count("\n  --")
    assert all(not words.startswith("(") for _, words in options), "an option without help shows only its type"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_program_without_a_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == (0 if arguments else 2)
    assert all(name in printed.out + printed.err for name in COMMANDS)


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD = [
    (
        "frobnicate",
        "command: expected one of train, sample, infill, eval, play, report, reproduce, convert, info; got "
        "'frobnicate'",
    ),
    ("trian", "got 'trian'; did you mean 'train'?"),
    (
        "eval perplexiti {run}",
        "measure: expected one of perplexity, generative, harness, latency; got 'perplexiti'",
    ),
    ("train --frobnicate 1", "--frobnicate: sedd train has no such option (see sedd train --help)"),
    ("train --run-dri x", "--run_dri: sedd train has no such option; did you mean '--run_dir'?"),
    ("train --source x", "--source: sedd train has no such option; did you mean '--data.source'?"),
    ("train --steps", "--steps: expected one argument (see sedd train --help)"),
    ("train --steps many", "--steps: expected a whole number, got 'many'"),
    ("train --steps 0", "--steps: expected at least 1, got 0"),
    ("train --lr -1", "--lr: expected a positive number, got -1"),
    ("train --ema 1.5", "--ema: expected 0 <= ema < 1, got 1.5"),
    ("train --betas [0.9,1]", "--betas: expected 0 <= betas < 1"),
    ("train --betas 0.9", "--betas: expected 2 values, got 1"),
    ("train --process circular", "--process: expected one of absorbing, uniform, hybrid; got 'circular'"),
    ("train --process uniforn", "got 'uniforn'; did you mean 'uniform'?"),
    ("train --process hybrid --uniform_fraction 2", "--uniform_fraction: expected a number in [0, 1], got 2.0"),
    ("train --schedule zigzag", "--schedule: expected one of loglinear, geometric, cosine, polynomial; got 'zigzag'"),
    ("train --schedule_params.power 1", "schedule_params: schedule 'loglinear' has the parameters eps; got 'power'"),
    ("train --schedule_params.zig 1", "--schedule_params.zig: sedd train has no such option"),
    ("train --schedule_params.eps 7", "--schedule_params.eps: expected a number between 0 and 1"),
    ("train --tokenizer {tmp}/words.json --run_dir {tmp}/r", "--tokenizer: expected gpt2, bytes, text8, a tokenizer"),
    ("train --lr_schedule zigzag", "--lr_schedule: expected one of constant, linear, cosine, wsd; got 'zigzag'"),
    ("train --lr_final 2", "--lr_final: expected a number in [0, 1], got 2.0"),
    ("train --report_to paper", "--report_to: expected one of tensorboard, wandb, none; got 'paper'"),
    ("train --init {tmp}/none --run_dir {tmp}/r", "{tmp}/none: no such file or folder"),
    ("train --model.preset huge", "--model.preset: expected one of tiny, small, medium, large; got 'huge'"),
    ("train --model.n_heads 3", "--model.hidden_size: expected a multiple of 2 * n_heads = 6"),
    ("train --device toaster", "--device: expected auto, cpu, cuda or cuda:N; got 'toaster'"),
    ("train --data.source {tmp}/no.txt --run_dir {tmp}/r", "--data.source: expected a file or folder, got"),
    (
        "train --data.valid_fraction 2 --data.source {text} --run_dir {tmp}/r",
        "--data.valid_fraction: expected a number",
    ),
    ("train --data.source {text} --tokenizer text8 --run_dir {tmp}/r", "text: expected the 27 symbols of text8"),
    ("train --data.source {text} --model.length 900000 --run_dir {tmp}/r", "expected at least one block of 900000"),
    ("train --config {tmp}/no.json", "{tmp}/no.json: no such file"),
    ("train --run_dir {run}", "already contains a run"),
    (
        "train --run_dir {run} --resume --batch_size 3",
        "--batch_size: expected 16 sequences per optimiser step as before, got 3",
    ),
    ("train --run_dir {tmp}/none --resume", "run_dir: expected a run to resume, got {tmp}/none"),
    ("sample", "the following arguments are required: run (see sedd sample --help)"),
    ("sample {run} other", "unexpected 'other'"),
    ("sample {tmp}/none", "{tmp}/none: no such file or folder"),
    ("sample {tmp}", "{tmp}: expected checkpoints or model.safetensors"),
    ("sample {run} --steps 0", "steps: expected at least 1, got 0"),
    ("sample {run} --length 0", "length: expected at least 1, got 0"),
    (
        "sample {run} --sampler magic",
        "--sampler: expected one of tweedie, tweedie_cosine, euler, ancestral, remask, predictor_corrector, first_hit",
    ),
    ("sample {run} --sampler_params.gamma 1", "--sampler: expected the name of the sampler that has these parameters"),
    ("sample {run} --sampler_params.zig 1", "--sampler_params.zig: sedd sample has no such option"),
    (
        "sample {run} --sampler tweedie --sampler_params.gamma 1",
        "sampler_params: sampler 'tweedie' has the parameters denoise, grid; got 'gamma'",
    ),
    (
        "sample {run} --sampler entropy_bounded --sampler_params.gamma much",
        "--sampler_params.gamma: expected a number, got 'much'",
    ),
    (
        "sample {run} --sampler entropy_bounded --sampler_params.gamma -1",
        "--sampler_params.gamma: expected a number of at least 0, got -1.0",
    ),
    (
        "sample {run} --sampler semi_autoregressive --sampler_params.sampler magic",
        "--sampler_params.sampler: expected one of tweedie",
    ),
    (
        "sample {run} --sampler semi_autoregressive --sampler_params.sampler margin --sampler_params.gamma 1",
        "sampler_params: sampler 'margin' has the parameters grid, noise; got 'gamma'",
    ),
    ("sample {run} --temperature 0", "temperature: expected a positive number, got 0.0"),
    ("sample {run} --top_p 1.5", "top_p: expected a number in (0, 1], got 1.5"),
    ("infill {run}", "template"),
    ("infill {run} nothing", "template: expected a gap, got none in 'nothing'; write {{{{n}}}}"),
    ("infill {run} a{{{{0}}}}b", "template: expected gaps of at least 1 token, got {{{{0}}}}"),
    ("eval perplexity {run} --draws 0", "draws: expected at least 1, got 0"),
    ("eval perplexity {run} {tmp}/no.txt", "texts: expected a file or folder, got '{tmp}/no.txt'"),
    ("eval perplexity {run} {text} ptb --plot a.png", "--plot: expected one text, got 2"),
    (
        "eval perplexity {run} --json {tmp}/no/figures.json",
        "json: cannot write {tmp}/no/figures.json: no such folder {tmp}/no",
    ),
    ("info {tmp}/none", "{tmp}/none: no such file or folder"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_line(
    line: str, message: str, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"run": str(run), "tmp": str(tmp_path), "text": str(text)}
    capsys.readouterr()
    assert main([word.format(**names) for word in line.split()]) == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("sedd: error: ")
    assert message.format(**names) in last
    assert not any("Traceback" in row or "usage:" in row for row in before)
    assert not (tmp_path / "r").exists(), "a run that cannot start leaves no folder"


def test_damage_and_debugging(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"lr": "fast"}')
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
    assert "config.json: not the options of a run: lr: expected a number, got 'fast'" in capsys.readouterr().err
    monkeypatch.setenv("SEDD_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("two\nlines"), 1, "sedd: error: two lines\n"),
        (OSError("no space left"), 2, "sedd: error: no space left\n"),
        (KeyboardInterrupt(), 130, "sedd: interrupted\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fails(run: str | None) -> int:
        raise error

    info = sedd.cli.COMMANDS["info"]
    assert info is not None
    monkeypatch.setitem(sedd.cli.COMMANDS, "info", dataclasses.replace(info, run=fails))
    assert main(["info"]) == code
    assert capsys.readouterr().err == message


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("sedd.")]:
        monkeypatch.setattr(sedd, name.removeprefix("sedd."), sys.modules[name], raising=False)  # so for what follows
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert program() == 2
    hint = pip_install("train", "rich")
    assert capsys.readouterr().err == f"sedd: error: needs rich.console: {hint}\n"
    with pytest.raises(ImportError, match=re.escape(f"sedd.Run needs rich.console: {hint}")):
        sedd.Run  # noqa: B018
    assert sedd.SEDD.__name__ == "SEDD", "the model needs torch alone"
    with pytest.raises(AttributeError, match="no attribute 'Sedd'"):
        sedd.Sedd  # noqa: B018


def test_hints_name_commands_that_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "an env" / "bin"
    folder.mkdir(parents=True)
    for name in ("sedd", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    for called in (str(folder / "sedd"), "an env/bin/sedd"):
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        assert command() == "'an env/bin/sedd'"
        assert pip_install("eval", "mauve") == "'an env/bin/python' -m pip install \"sedd_ext[eval]\""
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        assert command() == "sedd"
        assert pip_install("eval", "mauve") == 'python -m pip install "sedd_ext[eval]"'
    monkeypatch.setattr(sys, "argv", [str(Path(sedd.__file__).parent / "__main__.py")])
    assert command() == "python -m sedd"

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sedd.hints.distribution", missing)  # a folder of sources: no index knows sedd_ext
    for module, package in (("mauve", "mauve-text"), ("rich.table", "rich"), ("yaml", "pyyaml")):
        assert pip_install("eval", module) == f"python -m pip install {package}"


def test_every_exported_name_is_there() -> None:
    for name in sedd.__all__:
        assert getattr(sedd, name).__name__ == name


def test_a_closed_pipe_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m sedd info {run} | true"  # ends long before the first line is written
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stderr == ""


# -- text on the terminal ----------------------------------------------------------------------------------------------


def test_template() -> None:
    tokens, is_fixed = parse_template("a{{2}}{{1}} b{{3}}", get_tokenizer("text8"))
    assert is_fixed.tolist() == [True] + [False] * 3 + [True] * 2 + [False] * 3
    assert tokens[is_fixed].tolist() == [1, 0, 2]
    assert parse_template("{x} {{y}} {{1}}", get_tokenizer("bytes"))[1].sum() == len("{x} {{y}} "), (
        "other braces are text"
    )


def test_what_is_shown_cannot_steer_the_terminal() -> None:
    tokenizer = get_tokenizer("bytes")
    tokens = torch.tensor([*b"\x1b[31mred\x07\r\n\tok", 257, 256])
    is_fixed = torch.tensor([False] * len(tokens))
    assert render(tokens, is_fixed, tokenizer).plain == "␛[31mred␇␍\n\tok█<|endoftext|>"
    shown = render(torch.tensor([*b"abcd"]), torch.tensor([True, False, False, True]), tokenizer)
    assert [(span.start, span.end, span.style) for span in shown.spans] == [(1, 3, "bold green")]


# -- the configuration -------------------------------------------------------------------------------------------------


def test_configurations_survive_a_file(tmp_path: Path) -> None:
    config = TrainConfig(
        model=ModelOptions(preset="small", length=64),
        process="hybrid",
        schedule="geometric",
        schedule_params={"sigma_max": 5.0},
        betas=(0.8, 0.95),
        max_minutes=1.5,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "config.json") == config
    resolved = config.resolved()
    assert resolved.model.hidden_size == 768
    assert resolved.schedule_params == {"sigma_min": 1e-5, "sigma_max": 5.0}
    assert resolved.resolved() == resolved
    assert config.differences(resolved) == {}
    changed = dataclasses.replace(config, seed=1, steps=3, model=ModelOptions(preset="small", length=32))
    assert config.differences(changed) == {"model.length": (64, 32), "seed": (0, 1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lr": 1', "damaged or not JSON: Expecting ',' delimiter"),
        ("[]", "expected an object (names with values), got list"),
        ('{"model": 3}', "model: expected options by name, got 3"),
        ('{"learning_rate": 1}', "learning_rate: no such option"),
        ('{"batch_size": 0.5}', "batch_size: expected a whole number, got 0.5"),
        ('{"warmup": -1}', "warmup: expected at least 0, got -1"),
        ('{"lr": NaN}', "lr: expected a positive number, got nan"),
    ],
)
def test_a_bad_configuration_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for built, chosen in ((True, "cuda"), (False, "cpu")):  # a GPU is of no use without kernels for it
        monkeypatch.setattr(sedd.runtime, "has_cuda_kernels", built)
        with nullcontext() if built else pytest.warns(UserWarning, match="no CUDA kernels; using the CPU"):
            assert resolve_device("auto").type == chosen
    with pytest.raises(ValueError, match="no CUDA kernels; use cpu"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="torch sees"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match="the kernels have no other"):
        resolve_device("meta")
    assert autocast_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert autocast_dtype("fp32", torch.device("cpu")) is None
    for has, dtype in ((True, torch.bfloat16), (False, None)):  # auto asks the processor
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has}, raising=False)
        assert autocast_dtype("auto", torch.device("cpu")) == dtype
