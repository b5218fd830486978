"""The measures of sampled texts: perplexity under another model, diversity, and MAUVE.

They are those of SEDD (figure 1) and of "Promises, Outlooks and Challenges of Diffusion Language Modeling"
(Deschenaux & Gulcehre 2024, tables 4 and 5).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sedd.commands.judge import Judge, RunJudge, load_judge
from sedd.commands.quality import SETTINGS, GenerativeOptions, Quality, Row, Write, with_error
from sedd.data.text import DataConfig, load_blocks, load_text, valid_batches
from sedd.data.tokenizer import EOT_TEXT
from sedd.files import finite
from sedd.hints import pip_install
from sedd.hub.pretrained import LoadedModel
from sedd.options import renamed
from sedd.progress import console

__all__ = ["TextQuality", "diversity", "measure"]

MAUVE_SEEDS = 5  # random clusterings, as in appendix A.4 of Deschenaux & Gulcehre 2024


def diversity(tokens: Tensor, window: int = 100) -> dict[str, Tensor]:
    """The diversity of tokens within each text.

    Args:
        tokens: texts [n, L], int64.
        window: number of preceding tokens in which a token counts as repeated.

    Returns:
        Each [n], float64: ``entropy``, of the token frequencies within the text, in nats; ``unique``, the number of
        distinct tokens / L; ``repetition``, the fraction of tokens that also occur among the ``window`` preceding
        tokens.

    Source: Deschenaux & Gulcehre 2024, table 4.
    """
    length = tokens.shape[1]
    entropy, unique = [], []
    for row in tokens:
        p = row.unique(return_counts=True)[1].double() / length
        entropy.append(-(p * p.log()).sum())
        unique.append(torch.tensor(len(p) / length, dtype=torch.float64))
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    for back in range(1, min(window, length - 1) + 1):
        repeated[:, back:] |= tokens[:, back:] == tokens[:, :-back]
    return {
        "entropy": torch.stack(entropy),
        "unique": torch.stack(unique),
        "repetition": repeated.double().mean(1),
    }


def _mauve(real: Tensor, written: Tensor) -> float:
    """MAUVE of two sets of features, averaged over several random clusterings."""
    import mauve

    values = [
        mauve.compute_mauve(
            p_features=real.numpy(), q_features=written.numpy(), seed=seed, mauve_scaling_factor=5, verbose=False
        ).mauve
        for seed in range(MAUVE_SEEDS)
    ]
    return float(statistics.fmean(values))


def measure(tokens: Tensor, loaded: LoadedModel, judge: Judge, batch_size: int, progress: bool) -> dict[str, Any]:
    """Measures of texts [n, L] that do not need real text."""
    nats, counts = _read(tokens, loaded, judge, batch_size, progress)
    if not counts.sum():
        raise ValueError(
            f"judge: expected texts of at least 2 tokens of {judge.name}, got 1, which has no context; increase "
            f"--length ({tokens.shape[1]})"
        )
    figures: dict[str, Any] = perplexity(nats, counts, judge.name)
    read = counts > 0
    figures["perplexity_mean_of_exp"] = finite(float((nats[read] / counts[read]).exp().mean()))
    figures["num"] = len(tokens)
    for name, values in diversity(tokens).items():
        figures[name] = float(values.mean())
        figures[f"{name}_std"] = float(values.std()) if len(values) > 1 else None
    return figures


def perplexity(nats: Tensor, counts: Tensor, judge: str, suffix: str = "") -> dict[str, float | None]:
    """The perplexity of texts and its standard error.

    Args:
        nats: negative log-likelihood of each text [n], float64.
        counts: number of scored tokens of each text [n], int64.
        judge: the name of the judge, for the error message.
        suffix: what follows the names of the figures.

    Raises:
        ValueError: the likelihood is not finite.
    """
    mean = float(nats.sum() / counts.sum())
    if not math.isfinite(mean):
        raise ValueError(
            f"judge: expected a finite likelihood, got {mean} nats per token from {judge}; check its weights"
        )
    error = None
    if len(nats) > 1:
        # standard error of a ratio of sums: texts are independent, tokens are not
        error = float((nats - mean * counts).std()) / math.sqrt(len(nats)) / float(counts.double().mean())
        error *= math.exp(mean)
    return {f"perplexity{suffix}": math.exp(mean), f"perplexity{suffix}_error": error}


def _read(
    tokens: Tensor, loaded: LoadedModel, judge: Judge, batch_size: int, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and number of scored tokens of each text [n, L], see :meth:`Judge.read`."""
    if _reads_tokens(judge, loaded):
        return judge.read_tokens(tokens.tolist(), batch_size, progress)
    return judge.read(_texts(tokens, loaded, judge), batch_size, progress)


def _reads_tokens(judge: Judge, loaded: LoadedModel) -> TypeGuard[RunJudge]:
    """Whether the judge has the tokeniser of the model."""
    return isinstance(judge, RunJudge) and judge.loaded.tokenizer.name == loaded.tokenizer.name


def _texts(tokens: Tensor, loaded: LoadedModel, judge: Judge) -> list[str]:
    """Texts of tokens [n, L]. End-of-text is kept if the judge has that token; otherwise it becomes an empty line."""
    end = EOT_TEXT if judge.knows_end else "\n\n"
    return [loaded.tokenizer.decode(row.tolist()).replace(EOT_TEXT, end) for row in tokens]


