"""Tokenisers: text to token ids and back.

Three are known by name: ``gpt2`` (byte-pair encoding of GPT-2, 50,257 tokens), ``bytes`` (UTF-8 bytes and end-of-text)
and ``text8`` (the 27 symbols of the text8 benchmark). Ids are 0 ≤ id < ``vocab_size``; the id ``vocab_size``, MASK of
an absorbing process, belongs to no tokeniser and decodes to a visible placeholder.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sedd.hints import pip_install

if TYPE_CHECKING:
    import tiktoken

MASK_TEXT = "█"
EOT_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokeniser offers.

    Attributes:
        name: The name `get_tokenizer` knows it by.
        vocab_size: Number of token ids, end-of-text included and MASK not.
        eot: Id of the end-of-text token, or None where the vocabulary has none.
    """

    name: str
    vocab_size: int
    eot: int | None

    @abstractmethod
    def encode_array(self, text: str) -> NDArray[np.uint16]:
        """Token ids of `text` as an array, [n] uint16. Never gives `eot`: text that spells it is ordinary text.

        Raises:
            ValueError: If `text` has characters outside the vocabulary.
        """

    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text each token stands for, [vocab_size] int64; 0 for end-of-text, which is not text."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an ordinary token, which need not be whole characters."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as a list; see `encode_array`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Any sequence of ids decodes, half-finished ones too: bytes that are not UTF-8 show as U+FFFD, MASK as ``█`` and
        end-of-text as ``<|endoftext|>``.

        Args:
            ids: Token ids, 0 ≤ id ≤ vocab_size: a list, an array or a one-dimensional tensor.

        Raises:
            ValueError: If an id is out of range.
        """
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each token adds to the text of `decode`: a character of several tokens stands at the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces: list[str] = []
        for token in map(int, ids):
            if token != self.eot and 0 <= token < self.vocab_size:
                pieces.append(decoder.decode(self._token_bytes(token)))
                continue
            if token not in (self.eot, self.vocab_size):
                raise ValueError(
                    f"ids: token {token} is out of range; {self.name} has the tokens 0 to {self.vocab_size - 1}, "
                    f"and {self.vocab_size} for MASK"
                )
            if pieces:  # no character goes on beyond this token
                pieces[-1] += decoder.decode(b"", final=True)
            pieces.append(EOT_TEXT if token == self.eot else MASK_TEXT)
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        # A worker process and the cache of `datasets` need the name alone, not the tables.
        return get_tokenizer, (self.name,)


class Bytes(Tokenizer):
    """UTF-8 bytes, 0 to 255, and end-of-text, 256."""

    name = "bytes"
    vocab_size = 257
    eot: int | None = 256

    def encode_array(self, text: str) -> NDArray[np.uint16]:  # noqa: D102
        # A lone surrogate (a broken command line, broken JSON) is no text and has no UTF-8: it becomes "?".
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16)

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[256] = 0
        return lengths

    def _token_bytes(self, token: int) -> bytes:
        return bytes([token])


class Text8(Tokenizer):
    """The 27 symbols of text8: 0 is the space, 1 to 26 are a to z. There is no end-of-text."""

    name = "text8"
    symbols = " abcdefghijklmnopqrstuvwxyz"
    vocab_size = len(symbols)
    eot: int | None = None

    def encode_array(self, text: str) -> NDArray[np.uint16]:  # noqa: D102
        bad = re.search("[^ a-z]", text)
        if bad:
            near = text[max(0, bad.start() - 20) : bad.start() + 20]
            raise ValueError(
                f"text: {bad[0]!r} (U+{ord(bad[0]):04X}) at character {bad.start()}, in {near!r}, is not one of the 27 "
                "symbols of text8: a to z and the space. Convert the text (lower case, digits spelled out, everything "
                "else a space), or use the tokeniser 'bytes'"
            )
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.uint16)
        ids: NDArray[np.uint16] = np.where(codes == ord(" "), np.uint16(0), codes - np.uint16(ord("a") - 1))
        return ids

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        return np.ones(self.vocab_size, np.int64)

    def _token_bytes(self, token: int) -> bytes:
        return self.symbols[token].encode("ascii")


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding through tiktoken: 50,256 ranks and end-of-text, 50256."""

    name = "gpt2"
    vocab_size = 50257
    eot: int | None = 50256

    def __init__(self) -> None:
        """Load the ranks, from tiktoken's cache or from the network.

        Raises:
            ImportError: If tiktoken is not installed.
            RuntimeError: If the ranks are neither cached nor to be had.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"the tokeniser 'gpt2' needs tiktoken: {pip_install('train', 'tiktoken')} (or use 'bytes')"
            ) from error
        try:
            # r50k_base has the ranks of "gpt2" in one file, which a copied cache folder can hold.
            self._encoding: tiktoken.Encoding = tiktoken.get_encoding("r50k_base")
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"the ranks of the tokeniser 'gpt2' could not be loaded ({type(error).__name__}: {error}). tiktoken "
                "downloads them once, so connect to the network; or set TIKTOKEN_CACHE_DIR to a folder that holds "
                "them, copied from a machine that has them; or use the tokeniser 'bytes', which needs no file"
            ) from error

    def encode_array(self, text: str) -> NDArray[np.uint16]:  # noqa: D102
        ids: list[int] = self._encoding.encode_ordinary(text)
        return np.array(ids, np.uint16)

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0], np.int64)

    def _token_bytes(self, token: int) -> bytes:
        found: bytes = self._encoding.decode_single_token_bytes(token)
        return found


TOKENIZERS: dict[str, type[Tokenizer]] = {"gpt2": GPT2, "bytes": Bytes, "text8": Text8}


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokeniser of that name: "gpt2", "bytes" or "text8".

    Raises:
        ValueError: If no tokeniser has that name.
        ImportError: For "gpt2" without tiktoken.
        RuntimeError: For "gpt2" if its ranks can neither be read from tiktoken's cache nor downloaded.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer: unknown name {name!r}; known are {', '.join(map(repr, TOKENIZERS))}")
    return TOKENIZERS[name]()


def count_bytes(tokens: Any, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that `tokens` stand for: the denominator of bits per byte.

    End-of-text counts nothing. Its bits are still paid for, so a figure per byte errs upwards, never downwards. A byte
    of text8 is a character.

    Args:
        tokens: Ids of ordinary tokens and end-of-text, an integer tensor or array of any shape.
        tokenizer: What made them.

    Raises:
        ValueError: If a token is out of range (MASK stands for no text).
    """
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ValueError(
            f"tokens: ids from {ids.min()} to {ids.max()} given; {tokenizer.name} has 0 to {tokenizer.vocab_size - 1}"
        )
    return int(tokenizer.byte_lengths()[ids].sum())
