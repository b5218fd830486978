"""What training data are: blocks of tokens, their vocabulary and shape, and a function that displays them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sedd.data.batches import Batches
from sedd.data.options import DataConfig
from sedd.data.tokenizer import Tokenizer

__all__ = ["Corpus"]


class Corpus(ABC):
    """Training and validation blocks of one kind of data. Registered by name in :data:`sedd.data.corpora.CORPORA`.

    A block has L tokens, the product of ``shape``.

    Attributes:
        unit: what :meth:`n_bytes` counts, in the name of the bound: bits per byte.
        vocab_size: number of token ids, without MASK.
        shape: shape of a block: (L,) for sequences of L tokens; rows, columns and channels for images, whose values are
            tokens in this order. A model for a shape of several axes has their positions.
        classes: number of classes of the blocks; 0 if they have none.

    Args:
        config: the data options.
        tokenizer: converts text to tokens; a corpus of other data ignores it.
        length: tokens per block; a corpus whose data have a shape of their own ignores it.
    """

    unit: ClassVar[str] = "byte"
    vocab_size: int
    shape: tuple[int, ...]
    classes: int = 0

    @abstractmethod
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, length: int) -> None: ...

    @abstractmethod
    def batches(self, batch_size: int, *, seed: int) -> Batches:
        """Endless training batches [batch_size, L], int64, in an order that depends only on the seed."""

    def labelled_batches(self, batch_size: int, *, seed: int) -> Batches:
        """The same batches with the class of each block. A corpus with classes must define this method."""
        raise self._without_classes("labelled_batches")

    @abstractmethod
    def valid(self, count: int) -> Tensor:
        """The first ``count`` validation blocks [≤ count, L], int64, the same in each call."""

    def test(self, count: int) -> Tensor | None:
        """The first ``count`` test blocks [≤ count, L], as :meth:`valid`; None if there are none."""
        return None

    def labels(self, split: str, count: int) -> Tensor:
        """The classes [≤ count], int64, of the blocks of a split, 'validation' or 'test'.

        A corpus with classes must define this method.
        """
        raise self._without_classes("labels")

    def _without_classes(self, method: str) -> NotImplementedError:
        name = type(self).__name__
        if self.classes:
            return NotImplementedError(
                f"{method}: expected a method of {name}, which has {self.classes} classes, got none"
            )
        return NotImplementedError(f"{method}: expected a corpus with classes, got {name}, which has none")

    @abstractmethod
    def n_bytes(self, blocks: Tensor) -> int:
        """Number of bytes, or of other units, that the blocks represent: the denominator of bits per byte."""

    @abstractmethod
    def show(self, block: Tensor) -> str | NDArray[np.uint8]:
        """A block [L] as readable text, or as a picture [H, W, C]. The block may contain MASK."""

    def describe(self) -> str:
        """What a block is, in a few words."""
        return f"{self.vocab_size:,} tokens in blocks of {' x '.join(map(str, self.shape))}"
