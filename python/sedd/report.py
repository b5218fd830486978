"""``sedd report``: a run as one HTML page, with the way of one text from noise to print as a film to scrub through.

The page asks for nothing else: pictures and data are inside, a content security policy forbids the rest, and only the
page's own script may run. What a model wrote is data to it, whatever it says.
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

from sedd.config import TrainConfig, check_options, flat, resolve_device
from sedd.files import write_text
from sedd.hints import pip_install
from sedd.options import check_one_of
from sedd.plain import read_json
from sedd.pretrained import LoadedModel, load_model
from sedd.progress import console
from sedd.sample import SAMPLERS, sample
from sedd.tokenizer import MASK_TEXT

__all__ = ["ReportOptions", "report"]

MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
DETAILS = {
    *("settings", "configs", "versions", "n-samples", "alias", "blocks", "length", "tokens_of_text", "bytes", "draws"),
    *("seed", "reading", "prior", "monte_carlo_error", "bits_per_token", "perplexity_mean_of_exp"),
}
"""What an evaluation writes that the page shows only when it is asked for."""


@dataclass
class ReportOptions:
    """Report"""

    out: str | None = None
    """The page to write; default: report.html in the run's folder."""
    samples: int = 4
    """Texts to write for it; the first one is the film."""
    steps: int = 64
    """Reverse steps, which are the pictures of the film. One denoising step follows them."""
    sampler: str = "tweedie"
    """How a reverse step is drawn: tweedie or euler."""
    length: int | None = None
    """Tokens in a text; default: as many as in a training block."""
    seed: int = 0
    """The same seed writes the same texts."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("samples", "steps", "length"), outputs=("out",))
        check_one_of("sampler", self.sampler, SAMPLERS)


def report(run: str, options: ReportOptions) -> int:
    """Gathers losses, likelihoods, evaluations and samples of a run into one page."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs {error.name}: {pip_install('eval', str(error.name))}") from error
    loaded = load_model(run, resolve_device(options.device))
    if loaded.config is None or loaded.state is None:
        raise ValueError(f"run: {loaded.path} is a model, not a run of sedd train with losses to report")
    folder = loaded.path.parent.parent
    texts, film = _film(loaded, options)
    script = files("sedd").joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("sedd").joinpath("report.html").read_text(encoding="utf-8"))
    evaluations, pictures = _evaluations(folder / "eval")
    chosen, usual = (_settings(config) for config in (loaded.config, TrainConfig()))
    page = template.render(
        name=folder.resolve().name,
        path=str(loaded.path),
        facts=_facts(loaded),
        film=film,
        # nothing in JSON can end the script element: no < is left in it
        film_json=_safe(json.dumps(film, ensure_ascii=True).replace("<", "\\u003c")),
        curves=[_safe(curve) for curve in _curves(folder / "metrics.jsonl")],
        evaluations=evaluations,
        pictures=pictures,
        eval_folder=str(folder / "eval"),
        samples=texts,
        samples_note=f"{options.steps} reverse steps with {options.sampler}, seed {options.seed}.",
        changed={name: value for name, value in chosen.items() if usual.get(name) != value and name != "run_dir"},
        options=chosen,
        script=_safe(script),
        script_hash=f"sha256-{digest}",
    )
    out = Path(options.out) if options.out else folder / "report.html"
    write_text(out, page)
    console().print(f"{out}: open it in a browser")
    return 0


def _settings(config: TrainConfig) -> dict[str, str]:
    values = flat(config.resolved().to_dict())
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _safe(text: str) -> Any:
    """Text of our own that goes into the page as it is."""
    import markupsafe

    return markupsafe.Markup(text)


def _facts(loaded: LoadedModel) -> dict[str, str]:
    config, state = loaded.config, loaded.state
    assert config is not None
    assert state is not None
    facts = {
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "noise": f"{config.process}, {config.schedule}",
        "tokens": f"{config.tokenizer}, {loaded.tokenizer.vocab_size:,}",
        "block": f"{loaded.model.config.length} tokens",
        "trained for": f"{state['step']:,} steps, {state['elapsed'] / 60:.1f} min",
    }
    if state["valid"] is not None:
        facts["validation bound"] = f"{state['valid']:.4f} nats/token, {state['valid'] / math.log(2):.4f} bits/token"
    return facts


