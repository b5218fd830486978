"""``sedd eval perplexity``: the likelihood bound of a model on the test sets of the papers or on other text."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sedd.commands.command import RUN, Argument, Command
from sedd.data.detokenize import Detokenizer
from sedd.data.ngram import ngram_bits
from sedd.data.sources import has_splits, is_plain_text
from sedd.data.text import DataConfig, TokenBlocks, load_blocks, load_text, valid_batches
from sedd.data.tokenizer import count_bytes
from sedd.diffusion.likelihood import ElboResult, elbo, joined
from sedd.figures import check_figure, write_figure
from sedd.files import finite, write_json
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.options import changed, check_one_of, check_options, prefixed, renamed
from sedd.progress import console, track
from sedd.runtime import resolve_device
from sedd.unfinished import identity

__all__ = ["TEXTS", "PerplexityOptions", "TextSet", "perplexity"]

ABOUT = """Measure the likelihood of text under a model.

Prints, for each text, a Monte Carlo estimate of the upper bound on the negative log-likelihood (theorem 3.6 of SEDD,
with its prior term) and its standard error. Perplexity is exp(mean nats per token); "mean of exp" is the mean over
blocks of exp(nats per token), as in the SEDD paper. An autoregressive model has an exact likelihood. Without a text,
scores the validation text of the run and compares the model with a unigram and a bigram model of the training text.

A text is wikitext2, wikitext2-train, wikitext103, lambada, lm1b or ptb (the texts of the papers, from the Hugging Face
hub, with their detokenisers), a file, a folder, or the name of a hub data set. Each document ends with end-of-text;
documents are concatenated and cut into blocks of the model's length.

For a run of images, prints the bound in bits per dimension, with its standard error, of the test
images, or of the validation images if there are no test images.

examples:
  sedd eval perplexity runs/default
  sedd eval perplexity runs/default other.txt --draws 64 --json figures.json
  sedd eval perplexity models/sedd-small wikitext2 lambada ptb lm1b --draws 1000 --json zero-shot.json
  sedd eval perplexity models/sedd-small wiki.test.raw --detokenizer wikitext
  sedd eval perplexity models/sedd-small news.txt --documents line --detokenizer lm1b
  sedd eval perplexity runs/default --plot bound.png
"""


NGRAM_TOKENS = 20_000_000  # maximum number of training tokens for the n-gram models


@dataclass(frozen=True)
class TextSet:
    """A test set of the papers: its source on the Hugging Face hub, and how to read it.

    Attributes:
        data: source, subset, split (as ``train_split``), column and detokeniser.
        joined: whether all rows form one document. Otherwise each row is a document, followed by end-of-text.
    """

    data: DataConfig
    joined: bool = False


def _hub(source: str, detokenizer: Detokenizer, joined: bool = False, **options: Any) -> TextSet:
    return TextSet(DataConfig(source, detokenizer=detokenizer, **{"train_split": "test", **options}), joined)


_WIKITEXT = "Salesforce/wikitext"
_PARQUET = "refs/convert/parquet"  # for data sets that were published as scripts
TEXTS = {
    "wikitext2": _hub(_WIKITEXT, "wikitext", joined=True, subset="wikitext-2-raw-v1"),
    "wikitext2-train": _hub(_WIKITEXT, "wikitext", joined=True, subset="wikitext-2-raw-v1", train_split="train"),
    "wikitext103": _hub(_WIKITEXT, "wikitext", joined=True, subset="wikitext-103-raw-v1"),
    "lambada": _hub("EleutherAI/lambada_openai", "lambada", subset="en"),
    "lm1b": _hub("billion-word-benchmark/lm1b", "lm1b", revision=_PARQUET),
    "ptb": _hub("ptb-text-only/ptb_text_only", "ptb", revision=_PARQUET, text_column="sentence"),
}
"""The texts of tables 1 to 3 of the SEDD paper, by name. It reports WikiText2 on the training text."""


@dataclass
class PerplexityOptions:
    """Evaluation"""

    texts: list[str] = field(default_factory=list)
    """Names in :data:`TEXTS`, files, folders or hub data sets. Empty: the validation text of the run."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set or of a folder written by `save_to_disk`; for a run of images, test or validation.
    Default: test; for images, validation if there is no test."""
    text_column: str = "text"
    """Column (or JSON key) that contains the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """Unit of a text file that counts as one document. Each document is followed by end-of-text; documents are then
    concatenated and cut into blocks."""
    detokenizer: Literal["none", "wikitext", "ptb", "lm1b", "lambada"] = "none"
    """Rules that remove the spaces around punctuation in some corpora, for files and hub data sets. The test sets of
    the papers have their own rules."""
    blocks: int | None = None
    """Number of blocks to score per text, always the same ones. Default: all."""
    max_minutes: float | None = None
    """Maximum time per text in minutes. The bound is then that of the blocks scored so far, which are the same as with
    `blocks`; the output contains their number. Such an evaluation is not resumed with `json`."""
    draws: int = 8
    """Number of noise levels per block, one from each of this many equal intervals of time. The papers use 1,000."""
    seed: int = 0
    """Random seed of the noise levels and the noise."""
    batch_size: int = 32
    """Number of blocks per call of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    cache_dir: str | None = None
    """Folder for downloads and tokenised text. Default: that of the package datasets."""
    json: str | None = None
    """Also write the results to this file. Partial results are stored in the same folder; if an interrupted evaluation
    is started again, it resumes from them."""
    plot: str | None = None
    """Write a plot of the contribution of each noise level to this file (one text only; needs the extra `eval`)."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("blocks", "draws", "batch_size"), outputs=("json", "plot"))
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes: expected a positive number, got {self.max_minutes}")


