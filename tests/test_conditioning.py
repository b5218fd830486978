"""What else a network may know than tokens and noise: positions in an image, and classes; and guidance by classes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sedd.diffusion import OBJECTIVES, Diffusion, Score, elbo, get_schedule, sample
from sedd.diffusion.objectives import get_objective
from sedd.diffusion.samplers import SAMPLERS
from sedd.diffusion.walk import Walk
from sedd.embeddings import LearnedPositions, Rotary
from sedd.network import DiffusionTransformer, ModelConfig
from sedd_ext import Absorbing, Hybrid, Tweedie, Uniform, reverse_probs

SIZES: dict[str, Any] = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8, "dropout": 0.0}
SHAPE = (3, 4, 2)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def network(dim: int = 6, **sizes: Any) -> DiffusionTransformer:
    """A network whose output depends on everything: no parameter is zero."""
    torch.manual_seed(0)
    made = DiffusionTransformer(ModelConfig(**{"length": 24, **SIZES, **sizes}), dim).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def tokens(batch: int = 3, dim: int = 6, length: int = 24) -> Tensor:
    return torch.randint(dim, (batch, length), generator=torch.Generator().manual_seed(1))


SIGMA = torch.tensor([0.3, 0.9, 2.0])


# -- positions ---------------------------------------------------------------------------------------------------------


def turned(rotary: Rotary, x: Tensor, length: int) -> Tensor:
    """x [d] at every position [L, d], in the pairs (i, i + d/2)."""
    cos, sin = rotary(length)
    first, second = x.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def test_attention_depends_on_distances_in_rows_and_columns() -> None:
    rows, columns, channels = SHAPE
    rotary = Rotary(8, SHAPE)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator)
    scores = (turned(rotary, q, 24) @ turned(rotary, k, 24).T).view(rows, columns, channels, rows, columns, channels)
    by_distance: dict[tuple[int, int], list[float]] = {}
    for place in itertools.product(*map(range, scores.shape)):
        r, c, _, r_2, c_2, _ = place
        by_distance.setdefault((r_2 - r, c_2 - c), []).append(float(scores[place]))
    assert len(by_distance) == 5 * 7
    for values in by_distance.values():
        assert max(values) - min(values) < 1e-5
    means = torch.tensor([np.mean(values) for values in by_distance.values()])
    assert (means[:, None] - means).abs().fill_diagonal_(1.0).min() > 1e-4, "no two distances are alike"


def test_positions_of_text_are_as_before() -> None:
    rotary = Rotary(8)
    inv_freq = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    angles = torch.outer(torch.arange(3, 8, dtype=torch.float32), inv_freq)
    cos, sin = rotary(5, 3)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())
    assert torch.equal(rotary.inv_freq, inv_freq)
    names = dict(DiffusionTransformer(ModelConfig(**SIZES), 6).named_parameters())
    assert not [name for name in names if name.startswith(("position_embed", "label_embed"))]


def test_embeddings_of_places() -> None:
    places = LearnedPositions(SHAPE, 1)
    with torch.no_grad():
        places.embedding.copy_(torch.tensor([[0], [100], [200], [0], [10], [20], [30], [0], [1]]))
        found = places(torch.zeros(1, 24, 1))
    assert found.flatten().tolist() == [100 * r + 10 * c + k for r in range(3) for c in range(4) for k in range(2)]


def test_a_network_of_images_knows_the_border() -> None:
    """Where all is masked, rotary positions alone are alike."""
    x = torch.full((1, 24), 5)
    with torch.no_grad():
        image, text = (network(shape=shape).hidden(x, SIGMA[:1])[0] for shape in (SHAPE, ()))
    assert torch.allclose(text, text[:1], atol=1e-5)
    assert (image[:, None] - image).abs().amax(2).fill_diagonal_(1.0).min() > 1e-3, "no two positions are alike"


def test_channels_have_embeddings() -> None:
    made = network(shape=SHAPE)
    x = tokens().view(3, 3, 4, 2)
    swapped = x.flip(3).reshape(3, 24)
    with torch.no_grad():
        here = made.hidden(x.reshape(3, 24), SIGMA).view(3, 12, 2, 16)
        there = made.hidden(swapped, SIGMA).view(3, 12, 2, 16).flip(2)
        assert not torch.allclose(here, there, atol=1e-3)
        assert made.position_embed is not None
        made.position_embed.embedding[-1] = made.position_embed.embedding[-2]
        here = made.hidden(x.reshape(3, 24), SIGMA).view(3, 12, 2, 16)
        there = made.hidden(swapped, SIGMA).view(3, 12, 2, 16).flip(2)
    assert torch.allclose(here, there, atol=1e-5), "the only difference between channels"


@pytest.mark.parametrize("shape", [(), SHAPE])
def test_learned_positions_are_the_only_ones(shape: tuple[int, ...]) -> None:
    made = network(shape=shape, positions="learned")
    x, order = tokens(), torch.randperm(24, generator=torch.Generator().manual_seed(2))
    assert made.position_embed is not None
    assert made.position_embed.embedding.shape == (24, 16)
    with torch.no_grad():
        assert not torch.allclose(made.hidden(x, SIGMA)[:, order], made.hidden(x[:, order], SIGMA), atol=1e-3)
        made.position_embed.embedding.zero_()
        assert torch.allclose(made.hidden(x, SIGMA)[:, order], made.hidden(x[:, order], SIGMA), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        ({"shape": SHAPE}, 20, "x_t: expected sequences of 24 tokens, 3 x 4 x 2, got 20"),
        ({"positions": "learned"}, 25, "x_t: expected at most the 24 learned positions, got 25"),
    ],
)
def test_lengths_without_positions(sizes: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**sizes).hidden(tokens(length=length), SIGMA)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shape": (3, 8)}, r"shape: expected rows, columns and channels, got \[3, 8\]"),
        ({"shape": (3, 4, 0)}, "shape: expected rows, columns and channels"),
        ({"shape": (3, 4, 3)}, "length: expected 36, the tokens of a block of 3 x 4 x 3, got 24"),
        ({"shape": SHAPE, "hidden_size": 12}, "hidden_size: expected a multiple of 4"),
        ({"shape": SHAPE, "hidden_size": 12, "positions": "learned"}, "hidden_size: expected a multiple of 4"),
        ({"positions": "sinus"}, "positions: expected one of rotary, learned, got 'sinus'"),
        ({"classes": -1}, "classes: expected at least 0, got -1"),
        ({"classes": 2, "causal": True}, "classes: expected 0 for a causal network, got 2"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, "length": 24, **sizes})


# -- classes -----------------------------------------------------------------------------------------------------------


def test_no_label_is_the_last_label() -> None:
    made = network(classes=4)
    with torch.no_grad():
        without = made.hidden(tokens(), SIGMA)
        assert torch.equal(without, made.hidden(tokens(), SIGMA, labels=torch.full((3,), 4)))
        conditional = made.hidden(tokens(), SIGMA, labels=torch.tensor([0, 1, 4]))
    assert not torch.allclose(without[:2], conditional[:2], atol=1e-3)
    assert torch.equal(without[2], conditional[2])


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (0, torch.zeros(3, dtype=torch.int64), "labels: expected none for a network without classes"),
        (4, torch.zeros(2, dtype=torch.int64), r"labels: expected an int64 tensor \[3\], got torch.int64 \[2\]"),
        (4, torch.zeros(3), r"labels: expected an int64 tensor \[3\], got torch.float32 \[3\]"),
        (4, torch.tensor([0, 5, 1]), r"labels: expected values in \[0, 4\], got values from 0 to 5"),
        (4, torch.tensor([0, -1, 1]), r"labels: expected values in \[0, 4\], got values from -1 to 1"),
    ],
)
def test_bad_labels(classes: int, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(classes=classes).hidden(tokens(), SIGMA, labels=labels)


def diffusion(objective: str, process: Any, *, dtype: torch.dtype = torch.float64, **sizes: Any) -> Diffusion:
    made, how = network(process.dim, classes=3, **sizes).to(dtype), get_objective(objective)
    return Diffusion(made, process, get_schedule("loglinear"), how, how.parameterization(made.config)).eval()


@pytest.mark.parametrize("objective", [name for name, kind in OBJECTIVES.items() if not kind.autoregressive])
@pytest.mark.parametrize("loss", ["training", "bound"])
def test_every_objective_passes_labels_on(objective: str, loss: str) -> None:
    processes = {"udlm": Uniform(6), "gidd": Hybrid(5, 0.2)}
    model = diffusion(objective, processes.get(objective, Absorbing(5)))
    x_0, t = tokens(dim=5), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)

    def losses(*labels: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if loss == "training":
            return model(x_0, t, labels=torch.tensor(labels), generator=generator)
        return model.loss(x_0, model.noise(x_0, t, generator=generator), t, labels=torch.tensor(labels))

    before = losses(2, 0, 2)
    before.sum().backward()
    embedding = model.network.label_embed.embedding.grad
    assert [bool(row.any()) for row in embedding] == [True, False, True, False]
    assert (before == losses(2, 1, 2)).tolist() == [True, False, True], "each label is that of its sequence"


@pytest.mark.parametrize(
    ("objective", "process"),
    [("md4", Absorbing(5)), ("score_entropy", Absorbing(5)), ("udlm", Uniform(6)), ("gidd", Hybrid(5, 0.2))],
)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_guidance_of_probabilities(objective: str, process: Any, guidance: float, whole_batch: bool) -> None:
    """Those of the guided log-scores or log-probabilities, written out: two sequences of three have open positions."""
    model = diffusion(objective, process)
    x_t, labels = tokens(dim=process.dim), torch.tensor([2, 0, 1])
    if process.mask_id is not None:
        x_t[:, ::2] = process.mask_id
    where = torch.zeros(3, 24, dtype=torch.bool)
    where[1, :6:2] = where[2, 2:12:4] = True
    walk = Walk(model, x_t, where, labels=labels, guidance=guidance, whole_batch=whole_batch)
    step, t = Tweedie(0.1), torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    found = walk.probs(where, t, step)[: int(where.sum())]
    sigma = model.schedule.total(t)
    with torch.no_grad():
        outputs = [
            model.network.head(model.network.hidden(x_t, sigma, labels=given))
            for given in (torch.full((3,), 3), labels)
        ]
    if not isinstance(model.parameterization, Score):  # log-probabilities of the clean token
        tokens_only = process.dim - (process.mask_id is not None)
        outputs = [torch.log_softmax(output[..., :tokens_only], -1) for output in outputs]
        outputs = [torch.nn.functional.pad(output, (0, process.dim - tokens_only)) for output in outputs]
    guided = (outputs[0] + guidance * (outputs[1] - outputs[0]))[where]
    options = model.step_options(sigma[:, None].expand(3, 24)[where], x_t[where])
    expected = reverse_probs(guided, x_t[where], step, process, **options)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("sampler", [name for name, kind in SAMPLERS.items() if not kind.autoregressive])
def test_guidance_1_is_no_guidance(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion("md4", Absorbing(5), dtype=torch.float32)
    calls: list[Tensor | None] = []
    hidden = model.network.hidden

    def counted(x_t: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        calls.append(given.get("labels"))
        return hidden(x_t, sigma, **given)

    monkeypatch.setattr(model.network, "hidden", counted)

    def drawn(**options: Any) -> Tensor:
        calls.clear()
        generator = torch.Generator().manual_seed(0)
        return sample(model, batch=3, length=24, steps=4, sampler=sampler, generator=generator, **options)

    labels = torch.tensor([2, 0, 1])
    conditional = drawn(labels=labels)
    plain = len(calls)
    assert all(given is not None for given in calls)
    assert torch.equal(drawn(labels=labels, guidance=1.0), conditional)
    assert len(calls) == plain, "the network is called once a step"
    without = drawn()
    assert all(given is None for given in calls)
    assert torch.equal(drawn(labels=labels, guidance=0.0), without), "guidance 0 is sampling without classes"
    assert torch.equal(drawn(labels=torch.full((3,), 3)), without)
    assert not torch.equal(drawn(labels=labels, guidance=3.0), conditional)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "guidance: expected 1 without labels or without a linear head, got 2.0"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64), "guidance": math.nan},
            "guidance: expected a number from -1000 to 1000, got nan",
        ),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: expected an int64 tensor \[3\]"),
        ({"labels": torch.tensor([0, 1, 9])}, r"labels: expected values in \[0, 3\]"),
    ],
)
def test_labels_that_cannot_be_sampled(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(diffusion("md4", Absorbing(5), dtype=torch.float32), batch=3, length=24, steps=2, **options)


def test_the_bound_is_that_of_the_labels() -> None:
    """The bound of a batch of several classes is put together from those of each class."""
    model = diffusion("md4", Absorbing(5))
    x_0, labels = tokens(4, 5), torch.tensor([0, 2, 2, 1])

    def bound(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return elbo(model, x_0, draws=3, batch_size=5, generator=generator, **options).sequences

    mixed = bound(labels=labels)
    for label in range(3):
        alone = bound(labels=torch.full((4,), label))
        assert torch.equal(mixed == alone, labels == label)
    assert torch.equal(bound(), bound(labels=torch.full((4,), 3)))
    with pytest.raises(ValueError, match=r"labels: expected shape \[4\], one for each sequence, got \[3\]"):
        bound(labels=labels[:3])


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source 'kinds' of small images: those of class 0 are dark, those of class 1 bright."""
    image_sources = pytest.importorskip("sedd.data.image_sources")
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    values = (random.integers(0, 8, (400, 4)) + 200 * labels[:, None]).astype(np.uint8)
    found = image_sources.ImageSet([values.reshape(-1)], (2, 2, 1), labels, 2)
    monkeypatch.setitem(image_sources.NAMED, "kinds", lambda: {"train": found})


