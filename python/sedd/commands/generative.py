"""``sedd eval generative``: evaluates samples by their perplexity under another model, by diversity and by MAUVE.

The measures are those of SEDD (figure 1) and of "Promises, Outlooks and Challenges of Diffusion Language Modeling"
(Deschenaux & Gulcehre 2024, tables 4 and 5).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sedd.commands.command import RUN, Command
from sedd.commands.judge import Judge, RunJudge, load_judge
from sedd.data.text import DataConfig, load_blocks, load_text, valid_batches
from sedd.data.tokenizer import EOT_TEXT
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.samplers import SAMPLERS, find_sampler, sample
from sedd.figures import check_figure, write_figure
from sedd.files import finite, write_json
from sedd.hints import pip_install
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.options import check_choice, check_one_of, check_options, renamed
from sedd.plain import read_json
from sedd.progress import console
from sedd.runtime import resolve_device
from sedd.unfinished import identity

__all__ = ["GenerativeOptions", "diversity", "generative", "measure", "plot_generative"]

ABOUT = """Measure the quality of samples.

Samples texts with each sampler and number of steps. Prints their perplexity under another language model (the judge),
with its standard error, and three measures of diversity: the entropy of the token frequencies within a text, the
fraction of distinct tokens, and the fraction of tokens that also occur among the 100 preceding tokens. Real text is
evaluated too, if there is any. Low perplexity with low entropy indicates repetition, not quality.

examples:
  sedd eval generative runs/default --steps 16,64,256 --plot steps.png
  sedd eval generative models/sedd-small --num 1000 --steps 32,128,1024 --json generative.json
  sedd eval generative runs/default --judge ~/models/SmolLM2-135M.gguf
      use a judge that needs no network
  sedd eval generative runs/default --mauve unconditional,prefix,infill --text real.txt