def _film(loaded: LoadedModel, options: ReportOptions) -> tuple[list[str], dict[str, Any]]:
    """Texts, and how the first one came to be: what its tokens show at the start and what each step has changed."""
    device = next(loaded.model.parameters()).device
    length = options.length or loaded.model.config.length
    shape = (options.samples, length)
    # the sampler's own first draw from this seed
    start = loaded.process.sample_limit(
        shape, generator=torch.Generator(device).manual_seed(options.seed), device=device
    )
    frames = [start[0].tolist()]

    def record(step: int, steps: int, tokens: Tensor) -> None:
        frames.append(tokens[0].tolist())

    written = sample(
        loaded.model,
        loaded.process,
        loaded.schedule,
        batch=options.samples,
        length=length,
        steps=options.steps,
        sampler=options.sampler,
        generator=torch.Generator(device).manual_seed(options.seed),
        device=device,
        on_step=record,
        progress=console().is_terminal,
        autocast_dtype=loaded.autocast_dtype,
    )
    mask = loaded.process.mask_id
    # what a token shows depends on its neighbours, with which it may make a character; MASK is no █ that was written
    numbers: dict[tuple[str, bool], int] = {}
    shown = [
        [
            numbers.setdefault((piece, token == mask), len(numbers))
            for piece, token in zip(loaded.tokenizer.pieces(frame), frame, strict=True)
        ]
        for frame in frames
    ]
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
        "pieces": [piece for piece, _ in numbers],
        "mask": numbers.get((MASK_TEXT, True)),
        "counts": counts,
        "counted": "tokens still masked" if mask is not None else "tokens changed",
    }
    return [loaded.tokenizer.decode(row.tolist()) for row in written], film


def _curves(path: Path) -> list[str]:
    """Loss with validation bound, and gradient norm, against steps, each as SVG; empty if there are none."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = _lines(path)
    steps = [row for row in rows if isinstance(row.get("loss"), float)]
    valid = [row for row in rows if isinstance(row.get("valid_nats_per_token"), float)]
    if not steps:
        return []
    with rc_context({"font.size": 12}):  # readable on a telephone
        figures = [Figure(figsize=(width, 3.4), layout="constrained") for width in (5.6, 4.0)]
        losses, norms = (figure.subplots() for figure in figures)
    x = [row["step"] for row in steps]
    window = max(1, len(steps) // 100)
    for axes, name, label in ((losses, "loss", "training loss"), (norms, "grad_norm", "gradient norm")):
        values = [row[name] / (math.log(2) if name == "loss" else 1) for row in steps]
        means = [sum(values[i : i + window]) / len(values[i : i + window]) for i in range(0, len(values), window)]
        centres = [x[min(i + window // 2, len(x) - 1)] for i in range(0, len(values), window)]
        axes.plot(centres, means, color="#1f77b4", label=f"{label}, mean of {window}" if window > 1 else label)
        axes.set(xlabel="step", ylabel="bits per token" if name == "loss" else label)
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
        label="validation bound",
    )
    # the first losses, and a rare jump, would flatten all others
    for axes, name, unit in ((losses, "loss", math.log(2)), (norms, "grad_norm", 1.0)):
        values = sorted(row[name] / unit for row in steps[len(steps) // 20 :])
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
    """The records of a run, but for a line that a killed process was writing."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


# -- what sedd eval has written ----------------------------------------------------------------------------------------


def _evaluations(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Tables of the JSON files in a folder, and its pictures as data URIs; a name with a dot is one half written."""
    evaluations = []
    for path in sorted(folder.glob("[!.]*.json")):
        evaluations.append({"name": path.stem, **_tables(read_json(path))})
    pictures = [
        {
            "name": path.stem,
            "uri": f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}",
        }
        for path in sorted(folder.glob("[!.]*"))
        if path.suffix in MEDIA
    ]
    return evaluations, pictures


def _tables(found: dict[str, Any]) -> dict[str, Any]:
    """Lists of objects and objects of objects as tables of the main columns; the rest as details.

    ``tables`` have the columns that are not in ``DETAILS``, ``facts`` are single values, and ``rows`` are the names and
    all values of the rows of which a table leaves something out.
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