RUN = [
    *("--corpus=images", "--data.source=kinds", "--objective=md4", "--precision=fp32", "--model.classes=2"),
    *("--model.hidden_size=32", "--model.n_blocks=1", "--model.n_heads=2", "--model.cond_dim=16", "--batch_size=16"),
    *("--valid_every=40", "--valid_blocks=16", "--valid_draws=2", "--warmup=5", "--lr=1e-2", "--steps=40"),
]


def run(folder: Path, *options: str) -> Path:
    pytest.importorskip("rich")
    from sedd.cli import main

    assert main(["train", "--run_dir", str(folder), "--report_to=none", *RUN, *options]) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("two_kinds")
def test_a_run_with_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", "--steps=150", "--valid_every=150")
    from sedd.cli import main
    from sedd.hub import load_model

    loaded = load_model(folder)
    corpus = loaded.corpus()
    blocks, labels = corpus.valid(50), corpus.labels("validation", 50)
    assert torch.equal(blocks.amax(1) >= 200, labels == 1), "labels belong to their images"

    def bound(labels: Tensor | None) -> float:
        generator = torch.Generator().manual_seed(0)
        return elbo(loaded.diffusion, blocks, draws=8, labels=labels, generator=generator).nats_per_token

    right, none, wrong = bound(labels), bound(None), bound(1 - labels)
    assert right < none < wrong

    path = tmp_path / "bound.json"
    assert main(["eval", "perplexity", str(folder), "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["data"]["validation"]
    assert figures["reading"].endswith("given their classes")
    assert figures["nats_per_token"] < none

    tokens, out = tmp_path / "tokens.json", tmp_path / "x.png"
    words = ["--num=16", "--steps=8", "--json", str(tokens), "--out", str(out), "--labels=0,1", "--guidance=2"]
    assert main(["sample", str(folder), *words, "--batch_size=5"]) == 0
    bright = [np.mean([token >= 100 for token in row["tokens"]]) for row in json.loads(tokens.read_text())]
    assert np.mean(bright[::2]) < 0.1
    assert np.mean(bright[1::2]) > 0.9
    for words, message in (
        (["--labels=2"], "labels: expected classes in [0, 2), got 2"),
        (["--guidance=2"], "guidance: expected 1 without labels"),
        (["--labels=0,1", "--guidance=1e308"], "guidance: expected a number from -1000 to 1000, got 1e+308"),
    ):
        assert main(["sample", str(folder), "--steps=1", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("two_kinds")
def test_a_resumed_run_with_classes_is_the_same(tmp_path: Path) -> None:
    from sedd.cli import main

    whole, parts = run(tmp_path / "whole", "--steps=8"), run(tmp_path / "parts", "--steps=5")
    assert main(["train", "--run_dir", str(parts), "--resume", "--steps=8"]) == 0
    losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    last = [folder / "checkpoints/step_00000008/model.safetensors" for folder in (whole, parts)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.usefixtures("two_kinds")
def test_which_labels_are_dropped(tmp_path: Path) -> None:
    """As many as asked for, anew in each step, and the same ones however a batch is divided."""
    from sedd.config import TrainConfig, load_config
    from sedd.training.run import Run

    config: TrainConfig = load_config(run(tmp_path / "run", "--steps=1") / "config.json")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "other"), label_dropout=0.3)
    trainer = Run(config)
    state = trainer.state
    labels = torch.arange(4000) % 2
    dropped = []
    for step in range(2):
        state.step = step
        state._seed(0)
        dropped.append(state._with_dropout(labels, 4000, 0))
        assert 0.26 < (dropped[-1] == 2).double().mean() < 0.34
        assert torch.equal(dropped[-1] != 2, dropped[-1] == labels)
        for first in (0, 1000):
            state._seed(first)
            part = state._with_dropout(labels[first : first + 1000], 4000, first)
            assert torch.equal(part, dropped[-1][first : first + 1000])
    assert not torch.equal(*dropped)
    trainer.lock.release()


@pytest.mark.usefixtures("two_kinds")
def test_without_any_label_training_does_not_see_the_classes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = run(tmp_path / "run", "--steps=4", "--label_dropout=1", "--checkpoint_every=2")
    states = [load_file(folder / f"checkpoints/step_0000000{i}/model.safetensors") for i in (2, 4)]
    change = (states[1]["label_embed.embedding"] - states[0]["label_embed.embedding"]).abs().amax(1)
    assert [bool(value > 0) for value in change] == [False, False, True]


@pytest.mark.usefixtures("two_kinds")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.classes=3"], "model.classes: expected 2, the classes of the data, got 3"),
        (["--label_dropout=1.5"], "label_dropout: expected a number in [0, 1], got 1.5"),
    ],
)
def test_runs_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    pytest.importorskip("rich")
    from sedd.cli import main

    assert main(["train", "--run_dir", str(tmp_path / "run"), *RUN, *options]) == 2
    assert message in capsys.readouterr().err