def perplexity(run: str, options: PerplexityOptions) -> int:
    """Scores texts with a model and prints a table with a row for each."""
    for name in options.texts:
        if options.texts.count(name) > 1:
            raise ValueError(f"texts: expected different texts, got {name!r} more than once")
    if options.plot and len(options.texts) > 1:
        raise ValueError(f"plot: expected one text, got {len(options.texts)}")
    if options.plot:
        check_figure(options.plot)
    loaded = load_model(run, resolve_device(options.device))
    out = console()
    if exact := loaded.diffusion.objective.autoregressive:
        if options.plot:
            raise ValueError("plot: expected a diffusion model, got an autoregressive one, which has no noise levels")
        options = dataclasses.replace(options, draws=1)
    if not loaded.is_text:
        return _bits_per_dim(loaded, options, out)
    how = "exact likelihoods" if exact else f"upper bounds, {options.draws} noise levels per block"
    table = Table("", title=f"{loaded.path}: {how}")
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
        n_bytes = partial(count_bytes, tokenizer=loaded.tokenizer)
        result = _score(loaded, wanted, n_bytes, title, options, unfinished, out)
        scored = wanted[: len(result.sequences)]
        exp = (result.sequences / result.length).exp()
        others = {
            "perplexity": result.perplexity,
            "perplexity_mean_of_exp": result.perplexity_mean_of_exp,
            "perplexity_mean_of_exp_error": float(exp.std()) / math.sqrt(len(exp)) if len(exp) > 1 else None,
            "bits_per_byte": result.bits_per_byte,
            "tokens_of_text": blocks.n_tokens,
            "bytes": result.n_bytes,
        }
        figures[title] = _figures(result, rules, options, others)
        table.add_row(
            title,
            f"{result.tokens:,}",
            f"{result.nats_per_token:.4f} ± {result.standard_error:.4f}",
            f"{result.perplexity:.2f} ± {result.perplexity * result.standard_error:.2f}",
            f"{result.perplexity_mean_of_exp:.{'2f' if result.perplexity_mean_of_exp < 1e6 else '2e'}}",
            f"{result.bits_per_byte:.4f}",
        )
        stopped = len(scored) < len(wanted)
        closed = "Prior and reconstruction" if loaded.diffusion.objective.reconstructs else "Prior term"
        notes.append(
            f"{title}: {rules}; {result.tokens:,} of {blocks.n_tokens:,} tokens, in {len(scored):,} blocks of "
            f"{result.length}{f', after {options.max_minutes:g} minutes' if stopped else ''}. "
            f"Standard error: {result.standard_error:.4f} nats/token for all text of this kind"
            + ("." if exact else f", {result.monte_carlo_error:.4f} for these blocks. {closed}: {result.prior:.4f}.")
        )
        if isinstance(train, TokenBlocks):  # a stream would have to be read completely
            for other, row in _ngrams(train, scored, loaded.tokenizer.vocab_size, result).items():
                figures[other] = row
                nats, bits = row["nats_per_token"], row["bits_per_byte"]
                table.add_row(other, "", f"{nats:.4f}", f"{row['perplexity']:.2f}", "", f"{bits:.4f}")
        if options.json:
            write_json(Path(options.json), {"model": str(loaded.path), "options": _given(options), "texts": figures})
        if options.plot:
            plot_bound(result, options.plot)
        if unfinished is not None:
            parts.append(unfinished)
    for part in parts:  # only at the end: until then a second call can resume from each of them
        part.unlink(missing_ok=True)
    out.print(table)
    for note in notes:
        out.print(note)
    return 0


def _given(options: PerplexityOptions) -> dict[str, Any]:
    """The options that say what was measured, for the results."""
    return changed(options, without=("device", "cache_dir", "json", "plot"))


