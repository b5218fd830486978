"""Blocks of tokens and their order in training, which is determined by a seed and can be resumed exactly."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sedd.data.detokenize import Detokenizer, detokenize
from sedd.data.tokenizer import Tokenizer, Tokens


def is_blank(text: str) -> bool:
    """Whether a document is empty or contains only white space."""
    return not text or text.isspace()


def encode_document(text: str, tokenizer: Tokenizer) -> Tokens:
    """Tokens of a document, followed by end-of-text, or by a space if the vocabulary has no end-of-text."""
    end = tokenizer.encode(" ")[0] if tokenizer.eot is None else tokenizer.eot
    return np.append(tokenizer.encode_array(text), tokenizer.dtype(end))


class TokenBlocks(torch.utils.data.Dataset[torch.Tensor]):
    """Blocks of equal length from a sequence of tokens, as a map-style dataset.

    The sequence is not copied and is usually a memory-mapped file; a block is copied when it is accessed.

    Args:
        chunks: The sequence, in chunks of any length.
        length: Tokens per block, L.
        windows: Whether training blocks may begin at any token; used by `batches`.
        starts: Offset of each block in the sequence, [n] int64. None: 0, L, 2L, … to the last full block.
        what: Name of the text in the error message.

    Raises:
        ValueError: If the sequence is shorter than one block.
    """

    def __init__(
        self,
        chunks: Iterable[Tokens],
        length: int,
        *,
        windows: bool = False,
        starts: NDArray[np.int64] | None = None,
        what: str = "text",
    ) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)
        self.length = length
        self.windows = windows
        self.n_tokens = int(self._ends[-1]) if self.chunks else 0
        if self.n_tokens < length:
            raise ValueError(
                f"{what}: expected at least one block of {length} tokens, got {self.n_tokens} tokens; give more text, "
                "shorter blocks, or another valid_fraction"
            )
        self.starts = np.arange(self.n_tokens // length, dtype=np.int64) * length if starts is None else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Block `index`, [L] int64."""
        return self.take([index])[0]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Blocks at the given indices, [B, L] int64."""
        return torch.from_numpy(self.gather(self.starts[np.asarray(indices, np.int64)]).astype(np.int64))

    def gather(self, starts: NDArray[np.int64]) -> Tokens:
        """L tokens from each offset in `starts` [B]: [B, L], in the dtype of the chunks (uint8, uint16 or uint32)."""
        blocks = np.empty((len(starts), self.length), self.chunks[0].dtype)
        for block, start, chunk in zip(blocks, starts, np.searchsorted(self._ends, starts, side="right"), strict=True):
            filled = 0
            while filled < self.length:
                begin = start + filled - (self._ends[chunk] - len(self.chunks[chunk]))
                piece = self.chunks[chunk][begin : begin + self.length - filled]
                block[filled : filled + len(piece)] = piece
                filled += len(piece)
                chunk += 1
        return blocks

    def tokens(self) -> Tokens:
        """Tokens of all blocks, concatenated: [n·L]."""
        return self.gather(self.starts).reshape(-1)

    def checksum(self) -> str:
        """Hash of the number of tokens, the block offsets and three blocks; identifies data and block length."""
        ends = self.gather(self.starts[[0, len(self) // 2, -1]])
        return hashlib.blake2b(
            ends.tobytes() + f"{self.n_tokens} {self.starts.sum()}".encode(), digest_size=8
        ).hexdigest()


class TokenStream:
    """Training blocks that are read and tokenised during training; created by `load_blocks`.

    Args:
        rows: A `datasets.IterableDataset`.
        column: The column of the text.
        tokenizer: Encodes the text.
        length: Tokens per block, L.
        shuffle_blocks: Number of blocks that are shuffled together.
        wanted: Function that returns whether a text belongs to this split.
        detokenizer: See `DataConfig.detokenizer`.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        tokenizer: Tokenizer,
        length: int,
        shuffle_blocks: int,
        wanted: Callable[[str], bool] = lambda text: True,
        detokenizer: Detokenizer = "none",
    ) -> None:
        self.rows = rows
        self.beginning: dict[str, Any] = rows.state_dict()
        self.length = length
        self.shuffle_blocks = shuffle_blocks
        self.dtype = tokenizer.dtype
        self._column = column
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._detokenizer = detokenizer

    def documents(self) -> Iterator[Tokens]:
        """Tokens of each document, from the position of `rows` (`rows.load_state_dict`) to the end."""
        for row in self.rows:
            text = row[self._column]
            if text is not None and not isinstance(text, str):
                raise ValueError(f"text_column: expected text in column {self._column!r}, got {type(text).__name__}")
            if text is not None and not is_blank(text) and self._wanted(text):
                yield encode_document(detokenize(text, self._detokenizer), self._tokenizer)


Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Tokens [batch_size, L], int64; with labels, the class of each block [batch_size], int64, too."""


class Batches(Protocol):
    """Endless training batches in an order that depends only on the seed.

    `state_dict` returns the position as JSON-serialisable data. After `load_state_dict`, also in a new process, the
    batches continue exactly from that position. All batches are full: a batch may contain blocks of two epochs.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


