"""The model card of a saved model: what it is, how it was trained, what was measured, and how to use it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sedd_ext
from sedd.config import TrainConfig
from sedd.hub.configuration import StoredModel
from sedd.plain import read_json

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["Figure", "measured", "model_card"]

DECODE = {
    "bytes": 'print(bytes(x for x in tokens[0].tolist() if x < 256).decode(errors="replace"))',
    "text8": 'print("".join(" abcdefghijklmnopqrstuvwxyz"[x] for x in tokens[0].tolist()))',
    "gpt2": 'print(AutoTokenizer.from_pretrained("openai-community/gpt2").decode(tokens[0]))',
    "tokenizer.json": "print(AutoTokenizer.from_pretrained(name).decode(tokens[0]))",
}
"""How a program without sedd shows tokens, by the entry ``tokenizer`` of ``config.json``."""
FILES = [
    ".txt",
    ".md",
    ".csv",
    ".json",
    ".jsonl",
    ".gz",
    ".zst",
    ".parquet",
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".gguf",
]
"""Suffixes of files, which names of repositories on the hub do not have."""


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        metric: its name, such as "perplexity".
        value: its value.
        error: its standard error; None if it was not measured.
        data: the data that it was measured on, in few words.
        details: how it was measured.
        command: the command that measured it.
    """

    metric: str
    value: float
    error: float | None
    data: str
    details: str
    command: str

    def __str__(self) -> str:
        """The value with its standard error, which has two digits."""
        if not self.error:
            return f"{self.value:.5g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def measured(stored: StoredModel) -> list[Figure]:
    """The figures that were measured with a checkpoint of a run of ``sedd train``.

    Reads the files of ``sedd eval --json`` in the folder ``eval`` of the run, and the validation in ``metrics.jsonl``.
    Files about other checkpoints of the run and infinite values are left out.

    Args:
        stored: the model as it is stored.

    Raises:
        ValueError: a file in the folder ``eval`` is not JSON.
    """
    config, state = stored.config, stored.state
    if config is None or state is None:
        return []
    run = stored.path.parent.parent
    found = [*_validation(run / "metrics.jsonl", state["step"], config)]
    for path in sorted((run / "eval").glob("[!.]*.json")):
        results = read_json(path)
        model = results.get("model") or _mapping(results.get("settings")).get("model")
        if isinstance(model, str) and _same_checkpoint(Path(model), stored.path):
            found += [*_perplexity(results), *_generative(results), *_harness(results)]
    return found


def _same_checkpoint(path: Path, checkpoint: Path) -> bool:
    """Whether results name this checkpoint. A run may have been moved: then the last three parts of the path decide."""
    if path.exists():
        return path.resolve() == checkpoint.resolve()
    return path.parts[-3:] == checkpoint.resolve().parts[-3:]  # run, checkpoints, step


def _validation(file: Path, step: int, config: TrainConfig) -> Iterator[Figure]:
    """The bound that the run itself measured at the step of the checkpoint."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete line of a killed run
            continue
        value = _mapping(row).get("valid_nats_per_token")
        if row.get("step") == step and isinstance(value, float):
            details = f"at most {config.valid_blocks} blocks, {config.valid_draws} noise levels for each"
            yield Figure("nats per token (upper bound)", value, row["valid_standard_error"], "validation data",
                         f"{details}, seed {config.seed}", "sedd train")  # fmt: skip
            return


def _perplexity(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Of ``sedd eval perplexity``; the results of n-gram models, which have no standard error, are left out."""
    for kind in ("texts", "data"):
        for title, row in _mapping(results.get(kind)).items():
            if row.get("standard_error") is None or not row.get("nats_per_token"):
                continue
            data, source = _public(title), r"(held out from |data of )(.+?)(?=, in blocks|$)"
            reading = re.sub(source, lambda found: found[1] + _public(found[2]), row["reading"])
            which = "" if title == "validation text" or kind == "data" else f" {shlex.quote(data)}"
            counts = {name: row[name] for name in ("draws", "blocks", "seed")}
            given = counts | ({"split": title} if kind == "data" else {}) | _mapping(results.get("options")) | counts
            command = f"sedd eval perplexity RUN{which}{_words(given, without=('texts', 'max_minutes'))}"
            details = (
                f"{reading}; {row['blocks']:,} blocks of {row['length']}, {row['draws']} noise levels for each, "
                f"seed {row['seed']}"
            )
            nats, error = row["nats_per_token"], row["standard_error"]
            for name, value in row.items():
                if isinstance(value, float) and (name == "perplexity" or name.startswith(("nats_per_", "bits_per_"))):
                    if name == "bits_per_token" or name.endswith("_error"):
                        continue
                    own = value * error if name == "perplexity" else value * error / nats
                    metric = f"{name.replace('_', ' ')} (upper bound)"
                    yield Figure(metric, value, own, data, details, command)