def _bits_per_dim(loaded: LoadedModel, options: PerplexityOptions, out: Console) -> int:
    """Scores the test or validation data of a run whose data are not text, such as images."""
    if options.texts:
        raise ValueError(f"texts: expected none for {loaded.path}, a model of other data, got {options.texts[0]!r}")
    _check_reading(options, ("split",), "the data are read with the options of the run")
    corpus, count = loaded.corpus(options.cache_dir), options.blocks or sys.maxsize
    splits = {"test": corpus.test(count), "validation": corpus.valid(count)}
    if options.split is not None:
        check_one_of("split", options.split, [name for name, blocks in splits.items() if blocks is not None])
    split, wanted = next((s, b) for s, b in splits.items() if b is not None and options.split in (None, s))
    labels = corpus.labels(split, count) if loaded.model.config.classes else None
    unfinished = _unfinished(options.json, split) if options.json and options.max_minutes is None else None
    result = _score(loaded, wanted, corpus.n_bytes, f"the {split} data", options, unfinished, out, labels)
    # a unit may have several tokens, or a token several units
    scale = result.tokens / (result.n_bytes or 0) / math.log(2)
    bits, error, unit = scale * result.nats_per_token, scale * result.standard_error, corpus.unit
    assert loaded.config is not None
    given = ", given their classes" if labels is not None else ""
    rules = f"{split} data of {loaded.config.data.source}, in blocks of {' x '.join(map(str, corpus.shape))}{given}"
    others = {f"bits_per_{unit}": bits, f"bits_per_{unit}_standard_error": error}
    figures = _figures(result, rules, options, others)
    if options.json:
        about = {"model": str(loaded.path), "options": _given(options)}
        write_json(Path(options.json), {**about, "data": {split: figures}})
    if options.plot:
        plot_bound(result, options.plot)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    how = "exact likelihoods" if result.exact else f"upper bounds, {options.draws} noise levels per block"
    table = Table("", title=f"{loaded.path}: {how}")
    for column in ("blocks", f"{unit}s", f"bits/{unit}", f"nats/{unit}"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(
        split,
        f"{len(result.sequences):,}",
        f"{result.n_bytes:,}",
        f"{bits:.4f} ± {error:.4f}",
        f"{bits * math.log(2):.4f} ± {error * math.log(2):.4f}",
    )
    out.print(table)
    of_all = f", {len(result.sequences):,} of {len(wanted):,} blocks" if len(result.sequences) < len(wanted) else ""
    out.print(
        f"{rules}{of_all}. Standard error: {error:.4f} bits/{unit} for all data of this kind"
        + (
            "."
            if result.exact
            else f", {scale * result.monte_carlo_error:.4f} for these blocks. Prior term: {scale * result.prior:.4f}."
        )
    )
    return 0


def _ngrams(train: TokenBlocks, scored: Tensor, dim: int, result: ElboResult) -> dict[str, dict[str, float]]:
    """Results of a unigram and a bigram model of the training text on the scored blocks."""
    counted = torch.cat(list(valid_batches(train, 4096, NGRAM_TOKENS // train.length)))
    rows = {}
    for order, name in ((1, "unigram"), (2, "bigram")):
        nats = ngram_bits(counted, scored, dim, order) * math.log(2)
        bits = nats / math.log(2) * result.tokens / (result.n_bytes or 0)
        rows[name] = {"nats_per_token": nats, "perplexity": math.exp(nats), "bits_per_byte": bits}
    return rows


def _unfinished(json: str, title: str) -> Path:
    """File of partial results for a text, in the folder of the JSON file, with a name unique to the text."""
    return Path(f"{json}.{re.sub('[^0-9A-Za-z]+', '-', title)}-{identity((), title)[:8]}.unfinished")


def _blocks(loaded: LoadedModel, name: str, options: PerplexityOptions) -> tuple[TokenBlocks, Any, str]:
    """Blocks of a text, the training blocks from which they are held out (or None), and a description."""
    length = loaded.model.config.length
    if not name:
        if loaded.config is None:
            known = ", ".join(TEXTS)
            raise ValueError(
                f"text: expected a text, got none; {loaded.path} has no validation text: give {known}, a file, ..."
            )
        _check_reading(options, (), "the validation text is read with the options of the run")
        data = loaded.config.data
        data = dataclasses.replace(data, cache_dir=options.cache_dir or data.cache_dir)
        with prefixed("data.", DataConfig):
            splits = load_blocks(data, loaded.tokenizer, length)
        return splits.valid, splits.train, f"held out from {loaded.config.data.source}"
    if name in TEXTS:
        _check_reading(options, (), f"{name} is read as in the papers")
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


def _check_reading(options: PerplexityOptions, allowed: tuple[str, ...], why: str) -> None:
    """Checks that no option is given that says how a text is read."""
    for option in ("subset", "split", "text_column", "documents", "detokenizer"):
        if option not in allowed and getattr(options, option) != getattr(PerplexityOptions(), option):
            raise ValueError(f"{option}: expected only with a file, a folder or a hub data set; {why}")


def _data(name: str, options: PerplexityOptions) -> DataConfig:
    one_split = Path(name).expanduser().exists() and not has_splits(name)
    if one_split and options.split is not None:
        raise ValueError(f"split: expected no value for {name!r}, which has no splits, got {options.split!r}")
    return DataConfig(
        name,
        subset=options.subset,
        train_split="train" if one_split else options.split or "test",
        text_column=options.text_column,
        documents=options.documents,
        detokenizer=options.detokenizer,
        cache_dir=options.cache_dir,
    )


def _score(
    loaded: LoadedModel,
    blocks: Tensor,
    n_bytes: Callable[[Tensor], int],
    title: str,
    options: PerplexityOptions,
    unfinished: Path | None,
    out: Console,
    labels: Tensor | None = None,
) -> ElboResult:
    """The bound of blocks [S, L]; with ``max_minutes``, of the first blocks that can be scored in that time.

    Raises:
        ValueError: a block has the score NaN.
    """
    device = loaded.diffusion.device
    generator = torch.Generator(device).manual_seed(options.seed)

    def score(part: Tensor, labels: Tensor | None, progress: bool) -> ElboResult:
        return elbo(
            loaded.diffusion,
            part,
            draws=options.draws,
            n_bytes=n_bytes(part),
            labels=labels,
            batch_size=options.batch_size,
            generator=generator,
            autocast_dtype=loaded.autocast_dtype,
            unfinished=unfinished,
            progress=progress,
        )

    if options.max_minutes is None:
        return _finite(score(blocks, labels, out.is_terminal), loaded, title)
    deadline = time.monotonic() + 60 * options.max_minutes
    size = max(1, min(options.batch_size, 8 * options.batch_size // options.draws))  # about 8 calls of the model
    results = []
    for number, part in enumerate(track(blocks.split(size), "likelihood", out.is_terminal)):
        classes = None if labels is None else labels[number * size :][:size]
        results.append(score(part, classes, False))
        if time.monotonic() >= deadline:
            break
    return _finite(joined(results), loaded, title)


def _finite(result: ElboResult, loaded: LoadedModel, title: str) -> ElboResult:
    if bad := int(result.sequences.isnan().sum()):
        raise ValueError(
            f"{loaded.path}: expected finite scores, got NaN for {bad:,} of {len(result.sequences):,} blocks of "
            f"{title}; check the weights of the model for NaN"
        )
    return result


def _figures(
    result: ElboResult, rules: str, options: PerplexityOptions, others: Mapping[str, float | int | None]
) -> dict[str, Any]:
    """The figures of a bound for JSON."""
    figures = {
        "nats_per_token": result.nats_per_token,
        "standard_error": result.standard_error,
        "monte_carlo_error": result.monte_carlo_error,
        "prior": result.prior,
        **others,
        "bits_per_token": result.bits_per_token,
        "blocks": len(result.sequences),
        "length": result.length,
        "tokens": result.tokens,
        "draws": options.draws,
        "exact": result.exact,
        "seed": options.seed,
        "reading": rules,
    }
    return {name: finite(value) if isinstance(value, float) else value for name, value in figures.items()}


def plot_bound(result: ElboResult, path: str | Path, bins: int = 20) -> None:
    """Plots the integrand of the bound against t: the contribution of each noise level.

    Args:
        result: the result of :func:`sedd.diffusion.elbo`.
        path: the output file; its suffix determines the format (.png, .svg, .pdf).
        bins: number of intervals of [0, 1] over which draws are averaged.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``bins`` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    index = (result.times.flatten() * bins).long().clamp_(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    mean = torch.bincount(index, weights=result.integrand.flatten(), minlength=bins) / count / result.length

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(xlabel="t", ylabel="nats per token and unit of time", xlim=(0, 1))
        axes.stairs(mean.tolist(), [i / bins for i in range(bins + 1)], label="σ(t) Σ L / length")
        axes.axhline(result.nats_per_token, linestyle="--", color="gray", label=f"bound: {result.nats_per_token:.3f}")
        axes.legend()

    write_figure(path, (6, 3.5), draw)


COMMAND = Command(
    "perplexity",
    ABOUT,
    perplexity,
    PerplexityOptions,
    arguments=(RUN, Argument("texts", "Texts to score. Default: the validation text of the run.", {"nargs": "*"})),
)
