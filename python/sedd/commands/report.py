"""``sedd report``: writes an HTML page about a run, with an interactive animation of one sample from its noise.

The page is self-contained: it includes all pictures and data. A content security policy blocks external resources and
all scripts except the one of the page. Sampled text is inserted as data and cannot run as code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import operator
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd.commands.command import Argument, Command
from sedd.config import TrainConfig, flat
from sedd.data.pictures import VALUES, grid, png, to_pixels
from sedd.data.tokenizer import MASK_TEXT
from sedd.diffusion.samplers import SAMPLERS, sample
from sedd.files import write_text
from sedd.hints import pip_install
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.options import check_one_of, check_options
from sedd.plain import read_json
from sedd.progress import console
from sedd.runtime import resolve_device

__all__ = ["ReportOptions", "report"]

ABOUT = """Write an HTML page about a run: losses, likelihood, evaluations, samples, and an animation of sampling.

The page is a single file that needs no network. It includes the files of `sedd eval ... --json` and `--plot` in the
folder eval of the run.

examples:
  sedd report runs/default
  sedd eval generative runs/default --json runs/default/eval/generative.json --plot runs/default/eval/generative.png
  sedd report runs/default --steps 128 --out page.html
"""


MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
DETAILS = {
    *("settings", "configs", "versions", "n-samples", "alias", "blocks", "length", "tokens_of_text", "bytes", "draws"),
    *("seed", "reading", "prior", "monte_carlo_error", "bits_per_token", "exact", "options"),
    *("perplexity_mean_of_exp", "perplexity_mean_of_exp_error"),
}
"""Entries of an evaluation that the page shows only in an expandable section."""


@dataclass
class ReportOptions:
    """Report"""

    out: str | None = None
    """The output file. Default: report.html in the folder of the run."""
    samples: int | None = None
    """Number of texts or images to sample. The animation shows the first one. Default: 4 texts, or 64 images."""
    steps: int = 64
    """Number of reverse steps, each a frame of the animation. One denoising step follows. An autoregressive model takes
    a step for each token."""
    sampler: str | None = None
    """A sampler of sedd sample, or your own class as module:name. Default: tweedie, or autoregressive for an
    autoregressive model."""
    length: int | None = None
    """Tokens per text. Default: the length of a training block."""
    seed: int = 0
    """Random seed. The same seed gives the same samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("samples", "steps", "length"), outputs=("out",))
        if self.sampler is not None:
            check_one_of("sampler", self.sampler, SAMPLERS)


def report(run: str, options: ReportOptions) -> int:
    """Writes losses, likelihoods, evaluations and samples of a run to one page."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs {error.name}: {pip_install('eval', str(error.name))}") from error
    loaded = load_model(run, resolve_device(options.device))
    shape = loaded.model.config.shape
    if not shape:
        loaded.need_text()
    elif options.length is not None:
        raise ValueError(f"length: expected no value for a model of images, got {options.length}")
    if loaded.config is None or loaded.state is None:
        raise ValueError(f"run: expected a run of sedd train, got {loaded.path}, a model without training losses")
    folder = loaded.path.parent.parent
    exact = loaded.diffusion.objective.autoregressive
    how = "One token at a time" if exact else f"{options.steps} reverse steps with {options.sampler or 'tweedie'}"
    if loaded.model.config.classes:
        how += ", one class after another"
    written, film = _film(loaded, options, options.samples or (64 if shape else 4))
    picture = _uri("image/png", png(grid(to_pixels(written, shape)))) if shape else None
    texts = [] if shape else [loaded.tokenizer.decode(row.tolist()) for row in written]
    script = files("sedd.commands").joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("sedd.commands").joinpath("report.html").read_text(encoding="utf-8"))
    evaluations, pictures = _evaluations(folder / "eval")
    chosen, usual = (_settings(config) for config in (loaded.config, TrainConfig()))
    page = template.render(
        style=_safe(files("sedd.commands").joinpath("page.css").read_text(encoding="utf-8")),
        name=folder.resolve().name,
        path=str(loaded.path),
        facts=_facts(loaded),
        film=film,
        # escape < so that no text can close the script element
        film_json=_safe(json.dumps(film, ensure_ascii=True).replace("<", "\\u003c")),
        curves=[_safe(curve) for curve in _curves(folder / "metrics.jsonl", _unit(loaded), exact)],
        evaluations=evaluations,
        pictures=pictures,
        eval_folder=str(folder / "eval"),
        unit="image" if shape else "text",
        samples=texts,
        grid=picture,
        samples_note=f"{how}, seed {options.seed}.",
        changed={name: value for name, value in chosen.items() if usual.get(name) != value and name != "run_dir"},
        options=chosen,
        script=_safe(script),
        script_hash=f"sha256-{digest}",
    )
    out = Path(options.out) if options.out else folder / "report.html"
    write_text(out, page)
    console().print(f"{out}: open it in a browser")
    return 0


def _unit(loaded: LoadedModel) -> str:
    """What a token is called."""
    return "dim" if loaded.model.config.shape else "token"


def _uri(kind: str, content: bytes) -> str:
    """A file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _settings(config: TrainConfig) -> dict[str, str]:
    values = flat(config.resolved().to_dict())
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _safe(text: str) -> Any:
    """Marks trusted text, which is inserted into the page without escaping."""
    import markupsafe

    return markupsafe.Markup(text)