class TextQuality(Quality):
    """The measures of sampled texts.

    Args:
        loaded: a model of text.
        options: the options of the command.
        num: number of texts.
        batch_size: number of texts evaluated at a time.

    Raises:
        ImportError, ValueError, FileNotFoundError, ConnectionError: the judge, MAUVE or real text are not there.
    """

    unit, real_name = "text", "real text"
    num, batch_size = 32, 8
    others = ("guidance", "classifier", "reference")

    def __init__(self, loaded: LoadedModel, options: GenerativeOptions, num: int, batch_size: int) -> None:
        if options.mauve:
            try:
                import mauve  # noqa: F401
            except ImportError as error:
                raise ImportError(f"--mauve needs mauve-text: {pip_install('eval', 'mauve')}") from error
        length = options.length or loaded.model.config.length
        if loaded.model.causal and "infill" in options.mauve:
            raise ValueError("mauve: expected unconditional or prefix for an autoregressive model, got infill")
        if options.mauve and options.compared > length:
            raise ValueError(f"compared: expected at most {length}, the length of a text, got {options.compared}")
        self._loaded, self._options, self._batch_size = loaded, options, batch_size
        self._real = _real(loaded, length, options, num, batch_size)
        self._judge = load_judge(options.judge, loaded.diffusion.device)
        if options.mauve and _reads_tokens(self._judge, loaded):
            most = self._judge.loaded.model.config.length
            if options.compared > most:
                raise ValueError(
                    f"compared: expected at most {most}, the length of the judge {self._judge.name}, got "
                    f"{options.compared}"
                )
        self.title = f"{num} texts of {length} tokens each"
        self.settings = {"judge": self._judge.name, "length": length}
        self.tensors = [*self._judge.parameters(), *([] if self._real is None else [self._real])]
        self.panels = (
            ("perplexity", f"perplexity of {self._judge.name}", "log"),
            ("entropy", "unigram entropy, nats", "linear"),
        )

    def real(self, progress: bool) -> Row | None:
        """See :meth:`Quality.real`."""
        if self._real is None:
            return None
        row = measure(self._real, self._loaded, self._judge, self._batch_size, progress)
        return row | self._continuation(self._real) if "prefix" in self._options.mauve else row

    def measure(self, samples: Tensor, write: Write) -> Row:
        """See :meth:`Quality.measure`."""
        options, loaded, judge = self._options, self._loaded, self._judge
        row = measure(samples, loaded, judge, self._batch_size, False)
        for setting in options.mauve:
            assert self._real is not None
            given = torch.zeros(samples.shape[1], dtype=torch.bool)
            if setting != "unconditional":
                head = options.given if setting == "prefix" else (options.given + 1) // 2
                given[:head] = True
                if setting == "infill":
                    given[options.compared - options.given // 2 : options.compared] = True
            texts = samples if setting == "unconditional" else write((self._real, given))
            pair = [_texts(tokens[:, : options.compared], loaded, judge) for tokens in (self._real, texts)]
            row[f"mauve_{setting}"] = _mauve(*(judge.features(side, self._batch_size) for side in pair))
            if setting == "prefix":
                row |= self._continuation(texts)
        row["texts"] = [loaded.tokenizer.decode(tokens.tolist()) for tokens in samples]
        return row

    def _continuation(self, texts: Tensor) -> dict[str, float | None]:
        """Perplexity of the compared tokens after the given ones: of both, without that of the given ones."""
        options, loaded, judge = self._options, self._loaded, self._judge
        both, first = (
            _read(texts[:, :length], loaded, judge, self._batch_size) for length in (options.compared, options.given)
        )
        if not (both[1] - first[1]).sum():
            raise ValueError(
                f"judge: expected one that reads more than the {options.given} given tokens of a text, got "
                f"{judge.name}, which does not; give another judge, or fewer tokens (--given)"
            )
        return perplexity(both[0] - first[0], both[1] - first[1], judge.name, "_prefix")

    def columns(self, rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
        """See :meth:`Quality.columns`."""
        mauves = [name for name in (f"mauve_{setting}" for setting in SETTINGS) if any(name in row for row in rows)]
        return [
            (f"perplexity\n{self._judge.name}", with_error("perplexity")),
            ("entropy\nnats", lambda row: f"{row['entropy']:.3f}"),
            ("unique", lambda row: f"{row['unique']:.3f}"),
            ("repeated", lambda row: f"{row['repetition']:.3f}"),
            ("seconds\nper text", lambda row: f"{row['seconds_per_text']:.2f}"),
            *((name.replace("mauve_", "MAUVE\n"), lambda row, name=name: f"{row[name]:.3f}") for name in mauves),
            *([("perplexity\nafter prefix", with_error("perplexity_prefix"))] if "mauve_prefix" in mauves else []),
        ]


def _real(loaded: LoadedModel, length: int, options: GenerativeOptions, num: int, batch_size: int) -> Tensor | None:
    """Real texts [num, length], as many as there are samples; None if there is no real text."""
    if options.text is not None:
        with renamed({"source": "text"}):
            data = DataConfig(options.text, documents=options.documents, detokenizer=options.detokenizer)
            blocks = load_text(data, loaded.tokenizer, length)
    elif loaded.config is not None and (length == loaded.model.config.length or options.mauve):
        try:
            blocks = load_blocks(loaded.config.data, loaded.tokenizer, length).valid
        except (FileNotFoundError, ConnectionError) as error:
            if options.mauve:
                raise type(error)(f"text: cannot load the validation text of the run; give a file: {error}") from error
            console().print(f"real text is not evaluated; to evaluate some, give --text FILE ({error})")
            return None
    elif options.mauve:
        raise ValueError(
            f"text: expected real text for MAUVE, got none; {loaded.path} has no validation text, so give a file"
        )
    else:
        return None
    if options.mauve and len(blocks) < num:
        raise ValueError(f"text: expected at least num = {num} blocks of {length} tokens, got {len(blocks)}")
    return torch.cat(list(valid_batches(blocks, batch_size, num)))
