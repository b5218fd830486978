"""``sedd sample`` and ``sedd infill``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text
from torch import Tensor

from sedd.commands.command import RUN, Argument, Command
from sedd.commands.pictures import paint, read_given
from sedd.commands.sampler_params import choose_sampler, parameters
from sedd.data.tokenizer import MASK_TEXT, Tokenizer
from sedd.diffusion.sampler import Sampler
from sedd.diffusion.samplers import SAMPLERS, sample
from sedd.files import write_json
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.network import compile_network
from sedd.options import check_choice, check_one_of, check_options, renamed
from sedd.progress import CONTROLS, console
from sedd.runtime import resolve_device

__all__ = ["INFILL", "SAMPLE", "parse_template", "render"]

GAP = re.compile(r"\{\{(\d+)\}\}")

ABOUT_SAMPLE = """Sample text or images from a model.

Images are written to a PNG file, in a grid.

examples:
  sedd sample runs/default
  sedd sample runs/default --num 3 --steps 64 --seed 7
  sedd sample runs/default --live
  sedd sample runs/default --sampler entropy_bounded --sampler_params.gamma 0.3
  sedd sample runs/default/checkpoints/step_00000500 --json texts.json
  sedd sample runs/digits --num 64 --out digits.png
"""

ABOUT_INFILL = """Fill the gaps of a text or of images.

