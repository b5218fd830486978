"""``sedd eval generative``: samples with each sampler and number of steps, and measures the samples.

:mod:`sedd.commands.text_quality` has the measures of texts, :mod:`sedd.commands.image_quality` those of images.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sedd.commands.command import RUN, Command
from sedd.commands.image_quality import ImageQuality
from sedd.commands.quality import GenerativeOptions, Quality, Row
from sedd.commands.text_quality import TextQuality
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.samplers import SAMPLERS, find_sampler, sample
from sedd.figures import check_figure, write_figure
from sedd.files import write_json
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.options import renamed
from sedd.plain import read_json
from sedd.progress import console
from sedd.runtime import resolve_device
from sedd.unfinished import identity

__all__ = ["generative"]

ABOUT = """Measure the quality of samples.

Samples texts with each sampler and number of steps. Prints their perplexity under another language model (the judge),
with its standard error, and three measures of diversity: the entropy of the token frequencies within a text, the
fraction of distinct tokens, and the fraction of tokens that also occur among the 100 preceding tokens. Real text is
evaluated too, if there is any. Low perplexity with low entropy indicates repetition, not quality.

For a model of images, prints the FID from the training images and the Inception score, with their standard errors. The
features are those of a small classifier, which is trained on the training images once, and not those of Inception.
Held-out images are evaluated too.

examples:
  sedd eval generative runs/default --steps 16,64,256 --plot steps.png
  sedd eval generative models/sedd-small --num 1000 --steps 32,128,1024 --json generative.json
  sedd eval generative runs/default --judge ~/models/SmolLM2-135M.gguf
      use a judge that needs no network
  sedd eval generative runs/default --mauve unconditional,prefix,infill --text real.txt
  sedd eval generative runs/digits --steps 4,16,64 --plot fid.png
      images
  sedd eval generative runs/classes --steps 64 --guidance 2
      images of given classes
"""


def generative(run: str, options: GenerativeOptions) -> int:
    """Samples with each sampler and number of steps, and measures the samples."""
    if options.plot:
        check_figure(options.plot)
    loaded = load_model(run, resolve_device(options.device))
    kind = TextQuality if loaded.is_text else ImageQuality
    for name in kind.others:
        if (value := getattr(options, name)) != getattr(GenerativeOptions(), name):
            raise ValueError(f"{name}: expected no value for a model of {kind.unit}s, got {value!r}")
    num, batch_size = options.num or kind.num, options.batch_size or kind.batch_size
    with renamed({"sampler": "samplers"}):
        samplers = _samplers(loaded.diffusion) if options.samplers is None else options.samplers
        for name in samplers:
            find_sampler(loaded.diffusion, name, 1)
    length = options.length or loaded.model.config.length
    quality = kind(loaded, options, num, batch_size)
    out = console()
    settings = {
        **{name: value for name, value in dataclasses.asdict(options).items() if name not in (*_FREE, *kind.others)},
        **{"model": str(loaded.path), "num": num, "batch_size": batch_size},
        **quality.settings,
    }
    if options.json:
        settings["identity"] = identity((*loaded.model.parameters(), *quality.tensors), str(loaded.model.to_config()))
    report: dict[str, Any] = {"settings": settings, "real": None, "rows": _known(options, settings)}
    if quality.note:
        report = {"note": quality.note, **report}
    report["real"] = quality.real(out.is_terminal)
    done = {(row["sampler"], row["steps"]) for row in report["rows"]}
    for sampler in samplers:
        for steps in [length] if loaded.model.causal else options.steps:
            if (sampler, steps) in done:
                continue
            write = partial(_write, loaded, options, quality.labels, (num, length), batch_size, sampler, steps)
            report["rows"].append(_row(sampler, steps, write, quality, num))
            report["rows"].sort(key=_place)
            if options.json:
                write_json(Path(options.json), report)
    out.print(_table(report, quality))
    if quality.note:
        out.print(quality.note)
    if options.plot:
        _plot(report, quality, options.plot)
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


def _place(row: Row) -> tuple[int, str, int]:
    """Where a row stands in the table; samplers of your own, which need not be known now, come last."""
    known = list(SAMPLERS)
    name = row["sampler"]
    return known.index(name) if name in known else len(known), name, row["steps"]


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
            f"json: expected results with the same options, weights and data in {options.json}, got others; delete "
            "the file or give another name"
        )
    return list(rows)


def _write(
    loaded: LoadedModel,
    options: GenerativeOptions,
    labels: Tensor | None,
    shape: tuple[int, int],
    batch_size: int,
    sampler: str,
    steps: int,
    fixed: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Samples blocks of ``shape`` [num, L], with classes [num].

    ``fixed``: tokens [num, L] and a mask [L] of the given positions.
    """
    device = loaded.diffusion.device
    generator = torch.Generator(device).manual_seed(options.seed)
    parts = []
    for first in range(0, shape[0], batch_size):
        count = min(batch_size, shape[0] - first)
        part = sample(
            loaded.diffusion,
            batch=count,
            length=shape[1],
            steps=steps,
            sampler=sampler,
            temperature=options.temperature,
            top_p=options.top_p,
            generator=generator,
            device=device,
            fixed=None if fixed is None else (fixed[0][first : first + count], fixed[1]),
            progress=console().is_terminal,
            autocast_dtype=loaded.autocast_dtype,
            labels=None if labels is None else labels[first : first + count],
            guidance=1.0 if options.guidance is None else options.guidance,
        )
        parts.append(part.cpu())
    return torch.cat(parts)