"""


SETTINGS = ("unconditional", "prefix", "infill")
MAUVE_SEEDS = 5  # random clusterings, as in appendix A.4 of Deschenaux & Gulcehre 2024


@dataclass
class GenerativeOptions:
    """Evaluation"""

    steps: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    """Numbers of reverse steps, for example --steps 64,1024."""
    samplers: list[str] | None = None
    """Names of samplers, for example --samplers tweedie,greedy. Default: tweedie and, if the model has a common noise
    rate, euler; autoregressive, which takes one step for each token whatever --steps is, for an autoregressive model.
    """
    num: int = 32
    """Number of texts for each sampler and number of steps. The papers use about 1,000."""
    length: int | None = None
    """Tokens per text. Default: the length of a training block."""
    judge: str = "openai-community/gpt2-large"
    """Causal language model that evaluates the samples: any that transformers loads, by its name on the Hugging Face
    hub, its folder, or a .gguf file; or a run of sedd train --objective autoregressive. Perplexities of different
    judges cannot be compared."""
    text: str | None = None
    """File or folder of real text, which is evaluated too and is the reference of MAUVE. Default: the validation text
    of the run, if it has one."""
    mauve: list[str] = field(default_factory=list)
    """Compare with real text by MAUVE, with the hidden states of the judge as features. Any of unconditional, prefix
    (the first `given` tokens of a real text are given) and infill (half of them are given at each end)."""
    given: int = 50
    """For prefix and infill: number of given tokens of a real text."""
    compared: int = 100
    """Number of tokens that MAUVE compares, from the start of each text."""
    temperature: float = 1.0
    """Below 1, more probable tokens are preferred; above 1, less probable ones. 1 samples the model's distribution."""
    top_p: float = 1.0
    """Sample only from the fewest, most probable tokens with this total probability."""
    seed: int = 0
    """Random seed. The same seed gives the same texts."""
    batch_size: int = 8
    """Number of texts sampled and evaluated at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Write results and texts to this file after each number of steps. If the file exists, its results are kept and
    only the missing ones are computed."""
    plot: str | None = None
    """Write a plot of perplexity and entropy against the number of steps to this file."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("num", "length", "given", "compared", "batch_size"), outputs=("json", "plot"))
        check_choice(self.temperature, self.top_p)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps: expected numbers of at least 1, got {self.steps}")
        for name, values, known in (("samplers", self.samplers or [], SAMPLERS), ("mauve", self.mauve, SETTINGS)):
            for value in values:
                check_one_of(name, value, known)
        if self.samplers == []:
            raise ValueError(f"samplers: expected at least one of {', '.join(SAMPLERS)}; got none")
        self.steps = list(dict.fromkeys(self.steps))
        self.samplers = None if self.samplers is None else list(dict.fromkeys(self.samplers))
        if set(self.mauve) - {"unconditional"} and self.given >= self.compared:
            raise ValueError(f"given: expected fewer than the {self.compared} compared tokens, got {self.given}")
        if self.text is not None and not Path(self.text).exists():
            raise FileNotFoundError(f"text: no such file or folder: {self.text}")


# -- measures ----------------------------------------------------------------------------------------------------------


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
    if isinstance(judge, RunJudge) and judge.loaded.tokenizer.name == loaded.tokenizer.name:
        nats, counts = judge.read_tokens(tokens.tolist(), batch_size, progress)
    else:
        nats, counts = judge.read(_texts(tokens, loaded, judge), batch_size, progress)
    if not counts.sum():
        raise ValueError(
            f"judge: expected texts of at least 2 tokens of {judge.name}, got 1, which has no context; increase "
            f"--length ({tokens.shape[1]})"
        )
    per_token = nats / counts.clamp(min=1)
    mean = float(nats.sum() / counts.sum())
    if not math.isfinite(mean):
        raise ValueError(
            f"judge: expected a finite likelihood, got {mean} nats per token from {judge.name}; check its weights"
        )
    figures: dict[str, Any] = {
        "perplexity": math.exp(mean),
        "perplexity_error": None,
        "perplexity_mean_of_exp": finite(float(per_token.exp().mean())),
    }
    if len(nats) > 1:
        # standard error of a ratio of sums: texts are independent, tokens are not
        error = float((nats - mean * counts).std()) / math.sqrt(len(nats)) / float(counts.double().mean())
        figures["perplexity_error"] = math.exp(mean) * error
    for name, values in diversity(tokens).items():
        figures[name] = float(values.mean())
        figures[f"{name}_std"] = float(values.std()) if len(values) > 1 else None
    return figures


def _texts(tokens: Tensor, loaded: LoadedModel, judge: Judge) -> list[str]:
    """Texts of tokens [n, L]. End-of-text is kept if the judge has that token; otherwise it becomes an empty line."""
    end = EOT_TEXT if judge.knows_end else "\n\n"
    return [loaded.tokenizer.decode(row.tolist()).replace(EOT_TEXT, end) for row in tokens]


# -- the evaluation ----------------------------------------------------------------------------------------------------


def generative(run: str, options: GenerativeOptions) -> int:
    """Samples texts with each sampler and number of steps, and evaluates them."""
    if options.mauve:
        try:
            import mauve  # noqa: F401
        except ImportError as error:
            raise ImportError(f"--mauve needs mauve-text: {pip_install('eval', 'mauve')}") from error
    if options.plot:
        check_figure(options.plot)
    device = resolve_device(options.device)
    loaded = load_model(run, device)
    loaded.need_text()
    length = options.length or loaded.model.config.length
    with renamed({"sampler": "samplers"}):
        samplers = _samplers(loaded.diffusion) if options.samplers is None else options.samplers
        for name in samplers:
            find_sampler(loaded.diffusion, name, 1)
    if loaded.model.causal:
        if "infill" in options.mauve:
            raise ValueError("mauve: expected unconditional or prefix for an autoregressive model, got infill")
        options = dataclasses.replace(options, steps=[length])
    if options.mauve and max(options.given, options.compared) > length:
        raise ValueError(
            f"given, compared: expected at most {length}, the length of a text, got {options.given}, {options.compared}"
        )
    real = _real(loaded, length, options)
    judge = load_judge(options.judge, device)
    if options.mauve:
        judge.features([" "], 1)  # it may have none
    out = console()
    settings = {
        **{name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE},
        **{"model": str(loaded.path), "judge": judge.name, "length": length},
    }
    if options.json:
        tensors = (*loaded.model.parameters(), *judge.parameters(), *([] if real is None else [real]))
        settings["identity"] = identity(tensors, str(loaded.model.to_config()))
    report: dict[str, Any] = {"settings": settings, "real": None, "rows": _known(options, settings)}
    if real is not None:
        report["real"] = measure(real, loaded, judge, options.batch_size, out.is_terminal)
    write = _writer(loaded, length, options, out.is_terminal)
    done = {(row["sampler"], row["steps"]) for row in report["rows"]}
    for sampler in samplers:
        for steps in options.steps:
            if (sampler, steps) in done:
                continue
            report["rows"].append(_row(sampler, steps, write, real, loaded, judge, options))
            report["rows"].sort(key=lambda row: (list(SAMPLERS).index(row["sampler"]), row["steps"]))
            if options.json:
                write_json(Path(options.json), report)
    out.print(_table(report))
    if options.plot:
        plot_generative(report, options.plot)
    return 0


def _samplers(diffusion: Diffusion) -> list[str]:
    """The samplers that a model is evaluated with unless others are given."""
    if diffusion.objective.autoregressive:
        return ["autoregressive"]
    try:
        find_sampler(diffusion, "euler", 1)
    except ValueError:
        return ["tweedie"]
    return ["tweedie", "euler"]


_FREE = ("samplers", "steps", "json", "plot", "device")  # rows do not depend on them


def _known(options: GenerativeOptions, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of earlier calls with the same settings."""
    if not options.json or not Path(options.json).exists():
        return []
    try:
        found = read_json(options.json)
        same, rows = found["settings"] == settings, found["rows"]
    except (ValueError, KeyError, TypeError):
        same, rows = False, []
    if not same:
        raise ValueError(
            f"json: expected results with the same options, weights and texts in {options.json}, got others; delete "
            "the file or give another name"
        )
    return list(rows)


