"""``sedd info``."""

from __future__ import annotations

import dataclasses
from typing import get_args

from rich.table import Table

from sedd.commands.command import RUN, Argument, Command
from sedd.config import ProcessName
from sedd.data.corpora import CORPORA
from sedd.data.tokenizer import TOKENIZERS
from sedd.diffusion.objectives import OBJECTIVES
from sedd.diffusion.samplers import SAMPLERS
from sedd.diffusion.schedule import SCHEDULES
from sedd.hub.pretrained import load_model
from sedd.network import PRESETS
from sedd.progress import console
from sedd.training.checkpoint import list_checkpoints, read_state
from sedd_ext.__main__ import describe

__all__ = ["COMMAND"]

ABOUT = """Show versions, kernels, presets and registered names; or, for a run, its options and checkpoints.

examples:
  sedd info
  sedd info runs/default
"""


def info(run: str | None) -> int:
    """``sedd info``: prints versions and registered names, or the options and checkpoints of a run."""
    out = console()
    if run is None:
        out.print(describe())
        table = Table.grid(padding=(0, 2))
        for name, registry in (
            ("tokenizers", TOKENIZERS),
            ("schedules", SCHEDULES),
            ("objectives", OBJECTIVES),
            ("samplers", SAMPLERS),
            ("corpora", CORPORA),
            ("processes", get_args(ProcessName)),
        ):
            table.add_row(f"{name}:", ", ".join(registry))
        for name, preset in PRESETS.items():
            sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(preset).items())
            table.add_row(f"preset {name}:", sizes)
        out.print(table)
        return 0
    loaded = load_model(run)
    out.print_json(ensure_ascii=True, data=loaded.config.to_dict() if loaded.config else loaded.model.to_config())
    table = Table.grid(padding=(0, 2))
    table.add_row("parameters:", f"{sum(p.numel() for p in loaded.model.parameters()):,}")
    if loaded.state:
        table.add_row("trained for:", f"{loaded.state['step']:,} steps, {loaded.state['elapsed'] / 60:.1f} minutes")
        for path in list_checkpoints(loaded.path.parent.parent):
            bound = read_state(path)["valid"]
            table.add_row(f"{path.name}:", "not validated" if bound is None else f"{bound:.4f} nats per token")
    out.print(table)
    return 0


COMMAND = Command("info", ABOUT, info, arguments=(Argument("run", RUN.help, {"nargs": "?"}),))
