"""Kinds of training data, found by name in :data:`CORPORA`."""

from __future__ import annotations

from torch import Tensor

from sedd.data.batches import Batches, batches, valid_batches
from sedd.data.corpus import Corpus
from sedd.data.images import ImageCorpus
from sedd.data.options import DataConfig
from sedd.data.text import load_blocks
from sedd.data.tokenizer import TOKENIZER_FILES, Tokenizer, count_bytes

__all__ = ["CORPORA", "TextCorpus"]


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

    def describe(self) -> str:
        """See :meth:`Corpus.describe`."""
        name = TOKENIZER_FILES[0] if self.tokenizer.files() else self.tokenizer.name
        return f"{name} tokens in blocks of {self.shape[0]}"


CORPORA: dict[str, type[Corpus]] = {"text": TextCorpus, "images": ImageCorpus}
"""All kinds of data by name. To add one, write a subclass of :class:`sedd.data.corpus.Corpus` and register it here."""