In the text, {{n}} is a gap of n tokens (bytes, characters or word pieces, depending on the model's tokeniser). All
other text is unchanged. Any number of gaps is possible, at any position; adjacent gaps form one gap.

examples (quote the text for the shell):
  sedd infill runs/default 'The standard library {{80}}'
      continue a text
  sedd infill runs/default '{{80}} and that is the end.'
      generate the beginning of a text
  sedd infill runs/default 'def {{10}}(path):{{60}}return result'
      fill several gaps
  sedd infill runs/default --num 4 --live "$(cat draft.txt)"
      fill the gaps of a file
  sedd infill runs/digits valid --keep upper --num 8
      complete eight validation images of the run, whose upper halves are kept
  sedd infill runs/digits four.png --keep 2:8,0:5
      keep rows 2 to 7 and columns 0 to 4 of an image

An autoregressive model can only continue a text. For a model of images, give a PNG file, or 'valid' for validation
images of the run, and the part to keep. Writes a PNG file with, for each image, the kept part and the filled image.
"""


@dataclass
class SamplingOptions:
    """Sampling"""

    num: int = 1
    """Number of texts or images."""
    steps: int = 128
    """Number of reverse steps. More steps take longer and give better text. Of no effect for first_hitting,
    entropy_bounded and autoregressive, which take as many steps as they need."""
    sampler: str | None = None
    """For any noise: tweedie (the best independent reverse step), tweedie_cosine (the same, with shorter steps near the
    noise), euler, predictor_corrector, greedy. For absorbing noise: ancestral, remask (unmasked tokens may return to
    MASK), first_hitting (one position per step), entropy_bounded (as many positions as the entropies allow),
    confidence, margin, entropy (the positions where the model is most certain), semi_autoregressive (block after
    block). For autoregressive models: autoregressive. Or your own class as module:name. Default: tweedie;
    autoregressive for an autoregressive model."""
    sampler_params: dict[str, str] = field(default_factory=dict)
    """Parameters of the sampler, for example --sampler entropy_bounded --sampler_params.gamma 0.3."""
    temperature: float = 1.0
    """Below 1, more probable tokens are preferred; above 1, less probable ones. 1 samples the model's distribution."""
    top_p: float = 1.0
    """Sample only from the fewest, most probable tokens with this total probability."""
    labels: list[int] = field(default_factory=list)
    """For a model with classes: the classes of the images in turn, for example --labels 3, or --labels 0,1,2. Default:
    no class."""
    guidance: float = 1.0
    """For a model with classes, with labels: above 1, samples are more typical of their class, and less diverse. Steps
    take twice as long, unless it is 1."""
    whole_batch: bool = False
    """All tokens go through the whole network in every step, so that no step waits for a GPU to count those that are
    left. It may be faster for a few short texts on a GPU, and is slower otherwise. Most samplers write the same texts,
    but for rounding."""
    compile: bool = False
    """Compile the network with torch.compile. Faster for many texts."""
    seed: int = 0
    """Random seed. The same seed gives the same texts."""
    batch_size: int = 8
    """Number of texts sampled at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Also write texts and tokens to this file."""
    out: str | None = None
    """For a model of images: the PNG file. Default: samples.png or infill.png in the current folder."""

    def __post_init__(self) -> None:
        check_options(self, positive=("num", "steps", "batch_size"), outputs=("json", "out"))
        if self.sampler is not None:
            check_one_of("sampler", self.sampler, SAMPLERS)
        check_choice(self.temperature, self.top_p, self.guidance)
        self.chosen()  # mistakes are found before the model is loaded

    def chosen(self) -> Sampler | str | None:
        """The sampler with its parameters, or its name; None for the default of the model."""
        return choose_sampler(self.sampler, self.steps, self.sampler_params)


@dataclass
class SampleOptions(SamplingOptions):
    """Sampling"""

    length: int | None = None
    """Tokens per text. Default: the length of a training block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, positive=("length",))


@dataclass
class InfillOptions(SamplingOptions):
    """Sampling"""

    keep: str | None = None
    """For a model of images: the part that is kept: upper, lower, left, right (halves), or a rectangle as rows,columns,
    for example 0:14,7:21 for rows 0 to 13 and columns 7 to 20."""


def write(run: str, options: SampleOptions, live: bool) -> int:
    """Samples texts or images."""
    loaded = load_model(run, resolve_device(options.device))
    if loaded.model.config.shape:
        _check_pictures(live=live, length=options.length)
        paint(loaded, options, _sampled(loaded, options), Path(options.out or "samples.png"))
        return 0
    _check_text(out=options.out)
    length = options.length or loaded.model.config.length
    nothing = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
    _generate(loaded, options, live, *nothing)
    return 0


def infill(run: str, template: str, options: InfillOptions, live: bool) -> int:
    """Fills the gaps of a text or of images."""
    loaded = load_model(run, resolve_device(options.device))
    if loaded.model.config.shape:
        _check_pictures(live=live)
        given = read_given(loaded, template, options.keep, options.num)
        with renamed({"fixed": "keep"}):
            written = _sampled(loaded, options, *given)
        paint(loaded, options, written, Path(options.out or "infill.png"), given)
        return 0
    loaded.need_text()
    _check_text(out=options.out, keep=options.keep)
    with renamed({"fixed": "template"}):
        _generate(loaded, options, live, *parse_template(template, loaded.tokenizer))
    return 0


def parse_template(template: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Converts a text with gaps, such as ``"The {{5}} sat"``, to tokens.

    Args:
        template: text in which ``{{n}}`` represents n unknown tokens; all other text is fixed.
        tokenizer: encodes the fixed parts, each separately.

    Returns:
        ``(tokens, is_fixed)``, int64 and bool, both [L]; the tokens of gaps are 0.

    Raises:
        ValueError: there is no gap, a gap is empty, or the tokeniser cannot encode the text.
    """
    tokens: list[int] = []
    is_fixed: list[bool] = []
    for index, part in enumerate(GAP.split(template)):  # text, n, text, n, ..., text
        known = index % 2 == 0
        if not known and int(part) == 0:
            raise ValueError("template: expected gaps of at least 1 token, got {{0}}; write {{n}} for n unknown tokens")
        tokens += tokenizer.encode(part) if known else [0] * int(part)
        is_fixed += [known] * (len(tokens) - len(is_fixed))
    if all(is_fixed):
        raise ValueError(f"template: expected a gap, got none in {template!r}; write {{{{n}}}} for n unknown tokens")
    return torch.tensor(tokens), torch.tensor(is_fixed)


def render(tokens: Tensor, is_fixed: Tensor, tokenizer: Tokenizer) -> Text:
    """Returns text for the terminal, with filled gaps highlighted and MASK dimmed."""
    text = Text()
    style = "bold green" if bool(is_fixed.any()) else ""
    flags, counts = torch.unique_consecutive(is_fixed, return_counts=True)
    for known, part in zip(flags.tolist(), tokens.split(counts.tolist()), strict=True):
        text.append(tokenizer.decode(part.tolist()).translate(CONTROLS), "" if known else style)
    text.highlight_regex(f"{MASK_TEXT}+", "dim")
    return text


def _show(view: Live, step: int, steps: int, tokens: Tensor, *, shown: Callable[[Tensor], Text]) -> None:
    """Displays the first text of a batch after a reverse step."""
    view.update(Group(Rule(f"step {step} of {steps}", style="dim"), shown(tokens[0].cpu())), refresh=True)


def _check_pictures(**given: Any) -> None:
    """Refuses options that models of images do not have."""
    for name, value in given.items():
        if value:
            raise ValueError(f"{name}: expected no value for a model of images, got {str(value).lower()}")


def _check_text(**given: Any) -> None:
    """Refuses options that models of text do not have."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected no value for a model of text, got {value!r}; it is for images")


def _generate(loaded: LoadedModel, options: SamplingOptions, live: bool, tokens: Tensor, is_fixed: Tensor) -> None:
    """Samples texts, or blocks of a corpus of one's own, around given tokens [L], and prints them."""
    out = console()
    texts: list[dict[str, Any]] = []
    corpus = None if loaded.is_text else loaded.corpus()

    def read(row: Tensor) -> str:
        return loaded.tokenizer.decode(row.tolist()) if corpus is None else str(corpus.show(row))

    def shown(row: Tensor) -> Text:
        return render(row, is_fixed, loaded.tokenizer) if corpus is None else Text(read(row).translate(CONTROLS))

    for written in _batches(loaded, options, tokens, is_fixed, partial(_show, shown=shown) if live else None):
        for row in written:
            out.print(Rule(f"{len(texts) + 1} of {options.num}", style="dim"), width=min(out.width, 80))
            out.print(shown(row), soft_wrap=True)
            texts.append({"text": read(row), "tokens": row.tolist()})
    if options.json:
        write_json(Path(options.json), texts)


def _sampled(
    loaded: LoadedModel, options: SamplingOptions, tokens: Tensor | None = None, is_fixed: Tensor | None = None
) -> Tensor:
    """Samples blocks [num, L] of the model's length, around given tokens [num, L] if there are any."""
    if tokens is None or is_fixed is None:
        tokens = torch.zeros(options.num, loaded.model.config.length, dtype=torch.int64)
        is_fixed = torch.zeros_like(tokens, dtype=torch.bool)
    return torch.cat(list(_batches(loaded, options, tokens, is_fixed)))


def _batches(
    loaded: LoadedModel,
    options: SamplingOptions,
    tokens: Tensor,
    is_fixed: Tensor,
    show: Callable[..., None] | None = None,
) -> Iterator[Tensor]:
    """Samples ``options.num`` blocks, ``options.batch_size`` at a time.

    Args:
        loaded: the model.
        options: see :class:`SamplingOptions`.
        tokens: given tokens, of all blocks [L] or of each [num, L].
        is_fixed: where they are given, of the same shape.
        show: displays a batch after each step, in the view that is its first argument.
    """
    device = loaded.diffusion.device
    if options.compile:
        if loaded.model.causal:
            raise ValueError(
                "compile: expected a diffusion model, got an autoregressive one, whose cache cannot be compiled; leave "
                "--compile out"
            )
        compile_network(loaded.model)
    generator = torch.Generator(device).manual_seed(options.seed)
    out, classes = console(), loaded.model.config.classes
    if not all(0 <= label < classes for label in options.labels):
        wanted = f"classes in [0, {classes})" if classes else "none for a model without classes"
        raise ValueError(f"labels: expected {wanted}, got {','.join(map(str, options.labels))}")
    labels = (
        torch.tensor([options.labels[i % len(options.labels)] for i in range(options.num)]) if options.labels else None
    )
    for first in range(0, options.num, options.batch_size):
        batch = min(options.batch_size, options.num - first)
        part = slice(None) if tokens.dim() == 1 else slice(first, first + batch)
        with Live(console=out, transient=True, auto_refresh=False) if show else nullcontext() as view:
            written = sample(
                loaded.diffusion,
                batch=batch,
                length=tokens.shape[-1],
                steps=options.steps,
                sampler=options.chosen(),
                temperature=options.temperature,
                top_p=options.top_p,
                generator=generator,
                device=device,
                fixed=(tokens[part], is_fixed[part]) if bool(is_fixed.any()) else None,
                on_step=partial(show, view) if show else None,
                progress=not show and out.is_terminal,
                autocast_dtype=loaded.autocast_dtype,
                whole_batch=options.whole_batch,
                labels=labels[first : first + batch] if labels is not None else None,
                guidance=options.guidance,
            ).cpu()
        yield written


_LIVE = Argument("--live", "Display the first text after each step.", {"action": "store_true"})
_KEYS = {"sampler_params": parameters}
SAMPLE = Command("sample", ABOUT_SAMPLE, write, SampleOptions, arguments=(RUN, _LIVE), keys=_KEYS)
INFILL = Command(
    "infill",
    ABOUT_INFILL,
    infill,
    InfillOptions,
    arguments=(
        RUN,
        Argument("template", "The text, with {{n}} for n unknown tokens; or, for images, a PNG file or 'valid'."),
        _LIVE,
    ),
    keys=_KEYS,
)
