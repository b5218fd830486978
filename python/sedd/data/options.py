"""Options of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sedd.data.detokenize import Detokenizer

__all__ = ["DataConfig"]


@dataclass
class DataConfig:
    """The training text or images, and how they are split."""

    source: str = "stdlib"
    """Source of the text: 'stdlib' (sources and documentation of this Python installation, no download), a file (.txt,
    .raw, .json, .jsonl or .parquet, optionally compressed as .gz, .bz2, .xz or .zst; a file without a suffix is text),
    a folder of such files, a folder written by `save_to_disk`, or the name of a data set on the Hugging Face hub. For
    images: 'digits' (of scikit-learn), 'fashion-mnist' (Debian's package), a folder of PNG files or of the IDX files of
    MNIST, a folder written by `save_to_disk`, or the name of a hub data set."""
    valid_source: str | None = None
    """File or folder with the validation text. Default: `valid_split`, or a part of `source`."""
    subset: str | None = None
    """Configuration of a hub data set, such as 'wikitext-103-raw-v1'."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_split: str = "train"
    """Training split of a hub data set or of a folder written by `save_to_disk`."""
    valid_split: str | None = None
    """Validation split of a hub data set. Default: 'validation' if it exists, else a part of `train_split`."""
    text_column: str = "text"
    """Column (or JSON key) that contains the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """Unit of a text file that counts as one document: the whole file (which must fit into memory), a paragraph (up to
    a blank line) or a line. In JSON and Parquet files, each row is a document."""
    detokenizer: Detokenizer = "none"
    """Rules that remove the spaces around punctuation in a corpus: none, wikitext, ptb, lm1b, or lambada (which
    replaces typographic quotes)."""
    valid_fraction: float = 0.05
    """Fraction of the documents held out for validation, between 0 and 1, if the source has no validation text. A
    single document is split at one position; its last part is the validation text."""
    windows: bool = False
    """Train on blocks that begin at random tokens (usual for text8) instead of fixed blocks in shuffled order.
    Validation always uses fixed blocks."""
    max_documents: int | None = None
    """Number of documents to read, from the start of `source`. Default: all."""
    streaming: bool = False
    """Read and tokenise the text during training instead of before, for text too large to store. Documents keep the
    order of the source; blocks are shuffled in groups."""
    stream_shuffle_blocks: int = 2000
    """With streaming: number of blocks that are shuffled together."""
    stream_valid_blocks: int = 1000
    """With streaming: number of validation blocks, which are kept in memory."""
    num_proc: int = 1
    """Number of tokenising processes. It does not affect the result."""
    flips: bool = False
    """For images: mirror half of the training images, left to right, anew in each epoch."""
    cache_dir: str | None = None
    """Folder for downloads and tokenised text. Default: HF_DATASETS_CACHE, or ~/.cache/huggingface."""
