"""Converts text to blocks of tokens.

`sources.py` reads documents. They are split between training and validation, and each document is tokenised and
followed by end-of-text (by a space if the vocabulary has no end-of-text). The documents of each split are concatenated
and cut into blocks of equal length (`batches.py`). Tokens are stored as uint16 (uint32 for vocabularies above 65,536)
in memory-mapped Arrow files in the cache of `datasets`: memory use does not grow with the data, and a change of the
block length does not tokenise the text again.

The splits do not overlap. A hash of its text decides the split of a document, before documents are concatenated or cut:
all copies of a document are in the same split, on every machine and with every seed. A text that is a single document
is split at one position; its last part is the validation text.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.data.batches import Batches, TokenBlocks, TokenStream, batches, encode_document, is_blank, valid_batches
from sedd.data.detokenize import DETOKENIZERS, Detokenizer, detokenize
from sedd.data.holdout import content_key, validation_cut
from sedd.data.options import DataConfig
from sedd.data.sources import SAMPLE_BY, import_datasets, open_source
from sedd.data.tokenizer import Tokenizer, Tokens

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

_CACHE_VERSION = 1  # increment it if the content of the cache changes


@dataclass
class DataSplits:
    """Result of `load_blocks`: training text and validation text, as blocks of tokens."""

    train: TokenBlocks | TokenStream
    valid: TokenBlocks


def load_blocks(config: DataConfig, tokenizer: Tokenizer, length: int) -> DataSplits:
    """Load text, split it into training and validation text, tokenise it and cut it into blocks.

    Args:
        config: The data options.
        tokenizer: Converts text to tokens.
        length: Tokens per block, ≥ 1.

    Returns:
        Training blocks (`TokenBlocks`, or a `TokenStream` with `config.streaming`; both for `batches`) and validation
        blocks (for `valid_batches`).

    Raises:
        ImportError: If `datasets` is not installed.
        FileNotFoundError: If there is no such file, folder or hub data set.
        ConnectionError: If the source is not a local file or folder and the hub cannot be reached.
        ValueError: If the configuration or the text is invalid; the message names the field.
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
    """Load the whole text of `config.source` as blocks for evaluation.

    Args:
        config: The data options: `train_split` of a hub data set, or files.
        tokenizer: Converts text to tokens.
        length: Tokens per block, ≥ 1.
        joined: Whether the rows are the lines of one document, as in WikiText on the hub.

    Returns:
        Blocks in a fixed random order, so that the first n blocks are a random sample for any n. The tokens after the
        last full block (`n_tokens % length`) are omitted.

    Raises:
        ImportError, FileNotFoundError, ConnectionError, ValueError: As `load_blocks`.
    """
    _check(config, length)
    rows, _ = open_source(config)
    if config.max_documents is not None:
        rows = rows.take(config.max_documents)
    _check_column(rows, config.text_column, "source")
    if joined:
        text = "".join(row or "" for row in rows[config.text_column])
        rows = import_datasets().Dataset.from_dict({config.text_column: [text]})
    return _shuffled(_tokenize(rows, config, tokenizer), length, f"text {config.source}")


def _shuffled(chunks: list[Tokens], length: int, what: str) -> TokenBlocks:
    """Blocks in a fixed random order, so that the first n blocks are a random sample for any n."""
    starts = np.random.default_rng(0).permutation(TokenBlocks(chunks, length, what=what).starts)
    return TokenBlocks(chunks, length, starts=starts)


