"""``sedd eval perplexity``: the likelihood bound of a model on the papers' test sets or on any other text."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sedd.config import check_options, resolve_device
from sedd.data import DataConfig, TokenBlocks, load_blocks, load_text, valid_batches
from sedd.detokenize import Detokenizer
from sedd.evaluate import ElboResult, elbo, joined, ngram_bits, plot_bound
from sedd.figures import check_figure
from sedd.files import finite, write_json
from sedd.options import prefixed, renamed
from sedd.pretrained import LoadedModel, load_model
from sedd.progress import console, track
from sedd.sources import is_plain_text
from sedd.tokenizer import count_bytes
from sedd.unfinished import identity

__all__ = ["TEXTS", "PerplexityOptions", "TextSet", "perplexity"]

NGRAM_TOKENS = 20_000_000  # training tokens that the n-gram models count


@dataclass(frozen=True)
class TextSet:
    """A test set of the papers: where it is on the Hugging Face hub, and how it is read.

    Attributes:
        data: source, subset, split (as ``train_split``), column and detokeniser.
        joined: all rows together are one document. Otherwise each row is a document and closed with end-of-text.
    """

    data: DataConfig
    joined: bool = False


def _hub(source: str, detokenizer: Detokenizer, joined: bool = False, **options: Any) -> TextSet:
    return TextSet(DataConfig(source, train_split="test", detokenizer=detokenizer, **options), joined)


_WIKITEXT = "Salesforce/wikitext"
_PARQUET = "refs/convert/parquet"  # of data sets that were published as scripts
TEXTS = {
    "wikitext2": _hub(_WIKITEXT, "wikitext", joined=True, subset="wikitext-2-raw-v1"),
    "wikitext103": _hub(_WIKITEXT, "wikitext", joined=True, subset="wikitext-103-raw-v1"),
    "lambada": _hub("EleutherAI/lambada_openai", "lambada", subset="en"),
    "lm1b": _hub("billion-word-benchmark/lm1b", "lm1b", revision=_PARQUET),
    "ptb": _hub("ptb-text-only/ptb_text_only", "ptb", revision=_PARQUET, text_column="sentence"),
}
"""The test sets of tables 1 to 3 of the SEDD paper, by name."""


@dataclass
class PerplexityOptions:
    """Evaluation"""

    texts: list[str] = field(default_factory=list)
    """Names of :data:`TEXTS`, files, folders or hub data sets; none: the run's validation text."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    split: str | None = None
    """Split of a data set on the hub; default: test."""
    text_column: str = "text"
    """Column (JSON key) that contains the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What counts as one document in a text file. Each document is closed with end-of-text; all are then joined and cut
    into blocks."""
    detokenizer: Literal["none", "wikitext", "ptb", "lm1b", "lambada"] = "none"
    """Rules that remove the spaces which some corpora have around punctuation, for files and hub data sets. The test
    sets known by name have their own."""
    blocks: int | None = None
    """Score only this many blocks of a text: always the same ones, spread evenly over it."""
    max_minutes: float | None = None
    """Stop after this many minutes for each text. The bound is then that of the blocks scored so far, the same ones
    that `blocks` takes, and the output says how many they are. Such an evaluation is not resumed by `json`."""
    draws: int = 8
    """Noise levels drawn for each block, one from each of this many equal parts of the time. The papers draw 1,000."""
    seed: int = 0
    """Seed of the noise levels and the noise."""
    batch_size: int = 32
    """Blocks in a call of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    cache_dir: str | None = None
    """Folder for downloads and prepared text; default: that of the package datasets."""
    json: str | None = None
    """Also write the figures to this file. Partial results are kept beside it: an interrupted evaluation that is called
    again continues from them."""
    plot: str | None = None
    """Plot how much each noise level contributes to the bound, to this file (needs the extra `eval`; one text only)."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("blocks", "draws", "batch_size"), outputs=("json", "plot"))
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes: expected a positive number, got {self.max_minutes}")


