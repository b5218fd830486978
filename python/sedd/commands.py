"""What the commands of ``sedd`` do; :mod:`sedd.cli` is their command line.

Each takes a dataclass of options, whose docstrings are the help, and returns the exit code.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sedd.checkpoint import best_checkpoint, list_checkpoints, read_state
from sedd.config import ProcessName, TrainConfig, check_choice, check_options, resolve_device
from sedd.data import DataConfig
from sedd.files import RunLock, write_json
from sedd.hints import program
from sedd.model import PRESETS, compile_network
from sedd.objective import OBJECTIVES
from sedd.options import check_one_of, prefixed
from sedd.plain import read_plain
from sedd.pretrained import LoadedModel, load_model, load_pretrained, model_card, to_config
from sedd.progress import CONTROLS, console
from sedd.sample import SAMPLERS
from sedd.sample import sample as draw
from sedd.schedule import SCHEDULES
from sedd.tokenizer import MASK_TEXT, TOKENIZERS, Tokenizer
from sedd.train import Trainer
from sedd_ext.__main__ import describe

GAP = re.compile(r"\{\{(\d+)\}\}")


@dataclass
class SamplingOptions:
    """Sampling"""

    num: int = 1
    """How many texts to write."""
    steps: int = 128
    """Reverse steps; more take longer and write better. One denoising step follows them."""
    sampler: str = "tweedie"
    """How a reverse step is drawn: tweedie (best for the given scores) or euler."""
    temperature: float = 1.0
    """Below 1, likelier tokens are preferred; above, rarer ones. 1 is what the model was trained for."""
    top_p: float = 1.0
    """Write only the likeliest tokens that hold this much of the probability."""
    compile: bool = False
    """Run the network through torch.compile: worth it for many texts."""
    seed: int = 0
    """The same seed writes the same texts."""
    batch_size: int = 8
    """Texts written at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Write texts and tokens to this file too."""

    def __post_init__(self) -> None:
        check_options(self, positive=("num", "steps", "batch_size"), outputs=("json",))
        check_one_of("sampler", self.sampler, SAMPLERS)
        check_choice(self.temperature, self.top_p)


@dataclass
class SampleOptions(SamplingOptions):
    """Sampling"""

    length: int | None = None
    """Tokens in a text; default: as many as in a training block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, positive=("length",))


def train(config: TrainConfig, resume: bool, lock: RunLock) -> int:
    """Trains; returns 0, or 128 + the number of the signal that stopped it."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE: expected 1, got {os.environ['WORLD_SIZE']}: one run on several processes is not supported "
            "yet. Start it as one process, without torchrun; --accumulate N makes batches of the same size"
        )
    out = console(stderr=True)
    with prefixed("data.", DataConfig):
        trainer = Trainer(config, resume=resume, console=out, lock=lock)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    model = f"{config.model.preset} model" if config.init is None else f"model that began as {config.init}"
    out.print(
        f"{model}, {parameters / 1e6:.2f} M parameters, {config.process} noise, "
        f"{config.tokenizer} tokens in blocks of {trainer.length}, {trainer.device} "
        f"({str(trainer.autocast_dtype or torch.float32)[6:]}); everything goes to {trainer.run_dir}"
    )
    first = trainer.step
    with prefixed("data.", DataConfig):  # a stream is read while training
        outcome = trainer.run()
    best = best_checkpoint(trainer.run_dir)
    kept = list_checkpoints(trainer.run_dir)
    last = f"last checkpoint: {kept[-1] if kept else 'none yet'}"
    sedd, folder = program(), shlex.quote(str(trainer.run_dir))
    if outcome.signum is None:
        finished = "nothing to do, the run was finished before," if first == outcome.step else "finished"
        out.print(f"\n{finished} at step {outcome.step:,}: {outcome.ended}; {last}")
    else:
        name = signal.Signals(outcome.signum).name
        out.print(f"\nstopped by {name} at step {outcome.step:,} of {config.steps:,}, not finished; {last}")
        out.print(f"  {sedd} train --run_dir {folder} --resume    goes on")
    if best is not None:
        out.print(f"best checkpoint: {best} ({trainer.best:.4f} nats per token)")
    out.print(f"  {sedd} sample {folder} --live               writes text")
    out.print(f"  {sedd} eval perplexity {folder}             measures it")
    return 0 if outcome.signum is None else 128 + outcome.signum


def sample(run: str, options: SampleOptions, live: bool) -> int:
    """``sedd sample``: writes texts from nothing."""
    loaded = load_model(run, resolve_device(options.device))
    length = options.length or loaded.model.config.length
    nothing = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
    _generate(loaded, options, live, *nothing)
    return 0


def infill(run: str, template: str, options: SamplingOptions, live: bool) -> int:
    """``sedd infill``: fills the gaps of a text."""
    loaded = load_model(run, resolve_device(options.device))
    _generate(loaded, options, live, *parse_template(template, loaded.tokenizer))
    return 0


def parse_template(template: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Turns a text with gaps, ``"The {{5}} sat"``, into tokens.

    Args:
        template: text in which ``{{n}}`` stands for n unknown tokens; all other text is fixed.
        tokenizer: encodes the fixed parts, each by itself.

    Returns:
        ``(tokens, is_fixed)``, int64 and bool, both [L]; the tokens of gaps are 0.

    Raises:
        ValueError: no gap, an empty gap, or text that the tokeniser does not know.
    """
    tokens: list[int] = []
    is_fixed: list[bool] = []
    for index, part in enumerate(GAP.split(template)):  # text, n, text, n, ..., text
        known = index % 2 == 0
        if not known and int(part) == 0:
            raise ValueError("template: a gap {{0}} holds nothing; write {{n}} for n unknown tokens")
        tokens += tokenizer.encode(part) if known else [0] * int(part)
        is_fixed += [known] * (len(tokens) - len(is_fixed))
    if all(is_fixed):
        raise ValueError(f"template: nothing to fill in {template!r}; write {{{{n}}}} where n tokens are unknown")
    return torch.tensor(tokens), torch.tensor(is_fixed)