def _generative(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Of ``sedd eval generative``."""
    settings, rows = results.get("settings"), results.get("rows")
    if not isinstance(settings, dict) or not isinstance(rows, list) or not {"judge", "classifier"} & settings.keys():
        return
    count, seed = settings["num"], settings["seed"]
    if "judge" in settings:
        details = f"texts of {settings['length']} tokens, judged by {_public(settings['judge'])}, seed {seed}"
    else:
        details = (
            f"{settings['training_images']:,} training images, features of the classifier "
            f"{_public(settings['classifier'])}, not Inception's, seed {seed}"
        )
    options: dict[str, Any] = {"samplers": list(dict.fromkeys(row["sampler"] for row in rows))}
    options["steps"] = list(dict.fromkeys(row["steps"] for row in rows))
    names = ("num", "length", "judge", "reference", "guidance", "seed", "batch_size", "text", "mauve")
    options |= {name: settings.get(name) for name in names}
    options |= {name: settings[name] for name in ("temperature", "top_p") if settings.get(name, 1) != 1}
    options |= {name: settings.get(name) for name in ("given", "compared") if settings.get("mauve")}
    reading = (("documents", "file"), ("detokenizer", "none"))
    options |= {name: settings[name] for name, default in reading if settings.get(name, default) != default}
    command = f"sedd eval generative RUN{_words(options)}"
    for row in rows:
        data = f"{count:,} samples, {row['sampler']}, {row['steps']} steps"
        for name, value in row.items():
            if isinstance(value, float) and (f"{name}_error" in row or name.startswith("mauve_")):
                metric = {"perplexity": "perplexity of samples", "fid": "FID"}.get(name, name.replace("_", " "))
                yield Figure(metric, value, row.get(f"{name}_error"), data, details, command)


def _harness(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Of ``sedd eval harness``."""
    tasks, counts = _mapping(results.get("results")), _mapping(results.get("n-samples"))
    given = {"tasks": list(tasks), "draws": results.get("draws")}
    command = f"sedd eval harness RUN{_words(given | _mapping(results.get('options')))}"
    for task, row in tasks.items():
        count = _mapping(counts.get(task)).get("effective")
        details = f"lm-evaluation-harness{'' if count is None else f', {count:,} examples'}"
        for name, value in row.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = row.get(name.replace(",", "_stderr,"))
                metric = name.replace(",none", "")
                yield Figure(metric, value, error if isinstance(error, float) else None, task, details, command)


def _words(options: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Options as words of a command line, each after a space; of local files, only the names."""
    words = ""
    for name, value in options.items():
        if name not in without and value not in (None, []):
            text = ",".join(map(str, value)) if isinstance(value, list) else _public(str(value))
            words += f" --{name} {shlex.quote(text)}"
    return words


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _public(source: str) -> str:
    """The name of a data set, or that of a local file or folder without the folders that it is in."""
    path = Path(source)
    local = os.path.isabs(source) or source.startswith(("~", ".")) or source.count("/") > 1 or path.exists()
    if not local and path.suffix.lower() not in FILES:
        return source
    return path.name if path.name.strip(".~") else "local data"


def _is_repository(source: str) -> bool:
    return _public(source) == source and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


# -- the page ----------------------------------------------------------------------------------------------------------


def model_card(
    name: str, facts: str, config: Mapping[str, Any], stored: StoredModel | None, text: str = "", *, auto: bool = True
) -> ModelCard:
    """Makes the model card.

    Args:
        name: the name of the repository or folder.
        facts: a one-line summary of the model.
        config: the content of ``config.json``.
        stored: the model as it is stored, if it was loaded and not changed. Its run, if it is one, has the figures.
        text: Markdown to add at the end.
        auto: whether ``transformers.AutoModel`` loads the model.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    figures = [] if stored is None else measured(stored)
    run = None if stored is None else stored.config
    image = config["model"]["shape"]
    task = "unconditional-image-generation" if image else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", figure.data),
            dataset_name=figure.data,
            metric_type=re.sub(r"\W+", "_", figure.metric.removesuffix(" (upper bound)")),
            metric_name=figure.metric,
            metric_value=str(figure),
        )
        for figure in figures
    ]
    data = ModelCardData(
        library_name="transformers" if auto else "sedd",
        pipeline_tag=task,
        tags=["discrete-diffusion", "sedd"],
        datasets=[run.data.source] if run is not None and _is_repository(run.data.source) else None,
        base_model=run.init if run is not None and run.init is not None and _is_repository(run.init) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"# {name}",
        f"A discrete diffusion model of {'images' if image else 'text'}: {facts}.",
        "It generates all positions in parallel, in any number of steps, and can fill gaps between given tokens.",
        *_use(name, config, auto),
        "## Training",
        *([_training(stored)] if run is not None and stored is not None else [
            "How the model was trained is not recorded: it was not saved from an unchanged run of `sedd train`."
        ]),
        f"This folder was written by sedd_ext {sedd_ext.__version__} with torch {torch.__version__}.",
        "## Measured figures",
        *_table(figures),
        "## Limits",
        _limits(config, auto),
        *([text] if text else []),
    ]  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _use(name: str, config: Mapping[str, Any], auto: bool) -> Iterator[str]:
    """The sections with programs."""
    image, tokenizer = config["model"]["shape"], config["tokenizer"]
    show = f"print(tokens.view({', '.join(map(str, image))}))" if image else DECODE.get(tokenizer, "print(tokens)")
    imports = "AutoModel, AutoTokenizer" if "AutoTokenizer" in show else "AutoModel"
    yield "## Use"
    if auto:
        yield "With `transformers` alone (`trust_remote_code` runs `modeling_sedd.py` of this repository):"
        yield (
            f"```python\nfrom transformers import {imports}\n\n"
            f"name = {json.dumps(name)}  # a repository or its local folder\n"
            "model = AutoModel.from_pretrained(name, trust_remote_code=True)\n"
            f"tokens = model.sample(batch=1, steps=128)\n{show}\n```"
        )
        yield "`model(tokens, t=0.5)` returns `log_score` and `logits`, [batch, length, vocabulary]."
    if image or config["tokenizer"] is None:
        yield "With the package `sedd_ext`, which runs no code of this repository:"
        yield (
            f"```python\nfrom sedd import SEDD\n\nmodel = SEDD.from_pretrained({json.dumps(name)})\n"
            "print(model.process, model.schedule, model.objective)\n```"
        )
        return
    packages = "With `transformers` and the package" if config["model"]["trunk"] else "With the package"
    yield f"{packages} `sedd_ext`, which has compiled kernels and runs no code of this repository:"
    yield (
        f"```python\nfrom sedd import load_model, sample\n\nloaded = load_model({json.dumps(name)})\n"
        f"tokens = sample(loaded.diffusion, batch=1, length={config['model']['length']}, steps=128)\n"
        "print(loaded.tokenizer.decode(tokens[0].tolist()))\n```"
    )
    word = shlex.quote(name)
    yield f"```sh\nsedd sample {word} --steps 128\nsedd eval perplexity {word} FILE\n```"


