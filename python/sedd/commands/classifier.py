"""A small classifier of images, whose features are compared in the place of those of Inception."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import Tensor, nn

from sedd.data.images import ImageCorpus
from sedd.data.sources import import_datasets
from sedd.files import load_tensors, save_tensors
from sedd.options import renamed
from sedd.progress import console, track
from sedd.unfinished import identity

__all__ = ["FEATURES", "Classifier", "find_classifier"]

FEATURES = 64
"""Features of an image."""
STEPS, EPOCHS = 2000, 40  # whichever ends first
BATCH = 128
LEARNING_RATE = 2e-3
SEED = 0
MOST = 50_000  # images in memory


class _Network(nn.Module):
    """Three convolutions, the last two of stride 2, a layer of features, and one of logits."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        height, width, channels = shape
        self.shape = shape
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, 3, stride=stride, padding=1)
            for into, out, stride in ((channels, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.features = nn.Linear(64 * -(-height // 4) * -(-width // 4), FEATURES)
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features [n, FEATURES] and logits [n, classes] of images [n, H·W·C], int64, in float32."""
        x = images.view(-1, *self.shape).permute(0, 3, 1, 2).float() / 127.5 - 1
        for convolution in self.convolutions:
            x = convolution(x).relu()
        features = self.features(x.flatten(1)).relu()
        return features, self.logits(features)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    It is so small that it runs on the CPU.

    Attributes:
        network: computes features and logits.
        name: the name of its training data with a hash of its weights.
        source: its training data.
        accuracy: the fraction of the ``accuracy_images`` held-out images whose class it finds.
        accuracy_images: their number.
        path: its file.
    """

    network: nn.Module
    name: str
    source: str
    accuracy: float
    accuracy_images: int
    path: Path

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """The features [n, FEATURES] and logits [n, classes] of images [n, L], float64."""
        parts = [self.network(part) for part in images.split(batch_size)]
        features, logits = (torch.cat(part).double() for part in zip(*parts, strict=True))
        return features, logits


def find_classifier(corpus: ImageCorpus, source: str, path: Path | None, cache: str | None) -> Classifier:
    """Loads the classifier of a data set, or trains it and writes its file.

    Args:
        corpus: the images. The classifier learns the training images, with their classes.
        source: the name of the data set.
        path: the file of the classifier; None for one in the cache, whose name depends on the training images.
        cache: the cache folder; None for the one of ``datasets``.

    Raises:
        ValueError: the file is damaged, or is no classifier of images of this shape; or it does not exist and the
            images have no classes.
        OSError: the file cannot be written.
    """
    if path is None:
        folder = Path(cache or import_datasets().config.HF_DATASETS_CACHE).expanduser()
        with renamed({"model.classes": "classifier"}):
            path = folder / f"sedd-classifier-{_recipe(corpus)}.safetensors"
    if path.exists():
        found = _load(path, corpus.shape)
    else:
        if not corpus.classes:
            raise ValueError(
                f"classifier: expected images with classes, to train a classifier, got {source}, which has none; give "
                "the file of a classifier of images of the same size"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed({"model.classes": "classifier"}):
            found = _train(corpus, source, path)
    console().print(
        f"classifier {found.name}: finds the class of {found.accuracy:.1%} of {found.accuracy_images:,} held-out "
        f"images; {found.path}",
        highlight=False,
    )
    return found


def _recipe(corpus: ImageCorpus) -> str:
    """Hash of all that the classifier depends on."""
    settings = f"{corpus.shape} {corpus.classes} {STEPS} {EPOCHS} {BATCH} {LEARNING_RATE} {SEED}"
    return identity((corpus.train(MOST), corpus.labels("train", MOST)) if corpus.classes else (), settings)[:16]


def _train(corpus: ImageCorpus, source: str, path: Path) -> Classifier:
    images, labels = corpus.train(MOST), corpus.labels("train", MOST)
    split, held_out, held_out_labels = _held_out(corpus)
    steps = min(STEPS, -(-EPOCHS * len(images) // BATCH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = _Network(corpus.shape, corpus.classes)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        out = console()
        out.print(f"training a classifier on {len(images):,} images of {source}")
        for _ in track(range(steps), "classifier", out.is_terminal):
            rows = torch.randint(len(images), (BATCH,))
            loss = F.cross_entropy(network(images[rows])[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guesses = torch.cat([network(part)[1].argmax(-1) for part in held_out.split(256)])
    about = {
        "source": source,
        "shape": list(corpus.shape),
        "classes": corpus.classes,
        "training_images": len(images),
        "accuracy": float((guesses == held_out_labels).double().mean()),
        "accuracy_images": len(held_out),
        "accuracy_split": split,
    }
    save_tensors(path, network.state_dict(), {"classifier": json.dumps(about)})
    return _classifier(network, about, path)


def _held_out(corpus: ImageCorpus) -> tuple[str, Tensor, Tensor]:
    """The name, images and classes of the test split; if it has none, or no classes, those of the validation split."""
    images = corpus.test(MOST)
    if images is not None:
        try:
            return "test", images, corpus.labels("test", MOST)
        except ValueError:  # images without a class
            pass
    return "validation", corpus.valid(MOST), corpus.labels("validation", MOST)


def _load(path: Path, shape: tuple[int, int, int]) -> Classifier:
    tensors, metadata = load_tensors(path)
    try:
        about = json.loads(metadata["classifier"])
        with torch.device("meta"):  # shapes are compared before memory is allocated
            network = _Network(tuple(about["shape"]), about["classes"])
        network.load_state_dict(tensors, assign=True)
        found = _classifier(network, about, path)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"classifier: expected a file of a classifier, written by sedd eval generative, got {path}; delete it or "
            "give another file"
        ) from error
    if tuple(about["shape"]) != shape:
        sizes = (" x ".join(map(str, size)) for size in (shape, about["shape"]))
        raise ValueError("classifier: expected one of images of {}, got {} in {}".format(*sizes, path))
    return found


def _classifier(network: _Network, about: dict[str, Any], path: Path) -> Classifier:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    source = str(about["source"])
    name = f"{Path(source).name}-{digest.hexdigest()[:8]}"
    accuracy, images = float(about["accuracy"]), int(about["accuracy_images"])
    return Classifier(network.eval().requires_grad_(False), name, source, accuracy, images, path)