def _real(loaded: LoadedModel, length: int, options: GenerativeOptions) -> Tensor | None:
    """Real texts [num, length], as many as there are samples; None if there is no real text."""
    if options.text is not None:
        with renamed({"source": "text"}):
            blocks = load_text(DataConfig(options.text), loaded.tokenizer, length)
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
    if options.mauve and len(blocks) < options.num:
        raise ValueError(f"text: expected at least num = {options.num} blocks of {length} tokens, got {len(blocks)}")
    return torch.cat(list(valid_batches(blocks, options.batch_size, options.num)))


Writer = Callable[[str, int, "tuple[Tensor, Tensor] | None"], Tensor]


def _writer(loaded: LoadedModel, length: int, options: GenerativeOptions, progress: bool) -> Writer:
    def write(sampler: str, steps: int, fixed: tuple[Tensor, Tensor] | None) -> Tensor:
        """Samples texts [num, length]. ``fixed``: tokens [num, length] and a mask [length] of the given positions."""
        device = loaded.diffusion.device
        generator = torch.Generator(device).manual_seed(options.seed)
        parts = []
        for first in range(0, options.num, options.batch_size):
            count = min(options.batch_size, options.num - first)
            part = sample(
                loaded.diffusion,
                batch=count,
                length=length,
                steps=steps,
                sampler=sampler,
                temperature=options.temperature,
                top_p=options.top_p,
                generator=generator,
                device=device,
                fixed=None if fixed is None else (fixed[0][first : first + count], fixed[1]),
                progress=progress,
                autocast_dtype=loaded.autocast_dtype,
            )
            parts.append(part.cpu())
        return torch.cat(parts)

    return write


