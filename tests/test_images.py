"""Images as training data: what is read, how it is split and ordered, and what the commands make of it."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tensorboard")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import datasets
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sedd.cli import main
from sedd.commands.pictures import kept
from sedd.data import image_sources
from sedd.data.corpora import CORPORA
from sedd.data.image_sources import read_idx
from sedd.data.images import ImageCorpus
from sedd.data.options import DataConfig
from sedd.data.pictures import grid, to_pixels, write_png
from sedd.data.tokenizer import get_tokenizer

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    threads(1)


def corpus(source: object, **options: Any) -> ImageCorpus:
    return ImageCorpus(DataConfig(str(source), **options), get_tokenizer("bytes"), 0)


def idx(*shape: int, content: bytes | None = None, kind: int = 8) -> bytes:
    """A file in the IDX format, written out."""
    head = bytes([0, 0, kind, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    return head + (bytes(i % 251 for i in range(math.prod(shape))) if content is None else content)


def idx_folder(folder: Path, train: int = 40, test: int = 7) -> Path:
    """A folder like that of MNIST: images of 3 x 2, some of the files compressed."""
    folder.mkdir()
    for prefix, n in (("train", train), ("t10k", test)):
        pixels = RANDOM.integers(0, 256, (n, 3, 2), np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(n, 3, 2, content=pixels))
        labels = idx(n, content=bytes(i % 3 for i in range(n)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def rgb(n: int, height: int = 4, width: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_an_idx_file(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(idx(2, 3, 4)) if compressed else idx(2, 3, 4))
    found = read_idx(path, 3)
    assert found.dtype == np.uint8
    assert found.tolist() == np.arange(24).reshape(2, 3, 4).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file, got one that begins with nothing"),
        (b"\x89PNG....", "expected an IDX file, got one that begins with 89 50 4e 47"),
        (idx(2, 3, 4, kind=13), "expected bytes (type 8) with 3 axes, got type 13 with 3 axes"),
        (idx(2, 3), "expected bytes (type 8) with 3 axes, got type 8 with 2 axes"),
        (idx(2, 3, 4)[:9], "expected the lengths of 3 axes, got the end of the file"),
        (idx(2, 3, 4)[:-1], "expected 24 numbers for the shape [2, 3, 4], got 23"),
        (idx(2, 3, 4) + b"x", "expected 24 numbers for the shape [2, 3, 4], got more"),
        (idx(0, 3, 4), "expected numbers, got the shape [0, 3, 4]"),
        # an array of 4 billion cubed numbers is not allocated
        (idx(2**32 - 1, 2**32 - 1, 2**32 - 1, content=b"abc"), "numbers for the shape"),
    ],
    ids=range(9),
)
def test_bad_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    for name, written in (("plain", content), ("small.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(ValueError, match="^" + str(tmp_path / name)) as error:
            read_idx(tmp_path / name, 3)
        assert message in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b"x" + b, lambda b: b[:20] + b"\xff\xff" + b[22:]])
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx(20, 30, 40))))
    with pytest.raises(ValueError, match=r"images\.gz: "):
        read_idx(path, 3)


def test_digits_are_the_digits() -> None:
    """Every image is there once, its values 0 to 16 as 0 to 255, and can be shown."""
    from sklearn.datasets import load_digits

    found = corpus("digits", valid_fraction=0.2)
    assert (found.vocab_size, found.shape) == (256, (8, 8, 1))
    valid = found.valid(10**6)
    n = 1797 - len(valid)
    assert 0.15 < len(valid) / 1797 < 0.25
    epoch = next(found.batches(n, seed=0))
    mine = sorted(torch.cat([epoch, valid]).tolist())
    scaled = {value: round(value * 255 / 16) for value in range(17)}
    assert mine == sorted([scaled[int(value)] for value in row] for row in load_digits().data)
    assert found.show(valid[0]).reshape(-1).tolist() == valid[0].tolist()
    assert found.show(torch.full((64,), 256)).tolist() == np.full((8, 8, 1), 128).tolist()
    assert found.test(5) is None


def test_mnist_files(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "mnist")
    found = corpus(folder, valid_fraction=0.25)
    assert found.shape == (3, 2, 1)
    test = found.test(100)
    assert test is not None
    assert sorted(test.tolist()) == sorted(read_idx(folder / "t10k-images-idx3-ubyte", 3).reshape(7, 6).tolist())
    n_valid = len(found.valid(100))
    train = next(found.batches(40 - n_valid, seed=1))
    everything = read_idx(folder / "train-images-idx3-ubyte", 3).reshape(40, 6)
    assert sorted(torch.cat([train, found.valid(100)]).tolist()) == sorted(everything.tolist())
    whole = corpus(folder, valid_split="test")
    assert sorted(next(whole.batches(40, seed=1)).tolist()) == sorted(everything.tolist()), "as the papers train"
    assert len(whole.valid(100)) == 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    ids=["too few labels", "a missing file"],
    argvalues=[
        ("train-labels-idx1-ubyte", idx(39), "expected a label for each of 40 images of train, got 39"),
        ("t10k-images-idx3-ubyte", None, "expected the file t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"),
    ],
)
def test_wrong_mnist_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = idx_folder(tmp_path / "mnist") / name
    path.unlink() if content is None else path.write_bytes(content)  # read before one that ends with .gz
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        corpus(tmp_path / "mnist")


def test_fashion_mnist_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "FASHION_MNIST", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        corpus("fashion-mnist")
    monkeypatch.setattr(image_sources, "FASHION_MNIST", idx_folder(tmp_path / "found"))
    assert corpus("fashion-mnist").shape == (3, 2, 1)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures = rgb(12)
    for number, picture in enumerate(pictures):
        folder = tmp_path / "all" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number:02}.png")
    found = corpus(tmp_path / "all", valid_fraction=0.3)
    assert found.shape == (4, 3, 3)
    valid = found.valid(100)
    rows = torch.cat([next(found.batches(12 - len(valid), seed=0)), valid])
    assert sorted(rows.tolist()) == sorted(pictures.reshape(12, -1).tolist())
    Image.fromarray(pictures[0][:, :2]).save(tmp_path / "all" / "c.png")
    with pytest.raises(ValueError, match=r"c.png: expected 4 x 3 pixels as in .*00.png, got 4 x 2"):
        corpus(tmp_path / "all")
    (tmp_path / "all" / "c.png").write_bytes(b"GIF89a nothing of the kind")
    with pytest.raises(ValueError, match=r"c.png: expected a PNG file, got one that cannot be read"):
        corpus(tmp_path / "all")


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    for number, picture in enumerate(rgb(5)):
        Image.fromarray(picture[..., 0]).save(tmp_path / f"{number}.png")
    assert corpus(tmp_path).shape == (4, 3, 1)
    Image.fromarray(np.zeros((4, 3), np.uint16)).save(tmp_path / "9.png")
    with pytest.raises(ValueError, match=r"9\.png: expected values of 8 bits \(1, L, LA, P, RGB, RGBA\), got I;16"):
        corpus(tmp_path)


def part(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_a_png_file_with_a_damaged_part(tmp_path: Path) -> None:
    """For which Pillow raises an error of its own code."""
    Image.fromarray(rgb(1)[0]).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    end = whole.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(whole[:end] + part(b"iCCP", b"") + whole[end:])
    with pytest.raises(ValueError, match=r"a\.png: expected a PNG file, got one that cannot be read"):
        corpus(tmp_path)


def test_pictures_with_16_bits_in_colour_are_refused(tmp_path: Path) -> None:
    """Pillow reads them as pictures with 8 bits."""
    head = (3).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])  # 3 x 4, 16 bits, colour
    rows = b"".join(b"\0" + bytes(range(18)) for _ in range(4))
    parts = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    with pytest.raises(ValueError, match=r"deep\.png: expected values of 8 bits .*, got RGB;16B"):
        corpus(tmp_path)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    """Such as those of editors and of macOS."""
    for number, picture in enumerate(rgb(5)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / ".checkpoints").mkdir()
    Image.fromarray(rgb(1, 9)[0]).save(tmp_path / ".checkpoints" / "0.png")
    (tmp_path / "._0.png").write_bytes(b"no picture")
    found = corpus(tmp_path, valid_fraction=0.3)
    assert len(found.valid(9)) + int(found.describe().split()[0]) == 5


def test_images_of_several_shapes_in_the_splits(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "mnist")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(7, 2, 2))
    with pytest.raises(
        ValueError, match=r"source: expected images of one shape, got \[3, 2, 1\] and, in 'test', \[2, 2, 1\]"
    ):
        corpus(folder)


def with_classes(source: str, folder: Path) -> ImageCorpus:
    """Images of a source, of which each value of class k is in [80 k, 80 k + 80). No training image has class 2."""
    labels = {"train": np.arange(40) % 2, "test": np.arange(9) % 3}
    shape = (4, 3, 1) if source == "idx" else (4, 3, 3)
    pixels = {
        split: (80 * found.reshape(-1, 1, 1, 1) + RANDOM.integers(0, 80, (len(found), *shape))).astype(np.uint8)
        for split, found in labels.items()
    }
    folder.mkdir()
    if source == "png":
        for number, (picture, label) in enumerate(zip(pixels["train"], labels["train"], strict=True)):
            (folder / "xy"[label]).mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / "xy"[label] / f"{number}.png")
    if source == "idx":
        for prefix, split in (("train", "train"), ("t10k", "test")):
            content = pixels[split].tobytes()
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(len(labels[split]), 4, 3, content=content))
            content = labels[split].astype(np.uint8).tobytes()
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(len(labels[split]), content=content))
    if source == "table":
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
        table = {
            split: datasets.Dataset.from_dict(
                {"img": list(map(Image.fromarray, pixels[split])), "label": labels[split]}, features=features
            )
            for split in labels
        }
        datasets.DatasetDict(table).save_to_disk(folder)
    return corpus(folder, valid_fraction=0.3, cache_dir=str(folder.parent / "cache"))


@pytest.mark.parametrize("source", ["png", "idx", "table"])
def test_classes_belong_to_their_images(source: str, tmp_path: Path) -> None:
    found = with_classes(source, tmp_path / "images")
    assert found.classes == (2 if source == "png" else 3)
    valid, test = found.valid(99), found.test(99)
    assert torch.equal(valid[:, 0] // 80, found.labels("validation", 99))
    assert torch.equal(valid[:5, 0] // 80, found.labels("validation", 5))
    tokens, labels = next(found.labelled_batches(40 - len(valid), seed=0))
    assert torch.equal(tokens[:, 0] // 80, labels)
    assert len(labels.unique()) == 2
    if test is None:
        assert source == "png"
    else:
        assert torch.equal(test[:, 0] // 80, found.labels("test", 99))
        assert sorted(found.labels("test", 99).unique().tolist()) == [0, 1, 2]


def table(folder: Path, pictures: list[Any], labels: list[int | None]) -> ImageCorpus:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    datasets.Dataset.from_dict({"img": pictures, "label": labels}, features=features).save_to_disk(folder / "saved")
    return corpus(folder / "saved", valid_fraction=0.3, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("label", [None, -1])
def test_images_without_a_class(tmp_path: Path, label: int | None) -> None:
    """Test images of the hub often have none. They can be read, but not with their classes."""
    found = table(tmp_path, list(map(Image.fromarray, rgb(20))), [label] * 20)
    assert next(found.batches(5, seed=0)).shape == (5, 36)
    message = r"model\.classes: expected a class of each image, got images without one"
    with pytest.raises(ValueError, match=message):
        next(found.labelled_batches(5, seed=0))
    with pytest.raises(ValueError, match=message):
        found.labels("validation", 20)


@pytest.mark.parametrize("number", [0, 3])
def test_a_row_without_an_image(tmp_path: Path, number: int) -> None:
    pictures: list[Any] = list(map(Image.fromarray, rgb(5)))
    pictures[number] = None
    with pytest.raises(
        ValueError, match=r"source: expected an image in each row of 'train' of .*, got a row without one"
    ):
        table(tmp_path, pictures, [0] * 5)


def test_a_table_of_datasets(tmp_path: Path) -> None:
    """A folder as save_to_disk writes it, with the columns of CIFAR-10; its own splits are used."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    pixels = {"train": rgb(30), "validation": rgb(5), "test": rgb(6)}
    splits = {
        name: datasets.Dataset.from_dict(
            {"img": [Image.fromarray(p) for p in found], "label": [i % 4 for i in range(len(found))]},
            features=features,
        )
        for name, found in pixels.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = corpus(tmp_path / "saved", cache_dir=str(tmp_path / "cache"))
    assert found.shape == (4, 3, 3)
    parts = {"train": next(found.batches(30, seed=0)), "validation": found.valid(99), "test": found.test(99)}
    for name, rows in parts.items():
        assert rows is not None
        assert sorted(rows.tolist()) == sorted(pixels[name].reshape(len(pixels[name]), -1).tolist())
    splits["train"].remove_columns("img").save_to_disk(tmp_path / "no images")
    with pytest.raises(ValueError, match=r"source: expected a column of images in 'train' of .*, got 'label'"):
        corpus(tmp_path / "no images", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("digits", {"streaming": True}, ValueError, "streaming: expected no value for images, got True"),
        ("digits", {"windows": True}, ValueError, "windows: expected no value for images"),
        ("digits", {"subset": "x"}, ValueError, "subset: expected no value for 'digits'"),
        ("digits", {"train_split": "test"}, ValueError, r"train_split: expected a split of 'digits' \('train'\)"),
        ("digits", {"valid_fraction": 1.0}, ValueError, "valid_fraction: expected a number between 0 and 1"),
        ("digits", {"max_documents": 0}, ValueError, "max_documents: expected at least 1, got 0"),
        ("digits", {"max_documents": 1}, ValueError, "source: expected at least 2 different images in digits, got 1"),
        ("a.txt", {}, ValueError, "source: expected a folder with PNG or IDX files, got a.txt, which is a file"),
        ("empty", {}, FileNotFoundError, "source: expected a folder with PNG or IDX files, got empty, which has none"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        corpus(source, **options)


# -- order -------------------------------------------------------------------------------------------------------------


def test_copies_of_an_image_are_in_one_split(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "mnist")
    path = folder / "train-images-idx3-ubyte"
    once = read_idx(path, 3)[:20]
    path.write_bytes(idx(40, 3, 2, content=np.concatenate([once, once]).tobytes()))
    found = corpus(folder, valid_fraction=0.3)
    valid = found.valid(100).tolist()
    train = next(found.batches(40 - len(valid), seed=0)).tolist()
    assert len(valid) % 2 == len(train) % 2 == 0
    assert not {tuple(row) for row in valid} & {tuple(row) for row in train}


@pytest.mark.parametrize("flips", [False, True])
def test_the_order_continues_exactly(flips: bool) -> None:
    found = corpus("digits", max_documents=20, flips=flips)
    whole, first = found.batches(7, seed=3), found.batches(7, seed=3)
    before = [next(whole) for _ in range(4)]
    assert all(torch.equal(next(first), batch) for batch in before)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = corpus("digits", max_documents=20, flips=flips).batches(7, seed=3)
    resumed.load_state_dict(state)
    assert all(torch.equal(next(resumed), next(whole)) for _ in range(6)), "into the next epochs"
    other = corpus("digits", max_documents=20, flips=not flips).batches(7, seed=3)
    with pytest.raises(ValueError, match="expected kind ="):
        other.load_state_dict(state)


def test_flips_mirror_half_of_the_images_anew_in_each_epoch() -> None:
    plain, mirrored = (corpus("digits", flips=flips) for flips in (False, True))
    rows = {row.tobytes() for row in next(plain.batches(1000, seed=0)).numpy()}
    rows |= {row.tobytes() for row in next(plain.batches(1725, seed=0)).numpy()}
    batches = mirrored.batches(1725, seed=0)
    turned = []
    for _ in range(2):
        epoch = next(batches)
        back = epoch.view(-1, 8, 8).flip(2).reshape(epoch.shape)
        is_turned = [row.tobytes() not in rows for row in epoch.numpy()]
        assert all(a.tobytes() in rows or b.tobytes() in rows for a, b in zip(epoch.numpy(), back.numpy(), strict=True))
        assert 0.45 < np.mean(is_turned) < 0.55
        turned.append({a.tobytes() for a, flag in zip(epoch.numpy(), is_turned, strict=True) if flag})
    assert turned[0] != turned[1]
    assert torch.equal(plain.valid(50), mirrored.valid(50)), "validation images stay as they are"


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_grid(tmp_path: Path) -> None:
    pictures = np.stack([np.full((40, 70, 3), i, np.uint8) for i in (10, 20, 30)])
    whole = grid(pictures)
    assert whole.shape == (2 * 41 + 1, 2 * 71 + 1, 3)
    assert [whole[1, 1, 0], whole[1, 72, 0], whole[42, 1, 0], whole[42, 72, 0]] == [10, 20, 30, 255]
    assert (whole[[0, 41, 82]] == 255).all()
    assert (whole[1:41, 1:71] == 10).all()
    write_png(tmp_path / "grid.png", whole)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), whole)
    assert grid(pictures[:1, :8, :8], 1).shape == (66, 66, 3), "small pictures are enlarged"


@pytest.mark.parametrize(
    ("keep", "rows", "columns"),
    [
        ("upper", (0, 2), (0, 6)),
        ("lower", (2, 5), (0, 6)),
        ("left", (0, 5), (0, 3)),
        ("right", (0, 5), (3, 6)),
        ("1:3,2:6", (1, 3), (2, 6)),
    ],
)
def test_what_is_kept(keep: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    where = kept(keep, (5, 6, 3)).view(5, 6, 3)
    inside = torch.zeros(5, 6, 3, dtype=torch.bool)
    inside[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(where, inside)


@pytest.mark.parametrize("keep", [None, "top", "0:6,0:6", "0:0,0:6", "3:1,0:6", "0:5", "-1:5,0:6"])
def test_what_cannot_be_kept(keep: str | None) -> None:
    with pytest.raises(ValueError, match=r"keep: expected upper, lower, left, right, or rows,columns within 5 x 6"):
        kept(keep, (5, 6, 3))


# -- runs --------------------------------------------------------------------------------------------------------------

TINY = [
    *("--corpus=images", "--data.source=digits", "--objective=md4", "--precision=fp32"),
    *("--model.hidden_size=32", "--model.n_blocks=1", "--model.n_heads=2", "--model.cond_dim=16", "--batch_size=16"),
    *("--valid_blocks=32", "--valid_draws=2", "--valid_every=10", "--checkpoint_every=10", "--warmup=5", "--lr=3e-3"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps on digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("images") / "run"
    assert main(["train", "--run_dir", str(folder), *TINY, "--steps=60", "--valid_every=30", "--valid_samples=4"]) == 0
    return folder


def test_training_lowers_the_bound(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bounds = [row["valid_nats_per_token"] for row in rows if "valid_nats_per_token" in row]
    uniform = math.log(256)
    assert bounds[-1] < bounds[0] < uniform
    assert bounds[-1] < 0.6 * uniform
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["length"], config["model"]["shape"]) == (64, [8, 8, 1])


def test_samples_are_logged_as_a_picture(run: Path) -> None:
    curves = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    curves.Reload()
    assert curves.Tags()["images"] == ["valid/samples"]
    pictures = curves.Images("valid/samples")
    assert [event.step for event in pictures] == [30, 60]
    assert (pictures[0].width, pictures[0].height) == (131, 131), "four pictures of 64 pixels, and lines"
    assert "valid/bits_per_dim" in curves.Tags()["scalars"]
    assert "valid/bits_per_byte" not in curves.Tags()["scalars"]


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    options = [*TINY, "--data.flips=true", "--report_to=none", "--data.max_documents=100"]
    assert main(["train", "--run_dir", str(tmp_path / "whole"), *options, "--steps=20"]) == 0
    assert main(["train", "--run_dir", str(tmp_path / "parts"), *options, "--steps=10"]) == 0
    assert main(["train", "--run_dir", str(tmp_path / "parts"), "--resume", "--steps=20"]) == 0
    last = [tmp_path / name / "checkpoints/step_00000020/model.safetensors" for name in ("whole", "parts")]
    assert last[0].read_bytes() == last[1].read_bytes()
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_bits_per_dimension(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bound.json"
    assert main(["eval", "perplexity", str(run), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    ((split, figures),) = json.loads(path.read_text())["data"].items()
    assert split == "validation", "digits have no test images"
    assert figures["bits_per_dim"] == pytest.approx(figures["nats_per_token"] / math.log(2))
    assert figures["bits_per_dim_standard_error"] == pytest.approx(figures["standard_error"] / math.log(2))
    assert figures["tokens"] == 64 * figures["blocks"]
    assert f"{figures['bits_per_dim']:.4f} ± {figures['bits_per_dim_standard_error']:.4f}" in out
    assert "bits/dim" in out
    assert "perplexity" not in out.replace("eval perplexity", "")
    for words, message in (
        (["text.txt"], "texts: expected none"),
        (["--split", "test"], "--split: expected one of validation; got 'test'"),
        (["--detokenizer", "ptb"], "--detokenizer: expected only with a file"),
    ):
        assert main(["eval", "perplexity", str(run), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_test_images_are_scored_if_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = idx_folder(tmp_path / "mnist"), tmp_path / "bound.json"
    options = [*TINY, f"--data.source={folder}", "--report_to=none", "--steps=2"]
    assert main(["train", "--run_dir", str(tmp_path / "run"), *options]) == 0
    found = {}
    for split in ("test", "validation"):
        words = [] if split == "test" else ["--split=validation"]
        assert main(["eval", "perplexity", str(tmp_path / "run"), "--json", str(path), *words]) == 0
        found |= json.loads(path.read_text())["data"]
    assert list(found) == ["test", "validation"]
    assert found["test"]["blocks"] == 7
    assert found["test"]["reading"] == f"test data of {folder}, in blocks of 3 x 2 x 1"


def test_samples_are_written_as_a_grid(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tokens = tmp_path / "grid.png", tmp_path / "tokens.json"
    words = ["--num=5", "--steps=4", "--batch_size=2", "--out", str(path), "--json", str(tokens)]
    assert main(["sample", str(run), *words]) == 0
    assert capsys.readouterr().out == f"{path}: 5 images of 8 x 8 x 1\n"
    rows = torch.tensor([row["tokens"] for row in json.loads(tokens.read_text())])
    assert rows.shape == (5, 64)
    expected = grid(to_pixels(rows, (8, 8, 1)))
    assert np.array_equal(np.asarray(Image.open(path)), expected[..., 0])


def test_inpainting_keeps_what_is_given(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--steps=3", "--num=2", "--json=tokens.json"]
    assert main(["infill", str(run), "valid", "--keep=upper", *words]) == 0
    assert "infill.png: 2 images" in capsys.readouterr().out
    written = torch.tensor([row["tokens"] for row in json.loads(Path("tokens.json").read_text())])
    given = corpus("digits").valid(2)
    assert torch.equal(written[:, :32], given[:, :32])
    assert not torch.equal(written[:, 32:], given[:, 32:])
    assert int(written.max()) < 256
    picture = np.asarray(Image.open("infill.png"))
    assert picture.shape == (131, 131), "for each image a row: what is kept, and the filled image"
    assert np.array_equal(picture[1:33, 1:65], picture[1:33, 66:130]), "the kept part"
    assert (picture[33:65, 1:65] == 128).all(), "the gap"

    write_png(Path("one.png"), given[0].view(8, 8, 1).numpy().astype(np.uint8))
    assert main(["infill", str(run), "one.png", "--keep=2:8,0:5", *words]) == 0
    written = torch.tensor([row["tokens"] for row in json.loads(Path("tokens.json").read_text())]).view(2, 8, 8)
    assert torch.equal(written[:, 2:, :5], given[0].view(8, 8)[2:, :5].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "RUN", "--live"], "live: expected no value for a model of images, got true"),
        (["sample", "RUN", "--labels=" + "9" * 20], "--labels: expected none for a model without classes, got 999"),
        (["sample", "RUN", "--length=8"], "--length: expected no value for a model of images, got 8"),
        (["sample", "RUN", "--out=nowhere/x.png"], "--out: cannot write nowhere/x.png: no such folder"),
        (["infill", "RUN", "valid"], "--keep: expected upper, lower, left, right, or rows,columns"),
        (["infill", "RUN", "valid", "--keep=0:8,0:8"], "--keep: every position is given"),
        (["infill", "RUN", "valid", "--keep=left", "--num=9999"], "--num: expected at most 72 validation images"),
        (["infill", "RUN", "none.png", "--keep=left"], "none.png: expected a PNG file, got no such file"),
        (["infill", "RUN", "big.png", "--keep=left"], "big.png: expected an image of 8 x 8 pixels, got 9 x 8"),
    ],
)
def test_mistakes(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(Path("big.png"), np.zeros((9, 8, 1), np.uint8))
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.length=32"], "model.length: expected 64, which the data have, got 32"),
        (["--model.shape=4,4,4"], "length: expected 64"),
        (["--model.hidden_size=36", "--model.n_heads=6"], "hidden_size: expected a multiple of 4 * n_heads = 24"),
        (["--data.source=stdlib"], "stdlib"),
    ],
)
def test_runs_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["train", "--run_dir", str(tmp_path / "run"), *TINY, "--steps=1", *options]) == 2
    assert message in capsys.readouterr().err


def test_text_has_no_flips(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text " * 1000)
    config = DataConfig(str(tmp_path / "text.txt"), flips=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="flips: expected false for text, got true"):
        CORPORA["text"](config, get_tokenizer("bytes"), 16)


def test_images_are_registered() -> None:
    assert CORPORA["images"] is ImageCorpus
