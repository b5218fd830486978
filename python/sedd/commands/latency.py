"""``sedd eval latency``: the time of sampling, compared with an autoregressive transformer of the same size.

The comparison is that of Deschenaux & Gulcehre 2024 (figure 1, table 7): a GPT-2 of the same width, depth and
vocabulary, which generates token by token with a key-value cache, against reverse steps over the whole text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sedd.commands.command import RUN, Command
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.position_loss import ScoreEntropy
from sedd.diffusion.samplers import SAMPLERS, find_sampler, sample
from sedd.diffusion.schedule import LogLinear
from sedd.figures import check_figure, write_figure
from sedd.files import write_json
from sedd.hints import pip_install
from sedd.hub.pretrained import load_model
from sedd.network import PRESETS, DiffusionTransformer
from sedd.options import check_one_of, check_options
from sedd.progress import console, track
from sedd.runtime import autocast_dtype, resolve_device
from sedd_ext import Absorbing, RankOne

__all__ = ["LatencyOptions", "crossing", "latency", "make_twin", "plot_latency"]

ABOUT = """Measure the time of sampling, compared with an autoregressive transformer of the same size.

Unless --twin names a run of sedd train --objective autoregressive, the autoregressive model is a GPT-2 from
transformers with the same width, depth, heads and vocabulary, random weights and a key-value cache. The two are
measured alternately. Prints seconds, tokens per second, and the number of steps at which both take the same time. For
an untrained model, give a preset such as small in place of a model: the time does not depend on the weights.

examples:
  sedd eval latency runs/default --plot latency.png
  sedd eval latency small --length 1024 --steps 16,64,256,1024 --batch_sizes 1,8,32 --json latency.json
"""


TOKENS = 50_257  # GPT-2's vocabulary, for untrained presets


@dataclass
class LatencyOptions:
    """Evaluation"""

    steps: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    """Numbers of reverse steps to measure, for example --steps 64,1024."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Batch sizes to measure, in texts."""
    length: int | None = None
    """Tokens per text. Default: the length of a training block."""
    sampler: str = "tweedie"
    """A sampler of sedd sample, or your own class as module:name."""
    twin: str | None = None
    """The autoregressive model: a run of sedd train --objective autoregressive. Default: a GPT-2 of the same size with
    random weights."""
    repeats: int = 3
    """Number of measurements of each time. The table shows the median, the fastest and the slowest."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Also write the results to this file."""
    plot: str | None = None
    """Write a plot of seconds against steps to this file. It marks where diffusion takes as long as the autoregressive
    model."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("length", "repeats"), outputs=("json", "plot"))
        for name in ("steps", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}: expected numbers of at least 1, got {values}")
            setattr(self, name, sorted(set(values)))
        check_one_of("sampler", self.sampler, SAMPLERS)


def make_twin(model: DiffusionTransformer, process: RankOne, length: int) -> Any:
    """Creates a GPT-2 with the width, depth, heads and vocabulary of a model. Its weights are random, which does not
    affect the time.

    Args:
        model: the network of the diffusion model.
        process: the process of the diffusion model.
        length: the maximum number of tokens that the GPT-2 can generate.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the autoregressive model needs transformers: {pip_install('eval', 'transformers')}"
        ) from error
    sizes = model.config
    config = transformers.GPT2Config(
        vocab_size=process.dim - (process.mask_id is not None),
        n_positions=length + 1,
        n_embd=sizes.hidden_size,
        n_layer=sizes.n_blocks,
        n_head=sizes.n_heads,
        bos_token_id=0,
        eos_token_id=None,
    )
    twin: Any = transformers.GPT2LMHeadModel(config)
    twin.generation_config.eos_token_id = None  # it always generates the full length
    return twin.eval()


def write_with_twin(twin: Any, batch: int, length: int) -> torch.Tensor:
    """Samples texts [batch, length] token by token from the full distribution, with a key-value cache."""
    start = torch.zeros(batch, 1, dtype=torch.int64, device=twin.device)
    written: torch.Tensor = twin.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        min_new_tokens=length,
        max_new_tokens=length,
        use_cache=True,
    )
    return written[:, 1:]


