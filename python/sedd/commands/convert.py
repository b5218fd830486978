"""``sedd convert``."""

from __future__ import annotations

from pathlib import Path

from sedd.commands.command import RUN, Argument, Command
from sedd.hub.model import SEDD
from sedd.plain import read_plain
from sedd.progress import console

__all__ = ["COMMAND"]

ABOUT = """Convert a model from any supported format to a folder with safetensors, ready for the Hugging Face hub.

SOURCE is a run, a Hugging Face repository (config.json with model.safetensors or pytorch_model.bin), a training run of
the released SEDD code (.hydra/config.yaml with checkpoints-meta/checkpoint.pth) or a Lightning checkpoint whose network
is called backbone. Averaged weights are used if there are any. Writes config.json, model.safetensors and a model card
to the folder OUT, which all commands accept in place of a run.

examples:
  sedd convert runs/default models/default
  sedd convert louaaron/sedd-small models/sedd-small
  sedd convert last.ckpt models/mine --config config.yaml
      for a checkpoint without a configuration; config.yaml contains two lines:
      graph: {type: absorb}
      noise: {type: loglinear}
"""


def convert(source: str, out: str, config: str | None) -> int:
    """``sedd convert``: converts any supported format to safetensors."""
    model = SEDD.from_pretrained(source, config=read_plain(config) if config else None)
    out_console = console()
    card = Path(out) / "README.md"
    if card.exists():
        out_console.print(f"{card} exists and is not changed; make sure that it still describes the model")
    model.save_pretrained(out)
    out_console.print(f"{out}: {model.facts()}")
    return 0


COMMAND = Command(
    "convert",
    ABOUT,
    convert,
    arguments=(
        Argument("source", RUN.help),
        Argument("out", "Output folder."),
        Argument(
            "--config", "JSON or YAML file with entries of config.json. They take precedence over those of the source."
        ),
    ),
)
