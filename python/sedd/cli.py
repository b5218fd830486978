"""The command line: ``sedd train | sample | infill | eval | info``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sedd import commands
from sedd.config import TrainConfig, explain, from_options, train_parser


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their lines."""


ABOUT = """Score-entropy diffusion language models: train one, let it write, fill gaps, measure it.

  sedd train --max_minutes 5           learn from the text of this Python installation
  sedd sample runs/default --live      watch the model write
  sedd infill runs/default 'def {{8}}(self, {{12}}) -> bool:'
  sedd eval runs/default               bits per byte, beside unigram and bigram models

SEDD_DEBUG=1 in the environment shows the traceback of an error.
"""

TRAIN = """Train a model on text.

Without options a small model learns from the sources and documentation of this Python installation. The run folder
holds everything: config.json, metrics.jsonl, TensorBoard scalars and checkpoints. Ctrl-C and SIGTERM save and stop;
--resume goes on, bit for bit as if there had been no break.

examples:
  sedd train
  sedd train --data.source book.txt --run_dir runs/book --max_minutes 30
  sedd train --data.source wikitext --data.subset wikitext-103-raw-v1 --tokenizer gpt2 --model.preset small \\
      --batch_size 32 --accumulate 16 --lr 3e-4 --warmup 2500 --ema 0.9999 --run_dir runs/small    the paper's settings
  sedd train --graph uniform --schedule geometric --schedule_params.sigma_max 20 --run_dir runs/uniform
  sedd train --config runs/book/config.json --lr 1e-3 --run_dir runs/book2
  sedd train --run_dir runs/book --resume --steps 40000
  tensorboard --logdir runs
"""

SAMPLE = """Let a model write text from nothing.

examples:
  sedd sample runs/default
  sedd sample runs/default --num 3 --steps 64 --seed 7
  sedd sample runs/default --live
  sedd sample runs/default/checkpoints/step_00000500 --json texts.json
"""

INFILL = """Let a model fill the gaps of a text.

In the text, {{n}} is a gap of n unknown tokens (bytes, characters or word pieces, as the model was trained); everything
else is kept exactly. Gaps may stand anywhere, and as many as you like; where they stand together they are one.

examples (quote the text, so that the shell leaves it alone):
  sedd infill runs/default 'The standard library {{80}}'            continue a text
  sedd infill runs/default '{{80}} and that is the end.'            write what comes before
  sedd infill runs/default 'def {{10}}(path):{{60}}return result'   fill several gaps
  sedd infill runs/default --num 4 --live "$(cat draft.txt)"        a file that contains gaps
"""

EVAL = """Measure how well a model predicts text it was not trained on.

Prints the upper bound on the negative log-likelihood (theorem 3.6 of SEDD, with its prior term), by Monte Carlo over
the noise level, and what a unigram and a bigram model, counted on the run's training text, get on the same blocks.
Perplexity is exp(mean nats per token).

examples:
  sedd eval runs/default
  sedd eval runs/default --text other.txt --draws 64
  sedd eval runs/default --json figures.json --plot bound.png
"""

INFO = """Show what is installed: versions, kernels, presets, registered names; or what a run is.

examples:
  sedd info
  sedd info runs/default
"""

RUN_HELP = "A run folder (its best checkpoint is used), or one checkpoint folder."


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sedd", description=ABOUT, formatter_class=_Help, exit_on_error=False)
    subcommands = parser.add_subcommands(dest="command")

    def add(name: str, about: str, make: Callable[..., ArgumentParser] = ArgumentParser) -> ArgumentParser:
        description, _, examples = about.partition("\nexamples")
        command = make(
            description=description, epilog=f"examples{examples}", formatter_class=_Help, exit_on_error=False
        )
        subcommands.add_subcommand(name, command, help=description.partition("\n")[0])
        return command

    train = add("train", TRAIN, train_parser)
    train.add_argument("--resume", action="store_true", help="Go on with the run in --run_dir.")
    sample, infill, evaluate = add("sample", SAMPLE), add("infill", INFILL), add("eval", EVAL)
    for command in (sample, infill, evaluate):
        command.add_argument("run", help=RUN_HELP)
    infill.add_argument("template", help="The text, with {{n}} for n unknown tokens.")
    for command in (sample, infill):
        command.add_argument("--live", action="store_true", help="Watch the first text emerge, step by step.")
    sample.add_class_arguments(commands.SampleOptions)
    infill.add_class_arguments(commands.SamplingOptions)
    evaluate.add_class_arguments(commands.EvalOptions)
    add("info", INFO).add_argument("run", nargs="?", help=RUN_HELP)
    return parser


def _run(argv: list[str]) -> int:
    parser = _parser()
    parsed = parser.parse_args(argv)
    given = parser.instantiate(parsed)[parsed.command]
    if parsed.command == "train":
        if given.resume:
            saved = Path(given.run_dir) / "config.json"
            if not saved.is_file():
                raise FileNotFoundError(f"run_dir: nothing to resume in {given.run_dir}: it has no config.json")
            # the options of the run come first, and what was given now changes them
            argv = ["train", "--config", str(saved), *argv[1:], "--run_dir", given.run_dir]
            given = parser.instantiate(parser.parse_args(argv)).train
        return commands.train(from_options(TrainConfig, given), given.resume)
    if parsed.command == "sample":
        return commands.sample(given.run, from_options(commands.SampleOptions, given), given.live)
    if parsed.command == "infill":
        options = from_options(commands.SamplingOptions, given)
        return commands.infill(given.run, given.template, options, given.live)
    if parsed.command == "eval":
        return commands.evaluate(given.run, from_options(commands.EvalOptions, given))
    return commands.info(given.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 1 if the work failed; 2 for a mistake in the command or its files; 128 + n after signal n.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("sedd: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ArgumentError, ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("SEDD_DEBUG"):
            raise
        print(f"sedd: error: {explain(error)}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