def crossing(steps: Sequence[int], seconds: Sequence[float], twin: float) -> tuple[float, bool]:
    """The number of steps at which diffusion takes as long as the autoregressive model.

    The time is interpolated linearly between measured numbers of steps, and extrapolated along the line through the two
    outermost ones.

    Args:
        steps: numbers of steps, ascending.
        seconds: the time for each number of steps.
        twin: the time of the autoregressive model.

    Returns:
        The number of steps, and whether it lies within the measured range. It is 0 if every number of steps takes
        longer than the autoregressive model, and NaN if it cannot be computed, because there is only one time or the
        times do not increase.
    """
    points = list(zip(steps, seconds, strict=True))
    for (a, start), (b, end) in pairwise(points):
        if min(start, end) <= twin <= max(start, end) and start != end:
            return a + (b - a) * (twin - start) / (end - start), True
    if len(points) < 2:
        return (float(steps[0]), True) if seconds[0] == twin else (math.nan, False)
    (a, start), (b, end) = points[:2] if twin < points[0][1] else points[-2:]
    if end <= start:
        return math.nan, False
    return max(0.0, a + (b - a) * (twin - start) / (end - start)), False


def latency(run: str, options: LatencyOptions) -> int:
    """Measures and prints the times."""
    if options.plot:
        check_figure(options.plot)
    device = resolve_device(options.device)
    diffusion, model, name, dtype = _load(run, device)
    find_sampler(diffusion, options.sampler, 1)
    length = options.length or model.config.length
    write_with, described = _twin(options.twin, model, diffusion.process, length, device)

    def diffuse(batch: int, steps: int) -> None:
        sample(
            diffusion,
            batch=batch,
            length=length,
            steps=steps,
            sampler=options.sampler,
            device=device,
            autocast_dtype=dtype,
        )

    contestants: dict[tuple[int, int], Callable[[], Any]] = {}
    for batch in options.batch_sizes:
        contestants[batch, 0] = partial(write_with, batch, length)
        for steps in options.steps:
            contestants[batch, steps] = partial(diffuse, batch, steps)
    out = console()
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in contestants}
    # not inference_mode: autocast does not cache weights there, and would cast all of them for each generated token
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for batch in options.batch_sizes:  # warm up
            contestants[batch, 0]()
            diffuse(batch, 1)
        # alternate, so that a change in the speed of the machine affects all of them
        rounds = [key for _ in range(options.repeats) for key in contestants]
        for key in track(rounds, "measuring", out.is_terminal):
            seconds[key].append(_time(contestants[key], device))
    report: dict[str, Any] = {
        "model": name,
        "twin": described,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "length": length,
        "sampler": options.sampler,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype or torch.float32)[6:],
        "torch": torch.__version__,
        "transformers": version("transformers") if options.twin is None else None,
        "rows": [_row(batch, steps, seconds[batch, steps], length) for batch, steps in contestants],
        "crossings": _crossings(options, seconds),
    }
    out.print(_table(report))
    for found in report["crossings"]:
        out.print(_sentence(found))
    if options.json:
        write_json(Path(options.json), report)
    if options.plot:
        plot_latency(report, options.plot)
    return 0


def _load(run: str, device: torch.device) -> tuple[Diffusion, DiffusionTransformer, str, torch.dtype | None]:
    """The diffusion model, its network, its name and the dtype of autocast."""
    if run in PRESETS and not Path(run).exists():
        # An untrained network unmasks positions at the same rate as a trained one: its log-scores, 0 minus the shift,
        # have the sum that the noise level requires. Larger or smaller scores would change the rate.
        process = Absorbing(TOKENS)
        network = DiffusionTransformer(run, process.dim)
        diffusion = Diffusion(network, process, LogLinear(), ScoreEntropy()).to(device).eval()
        return diffusion, network, f"untrained preset {run}", autocast_dtype("auto", device)
    loaded = load_model(run, device)
    if loaded.diffusion.objective.autoregressive:
        raise ValueError(
            f"run: expected a diffusion model, got {loaded.path}, an autoregressive one; give it as --twin {run}"
        )
    return loaded.diffusion, loaded.model, str(loaded.path), loaded.autocast_dtype