def _facts(loaded: LoadedModel) -> dict[str, str]:
    config, state = loaded.config, loaded.state
    assert config is not None
    assert state is not None
    facts = {
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "noise": "none (autoregressive)" if loaded.model.causal else f"{config.process}, {config.schedule}",
    }
    if shape := loaded.model.config.shape:
        facts["image"] = f"{' x '.join(map(str, shape))}, {VALUES} values"
    else:
        facts["tokens"] = f"{config.tokenizer}, {loaded.tokenizer.vocab_size:,}"
        facts["block"] = f"{loaded.model.config.length} tokens"
    facts |= {
        "trained for": f"{state['step']:,} steps, {state['elapsed'] / 60:.1f} min",
    }
    if state["valid"] is not None:
        name = "validation" if loaded.model.causal else "validation bound"
        unit = _unit(loaded)
        facts[name] = f"{state['valid']:.4f} nats/{unit}, {state['valid'] / math.log(2):.4f} bits/{unit}"
    return facts


def _film(loaded: LoadedModel, options: ReportOptions, num: int) -> tuple[Tensor, dict[str, Any]]:
    """Samples blocks [num, L], and records the first one: what it shows at the start, and the changes of each step."""
    device = loaded.diffusion.device
    length = options.length or loaded.model.config.length
    # equals the initial state of the sampler, which uses the same seed
    start = loaded.diffusion.process.sample_limit(
        (num, length), generator=torch.Generator(device).manual_seed(options.seed), device=device
    )
    frames = [start[0].tolist()]
    classes = loaded.model.config.classes

    def record(step: int, steps: int, tokens: Tensor) -> None:
        frames.append(tokens[0].tolist())

    written = sample(
        loaded.diffusion,
        batch=num,
        length=length,
        steps=options.steps,
        sampler=options.sampler,
        generator=torch.Generator(device).manual_seed(options.seed),
        device=device,
        on_step=record,
        progress=console().is_terminal,
        autocast_dtype=loaded.autocast_dtype,
        labels=torch.arange(num, device=device) % classes if classes else None,
    )
    mask = loaded.diffusion.process.mask_id
    if loaded.model.config.shape:
        shown, what = frames, {"shape": loaded.model.config.shape, "mask": mask}
    else:
        shown, what = _as_text(loaded, frames)
    tokens_ = "values" if loaded.model.config.shape else "tokens"
    if mask is not None:
        counts = [frame.count(mask) for frame in frames]
    else:
        counts = [0, *(sum(map(operator.ne, before, after)) for before, after in pairwise(frames))]
    film = {
        "start": shown[0],
        "changes": [
            [[place, new] for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
            for before, after in pairwise(shown)
        ],
        "counts": counts,
        "counted": f"{tokens_} still masked" if mask is not None else f"{tokens_} changed",
        **what,
    }
    return written, film


def _as_text(loaded: LoadedModel, frames: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
    """Frames of tokens as frames of pieces of text: the number of each piece, and the pieces."""
    mask = loaded.diffusion.process.mask_id
    # the text of a token depends on its neighbours, because a character may span tokens; MASK differs from a sampled █
    numbers: dict[tuple[str, bool], int] = {}
    shown = [
        [
            numbers.setdefault((piece, token == mask), len(numbers))
            for piece, token in zip(loaded.tokenizer.pieces(frame), frame, strict=True)
        ]
        for frame in frames
    ]
    return shown, {"pieces": [piece for piece, _ in numbers], "mask": numbers.get((MASK_TEXT, True))}


def _curves(path: Path, unit: str, exact: bool) -> list[str]:
    """Plots of the loss with the validation bound, and of the gradient norm, as SVG; empty without metrics.

    Args:
        path: the metrics.
        unit: what a token is called.
        exact: the validations are exact likelihoods.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = _lines(path)
    steps = [row for row in rows if isinstance(row.get("loss"), float)]
    valid = [row for row in rows if isinstance(row.get("valid_nats_per_token"), float)]
    if not steps:
        return []
    with rc_context({"font.size": 12}):  # readable on a phone
        figures = [Figure(figsize=(width, 3.4), layout="constrained") for width in (5.6, 4.0)]
        losses, norms = (figure.subplots() for figure in figures)
    x = [row["step"] for row in steps]
    window = max(1, len(steps) // 100)
    for axes, name, label in ((losses, "loss", "training loss"), (norms, "grad_norm", "gradient norm")):
        values = [row[name] / (math.log(2) if name == "loss" else 1) for row in steps]
        means = [sum(values[i : i + window]) / len(values[i : i + window]) for i in range(0, len(values), window)]
        centres = [x[min(i + window // 2, len(x) - 1)] for i in range(0, len(values), window)]
        axes.plot(centres, means, color="#1f77b4", label=f"{label}, mean of {window}" if window > 1 else label)
        axes.set(xlabel="step", ylabel=f"bits per {unit}" if name == "loss" else label)
        axes.grid(alpha=0.3)
    errors = [(row.get("valid_standard_error") or 0.0) / math.log(2) for row in valid]
    bounds = [row["valid_nats_per_token"] / math.log(2) for row in valid]
    losses.errorbar(
        [row["step"] for row in valid],
        bounds,
        errors,
        color="#d1495b",
        marker="o",
        markersize=4,
        label="validation" if exact else "validation bound",
    )
    # the initial losses and rare outliers would compress the rest of the curve
    for axes, name, scale in ((losses, "loss", math.log(2)), (norms, "grad_norm", 1.0)):
        values = sorted(row[name] / scale for row in steps[len(steps) // 20 :])
        axes.set_ylim(0.8 * values[0], 1.1 * values[int(0.99 * (len(values) - 1))])
    losses.legend(fontsize="small")
    for axes in (losses, norms):
        axes.spines[["top", "right"]].set_visible(False)
    pictures = []
    for figure in figures:
        picture = io.StringIO()
        with rc_context({"svg.fonttype": "path", "svg.hashsalt": "sedd"}):
            figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
        pictures.append(picture.getvalue()[picture.getvalue().index("<svg") :])
    return pictures


def _lines(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``, without an incomplete line of a killed process."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


# -- results of sedd eval ----------------------------------------------------------------------------------------------


def _evaluations(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Tables of the JSON files in a folder, and its pictures as data URIs; skips temporary files (``.name``)."""
    evaluations = []
    for path in sorted(folder.glob("[!.]*.json")):
        found = read_json(path)
        note = _cell(found.pop("note", None))  # a sentence that explains the figures
        evaluations.append({"name": path.stem, "note": note, **_tables(found)})
    pictures = [
        {"name": path.stem, "uri": _uri(MEDIA[path.suffix], path.read_bytes())}
        for path in sorted(folder.glob("[!.]*"))
        if path.suffix in MEDIA
    ]
    return evaluations, pictures


def _tables(found: dict[str, Any]) -> dict[str, Any]:
    """Converts lists of objects and objects of objects to tables with the main columns, and the rest to details.

    ``tables`` contain the columns that are not in ``DETAILS``. ``facts`` are single values. ``rows`` contain the name
    and all values of each row whose table omits columns.
    """
    facts = {name: _cell(value) for name, value in found.items() if not isinstance(value, (dict, list))}
    tables, details = [], []
    for name, value in found.items():
        if isinstance(value, dict) and name in DETAILS:
            facts |= {key: _cell(entry) for key, entry in value.items() if not isinstance(entry, (dict, list))}
            continue
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            rows = value
        elif isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            rows = [{"": key, **row} for key, row in value.items()]
        elif isinstance(value, dict) and value:
            rows = [{"": name, **value}]
        else:
            continue
        rows = [{key: entry for key, entry in row.items() if not isinstance(entry, (dict, list))} for row in rows]
        every = list(dict.fromkeys(key for row in rows for key in row))
        columns = [key for key in every if key not in DETAILS]
        if any(len(row) > 1 for row in rows):
            cells = [[_cell(row.get(key)) for key in columns] for row in rows]
            tables.append({"columns": list(map(_label, columns)), "rows": cells})
        if columns != every:
            details += [{"name": _title(row), "facts": {_label(k): _cell(v) for k, v in row.items()}} for row in rows]
    return {"facts": {_label(name): value for name, value in facts.items()}, "tables": tables, "rows": details}


def _title(row: dict[str, Any]) -> str:
    return " ".join(_cell(row[key]) for key in ("", "sampler", "batch", "steps") if row.get(key) not in (None, ""))


def _label(name: str) -> str:
    return name.replace("_", " ").replace(",none", "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


COMMAND = Command(
    "report", ABOUT, report, ReportOptions, arguments=(Argument("run", "A run folder or a checkpoint folder."),)
)