def render(tokens: Tensor, is_fixed: Tensor, tokenizer: Tokenizer) -> Text:
    """Returns text for the terminal, with what was filled in between fixed parts highlighted, and MASK dim."""
    text = Text()
    style = "bold green" if bool(is_fixed.any()) else ""
    flags, counts = torch.unique_consecutive(is_fixed, return_counts=True)
    for known, part in zip(flags.tolist(), tokens.split(counts.tolist()), strict=True):
        text.append(tokenizer.decode(part.tolist()).translate(CONTROLS), "" if known else style)
    text.highlight_regex(f"{MASK_TEXT}+", "dim")
    return text


def _show(view: Live, is_fixed: Tensor, tokenizer: Tokenizer, step: int, steps: int, tokens: Tensor) -> None:
    """Shows the first text of a batch on its way."""
    text = render(tokens[0].cpu(), is_fixed, tokenizer)
    view.update(Group(Rule(f"step {step} of {steps}", style="dim"), text), refresh=True)


def _generate(loaded: LoadedModel, options: SamplingOptions, live: bool, tokens: Tensor, is_fixed: Tensor) -> None:
    device = next(loaded.model.parameters()).device
    if options.compile:
        compile_network(loaded.model)
    generator = torch.Generator(device).manual_seed(options.seed)
    out = console()
    texts: list[dict[str, Any]] = []
    for first in range(0, options.num, options.batch_size):
        with Live(console=out, transient=True, auto_refresh=False) if live else nullcontext() as view:
            written = draw(
                loaded.model,
                loaded.process,
                loaded.schedule,
                batch=min(options.batch_size, options.num - first),
                length=len(tokens),
                steps=options.steps,
                sampler=options.sampler,
                temperature=options.temperature,
                top_p=options.top_p,
                generator=generator,
                device=device,
                fixed=(tokens, is_fixed) if bool(is_fixed.any()) else None,
                on_step=partial(_show, view, is_fixed, loaded.tokenizer) if view is not None else None,
                progress=not live and out.is_terminal,
                autocast_dtype=loaded.autocast_dtype,
            ).cpu()
        for row in written:
            out.print(Rule(f"{len(texts) + 1} of {options.num}", style="dim"), width=min(out.width, 80))
            out.print(render(row, is_fixed, loaded.tokenizer), soft_wrap=True)
            texts.append({"text": loaded.tokenizer.decode(row.tolist()), "tokens": row.tolist()})
    if options.json:
        write_json(Path(options.json), texts)


def convert(source: str, out: str, config: str | None) -> int:
    """``sedd convert``: any known format to safetensors."""
    model = load_pretrained(source, config=read_plain(config) if config else None)
    out_console = console()
    card = Path(out) / "README.md"
    if card.exists():
        out_console.print(f"{card} was here before and stays as it is: see that it still describes the model")
    model.save_pretrained(out)
    out_console.print(f"{out}: {model_card(model)['facts']}")
    return 0


def info(run: str | None) -> int:
    """``sedd info``: what is installed and known, and what a run is."""
    out = console()
    if run is None:
        out.print(describe())
        table = Table.grid(padding=(0, 2))
        for name, registry in (
            ("tokenizers", TOKENIZERS),
            ("schedules", SCHEDULES),
            ("objectives", OBJECTIVES),
            ("samplers", SAMPLERS),
            ("processes", get_args(ProcessName)),
        ):
            table.add_row(f"{name}:", ", ".join(registry))
        for name, preset in PRESETS.items():
            sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(preset).items())
            table.add_row(f"preset {name}:", sizes)
        out.print(table)
        return 0
    loaded = load_model(run)
    out.print_json(ensure_ascii=True, data=loaded.config.to_dict() if loaded.config else to_config(loaded.model))
    table = Table.grid(padding=(0, 2))
    table.add_row("parameters:", f"{sum(p.numel() for p in loaded.model.parameters()):,}")
    if loaded.state:
        table.add_row("trained for:", f"{loaded.state['step']:,} steps, {loaded.state['elapsed'] / 60:.1f} minutes")
        for path in list_checkpoints(loaded.path.parent.parent):
            bound = read_state(path)["valid"]
            table.add_row(f"{path.name}:", "not validated" if bound is None else f"{bound:.4f} nats per token")
    out.print(table)
    return 0
