"""Classes from outside the package: named on the command line they work everywhere, named in a file alone nowhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("rich")

import torch
from safetensors.torch import load_file

from sedd.cli import main
from sedd.data.corpora import CORPORA
from sedd.data.options import DataConfig
from sedd.data.tokenizer import TOKENIZERS, get_tokenizer
from sedd.diffusion import OBJECTIVES, SAMPLERS, SCHEDULES
from sedd.hub import load_model
from sedd.registry import import_outside

SOURCES = {
    "schedule": '''
import math
import torch
from torch import nn
from sedd.diffusion import Schedule

class Power(Schedule, nn.Module):
    """A moved fraction of t^w, with a power w that is learned."""

    def __init__(self, power: float = 1.0, eps: float = 1e-3):
        nn.Module.__init__(self)
        self.eps = eps
        self.log_power = nn.Parameter(torch.tensor(math.log(power), dtype=torch.float64))

    def total(self, t):
        return -torch.log1p(-(1 - self.eps) * t.double() ** self.log_power.exp())

    def rate(self, t):
        power = self.log_power.exp()
        return (1 - self.eps) * power * t.double() ** (power - 1) * self.total(t).exp()
''',
    "objective": '''
from sedd.diffusion import Objective
from sedd_ext import reference

class PlainScoreEntropy(Objective):
    """Score entropy in plain PyTorch, with gradients of the schedule too."""

    def loss(self, diffusion, x_0, x_t, t, options):
        sigma, process = diffusion.schedule.total(t)[:, None], diffusion.process
        log_score = diffusion.network.head(diffusion.network.hidden(x_t, sigma[:, 0].detach()))
        shift = diffusion.step_options(sigma, x_t)["log_score_shift"]
        loss = reference.score_entropy_loss(log_score, x_t, x_0, sigma, process, log_score_shift=shift)
        return (options.scale * diffusion.schedule.rate(t) * loss[:, options.given :].sum(1)).float()
''',
    "sampler": '''
from dataclasses import dataclass
import torch
from sedd.diffusion import Sampler
from sedd_ext import Tweedie

@dataclass(frozen=True)
class HalfAtATime(Sampler):
    """Denoises half of the open positions of each sequence, over and over; then all that are left."""

    part: int = 2

    def __call__(self, walk):
        for i in range(self.steps):
            where = walk.open()
            if i + 1 < self.steps:
                where = where & (where.cumsum(1) % self.part == 1)
            t = torch.tensor(1 - i / self.steps, dtype=torch.float64)
            if bool(where.any()):
                walk.write(where, walk.draw(where, t, Tweedie(float(walk.schedule.total(t))), denoise=True))
            yield walk.tokens
''',
    "corpus": '''
import numpy as np
from sedd.data.batches import TokenBlocks, batches, valid_batches
from sedd.data.corpus import Corpus

class Ramps(Corpus):
    """Digits that count up and start again: 0 1 2 ... 9 0 1 ..."""

    def __init__(self, config, tokenizer, length):
        self.vocab_size, self.shape = 10, (length,)
        self._blocks = TokenBlocks([np.arange(4000, dtype=np.uint16) % 10], length)

    def batches(self, batch_size, *, seed):
        return batches(self._blocks, batch_size, seed=seed)

    def valid(self, count):
        return next(valid_batches(self._blocks, count))

    def n_bytes(self, blocks):
        return blocks.numel()

    def show(self, block):
        return " ".join("_" if token == 10 else str(token) for token in block.tolist())
''',
    "tokenizer": '''
import numpy as np
from sedd.data.tokenizer import Tokenizer

class Vowels(Tokenizer):
    """Vowels, and x for all other characters."""

    name, vocab_size, eot, LETTERS = "vowels", 6, None, "aeioux"

    def encode_array(self, text):
        return np.array([max(0, self.LETTERS.find(c)) if c in self.LETTERS else 5 for c in text], dtype=np.uint16)

    def byte_lengths(self):
        return np.ones(6, dtype=np.int64)

    def _token_bytes(self, token):
        return self.LETTERS[token].encode()
''',
}
CLASSES = {"schedule": "Power", "objective": "PlainScoreEntropy", "sampler": "HalfAtATime", "corpus": "Ramps"}
CLASSES["tokenizer"] = "Vowels"
REGISTRIES = {
    "schedule": SCHEDULES,
    "objective": OBJECTIVES,
    "sampler": SAMPLERS,
    "corpus": CORPORA,
    "tokenizer": TOKENIZERS,
}
TINY = [
    *("--model.hidden_size=16", "--model.n_blocks=1", "--model.n_heads=1", "--model.cond_dim=8", "--model.length=16"),
    *("--valid_every=2", "--valid_blocks=2", "--valid_draws=1", "--report_to=none", "--precision=fp32", "--steps=4"),
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, the current one, with a module of each kind; the registries are as before afterwards."""
    for kind, source in SOURCES.items():
        (tmp_path / f"my_{kind}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"my_{kind}", raising=False)
        for name in REGISTRIES[kind]:
            monkeypatch.setitem(REGISTRIES[kind], name, REGISTRIES[kind][name])
    (tmp_path / "text.txt").write_text("a house of many rooms, and open doors. " * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = {kind: set(registry) for kind, registry in REGISTRIES.items()}
    yield tmp_path
    for kind, registry in REGISTRIES.items():
        for name in set(registry) - known[kind]:
            del registry[name]
        sys.modules.pop(f"my_{kind}", None)


def train(folder: str, *options: str) -> int:
    return main(["train", "--run_dir", folder, "--data.source=text.txt", "--data.cache_dir=cache", *TINY, *options])


def name_of(kind: str) -> str:
    return f"my_{kind}:{CLASSES[kind]}"


def forget() -> None:
    """As in a new process."""
    for kind, registry in REGISTRIES.items():
        registry.pop(name_of(kind), None)
        sys.modules.pop(f"my_{kind}", None)


def test_one_of_each_kind(outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A learned schedule, an objective, a corpus and a sampler together, from training to a text."""
    options = [f"--{kind}={name_of(kind)}" for kind in ("schedule", "objective", "corpus")]
    assert train("run", *options, "--schedule_params.power=2") == 0, capsys.readouterr().err
    config = json.loads((outside / "run" / "config.json").read_text())
    assert [config[kind] for kind in ("schedule", "objective", "corpus")] == [o.partition("=")[2] for o in options]
    checkpoint = outside / "run" / "checkpoints" / "step_00000004"
    assert load_file(checkpoint / "model.safetensors")["schedule.log_power"].item() != pytest.approx(0.6931471805)
    assert "schedule.log_power" in load_file(checkpoint / "ema.safetensors")
    assert "schedule.log_power/exp_avg" in load_file(checkpoint / "optimizer.safetensors")

    forget()
    uses = [word for kind in ("schedule", "objective", "corpus") for word in ("--use", name_of(kind))]
    sampler = ["--sampler", name_of("sampler"), "--sampler_params.part=3", "--steps", "3", "--json", "texts.json"]
    assert main(["sample", "run", *sampler, *uses]) == 0
    (row,) = json.loads((outside / "texts.json").read_text())
    assert len(row["tokens"]) == 16
    assert max(row["tokens"]) < 10, "digits, and no MASK"
    assert row["text"] == " ".join(map(str, row["tokens"])), "as the corpus shows them"
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("there is a page"))
    for line in (["infill", "run", "1{{2}}3"], ["play", "run", "--port=0"]):
        assert main([*line, *uses]) == 2
        assert "run: expected a model of text, got" in " ".join(capsys.readouterr().err.split())
    loaded = load_model("run")
    learned = loaded.diffusion.schedule.state_dict()["log_power"]
    assert torch.equal(learned, load_file(checkpoint / "ema.safetensors")["schedule.log_power"])

    forget()
    assert main(["train", "--run_dir", "run", "--resume", "--steps=6", *uses]) == 0, "goes on"


def test_a_learned_schedule_is_resumed_bit_for_bit(outside: Path) -> None:
    options = [f"--schedule={name_of('schedule')}", f"--objective={name_of('objective')}"]
    assert train("whole", *options) == 0
    assert train("parts", *options, "--steps=2") == 0
    assert main(["train", "--run_dir", "parts", "--resume", "--steps=4", *options]) == 0
    ends = [load_file(outside / run / "checkpoints/step_00000004/model.safetensors") for run in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_tokenizer(outside: Path) -> None:
    assert train("run", f"--tokenizer={name_of('tokenizer')}") == 0
    forget()
    assert main(["sample", "run", "--steps=2", "--json=texts.json", "--use", name_of("tokenizer")]) == 0
    (row,) = json.loads((outside / "texts.json").read_text())
    assert set(row["text"]) <= set("aeioux")


def test_parameters_of_a_schedule_are_options(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"--schedule={name_of('schedule')}", "--help"])
    assert "my_schedule:Power (default: 1)" in " ".join(capsys.readouterr().out.split())
    assert main(["train", f"--schedule={name_of('schedule')}", "--schedule_params.sigma_max=2"]) == 2
    assert "has the parameters power, eps; got 'sigma_max'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", CLASSES)
def test_a_file_never_imports(outside: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration, a run that is resumed, and a run that is loaded name the class; the command line does not."""
    canary = outside / "canary"
    with open(outside / f"my_{kind}.py", "a") as file:
        file.write(f"\nimport pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    options = [] if kind == "sampler" else [f"--{kind}={name_of(kind)}"]
    objective = [f"--objective={name_of('objective')}"] if kind == "schedule" else []
    assert train("run", *options, *objective) == 0
    assert canary.exists() is (kind != "sampler")
    forget()
    canary.unlink(missing_ok=True)
    if kind == "sampler":
        (outside / "run" / "config.json").write_text(json.dumps({"sampler": name_of(kind)}))
    uses = ["--use", name_of("objective")] if objective else []
    for words in (
        ["train", "--config", "run/config.json", "--run_dir", "other", *uses],
        ["train", "--run_dir", "run", "--resume", "--steps=6", *uses],
        *([["sample", "run", "--steps=1", *uses]] if kind != "sampler" else []),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert kind == "sampler" or f"--use {name_of(kind)}" in error, error
        assert not canary.exists()
        assert f"my_{kind}" not in sys.modules


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("my_schedule", ValueError, "use: expected module:name, got 'my_schedule'"),
        ("my_schedule:Nothing", ImportError, "my_schedule has no Nothing"),
        ("no_such_module:Power", ImportError, "cannot import no_such_module; looked in"),
        ("my_schedule:math", ValueError, "expected a subclass of Schedule, Objective, Sampler, Corpus, Tokenizer"),
        ("json:JSONDecoder", ValueError, "expected a subclass of"),
    ],
)
def test_mistakes(outside: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        import_outside(name)


@pytest.mark.parametrize("method", ["labels", "labelled_batches"])
@pytest.mark.usefixtures("outside")
def test_a_corpus_that_does_not_tell_the_classes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_outside("my_corpus:Ramps")
    kind = CORPORA["my_corpus:Ramps"]
    corpus = kind(DataConfig(), get_tokenizer("bytes"), 16)
    arguments = ("validation", 3) if method == "labels" else (4,)
    options = {} if method == "labels" else {"seed": 0}
    with pytest.raises(
        NotImplementedError, match=f"^{method}: expected a corpus with classes, got Ramps, which has none"
    ):
        getattr(corpus, method)(*arguments, **options)
    monkeypatch.setattr(kind, "classes", 10)
    with pytest.raises(
        NotImplementedError, match=f"^{method}: expected a method of Ramps, which has 10 classes, got none"
    ):
        getattr(corpus, method)(*arguments, **options)
