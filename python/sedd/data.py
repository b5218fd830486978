"""Text in, blocks of tokens out.

Text becomes documents (`sources.py`), documents are divided between training and validation, each document is tokenised
and closed with end-of-text (with a space where the vocabulary has no end-of-text), and each side's documents, joined,
are cut into blocks of one length (`batches.py`). Tokens are uint16 (uint32 for vocabularies above 65,536) in
memory-mapped Arrow files of the cache of `datasets`: memory does not grow with the data, and another block length
tokenises nothing anew.

No text is on both sides. A document's side follows from a hash of its text, before anything is joined or cut, so copies
of a document are on one side too, and neither the machine nor the seed of training moves a document. A text that is one
single document is divided at one place: its last part is the validation text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sedd.batches import Batches, TokenBlocks, TokenStream, batches, encode_document, is_blank, valid_batches
from sedd.detokenize import DETOKENIZERS, Detokenizer, detokenize
from sedd.sources import SAMPLE_BY, import_datasets, open_source
from sedd.tokenizer import Tokenizer, Tokens

__all__ = [
    "Batches",
    "DataConfig",
    "DataSplits",
    "TokenBlocks",
    "TokenStream",
    "batches",
    "load_blocks",
    "load_text",
    "valid_batches",
]

_CACHE_VERSION = 1  # raise it when the meaning of what is cached changes


@dataclass
class DataConfig:
    """Which text to train on and how it is cut up."""

    source: str = "stdlib"
    """Where the text comes from: 'stdlib' (source and documentation of this Python installation: no download), a file
    (.txt, .raw, .json, .jsonl or .parquet, also compressed as .gz, .bz2, .xz or .zst; a name without suffix is
    text), a folder of such files, a folder of `save_to_disk`, or the name of a data set on the Hugging Face hub."""
    valid_source: str | None = None
    """A file or folder with the validation text. Without it validation text is `valid_split` or a part of `source`."""
    subset: str | None = None
    """Configuration of a hub data set, such as 'wikitext-103-raw-v1'."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_split: str = "train"
    """Split of a hub data set, or of a folder of `save_to_disk`, to train on."""
    valid_split: str | None = None
    """Split of a hub data set to validate on. Default: 'validation' if there is one, else a part of `train_split`."""
    text_column: str = "text"
    """Column (JSON key) that holds the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one document of a text file is: the whole file, as it stands (it is held in memory while it is read), a
    paragraph (up to a blank line) or a line. JSON and Parquet have a document a row."""
    detokenizer: Detokenizer = "none"
    """How spaces that a tokeniser of words has put into the text are taken out again: none, wikitext, ptb, lm1b, or
    lambada (typographic quotes made plain)."""
    valid_fraction: float = 0.05
    """Share of the documents that goes to validation where the source has no validation text of its own; of a single
    document, the share at its end. Between 0 and 1."""
    windows: bool = False
    """Train on windows that begin at any token (usual for text8) instead of on fixed blocks in a shuffled order.
    Validation always uses fixed blocks."""
    max_documents: int | None = None
    """Use only the first so many documents of `source`."""
    streaming: bool = False
    """Read and tokenise while training instead of preparing first: for text too big to store. Documents come in the
    source's order, and blocks are shuffled in groups."""
    stream_shuffle_blocks: int = 2000
    """Streaming: number of blocks that are shuffled together."""
    stream_valid_blocks: int = 1000
    """Streaming: read and keep this many validation blocks (fewer if the text ends before)."""
    num_proc: int = 1
    """Number of processes that tokenise. It does not change the result."""
    cache_dir: str | None = None
    """Folder for downloads and prepared text. Default: that of the package datasets
    (HF_DATASETS_CACHE, else ~/.cache/huggingface)."""


@dataclass
class DataSplits:
    """What `load_blocks` gives: text to train on and other text to validate on, as blocks of tokens."""

    train: TokenBlocks | TokenStream
    valid: TokenBlocks


