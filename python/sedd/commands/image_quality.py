"""The measures of sampled images: FID and Inception score with the features of a small classifier.

The classifier is trained on the data of the model, see :mod:`sedd.commands.classifier`. Its distances are not those of
Inception.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedd.commands.classifier import FEATURES, find_classifier
from sedd.commands.quality import READING, GenerativeOptions, Quality, Row, Write, with_error
from sedd.data.images import ImageCorpus
from sedd.hints import pip_install
from sedd.hub.pretrained import LoadedModel

__all__ = ["Distances", "ImageQuality"]

GROUPS = 20
"""Groups of the jackknife."""


class _Features(nn.Module):
    """What the metrics take for their network: it receives features, which are computed only once."""

    num_features = FEATURES

    def forward(self, features: Tensor) -> Tensor:
        """Returns its argument."""
        return features


def _metrics() -> tuple[type[Any], type[Any]]:
    """The metrics of torchmetrics: FID and Inception score."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics: {pip_install('images', 'torchmetrics')}") from error
    return FrechetInceptionDistance, InceptionScore


class Distances:
    """FID from real images, and Inception score, of sets of images.

    Args:
        real: the features of the real images [n, FEATURES], float64.

    Raises:
        ImportError: torchmetrics is not installed.
    """

    def __init__(self, real: Tensor) -> None:
        distance, score = _metrics()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")
            self._score = score(_Features(), splits=1)
        self._fid = distance(_Features(), reset_real_features=False)
        self._fid.update(real, real=True)

    def measure(self, features: Tensor, logits: Tensor) -> dict[str, float | None]:
        """Both measures of images, with the standard errors of a jackknife that omits one of 20 groups.

        Args:
            features: [n, FEATURES], float64.
            logits: [n, classes], float64.
        """
        fid, score = self._distance(features), self._inception(logits)
        return {
            "fid": fid,
            "fid_error": _jackknife(self._distance, features),
            "inception_score": score,
            "inception_score_error": _jackknife(self._inception, logits),
        }

    def _distance(self, features: Tensor) -> float:
        self._fid.reset()
        self._fid.update(features, real=False)
        return float(self._fid.compute())

    def _inception(self, logits: Tensor) -> float:
        self._score.reset()
        self._score.update(logits)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it shuffles them
            warnings.filterwarnings("ignore", r"std\(\): degrees of freedom")  # of one split
            return float(self._score.compute()[0])


def _jackknife(value: Callable[[Tensor], float], rows: Tensor) -> float | None:
    """The standard error of a function of independent rows; None for fewer than 4 rows."""
    groups = min(GROUPS, len(rows) // 2)
    if groups < 2:
        return None
    group = torch.arange(len(rows)) % groups
    values = torch.tensor([value(rows[group != omitted]) for omitted in range(groups)], dtype=torch.float64)
    return math.sqrt((groups - 1) / groups * float((values - values.mean()).square().sum()))


class ImageQuality(Quality):
    """The measures of sampled images.

    Args:
        loaded: a run with images.
        options: the options of the command.
        num: number of images.
        batch_size: number of images at a time; the classifier takes its own.

    Raises:
        ValueError, ImportError, OSError, ConnectionError: the data of the run are not there or are no images, or as
            :class:`Distances` and :func:`sedd.commands.classifier.find_classifier`.
    """

    unit, real_name = "image", "real images"
    num, batch_size = 1000, 100
    others = ("judge", "text", *READING, "mauve", "given", "compared", "length")

    def __init__(self, loaded: LoadedModel, options: GenerativeOptions, num: int, batch_size: int) -> None:
        _metrics()  # before anything that takes time
        for name, value in (("num", num), ("reference", options.reference)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2 images, which have a covariance, got {value}")
        corpus = loaded.corpus()
        assert loaded.config is not None
        if not isinstance(corpus, ImageCorpus):
            raise ValueError(f"run: expected a model of text or images, got {loaded.path}, of {loaded.config.corpus}")
        reference, test = corpus.train(options.reference), corpus.test(num)
        if options.guidance is not None:
            if not loaded.model.config.classes:
                raise ValueError(f"guidance: expected no value for a model without classes, got {options.guidance:g}")
            drawn = torch.randint(len(reference), (num,), generator=torch.Generator().manual_seed(options.seed))
            self.labels = corpus.labels("train", len(reference))[drawn]
        self._real, split = (corpus.valid(num), "validation") if test is None else (test, "test")
        data, path = loaded.config.data, options.classifier
        classifier = find_classifier(corpus, data.source, None if path is None else Path(path), data.cache_dir)
        self._classifier = classifier
        self._distances = Distances(classifier.read(reference)[0])
        self.title = f"{num:,} images of {' x '.join(map(str, corpus.shape))}"
        few = f", which are fewer than {num:,} and have a higher FID for that alone" if len(self._real) < num else ""
        self.note = (
            f"FID and Inception score of a classifier trained on {classifier.source}, not Inception; comparable only "
            f"with the same classifier ({classifier.name}) and the same number of images. FID from {len(reference):,} "
            f"training images; real images: {len(self._real):,} {split} images{few}."
        )
        if self.labels is not None:
            self.note += f" Samples have the classes of training images, with guidance {options.guidance:g}."
        self.settings = {
            "classifier": classifier.name,
            "classifier_accuracy": classifier.accuracy,
            "training_images": len(reference),
        }
        self.tensors = [*classifier.network.parameters(), reference, self._real]
        self.panels = (
            ("fid", f"FID of {classifier.name}", "log"),
            ("inception_score", f"Inception score of {classifier.name}", "linear"),
        )

    def real(self, progress: bool) -> Row | None:
        """See :meth:`Quality.real`."""
        return self._measures(self._real) if len(self._real) > 1 else None

    def measure(self, samples: Tensor, write: Write) -> Row:
        """See :meth:`Quality.measure`."""
        return self._measures(samples)

    def _measures(self, images: Tensor) -> Row:
        return {"images": len(images), **self._distances.measure(*self._classifier.read(images))}

    def columns(self, rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
        """See :meth:`Quality.columns`."""
        return [
            ("images", lambda row: f"{row['images']:,}"),
            (f"FID\n{self._classifier.name}", with_error("fid")),
            (f"Inception score\n{self._classifier.name}", with_error("inception_score", 3)),
            ("seconds\nper image", lambda row: f"{row['seconds_per_image']:.3f}"),
        ]