def batches(split: TokenBlocks | TokenStream, batch_size: int, *, seed: int = 0) -> Batches:
    """Endless training batches of a split.

    Fixed blocks occur once per epoch, in a new random order each epoch. With `windows`, an epoch has as many blocks as
    the text has fixed blocks, each at an offset drawn uniformly. The blocks of a stream are shuffled in groups.

    Args:
        split: `DataSplits.train`.
        batch_size: Blocks per batch, ≥ 1.
        seed: Determines the order, ≥ 0.

    Raises:
        ValueError: If batch_size or seed is too small; from `load_state_dict`, if the state belongs to other data or
            another seed; from a stream, if it contains no training text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if isinstance(split, TokenStream):
        return _StreamBatches(split, batch_size, seed)
    return BlockBatches(split, batch_size, seed)


def valid_batches(blocks: TokenBlocks, batch_size: int, max_blocks: int | None = None) -> Iterator[torch.Tensor]:
    """Yields the first `max_blocks` blocks (None: all) in their fixed order, as batches [≤ batch_size, L] int64."""
    numbers = range(len(blocks))[:max_blocks]
    for first in range(0, len(numbers), batch_size):
        yield blocks.take(numbers[first : first + batch_size])


class BlockBatches:
    """Batches of blocks; made by :func:`batches`."""

    def __init__(self, blocks: TokenBlocks, batch_size: int, seed: int) -> None:
        self._blocks = blocks
        self._batch_size = batch_size
        self._identity: dict[str, Any] = {
            "kind": "windows" if blocks.windows else "blocks",
            "seed": seed,
            "data": blocks.checksum(),
        }
        self._seed = seed
        self._consumed = 0
        self._epoch = -1
        self._order = blocks.starts

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(np.random.default_rng([self._seed, epoch])), epoch
        return self._order

    def _shuffled(self, random: np.random.Generator) -> NDArray[np.int64]:
        """The offsets of the blocks of an epoch."""
        if not self._blocks.windows:
            return random.permutation(self._blocks.starts)
        last = self._blocks.n_tokens - self._blocks.length
        return random.integers(0, last, len(self._blocks), endpoint=True)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts: list[NDArray[np.int64]] = []
        missing = self._batch_size
        while missing:
            epoch, position = divmod(self._consumed, len(self._blocks))
            starts.append(self._starts(epoch)[position : position + missing])
            missing -= len(starts[-1])
            self._consumed += len(starts[-1])
        return self._take(np.concatenate(starts))

    def _take(self, starts: NDArray[np.int64]) -> Batch:
        """The blocks at these offsets."""
        return torch.from_numpy(self._blocks.gather(starts).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {**self._identity, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        _check_state(state, self._identity, ("consumed",))
        self._consumed = state["consumed"]


class _StreamBatches:
    """Batches of a stream.

    Documents are read until they fill a group of blocks, and the blocks of the group are returned in random order. Only
    one group is in memory at a time. The state is the start of the group (the state of the reader, and the tokens left
    over from the previous group, fewer than a block) and the number of its blocks returned so far. After resuming, that
    group is read again.
    """

    def __init__(self, stream: TokenStream, batch_size: int, seed: int) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._seed = seed
        data = f"length {stream.length}, shuffle_blocks {stream.shuffle_blocks}"
        self._identity = {"kind": "stream", "seed": seed, "data": data}
        self._restart({"epoch": 0, "group": 0, "rows": stream.beginning, "left_over": []}, 0)

    def _restart(self, group: dict[str, Any], position: int) -> None:
        self._group = group
        self._position = position
        self._blocks: Tokens | None = None
        self._rewind(group["rows"])

    def _rewind(self, rows: dict[str, Any]) -> None:
        self._stream.rows.load_state_dict(rows)
        self._documents = self._stream.documents()

    def _read_group(self) -> Tokens:
        length, wanted = self._stream.length, self._stream.length * self._stream.shuffle_blocks
        pieces: list[Tokens] = [np.array(self._group["left_over"], self._stream.dtype)]
        n_tokens, epoch, at_beginning = len(pieces[0]), self._group["epoch"], False
        while n_tokens < wanted:
            document = next(self._documents, None)
            if document is not None:
                at_beginning = False
                pieces.append(document)
                n_tokens += len(document)
                continue
            if epoch > self._group["epoch"] and len(pieces) == 1:
                raise ValueError(
                    "source: expected training documents in the stream, got none; it is empty or all validation text"
                )
            epoch += 1
            self._rewind(self._stream.beginning)
            at_beginning = True  # `rows.state_dict` reports it only after the first row is read
            if n_tokens >= length:
                break
        tokens = np.concatenate(pieces)
        n_blocks = len(tokens) // length
        order = np.random.default_rng([self._seed, self._group["epoch"], self._group["group"]]).permutation(n_blocks)
        self._after = {
            "epoch": epoch,
            "group": self._group["group"] + 1,
            "rows": self._stream.beginning if at_beginning else self._stream.rows.state_dict(),
            "left_over": tokens[n_blocks * length :].tolist(),
        }
        return tokens[: n_blocks * length].reshape(n_blocks, length)[order]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        parts: list[Tokens] = []
        missing = self._batch_size
        while missing:
            if self._blocks is None:
                self._blocks = self._read_group()
            parts.append(self._blocks[self._position : self._position + missing])
            missing -= len(parts[-1])
            self._position += len(parts[-1])
            if self._position == len(self._blocks):
                self._group, self._position, self._blocks = self._after, 0, None
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity, **copy.deepcopy(self._group), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self._identity, ("epoch", "group", "position"))
        if not isinstance(state.get("rows"), dict):
            raise ValueError(f"rows: expected an object, got {state.get('rows')!r}")
        left_over = state.get("left_over")
        if not isinstance(left_over, list) or not all(type(x) is int and 0 <= x < 2**32 for x in left_over):
            raise ValueError("left_over: expected a list of tokens")
        self._restart(copy.deepcopy({key: state[key] for key in self._group}), state["position"])


def _check_state(state: dict[str, Any], identity: dict[str, Any], counts: tuple[str, ...]) -> None:
    for key, mine in identity.items():
        if state.get(key) != mine:
            raise ValueError(
                f"state: expected {key} = {mine!r}, got {key} = {state.get(key)!r}; resume with the data, the block "
                "length and the seed of the saved run"
            )
    for key in counts:
        if type(state.get(key)) is not int or state[key] < 0:
            raise ValueError(f"{key}: expected an int of at least 0, got {state.get(key)!r}")