def load_blocks(config: DataConfig, tokenizer: Tokenizer, length: int) -> DataSplits:
    """Load text, divide it between training and validation, tokenise it and cut it into blocks.

    Args:
        config: Which text.
        tokenizer: What turns it into tokens.
        length: Tokens a block, ≥ 1.

    Returns:
        Training blocks (`TokenBlocks`, or a `TokenStream` with `config.streaming`; both for `batches`) and validation
        blocks (for `valid_batches`).

    Raises:
        ImportError: Without `datasets`.
        FileNotFoundError: If there is no such file, folder or hub data set.
        ConnectionError: If the source must be a hub data set and the hub cannot be reached.
        ValueError: If the configuration or the text will not do: the message names the field.
    """
    _check(config, length)
    rows, valid_rows = open_source(config)
    if config.max_documents is not None:
        rows = rows.take(config.max_documents)
    for field, part in (("source", rows), ("valid_source", valid_rows)):
        if part is not None:
            _check_column(part, config.text_column, field)
    if config.streaming:
        return _stream(rows, valid_rows, config, tokenizer, length)
    if valid_rows is None:
        train, valid = _divide(rows, config, tokenizer)
    else:
        train, valid = _tokenize(rows, config, tokenizer), _tokenize(valid_rows, config, tokenizer)
    blocks = _shuffled(valid, length, "validation text")
    return DataSplits(TokenBlocks(train, length, windows=config.windows, what="training text"), blocks)


def load_text(config: DataConfig, tokenizer: Tokenizer, length: int, *, joined: bool = False) -> TokenBlocks:
    """Load the text of `config.source`, all of it, as blocks to evaluate on.

    Args:
        config: Which text: `train_split` of a hub data set, or files.
        tokenizer: What turns it into tokens.
        length: Tokens a block, ≥ 1.
        joined: The rows are the lines of one document, as WikiText's on the hub.

    Returns:
        Blocks in an order shuffled once and for all: the first ones of any number are a fair sample. The tokens after
        the last full block (`n_tokens % length`) are left out.

    Raises:
        ImportError, FileNotFoundError, ConnectionError, ValueError: As `load_blocks`.
    """
    _check(config, length)
    rows, _ = open_source(config)
    _check_column(rows, config.text_column, "source")
    if joined:
        text = "".join(row or "" for row in rows[config.text_column])
        rows = import_datasets().Dataset.from_dict({config.text_column: [text]})
    return _shuffled(_tokenize(rows, config, tokenizer), length, f"text {config.source}")


def _shuffled(chunks: list[Tokens], length: int, what: str) -> TokenBlocks:
    """Blocks in an order drawn once and for all: the first ones of any number are a fair sample of the whole."""
    starts = np.random.default_rng(0).permutation(TokenBlocks(chunks, length, what=what).starts)
    return TokenBlocks(chunks, length, starts=starts)


def _check(config: DataConfig, length: int) -> None:
    if length < 1:
        raise ValueError(f"length: {length} given, wanted at least 1")
    for name in ("max_documents", "stream_shuffle_blocks", "stream_valid_blocks", "num_proc"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} given, wanted at least 1")
    if not 0 < config.valid_fraction < 1:
        raise ValueError(f"valid_fraction: {config.valid_fraction} given, wanted a number between 0 and 1")
    if config.detokenizer not in DETOKENIZERS:
        raise ValueError(f"detokenizer: {config.detokenizer!r} given, wanted one of {', '.join(DETOKENIZERS)}")
    if config.documents not in SAMPLE_BY:
        raise ValueError(f"documents: {config.documents!r} given, wanted one of {', '.join(map(repr, SAMPLE_BY))}")
    if config.windows and config.streaming:
        raise ValueError("windows: a stream has no random access; use windows or streaming, not both")


def _check_column(rows: Any, column: str, field: str) -> None:
    try:
        columns = rows.column_names or list(next(iter(rows), {}))
    except ValueError as error:  # a stream opens its first file only now
        raise ValueError(f"{field}: the text could not be read: {error}") from error
    if column not in columns:
        raise ValueError(f"text_column: {field} has no column {column!r}; it has {', '.join(map(repr, columns))}")
    kind = getattr((rows.features or {}).get(column), "dtype", None)
    if rows.features and kind not in ("string", "large_string"):
        raise ValueError(f"text_column: {column!r} of {field} holds {kind or rows.features[column]}, wanted text")


