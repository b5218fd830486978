"""FID and Inception score by the features of a classifier, and the report of a run with images."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("PIL")

from PIL import Image

import sedd.commands.generative
from sedd.cli import main
from sedd.commands import classifier
from sedd.commands.classifier import FEATURES, Classifier, find_classifier
from sedd.commands.image_quality import Distances, _jackknife
from sedd.data.images import ImageCorpus
from sedd.data.options import DataConfig
from sedd.data.pictures import grid, png, to_pixels, write_png
from sedd.data.tokenizer import get_tokenizer
from sedd.diffusion.samplers import sample
from sedd.files import load_tensors, save_tensors
from sedd.hub import SEDD, load_model
from sedd.recipes.results import find_figure

GENERATOR = torch.Generator().manual_seed(0)
TINY = [
    *("--corpus=images", "--data.source=digits", "--objective=md4", "--precision=fp32", "--steps=20"),
    *("--model.hidden_size=32", "--model.n_blocks=1", "--model.n_heads=2", "--model.cond_dim=16", "--valid_every=20"),
    *("--valid_blocks=32", "--valid_draws=2", "--warmup=5", "--lr=3e-3", "--data.valid_fraction=0.2"),
    *("--batch_size=16", "--report_to=none"),
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a run of 20 steps on digits, and the classifier of these digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quality")
    assert main(["train", *TINY, f"--run_dir={folder / 'run'}", f"--data.cache_dir={folder / 'cache'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def digits() -> ImageCorpus:
    return ImageCorpus(DataConfig("digits", valid_fraction=0.2), get_tokenizer("bytes"), 0)


@pytest.fixture(scope="module")
def judge(folder: Path, digits: ImageCorpus) -> Classifier:
    return find_classifier(digits, "digits", None, str(folder / "cache"))


# -- the measures ------------------------------------------------------------------------------------------------------


def fid(real: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The formula of Heusel et al. 2017, in float64. The trace of (A B)^½ is that of (A^½ B A^½)^½."""
    difference = real.mean(0) - other.mean(0)
    first, second = (np.cov(side, rowvar=False) for side in (real, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * cross)


def inception_score(logits: np.ndarray[Any, Any]) -> float:
    """The formula of Salimans et al. 2016, in float64."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def draw(n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=GENERATOR, dtype=torch.float64)


def test_both_measures_by_hand() -> None:
    real, other, logits = draw(300, FEATURES), 1.5 * draw(200, FEATURES) + 0.3, 3 * draw(200, 10)
    state = torch.get_rng_state()
    found = Distances(real).measure(other, logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert found["fid"] == pytest.approx(fid(real.numpy(), other.numpy()), rel=1e-8)
    assert found["inception_score"] == pytest.approx(inception_score(logits.numpy()), rel=1e-10)
    omitted = [np.arange(200) % 20 != group for group in range(20)]
    for name, values in (
        ("fid_error", [fid(real.numpy(), other.numpy()[rows]) for rows in omitted]),
        ("inception_score_error", [inception_score(logits.numpy()[rows]) for rows in omitted]),
    ):
        assert found[name] == pytest.approx(np.sqrt(19 / 20 * ((values - np.mean(values)) ** 2).sum()), rel=1e-4)


def test_the_extremes() -> None:
    real = draw(300, FEATURES)
    distances = Distances(real)
    certain = 1000.0 * torch.eye(10, dtype=torch.float64).repeat(30, 1)
    found = distances.measure(real, certain)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["inception_score"] == pytest.approx(10), "ten classes equally often, each with certainty"
    assert distances.measure(real, torch.zeros_like(certain))["inception_score"] == pytest.approx(1)
    assert distances.measure(real + 2, certain)["fid"] == pytest.approx(4 * FEATURES), "the means differ, nothing else"


def test_the_error_is_that_of_new_samples() -> None:
    """The spread of the FID over sets of samples, and the mean of its errors."""
    distances = Distances(draw(1500, FEATURES))
    found = [distances.measure(0.8 * draw(600, FEATURES) + 0.2, draw(600, 3)) for _ in range(24)]
    for name in ("fid", "inception_score"):
        spread = np.std([row[name] for row in found], ddof=1)
        assert np.mean([row[f"{name}_error"] for row in found]) == pytest.approx(spread, rel=0.45)


def test_the_error_of_a_mean_is_known() -> None:
    values = draw(400, 1)
    groups = values.view(20, 20).mean(0)  # row i is in group i % 20
    assert _jackknife(lambda rows: float(rows.mean()), values) == pytest.approx(float(groups.std()) / 20**0.5)
    assert _jackknife(lambda rows: float(rows.mean()), values[:4]) is not None
    assert _jackknife(lambda rows: float(rows.mean()), values[:3]) is None


def test_what_is_corrupted_is_further_away(judge: Classifier, digits: ImageCorpus) -> None:
    distances, held_out = Distances(judge.read(digits.train(2000))[0]), digits.valid(300)
    found = []
    for share in (0.0, 0.1, 0.3):
        noise = torch.randint(256, held_out.shape, generator=GENERATOR)
        is_noise = torch.rand(held_out.shape, generator=GENERATOR) < share
        found.append(distances.measure(*judge.read(torch.where(is_noise, noise, held_out))))
    assert found[0]["fid"] * 2 < found[1]["fid"] < found[2]["fid"] / 2
    assert found[0]["inception_score"] > found[1]["inception_score"] > found[2]["inception_score"]


# -- the classifier ----------------------------------------------------------------------------------------------------


def test_the_classifier_knows_the_digits(judge: Classifier, digits: ImageCorpus) -> None:
    features, logits = judge.read(digits.valid(1000), batch_size=100)
    held_out = len(digits.valid(1000))
    right = logits.argmax(-1) == digits.labels("validation", 1000)
    assert judge.accuracy == pytest.approx(float(right.double().mean()))
    assert judge.accuracy > 0.9
    assert judge.accuracy_images == held_out
    assert features.shape == (held_out, FEATURES)
    assert features.dtype == logits.dtype == torch.float64
    again = features @ judge.network.logits.weight.double().T + judge.network.logits.bias
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)


def test_labels_and_training_images_fit(digits: ImageCorpus) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    values = np.rint(found.data * (255 / 16)).astype(int).tolist()
    known = dict(zip(map(tuple, values), found.target.tolist(), strict=True))
    images, labels = digits.train(50), digits.labels("train", 50)
    assert [known[tuple(row)] for row in images.tolist()] == labels.tolist()
    held_out = {tuple(row) for row in digits.valid(1000).tolist()}
    assert not held_out & {tuple(row) for row in digits.train(2000).tolist()}


def test_it_is_trained_once_for_each_data_set(
    judge: Classifier, digits: ImageCorpus, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "STEPS", 3)  # other settings: another classifier
    state = torch.get_rng_state()
    short = find_classifier(digits, "digits", None, str(folder / "cache"))
    assert torch.equal(torch.get_rng_state(), state)
    again = find_classifier(digits, "digits", tmp_path / "new" / "given.safetensors", None)
    assert short.path != judge.path
    assert again.name == short.name != judge.name, "the same seed gives the same classifier"
    fewer = ImageCorpus(DataConfig("digits", valid_fraction=0.3), get_tokenizer("bytes"), 0)
    assert find_classifier(fewer, "digits", None, str(folder / "cache")).path not in (short.path, judge.path)
    monkeypatch.undo()
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("it is there"))
    found = find_classifier(digits, "digits", None, str(folder / "cache"))
    assert found.name == judge.name
    assert torch.equal(found.read(digits.valid(9))[0], judge.read(digits.valid(9))[0])
    assert find_classifier(digits, "digits", again.path, None).name == short.name


def test_files_that_are_no_classifier(judge: Classifier, digits: ImageCorpus, tmp_path: Path) -> None:
    tensors, metadata = load_tensors(judge.path)
    said = {"classifier": metadata["classifier"]}
    about = json.loads(said["classifier"])
    images = str(about["accuracy_images"])
    for name, files, message in (
        ("other", ({"x": torch.zeros(3)}, {}), "classifier: expected a file of a classifier, written by sedd eval"),
        ("fewer", ({"logits.bias": tensors["logits.bias"]}, said), "expected a file of a classifier"),
        ("words", (tensors, {"classifier": json.dumps({**about, "shape": "8x8"})}), "expected a file of a classifier"),
        ("list", (tensors, {"classifier": "[1]"}), "expected a file of a classifier"),
        ("endless", (tensors, {"classifier": said["classifier"].replace(images, "1e999")}), "a file of a classifier"),
        ("deep", (tensors, {"classifier": "[" * 10**5}), "expected a file of a classifier"),
    ):
        save_tensors(tmp_path / name, *files)
        with pytest.raises(ValueError, match=message):
            find_classifier(digits, "digits", tmp_path / name, None)
    save_tensors(tmp_path / "huge", tensors, {"classifier": json.dumps({**about, "classes": 10**12})})
    with pytest.raises(ValueError, match="a file of a classifier") as caught:
        find_classifier(digits, "digits", tmp_path / "huge", None)
    assert "size mismatch" in str(caught.value.__cause__), "256 terabytes are allocated first"
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        find_classifier(digits, "digits", tmp_path / "text", None)


def test_images_of_another_size_or_without_classes(judge: Classifier, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        write_png(tmp_path / "pictures" / f"{i}.png", np.full((5, 4, 3), i, np.uint8))
    found = ImageCorpus(DataConfig(str(tmp_path / "pictures"), valid_fraction=0.5), get_tokenizer("bytes"), 0)
    with pytest.raises(ValueError, match="classifier: expected images with classes, to train a classifier, got dots"):
        find_classifier(found, "dots", None, str(tmp_path))
    with pytest.raises(ValueError, match="classifier: expected one of images of 5 x 4 x 3, got 8 x 8 x 1 in "):
        find_classifier(found, "dots", judge.path, None)


def test_a_test_split_without_classes(digits: ImageCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation images measure the classifier; training images without a class are refused by the right name."""
    labels = digits.labels

    def no_labels(without: str) -> Any:
        def read(split: str, count: int) -> Tensor:
            if split == without:
                raise ValueError("model.classes: expected a class of each image, got -1")
            return labels("validation" if split == "test" else split, count)

        return read

    monkeypatch.setattr(classifier, "STEPS", 2)
    monkeypatch.setattr(digits, "test", lambda count: digits.train(count))
    monkeypatch.setattr(digits, "labels", no_labels("test"))
    found = find_classifier(digits, "digits", tmp_path / "here", None)
    assert found.accuracy_images == len(digits.valid(10_000))
    monkeypatch.setattr(digits, "labels", no_labels("train"))
    with pytest.raises(ValueError, match=r"^classifier: expected a class of each image"):
        find_classifier(digits, "digits", tmp_path / "there", None)


# -- sedd eval generative ----------------------------------------------------------------------------------------------


def evaluate(folder: Path, *options: str) -> dict[str, Any]:
    path = folder / "fid.json"
    assert main(["eval", "generative", str(folder / "run"), "--json", str(path), "--num", "40", *options]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_whole_command(
    judge: Classifier,
    digits: ImageCorpus,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--samplers", "tweedie,greedy", "--batch_size", "25"]
    found = evaluate(folder, *options, "--steps", "2,4", "--plot", str(tmp_path / "fid.png"))
    printed = capsys.readouterr().out
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [
        *(("tweedie", 2), ("tweedie", 4)),
        *(("greedy", 2), ("greedy", 4)),
    ]
    loaded, generator = load_model(folder / "run"), torch.Generator().manual_seed(0)
    images = torch.cat([sample(loaded.diffusion, batch=n, length=64, steps=2, generator=generator) for n in (25, 15)])
    real, train = digits.valid(40), judge.read(digits.train(10**4))[0]
    for row, measured in ((found["rows"][0], images), (found["real"], real)):
        features, logits = judge.read(measured)
        assert row["fid"] == pytest.approx(fid(train.numpy(), features.numpy()), rel=1e-5)
        assert row["inception_score"] == pytest.approx(inception_score(logits.numpy()))
        assert row["images"] == 40
        assert f"{row['fid']:.2f} ± {row['fid_error']:.2f}" in printed
        assert f"{row['inception_score']:.3f} ± {row['inception_score_error']:.3f}" in printed
    assert found["real"]["fid"] < min(row["fid"] for row in found["rows"])
    assert "real images" in printed
    assert f"finds the class of {judge.accuracy:.1%}" in printed
    for text in (found["note"], printed.replace("\n", " ")):
        assert "of a classifier trained on digits, not Inception; comparable only with the same classifier" in text
    assert found["settings"]["classifier"] == judge.name
    assert found["settings"]["classifier_accuracy"] == judge.accuracy
    assert not {"judge", "mauve", "length"} & set(found["settings"])
    assert (tmp_path / "fid.png").read_bytes().startswith(b"\x89PNG")
    figure = find_figure("generative", found, "fid", {"sampler": "greedy", "steps": 4}, 1.0)
    assert (figure.value, figure.error) == (found["rows"][3]["fid"], found["rows"][3]["fid_error"])

    # what is there is kept, what is missing is made
    made: list[tuple[str, int]] = []
    row_of = sedd.commands.generative._row
    monkeypatch.setattr(
        sedd.commands.generative,
        "_row",
        lambda sampler, steps, *rest: made.append((sampler, steps)) or row_of(sampler, steps, *rest),
    )
    more = evaluate(folder, *options, "--steps", "2,3,4")
    assert made == [("tweedie", 3), ("greedy", 3)]
    assert [row for row in more["rows"] if row["steps"] != 3] == found["rows"]
    monkeypatch.setattr(classifier, "STEPS", 3)
    line = ["eval", "generative", str(folder / "run"), "--json", str(folder / "fid.json"), "--num", "40", *options]
    assert main(line) == 2
    assert "json: expected results with the same options, weights and data" in capsys.readouterr().err


def test_the_model_card_has_the_figures(judge: Classifier, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    options = ["--num", "20", "--samplers", "tweedie", "--steps", "2", "--reference", "100"]
    path = run / "eval" / "generative.json"
    path.parent.mkdir(exist_ok=True)
    assert main(["eval", "generative", str(run), "--json", str(path), *options]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    content = SEDD.from_pretrained(run).generate_model_card(name="m").content
    for metric, name in (("FID", "fid"), ("inception score", "inception_score")):
        found = re.search(rf"\| 20 samples, tweedie, 2 steps \| {metric} \| ([\d.]+) ± ([\d.]+) \|", content)
        assert found is not None
        assert float(found[1]) == pytest.approx(row[name], abs=0.06 * row[f"{name}_error"])
        assert float(found[2]) == pytest.approx(row[f"{name}_error"], rel=0.06)
    assert f"100 training images, features of the classifier {judge.name}, not Inception's, seed 0" in content
    command = "sedd eval generative RUN --samplers tweedie --steps 2 --num 20 --reference 100 --seed 0 --batch_size 100"
    assert f"`{command}`" in content
    assert str(tmp_path) not in content


def test_samples_of_given_classes(
    judge: Classifier, digits: ImageCorpus, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--run_dir={tmp_path / 'run'}", f"--data.cache_dir={folder / 'cache'}"]
    assert main(["train", *TINY, "--model.classes=10", *folders]) == 0
    options = ["--samplers", "tweedie", "--steps", "2", "--batch_size", "25", "--seed", "3"]
    rows = {}
    for guidance in ((), ("--guidance", "1"), ("--guidance", "3")):
        rows[guidance] = evaluate(tmp_path, *options, *guidance)
        (tmp_path / "fid.json").unlink()
    loaded, train = load_model(tmp_path / "run"), digits.train(10**4)
    drawn = torch.randint(len(train), (40,), generator=torch.Generator().manual_seed(3))
    labels = digits.labels("train", len(train))[drawn]
    assert len(set(labels.tolist())) > 5
    for guidance, found in rows.items():
        generator = torch.Generator().manual_seed(3)
        images = torch.cat(
            [
                sample(
                    loaded.diffusion, batch=len(part), length=64, steps=2, generator=generator,
                    labels=part if guidance else None, guidance=float(guidance[1]) if guidance else 1.0,
                )
                for part in labels.split(25)
            ]
        )  # fmt: skip
        features, _ = judge.read(images)
        assert found["rows"][0]["fid"] == pytest.approx(fid(judge.read(train)[0].numpy(), features.numpy()), rel=1e-5)
        assert ("Samples have the classes of training images" in found["note"]) == bool(guidance)
    assert len({found["rows"][0]["fid"] for found in rows.values()}) == 3
    assert "with guidance 3" in capsys.readouterr().out.replace("\n", " ")


def test_fewer_real_images_than_samples(judge: Classifier, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "generative", str(folder / "run"), "--num", "400", "--steps", "1", "--samplers", "tweedie"]
    assert main([*line, "--reference", "100"]) == 0
    printed = capsys.readouterr().out
    assert "FID from 100 training images; real images: 330 validation images, which are fewer than 400" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "gpt2"], "--judge: expected no value for a model of images, got 'gpt2'"),
        (["--length", "8"], "--length: expected no value for a model of images, got 8"),
        (["--mauve", "prefix"], "--mauve: expected no value for a model of images, got ['prefix']"),
        (["--guidance", "1"], "--guidance: expected no value for a model without classes, got 1"),
        (["--num", "1"], "--num: expected at least 2 images, which have a covariance, got 1"),
        (["--reference", "1"], "--reference: expected at least 2 images, which have a covariance, got 1"),
        (["--samplers", "magic"], "--samplers: expected one of"),
        (["--classifier", "RUN/config.json"], "config.json: damaged or incomplete: not a valid safetensors file"),
    ],
)
def test_mistakes(options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [word.replace("RUN", str(folder / "run")) for word in options]
    assert main(["eval", "generative", str(folder / "run"), "--steps", "2", *options]) == 2
    assert message in capsys.readouterr().err


def test_torchmetrics_is_named_where_it_is_missing(
    judge: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    monkeypatch.setattr(classifier, "_load", lambda *_: pytest.fail("too late"))
    assert main(["eval", "generative", str(folder / "run"), "--steps", "2"]) == 2
    assert re.search(r'FID needs torchmetrics: .*pip install "sedd_ext\[images\]"', capsys.readouterr().err)


# -- sedd report -------------------------------------------------------------------------------------------------------

STEPS = 6


def make(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    assert main(["report", str(folder / "run"), "--steps", str(STEPS), "--samples", "4", *options]) == 0
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def frames(folder: Path, sampler: str, labels: torch.Tensor | None = None) -> tuple[list[list[int]], torch.Tensor]:
    """The first image of all steps, and all images, from the sampler itself."""
    loaded, kept = load_model(folder / "run"), [[256] * 64]
    images = sample(
        loaded.diffusion,
        batch=4,
        length=64,
        steps=STEPS,
        sampler=sampler,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda step, steps, tokens: kept.append(tokens[0].tolist()),
        labels=labels,
    )
    return kept, images


def test_the_page_of_a_run_with_classes(folder: Path, tmp_path: Path) -> None:
    folders = [f"--run_dir={tmp_path / 'run'}", f"--data.cache_dir={folder / 'cache'}"]
    assert main(["train", *TINY, "--model.classes=10", *folders]) == 0
    page, _ = make(tmp_path)
    assert "reverse steps with tweedie, one class after another, seed 0." in page
    _, images = frames(tmp_path, "tweedie", torch.arange(4))
    assert not torch.equal(images, frames(tmp_path, "tweedie")[1])
    assert "data:image/png;base64," + base64.b64encode(png(grid(to_pixels(images, (8, 8, 1))))).decode() in page


def test_the_page_of_a_run_with_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures: dict[str, Any] = {"note": "a classifier, not Inception", "options": {"guidance": 1.5}}
    figures["rows"] = [{"sampler": "tweedie", "steps": 4, "fid": 12.345}]
    (folder / "run" / "eval").mkdir(exist_ok=True)
    (folder / "run" / "eval" / "generative.json").write_text(json.dumps(figures))
    page, film = make(folder)
    (folder / "run" / "eval" / "generative.json").unlink()
    for words in ("bits/dim", "8 x 8 x 1, 256 values", "12.35", ">a classifier, not Inception</p>", "noise to image"):
        assert words in page
    assert "bits/token" not in page
    assert ">options</td>" not in page, "a table of one cell"
    assert "<dt>guidance</dt><dd>1.5</dd>" in page
    assert "one class after another" not in page
    steps, images = frames(folder, "tweedie")
    assert "data:image/png;base64," + base64.b64encode(png(grid(to_pixels(images, (8, 8, 1))))).decode() in page
    assert film["shape"] == [8, 8, 1]
    assert film["counts"] == [row.count(256) for row in steps]
    assert main(["report", str(folder / "run"), "--length", "8"]) == 2
    assert "--length: expected no value for a model of images, got 8" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium (CI does)")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_film(folder: Path, tmp_path: Path, width: int) -> None:
    """With a sampler that masks again: what is masked is blue, what has changed has a frame."""
    api = pytest.importorskip("playwright.sync_api")
    make(folder, "--sampler", "remask")
    steps, _ = frames(folder, "remask")
    before, after = np.array(steps[:-1]), np.array(steps[1:])
    assert ((before != 256) & (after == 256)).any(), "something is masked again"
    read = """() => {
      const canvas = document.getElementById("film"), context = canvas.getContext("2d"), size = canvas.width / 8;
      const at = (x, y) => [...context.getImageData(x, y, 1, 1).data];
      const places = [...Array(64).keys()].map((place) => [size * (place % 8), size * Math.floor(place / 8)]);
      return [canvas.width, places.map(([x, y]) => at(x + size / 2, y + size / 2)), places.map(([x, y]) => at(x, y))];
    }"""
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        page = browser.new_page(viewport={"width": width, "height": 900})
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(f"{(folder / 'run' / 'report.html').as_uri()}#step=0")
        for step in (0, 3, 4, STEPS + 1):
            page.evaluate(f"location.hash = '#step={step}'")
            page.locator("#where", has_text=f"step {step} of").wait_for()
            side, centres, corners = page.evaluate(read)
            previous = steps[max(0, step - 1)]
            for old, value, centre, corner in zip(previous, steps[step], centres, corners, strict=True):
                colour = [150, 180, 235, 255] if value == 256 else [value, value, value, 255]
                assert centre == colour
                assert corner == ([242, 140, 28, 255] if old != value else colour)
            assert side == 448
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = page.locator("#film").bounding_box()
        assert shown is not None
        assert shown["width"] <= width
        assert shown["width"] == pytest.approx(shown["height"])
        page.evaluate("location.hash = '#step=3'")
        page.locator("#where", has_text="step 3 of").wait_for()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.click("#play")
        page.locator("#where", has_text=f"step {STEPS + 1} of").wait_for()
        browser.close()
    assert [words for words in messages if "getImageData" not in words] == [], "this test reads the canvas"
    colours = np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3), axis=0)
    assert [150, 180, 235] in colours.tolist()