def _twin(
    run: str | None, model: DiffusionTransformer, process: RankOne, length: int, device: torch.device
) -> tuple[Callable[[int, int], Any], str]:
    """The function that writes texts (number, length) of the autoregressive model, and its description."""
    if run is None:
        twin = make_twin(model, process, length).to(device)
        described = f"GPT-2 of {twin.num_parameters():,} parameters, random weights, key-value cache"
        return partial(write_with_twin, twin), described
    loaded = load_model(run, device)
    if not loaded.diffusion.objective.autoregressive:
        raise ValueError(f"twin: expected a run of sedd train --objective autoregressive, got {loaded.path}")

    def write(batch: int, length: int) -> torch.Tensor:
        return sample(loaded.diffusion, batch=batch, length=length, device=device, autocast_dtype=loaded.autocast_dtype)

    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return write, f"{loaded.path}, {parameters:,} parameters, key-value cache"


def _time(contestant: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    contestant()
    wait()
    return time.perf_counter() - started


def _row(batch: int, steps: int, seconds: list[float], length: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "batch": batch,
        "steps": steps or None,  # None: the autoregressive model
        "seconds": median,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens_per_second": batch * length / median,
    }


def _crossings(options: LatencyOptions, seconds: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
    found = []
    for batch in options.batch_sizes:
        times = [statistics.median(seconds[batch, n]) for n in options.steps]
        where, measured = crossing(options.steps, times, statistics.median(seconds[batch, 0]))
        found.append({"batch": batch, "steps": None if math.isnan(where) else where, "measured": measured})
    return found


def _sentence(found: dict[str, Any]) -> str:
    if found["steps"] is None:
        return (
            f"batch {found['batch']}: these numbers of steps do not determine where diffusion takes as long as the "
            "autoregressive model; measure more numbers (--steps)"
        )
    if found["steps"] == 0:
        return f"batch {found['batch']}: diffusion takes longer than the autoregressive model with any number of steps"
    how = "" if found["measured"] else " (extrapolated)"
    steps = f"{found['steps']:.1f} steps{how}"
    return f"batch {found['batch']}: diffusion takes as long as the autoregressive model at {steps}"


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        "", title=f"{report['model']}: texts of {report['length']} tokens, {report['device']}, {report['dtype']}"
    )
    for column in ("batch", "seconds", "fastest to slowest", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            f"{row['steps']:,} steps" if row["steps"] else "autoregressive, cached",
            str(row["batch"]),
            f"{row['seconds']:.3f}",
            f"{row['fastest']:.3f} to {row['slowest']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    return table


def plot_latency(report: dict[str, Any], path: str | Path) -> None:
    """Plots seconds against steps on log-log axes, with a line per batch size, dashed for the autoregressive model.

    Args:
        report: what ``sedd eval latency --json`` writes.
        path: the output file; its suffix determines the format.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="reverse steps", ylabel="seconds for the batch")
        for colour, found in enumerate(report["crossings"]):
            rows = [row for row in report["rows"] if row["batch"] == found["batch"]]
            twin = next(row for row in rows if row["steps"] is None)
            rows = [row for row in rows if row["steps"] is not None]
            style = {"color": f"C{colour}"}
            texts = f"{found['batch']} text{'s' if found['batch'] > 1 else ''}"
            steps, times = [row["steps"] for row in rows], [row["seconds"] for row in rows]
            axes.plot(steps, times, marker="o", label=f"diffusion, {texts} at a time", **style)
            axes.fill_between(steps, [r["fastest"] for r in rows], [r["slowest"] for r in rows], alpha=0.2, **style)
            label = f"autoregressive with cache, {texts}"
            axes.axhline(twin["seconds"], linestyle="--", label=label, **style)
            if found["steps"]:  # not None, not 0
                face = style["color"] if found["measured"] else "white"
                axes.plot(found["steps"], twin["seconds"], marker="*", markersize=14, markerfacecolor=face, **style)
                axes.annotate(
                    f"{found['steps']:.0f} steps" + ("" if found["measured"] else " (extrapolated)"),
                    (found["steps"], twin["seconds"]),
                    (-6, 8),
                    textcoords="offset points",
                    ha="right",
                    **style,
                )
        ticks = sorted({row["steps"] for row in report["rows"] if row["steps"]})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(y=0.12)  # space for the labels of the stars
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # there may be only one power of ten
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.set_title(f"texts of {report['length']} tokens, {report['device']}, {report['dtype']}", fontsize="medium")
        axes.legend(fontsize="small")

    write_figure(path, (7, 4.5), draw)


COMMAND = Command("latency", ABOUT, latency, LatencyOptions, arguments=(RUN,))