def _key(text: str) -> int:
    """A number that follows from the text alone, uniform over [0, 2⁶³)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def _keys(texts: list[str | None]) -> dict[str, list[int]]:
    return {"key": [-1 if text is None or is_blank(text) else _key(text) for text in texts]}


def _encode(
    texts: list[str | None], tokenizer: Tokenizer, detokenizer: Detokenizer, version: int
) -> dict[str, list[Tokens]]:
    documents = (text for text in texts if text is not None and not is_blank(text))
    return {"tokens": [encode_document(detokenize(text, detokenizer), tokenizer) for text in documents]}


def _tokenize(rows: Any, config: DataConfig, tokenizer: Tokenizer) -> list[Tokens]:
    """Tokens of the documents in their order, memory-mapped, in pieces."""
    datasets = import_datasets()
    tokenized = rows.map(
        _encode,
        batched=True,
        batch_size=100,
        input_columns=[config.text_column],
        remove_columns=rows.column_names,
        features=datasets.Features({"tokens": datasets.Sequence(datasets.Value(tokenizer.dtype.__name__))}),
        fn_kwargs={"tokenizer": tokenizer, "detokenizer": config.detokenizer, "version": _CACHE_VERSION},
        num_proc=config.num_proc if config.num_proc > 1 else None,
        desc=f"Tokenising ({tokenizer.name})",
    )
    return [chunk.flatten().to_numpy() for chunk in tokenized.with_format("arrow")[:]["tokens"].chunks]


def _divide(rows: Any, config: DataConfig, tokenizer: Tokenizer) -> tuple[list[Tokens], list[Tokens]]:
    """Tokens to train on and tokens to validate on."""
    keyed = rows.map(
        _keys,
        batched=True,
        input_columns=[config.text_column],
        remove_columns=rows.column_names,
        desc="Dividing documents",
    )
    keys = np.asarray(keyed.with_format("numpy")[:]["key"], np.int64)
    different = np.unique(keys[keys >= 0])
    if not len(different):
        raise ValueError(f"source: {config.source} has no text")
    if len(different) == 1:
        tokens = np.concatenate(_tokenize(rows.select([int(np.argmax(keys >= 0))]), config, tokenizer))
        cut = round(len(tokens) * (1 - config.valid_fraction))
        return [tokens[:cut]], [tokens[cut:]]
    # Of few documents, too, at least one goes to each side.
    cut = min(max(int(config.valid_fraction * 2**63), int(different[0]) + 1), int(different[-1]))
    train, valid = (rows.select(np.flatnonzero(side)) for side in (keys >= cut, (keys >= 0) & (keys < cut)))
    return _tokenize(train, config, tokenizer), _tokenize(valid, config, tokenizer)


def _stream(rows: Any, valid_rows: Any, config: DataConfig, tokenizer: Tokenizer, length: int) -> DataSplits:
    cut = int(config.valid_fraction * 2**63)

    def stream(rows: Any, wanted: Callable[[str], bool]) -> TokenStream:
        return TokenStream(
            rows, config.text_column, tokenizer, length, config.stream_shuffle_blocks, wanted, config.detokenizer
        )

    if valid_rows is None:
        train, held_out = stream(rows, lambda text: _key(text) >= cut), stream(rows, lambda text: _key(text) < cut)
    else:
        train, held_out = stream(rows, lambda text: True), stream(valid_rows, lambda text: True)
    wanted = config.stream_valid_blocks * length
    chunks: list[Tokens] = []
    read = 0
    with import_datasets().utils.tqdm(total=wanted, desc="Reading validation text", unit=" tokens") as bar:
        for document in held_out.documents():
            chunks.append(document)
            bar.update(len(document))
            read += len(document)  # a bar that is not shown does not count
            if read >= wanted:
                break
    valid = TokenBlocks([np.concatenate(chunks)[:wanted]] if chunks else [], length, what="validation text")
    return DataSplits(train=train, valid=valid)