def _check(config: DataConfig, length: int) -> None:
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    for name in ("max_documents", "stream_shuffle_blocks", "stream_valid_blocks", "num_proc"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < config.valid_fraction < 1:
        raise ValueError(f"valid_fraction: expected a number between 0 and 1, got {config.valid_fraction}")
    if config.detokenizer not in DETOKENIZERS:
        raise ValueError(f"detokenizer: expected one of {', '.join(DETOKENIZERS)}; got {config.detokenizer!r}")
    if config.documents not in SAMPLE_BY:
        raise ValueError(f"documents: expected one of {', '.join(map(repr, SAMPLE_BY))}; got {config.documents!r}")
    if config.flips:
        raise ValueError("flips: expected false for text, got true")
    if config.windows and config.streaming:
        raise ValueError(
            "windows: expected false with streaming, got true: a stream has no random access; use only one of the two"
        )


def _check_column(rows: Any, column: str, field: str) -> None:
    try:
        columns = rows.column_names or list(next(iter(rows), {}))
    except ValueError as error:  # a stream opens its first file here
        raise ValueError(f"{field}: could not read the text: {error}") from error
    if column not in columns:
        raise ValueError(f"text_column: expected a column of {field} ({', '.join(map(repr, columns))}), got {column!r}")
    kind = getattr((rows.features or {}).get(column), "dtype", None)
    if rows.features and kind not in ("string", "large_string"):
        raise ValueError(f"text_column: expected text in {column!r} of {field}, got {kind or rows.features[column]}")


def _key(text: str) -> int:
    """Hash of the text, uniform over [0, 2⁶³)."""
    return content_key(text.encode("utf-8"))


def _keys(texts: list[str | None]) -> dict[str, list[int]]:
    return {"key": [-1 if text is None or is_blank(text) else _key(text) for text in texts]}


def _encode(
    texts: list[str | None], tokenizer: Tokenizer, detokenizer: Detokenizer, version: int | str
) -> dict[str, list[Tokens]]:
    documents = (text for text in texts if text is not None and not is_blank(text))
    return {"tokens": [encode_document(detokenize(text, detokenizer), tokenizer) for text in documents]}


def _version(tokenizer: Tokenizer) -> int | str:
    """Of the content of the cache, which a tokeniser's name does not tell: the code of one from outside the package."""
    module = inspect.getmodule(type(tokenizer))
    if module is None or module.__name__.startswith("sedd."):
        return _CACHE_VERSION
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # typed into an interpreter
        return uuid.uuid4().hex


def _tokenize(rows: Any, config: DataConfig, tokenizer: Tokenizer) -> list[Tokens]:
    """Tokens of the documents in order, as memory-mapped chunks."""
    datasets = import_datasets()
    tokenized = rows.map(
        _encode,
        batched=True,
        batch_size=100,
        input_columns=[config.text_column],
        remove_columns=rows.column_names,
        features=datasets.Features({"tokens": datasets.Sequence(datasets.Value(tokenizer.dtype.__name__))}),
        fn_kwargs={"tokenizer": tokenizer, "detokenizer": config.detokenizer, "version": _version(tokenizer)},
        num_proc=config.num_proc if config.num_proc > 1 else None,
        desc=f"Tokenising ({tokenizer.name})",
    )
    return [chunk.flatten().to_numpy() for chunk in tokenized.with_format("arrow")[:]["tokens"].chunks]


def _divide(rows: Any, config: DataConfig, tokenizer: Tokenizer) -> tuple[list[Tokens], list[Tokens]]:
    """Training tokens and validation tokens."""
    keyed = rows.map(
        _keys,
        batched=True,
        input_columns=[config.text_column],
        remove_columns=rows.column_names,
        desc="Splitting documents",
    )
    keys = np.asarray(keyed.with_format("numpy")[:]["key"], np.int64)
    different = np.unique(keys[keys >= 0])
    if not len(different):
        raise ValueError(f"source: expected text, got none in {config.source}")
    if len(different) == 1:
        tokens = np.concatenate(_tokenize(rows.select([int(np.argmax(keys >= 0))]), config, tokenizer))
        cut = round(len(tokens) * (1 - config.valid_fraction))
        return [tokens[:cut]], [tokens[cut:]]
    cut = validation_cut(different, config.valid_fraction)
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
            read += len(document)  # a hidden progress bar does not count
            if read >= wanted:
                break
    valid = TokenBlocks([np.concatenate(chunks)[:wanted]] if chunks else [], length, what="validation text")
    return DataSplits(train=train, valid=valid)
