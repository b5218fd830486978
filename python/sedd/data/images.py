"""Images as training data: the 256 values of each pixel and channel are tokens.

An image of H rows, W columns and C channels is a block of H·W·C tokens: row after row, the channels of a pixel one
after another. Order does not matter to a diffusion model of masked or replaced values, whose bound in bits per
dimension is comparable with that of any other model of the 8-bit values.
"""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedd.data.batches import Batch, Batches, BlockBatches, TokenBlocks
from sedd.data.corpus import Corpus
from sedd.data.holdout import content_key, validation_cut
from sedd.data.image_sources import ImageSet, open_images
from sedd.data.options import DataConfig
from sedd.data.pictures import VALUES, Pixels, to_pixels
from sedd.data.sources import chosen
from sedd.data.tokenizer import Tokenizer

__all__ = ["ImageCorpus"]

_TEXT_ONLY = ("valid_source", "text_column", "documents", "detokenizer", "windows", "streaming")


class ImageCorpus(Corpus):
    """Images with 256 values, read by :func:`sedd.data.image_sources.open_images`.

    The training images are those of ``train_split``. Validation images are those of ``valid_split``, by default
    'validation' if there is such a split, else a part of the training images. Test images are those of the split
    'test', if there is one.
    """

    unit = "dim"
    vocab_size = VALUES

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, length: int) -> None:
        _check(config)
        found = open_images(config)
        train, valid = chosen(found, config)
        self.shape: tuple[int, int, int] = train.shape
        self.classes = train.classes
        self._flips = config.flips
        whole = _Split(train)
        if config.max_documents is not None:
            whole = whole.part(whole.blocks.starts[: config.max_documents])
        if valid is None:
            is_valid = _held_out(whole.blocks, config)
            self._train = whole.part(whole.blocks.starts[~is_valid])
            self._splits = {"validation": whole.part(whole.blocks.starts[is_valid]).shuffled()}
        else:
            self._train = whole
            self._splits = {"validation": _Split(valid).shuffled()}
        if "test" in found:
            self._splits["test"] = _Split(found["test"]).shuffled()
        self._splits["train"] = self._train.shuffled()

    def batches(self, batch_size: int, *, seed: int) -> Batches:
        """See :meth:`Corpus.batches`."""
        return _ImageBatches(self._train, batch_size, seed, flips=self._flips)

    def labelled_batches(self, batch_size: int, *, seed: int) -> Batches:
        """See :meth:`Corpus.labelled_batches`."""
        return _ImageBatches(self._train, batch_size, seed, flips=self._flips, labelled=True)

    def train(self, count: int) -> Tensor:
        """The first ``count`` training images [≤ count, L], int64, as :meth:`valid`; none is mirrored."""
        return self._splits["train"].take(count)

    def valid(self, count: int) -> Tensor:
        """See :meth:`Corpus.valid`."""
        return self._splits["validation"].take(count)

    def test(self, count: int) -> Tensor | None:
        """See :meth:`Corpus.test`."""
        return self._splits["test"].take(count) if "test" in self._splits else None

    def labels(self, split: str, count: int) -> Tensor:
        """See :meth:`Corpus.labels`; the split can be 'train' too."""
        found = self._splits[split]
        return found.labels(found.blocks.starts[:count])

    def n_bytes(self, blocks: Tensor) -> int:
        """Number of dimensions: of values."""
        return blocks.numel()

    def show(self, block: Tensor) -> Pixels:
        """The image [H, W, C]."""
        return to_pixels(block, self.shape)

    def describe(self) -> str:
        """See :meth:`Corpus.describe`."""
        return f"{len(self._train.blocks):,} images of {' x '.join(map(str, self.shape))}"


class _Split:
    """Images of a split, as blocks and with their classes.

    Args:
        images: the images.
        starts: where the images of the split begin among all values; None for all images.
    """

    def __init__(self, images: ImageSet, starts: NDArray[np.int64] | None = None) -> None:
        self.images = images
        self.blocks = TokenBlocks(images.chunks, math.prod(images.shape), starts=starts, what="images")

    def part(self, starts: NDArray[np.int64]) -> _Split:
        """Some of the images, in this order."""
        return _Split(self.images, starts)

    def shuffled(self) -> _Split:
        """The images in a fixed random order, so that the first n are a random sample for any n."""
        return self.part(np.random.default_rng(0).permutation(self.blocks.starts))

    def take(self, count: int) -> Tensor:
        """The first ``count`` images [≤ count, L]."""
        return self.blocks.take(range(min(count, len(self.blocks))))

    def labels(self, starts: NDArray[np.int64]) -> Tensor:
        """The classes of the images that begin there."""
        if self.images.labels is None:
            raise ValueError("model.classes: expected images with classes, got a split without them")
        found = self.images.labels[starts // self.blocks.length]
        if (found < 0).any():
            raise ValueError("model.classes: expected a class of each image, got images without one")
        return torch.from_numpy(found)


class _ImageBatches(BlockBatches):
    """Batches of images, some of them mirrored. The offset of a mirrored one is inverted: ~start."""

    def __init__(self, split: _Split, batch_size: int, seed: int, *, flips: bool, labelled: bool = False) -> None:
        super().__init__(split.blocks, batch_size, seed)
        self._identity["kind"] = "mirrored images" if flips else "images"
        self._split, self._flips, self._labelled = split, flips, labelled

    def _shuffled(self, random: np.random.Generator) -> NDArray[np.int64]:
        starts = super()._shuffled(random)
        return np.where(random.random(len(starts)) < 0.5, ~starts, starts) if self._flips else starts

    def _take(self, starts: NDArray[np.int64]) -> Batch:
        is_mirrored = starts < 0
        starts = np.where(is_mirrored, ~starts, starts)
        images = self._blocks.gather(starts).reshape(-1, *self._split.images.shape)
        images[is_mirrored] = images[is_mirrored, :, ::-1]
        tokens = torch.from_numpy(images.reshape(len(starts), -1).astype(np.int64))
        return (tokens, self._split.labels(starts)) if self._labelled else tokens


def _check(config: DataConfig) -> None:
    defaults = {field.name: field.default for field in fields(DataConfig)}
    for name in _TEXT_ONLY:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name}: expected no value for images, got {getattr(config, name)!r}")
    if config.max_documents is not None and config.max_documents < 1:
        raise ValueError(f"max_documents: expected at least 1, got {config.max_documents}")
    if not 0 < config.valid_fraction < 1:
        raise ValueError(f"valid_fraction: expected a number between 0 and 1, got {config.valid_fraction}")


def _held_out(blocks: TokenBlocks, config: DataConfig) -> NDArray[np.bool_]:
    """Which images are held out for validation."""
    keys = np.array([content_key(blocks.gather(start[None]).tobytes()) for start in blocks.starts], np.int64)
    different = np.unique(keys)
    if len(different) < 2:
        raise ValueError(f"source: expected at least 2 different images in {config.source}, got {len(different)}")
    is_valid: NDArray[np.bool_] = keys < validation_cut(different, config.valid_fraction)
    return is_valid