def _training(stored: StoredModel) -> str:
    config, state = stored.config, stored.state
    assert config is not None
    assert state is not None
    data = config.data
    sequences = state.get("sequences_per_step", config.batch_size * config.accumulate)
    tokens, hours = state["step"] * sequences * stored.sizes.length, state["elapsed"] / 3600
    rows = {
        "data": ", ".join(filter(None, (_public(data.source), data.subset, data.revision))),
        "tokeniser": "" if stored.sizes.shape else _public(config.tokenizer),
        "fine-tuned from": _public(config.init) if config.init else "",
        "objective": config.objective + _numbers(config.objective_params),
        "noise": config.process + (f" (fraction {config.uniform_fraction:g})" if config.process == "hybrid" else ""),
        "schedule": config.schedule + _numbers(config.schedule_params),
        "steps": f"{state['step']:,}",
        "tokens seen": f"{tokens:,} ({sequences:,} blocks of {stored.sizes.length:,} in each step)",
        "optimiser": f"AdamW, learning rate {config.lr:g} ({config.lr_schedule}), averaged weights ({config.ema:g})",
        "device": f"{state['device']}, {hours:.1f} hours"
        if hours >= 1
        else f"{state['device']}, {60 * hours:.1f} minutes",
        "seed": str(config.seed),
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)


def _numbers(params: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{key} {value:g}' for key, value in params.items())})" if params else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(figures: list[Figure]) -> Iterator[str]:
    if not figures:
        yield "None: this model has no evaluation."
        return
    yield "± is the standard error, if it was computed. RUN is the run folder, which is not part of this repository."
    yield "| data | figure | value |\n| --- | --- | --- |\n" + "\n".join(
        f"| {_cell(figure.data)} | {_cell(figure.metric)} | {figure} |" for figure in figures
    )
    how: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        data = how.setdefault((figure.details, figure.command), [])
        if figure.data not in data:
            data.append(figure.data)
    yield "\n".join(f"* {'; '.join(data)}: {details}. `{command}`" for (details, command), data in how.items())


def _limits(config: Mapping[str, Any], auto: bool) -> str:
    sizes = config["model"]
    kind = "images" if sizes["shape"] else "text"
    length = "It reads no other length." if sizes["shape"] else "Other lengths were not evaluated."
    limits = [
        f"The model imitates its training data. It was not trained to follow instructions, and its {kind} may be "
        "wrong, offensive or copied from the data.",
        f"It was trained on blocks of {sizes['length']:,} tokens. {length}",
        "Likelihoods of diffusion models are bounds: the model may be better than they say, by an unknown amount.",
    ]
    if auto:
        limits.append(
            "`modeling_sedd.py` is for inference, with one sampler. Read it before you trust it, and pin a `revision`."
        )
    return "\n".join(f"* {limit}" for limit in limits)