def perplexity(run: str, options: PerplexityOptions) -> int:
    """Scores a model on texts and prints a table, a row for each."""
    for name in options.texts:
        if options.texts.count(name) > 1:
            raise ValueError(f"texts: {name!r} is named twice")
    if options.plot and len(options.texts) > 1:
        raise ValueError(f"plot: expected one text, got {len(options.texts)}")
    if options.plot:
        check_figure(options.plot)
    loaded = load_model(run, resolve_device(options.device))
    out = console()
    table = Table("", title=f"{loaded.path}: upper bounds, {options.draws} noise levels a block")
    for column in ("tokens", "nats/token", "perplexity", "mean of exp", "bits/byte"):
        table.add_column(column, justify="right", no_wrap=True)
    figures: dict[str, Any] = {}
    notes, parts = [], []
    last = [Path(os.path.abspath(name)).name for name in options.texts]
    titles = [name if last.count(short) > 1 else short for name, short in zip(options.texts, last, strict=True)]
    for name, title in zip(options.texts or [""], titles or ["validation text"], strict=True):
        with renamed({"source": "texts", "train_split": "split"}):
            blocks, train, rules = _blocks(loaded, name, options)
        unfinished = _unfinished(options.json, title) if options.json and options.max_minutes is None else None
        wanted = torch.cat(list(valid_batches(blocks, 4096, options.blocks)))
        result = _score(loaded, wanted, options, unfinished, out)
        scored = wanted[: len(result.sequences)]
        if math.isnan(result.nats_per_token):
            bad = int(result.sequences.isnan().sum())
            raise ValueError(
                f"{loaded.path}: the model's scores are not numbers (NaN) on {bad:,} of {len(result.sequences):,} "
                f"blocks of {title}; is there NaN among its weights?"
            )
        n_bytes = result.n_bytes or 0
        figures[title] = _figures(result, blocks, rules, options)
        table.add_row(
            title,
            f"{result.tokens:,}",
            f"{result.nats_per_token:.4f} ± {result.standard_error:.4f}",
            f"{result.perplexity:.2f} ± {result.perplexity * result.standard_error:.2f}",
            f"{result.perplexity_mean_of_exp:.{'2f' if result.perplexity_mean_of_exp < 1e6 else '2e'}}",
            f"{result.bits_per_byte:.4f}",
        )
        stopped = len(scored) < len(wanted)
        notes.append(
            f"{title}: {rules}; {result.tokens:,} of {blocks.n_tokens:,} tokens, in {len(scored):,} blocks of "
            f"{result.length}{f', after {options.max_minutes:g} minutes' if stopped else ''}. "
            f"± {result.standard_error:.4f} nats/token is for all text like this, "
            f"± {result.monte_carlo_error:.4f} for these blocks; {result.prior:.4f} is the prior term."
        )
        if isinstance(train, TokenBlocks):  # a stream would have to be read to its end
            counted = torch.cat(list(valid_batches(train, 4096, NGRAM_TOKENS // train.length)))
            for order, other in ((1, "unigram"), (2, "bigram")):
                nats = ngram_bits(counted, scored, loaded.tokenizer.vocab_size, order) * math.log(2)
                bits = nats / math.log(2) * result.tokens / n_bytes
                table.add_row(other, "", f"{nats:.4f}", f"{math.exp(nats):.2f}", "", f"{bits:.4f}")
                figures[other] = {"nats_per_token": nats, "perplexity": math.exp(nats), "bits_per_byte": bits}
        if options.json:
            write_json(Path(options.json), {"model": str(loaded.path), "texts": figures})
        if options.plot:
            plot_bound(result, options.plot)
        if unfinished is not None:
            parts.append(unfinished)
    for part in parts:  # only now: until then, each spares a second call the work on its text
        part.unlink(missing_ok=True)
    out.print(table)
    for note in notes:
        out.print(note)
    return 0


def _unfinished(json: str, title: str) -> Path:
    """The file of partial results for a text, beside the JSON file, with a name that is unique to the text."""
    return Path(f"{json}.{re.sub('[^0-9A-Za-z]+', '-', title)}-{identity((), title)[:8]}.unfinished")


def _blocks(loaded: LoadedModel, name: str, options: PerplexityOptions) -> tuple[TokenBlocks, Any, str]:
    """The blocks of a text, the training text that they are held out from (or None), and how the text was read."""
    length = loaded.model.config.length
    if not name:
        if loaded.config is None:
            known = ", ".join(TEXTS)
            raise ValueError(f"text: {loaded.path} is no run with a text of its own; give one: {known}, a file, ...")
        for option in ("subset", "split", "text_column", "documents", "detokenizer"):
            if getattr(options, option) != getattr(PerplexityOptions(), option):
                raise ValueError(f"{option}: for a text that is named; the run's own is read as it was for training")
        data = loaded.config.data
        data = dataclasses.replace(data, cache_dir=options.cache_dir or data.cache_dir)
        with prefixed("data.", DataConfig):
            splits = load_blocks(data, loaded.tokenizer, length)
        return splits.valid, splits.train, f"held out from {loaded.config.data.source}"
    if name in TEXTS:
        known_set = TEXTS[name]
        data, joined = dataclasses.replace(known_set.data, cache_dir=options.cache_dir), known_set.joined
    else:
        data, joined = _data(name, options), False
    if joined:
        documents = "one document"
    elif name not in TEXTS and is_plain_text(name):
        documents = f"each {data.documents} a document"
    else:
        documents = "each row a document closed with end-of-text"
    rules = f"{documents}, detokeniser {data.detokenizer}, {loaded.tokenizer.name} tokens"
    return load_text(data, loaded.tokenizer, length, joined=joined), None, rules


def _data(name: str, options: PerplexityOptions) -> DataConfig:
    local = Path(name).expanduser().exists()
    if local and options.split is not None:
        raise ValueError(f"split: {options.split!r} given, but only hub data sets have it, not {name!r}")
    return DataConfig(
        name,
        subset=options.subset,
        train_split="train" if local else options.split or "test",
        text_column=options.text_column,
        documents=options.documents,
        detokenizer=options.detokenizer,
        cache_dir=options.cache_dir,
    )


def _score(
    loaded: LoadedModel, blocks: Tensor, options: PerplexityOptions, unfinished: Path | None, out: Console
) -> ElboResult:
    """The bound of blocks [S, L]; with ``max_minutes``, of the first of them that it has time for."""
    device = next(loaded.model.parameters()).device
    generator = torch.Generator(device).manual_seed(options.seed)

    def score(part: Tensor, progress: bool) -> ElboResult:
        return elbo(
            loaded.model,
            part,
            loaded.process,
            loaded.schedule,
            draws=options.draws,
            n_bytes=count_bytes(part, loaded.tokenizer),
            batch_size=options.batch_size,
            generator=generator,
            autocast_dtype=loaded.autocast_dtype,
            unfinished=unfinished,
            progress=progress,
        )

    if options.max_minutes is None:
        return score(blocks, out.is_terminal)
    deadline = time.monotonic() + 60 * options.max_minutes
    size = max(1, min(options.batch_size, 8 * options.batch_size // options.draws))  # some 8 calls of the model
    results = []
    for part in track(blocks.split(size), "likelihood", out.is_terminal):
        results.append(score(part, False))
        if time.monotonic() >= deadline:
            break
    return joined(results)


def _figures(result: ElboResult, blocks: TokenBlocks, rules: str, options: PerplexityOptions) -> dict[str, Any]:
    figures = {
        "nats_per_token": result.nats_per_token,
        "standard_error": result.standard_error,
        "monte_carlo_error": result.monte_carlo_error,
        "prior": result.prior,
        "perplexity": result.perplexity,
        "perplexity_mean_of_exp": result.perplexity_mean_of_exp,
        "bits_per_token": result.bits_per_token,
        "bits_per_byte": result.bits_per_byte,
        "blocks": len(result.sequences),
        "length": result.length,
        "tokens": result.tokens,
        "tokens_of_text": blocks.n_tokens,
        "bytes": result.n_bytes,
        "draws": options.draws,
        "seed": options.seed,
        "reading": rules,
    }
    return {name: finite(value) if isinstance(value, float) else value for name, value in figures.items()}
