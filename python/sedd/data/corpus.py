"""Training data: blocks of tokens, their vocabulary and shape, and a function that displays them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from sedd.data.batches import Batches, batches, valid_batches
from sedd.data.options import DataConfig
from sedd.data.text import load_blocks
from sedd.data.tokenizer import Tokenizer, count_bytes

__all__ = ["CORPORA", "Corpus", "TextCorpus"]


class Corpus(ABC):
    """Training and validation blocks of one kind of data. Registered by name in :data:`CORPORA`.

    Attributes:
        vocab_size: number of token ids, without MASK.
        shape: shape of a block: (L,) for sequences of L tokens.

    Args:
        config: the data options.
        tokenizer: converts text to tokens; a corpus of other data ignores it.
        length: tokens per block.
    """

    vocab_size: int
    shape: tuple[int, ...]

    @abstractmethod
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, length: int) -> None: ...

    @abstractmethod
    def batches(self, batch_size: int, *, seed: int) -> Batches:
        """Endless training batches [batch_size, *shape], int64, in an order that depends only on the seed."""

    @abstractmethod
    def valid(self, count: int) -> Tensor:
        """The first ``count`` validation blocks [≤ count, *shape], int64, the same in each call."""

    @abstractmethod
    def n_bytes(self, blocks: Tensor) -> int:
        """Number of bytes that the blocks represent: the denominator of bits per byte."""

    @abstractmethod
    def show(self, block: Tensor) -> str:
        """A block [*shape] as readable text. The block may contain MASK."""


class TextCorpus(Corpus):
    """Text, tokenised and cut into blocks of L tokens."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.shape = (length,)
        self._splits = load_blocks(config, tokenizer, length)

    def batches(self, batch_size: int, *, seed: int) -> Batches:
        """See :func:`sedd.data.batches.batches`."""
        return batches(self._splits.train, batch_size, seed=seed)

    def valid(self, count: int) -> Tensor:
        """See :meth:`Corpus.valid`."""
        blocks: Tensor = next(valid_batches(self._splits.valid, count))
        return blocks

    def n_bytes(self, blocks: Tensor) -> int:
        """Number of UTF-8 bytes of the text."""
        return count_bytes(blocks, self.tokenizer)

    def show(self, block: Tensor) -> str:
        """The decoded text."""
        return self.tokenizer.decode(block.tolist())


CORPORA: dict[str, type[Corpus]] = {"text": TextCorpus}
"""All kinds of data by name. To add one, write a subclass of :class:`Corpus` and register it here."""