def _row(
    sampler: str,
    steps: int,
    write: Writer,
    real: Tensor | None,
    loaded: LoadedModel,
    judge: Judge,
    options: GenerativeOptions,
) -> dict[str, Any]:
    """Samples and evaluates texts for one sampler and number of steps."""
    started = time.perf_counter()
    written = write(sampler, steps, None)
    seconds = (time.perf_counter() - started) / options.num
    row: dict[str, Any] = {"sampler": sampler, "steps": steps, "seconds_per_text": seconds}
    row |= measure(written, loaded, judge, options.batch_size, False)
    for setting in options.mauve:
        assert real is not None
        length = written.shape[1]
        given = torch.zeros(length, dtype=torch.bool)
        if setting != "unconditional":
            head = options.given if setting == "prefix" else (options.given + 1) // 2
            given[:head] = True
            if setting == "infill":
                given[options.compared - options.given // 2 : options.compared] = True
        texts = written if setting == "unconditional" else write(sampler, steps, (real, given))
        pair = [_texts(tokens[:, : options.compared], loaded, judge) for tokens in (real, texts)]
        row[f"mauve_{setting}"] = _mauve(*(judge.features(side, options.batch_size) for side in pair))
    row["texts"] = [loaded.tokenizer.decode(tokens.tolist()) for tokens in written]
    return row


def _table(report: dict[str, Any]) -> Table:
    judge = report["settings"]["judge"]
    table = Table("", title=f"{report['settings']['num']} texts of {report['settings']['length']} tokens each")
    mauves = [name for name in (f"mauve_{setting}" for setting in SETTINGS) if any(name in r for r in report["rows"])]
    columns = ["steps", f"perplexity\n{judge}", "entropy\nnats", "unique", "repeated", "seconds\nper text"]
    for column in [*columns, *(name.replace("mauve_", "MAUVE\n") for name in mauves)]:
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, steps: str, row: dict[str, Any]) -> None:
        error = "" if row["perplexity_error"] is None else f" ± {row['perplexity_error']:.2f}"
        table.add_row(
            name,
            steps,
            f"{row['perplexity']:.2f}{error}",
            f"{row['entropy']:.3f}",
            f"{row['unique']:.3f}",
            f"{row['repetition']:.3f}",
            f"{row['seconds_per_text']:.2f}" if "seconds_per_text" in row else "",
            *(f"{row[name]:.3f}" if name in row else "" for name in mauves),
        )

    for row in report["rows"]:
        add(row["sampler"], f"{row['steps']:,}", row)
    if report["real"]:
        add("real text", "", report["real"])
    return table


def plot_generative(report: dict[str, Any], path: str | Path) -> None:
    """Plots the judge's perplexity and the entropy against the number of steps, with a line for each sampler.

    Args:
        report: what ``sedd eval generative --json`` writes.
        path: the output file; its suffix determines the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows, real = report["rows"], report["real"]

    def draw(figure: Any) -> None:
        judge = report["settings"]["judge"]
        panels = (("perplexity", f"perplexity of {judge}", "log"), ("entropy", "unigram entropy, nats", "linear"))
        for axes, (name, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
            styles = itertools.cycle(("-", "--", ":", "-."))
            for style, sampler in zip(styles, dict.fromkeys(row["sampler"] for row in rows), strict=False):
                line = [row for row in rows if row["sampler"] == sampler]
                errors = [row["perplexity_error"] or 0.0 for row in line] if name == "perplexity" else None
                steps = [row["steps"] for row in line]
                # dashes keep a line below visible
                values = [row[name] for row in line]
                axes.errorbar(steps, values, errors, marker="o", linestyle=style, capsize=3, label=sampler)
            if real:
                axes.axhline(real[name], color="gray", linestyle="--", label="real text")
            axes.set(xscale="log", yscale=scale, xlabel="reverse steps", ylabel=label)
            ticks = sorted({row["steps"] for row in rows})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        axes.legend()

    write_figure(path, (9, 3.6), draw)


COMMAND = Command("generative", ABOUT, generative, GenerativeOptions, arguments=(RUN,))