def _row(
    sampler: str, steps: int, write: Callable[[tuple[Tensor, Tensor] | None], Tensor], quality: Quality, num: int
) -> Row:
    """Samples with one sampler and number of steps, and measures the samples."""
    started = time.perf_counter()
    samples = write(None)
    seconds = (time.perf_counter() - started) / num
    row = {"sampler": sampler, "steps": steps, f"seconds_per_{quality.unit}": seconds}
    return row | quality.measure(samples, write)


def _table(report: dict[str, Any], quality: Quality) -> Table:
    columns = quality.columns(report["rows"])
    table = Table("", title=quality.title)
    for heading in ("steps", *(heading for heading, _ in columns)):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, steps: str, row: Row) -> None:
        cells = []
        for _, show in columns:
            try:
                cells.append(show(row))
            except KeyError:  # real data have no seconds
                cells.append("")
        table.add_row(name, steps, *cells)

    for row in report["rows"]:
        add(row["sampler"], f"{row['steps']:,}", row)
    if report["real"]:
        add(quality.real_name, "", report["real"])
    return table


def _plot(report: dict[str, Any], quality: Quality, path: str) -> None:
    """Plots two values against the number of steps, with a line for each sampler."""
    from matplotlib.ticker import LogLocator

    rows, real = report["rows"], report["real"]

    def draw(figure: Any) -> None:
        for axes, (name, label, scale) in zip(figure.subplots(1, 2), quality.panels, strict=True):
            styles = itertools.cycle(("-", "--", ":", "-."))
            for style, sampler in zip(styles, dict.fromkeys(row["sampler"] for row in rows), strict=False):
                line = [row for row in rows if row["sampler"] == sampler]
                errors = [row[f"{name}_error"] or 0.0 for row in line] if f"{name}_error" in line[0] else None
                steps = [row["steps"] for row in line]
                # dashes keep a line below visible
                values = [row[name] for row in line]
                axes.errorbar(steps, values, errors, marker="o", linestyle=style, capsize=3, label=sampler)
            if real:
                axes.axhline(real[name], color="gray", linestyle="--", label=quality.real_name)
            axes.set(xscale="log", yscale=scale, xlabel="reverse steps", ylabel=label)
            ticks = sorted({row["steps"] for row in rows})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            if scale == "log":  # otherwise a range within a power of ten has one tick
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        axes.legend()

    write_figure(path, (9, 3.6), draw)


COMMAND = Command("generative", ABOUT, generative, GenerativeOptions, arguments=(RUN,))
