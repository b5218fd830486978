"""The command line: a loop over the commands of :mod:`sedd.commands`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from sedd.commands import convert, info, play, report, reproduce, sample, train
from sedd.commands.command import Command
from sedd.commands.measures import MEASURES
from sedd.hints import program
from sedd.options import add_options, build, check_one_of, checked, did_you_mean, renamed, tree
from sedd.progress import printable
from sedd.registry import import_named

__all__ = ["COMMANDS", "MEASURES", "main"]

ABOUT = """Discrete diffusion language models: train, sample, infill and evaluate them.

  sedd train --max_minutes 5
      train on the text of this Python installation
  sedd sample runs/default --live
      watch a sample emerge
  sedd infill runs/default 'def {{8}}(self, {{12}}) -> bool:'
  sedd eval perplexity runs/default
      bits per byte, compared with unigram and bigram models
  sedd report runs/default
      losses, evaluations and samples on one page
  sedd reproduce list
      the tables and figures of the papers, and what runs here

Set SEDD_DEBUG=1 to see the traceback of an error.
"""

EVAL = """Evaluate a model as the papers do.

examples:
  sedd eval perplexity runs/default
      likelihood of its validation text, compared with unigram and bigram models
  sedd eval perplexity models/sedd-small wikitext2 ptb
      likelihood of the papers' test sets
  sedd eval generative runs/default
      quality of its samples, by another model
  sedd eval harness models/sedd-small --tasks piqa
      tasks of lm-evaluation-harness
  sedd eval latency runs/default
      time of a sample, compared with an autoregressive model with cache
"""

COMMANDS: dict[str, Command | None] = {
    "train": train.COMMAND,
    "sample": sample.SAMPLE,
    "infill": sample.INFILL,
    "eval": None,  # has MEASURES
    "play": play.COMMAND,
    "report": report.COMMAND,
    "reproduce": reproduce.COMMAND,
    "convert": convert.COMMAND,
    "info": info.COMMAND,
}


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake; examples in the help keep their lines."""

    def __init__(self, **kwargs: Any) -> None:
        help = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(formatter_class=help, allow_abbrev=False, **kwargs)

    def shortened(self) -> str:
        """Returns the usage without the list of options, which the help explains one by one."""
        places = [action for action in self._actions if not action.option_strings]
        words = [f"[{action.dest.upper()}]" if action.nargs in ("?", "*") else action.dest.upper() for action in places]
        return " ".join([self.prog, "[options]", *words])

    def error(self, message: str) -> NoReturn:
        """Called by argparse with what is wrong."""
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog=program(), description=ABOUT)
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if command is not None:
            _add(subcommands, command)
            continue
        measures = _add_parser(subcommands, name, EVAL).add_subparsers(dest="measure", metavar="MEASURE", required=True)
        for measure in MEASURES.values():
            _add(measures, measure)
    return parser


def _add_parser(to: Any, name: str, about: str) -> _Parser:
    description, _, examples = about.partition("\nexamples")
    parser: _Parser = to.add_parser(
        name, help=description.partition("\n")[0], description=description, epilog=f"examples{examples}"
    )
    return parser


def _add(to: Any, command: Command) -> None:
    parser = _add_parser(to, command.name, command.about)
    parser.set_defaults(parser=parser, run_command=command)
    for argument in command.arguments:
        parser.add_argument(argument.name, help=argument.help, **argument.kwargs)
    if command.options is not None:
        names = {argument.name for argument in command.arguments}
        keys = {name: find() for name, find in command.keys.items()}
        add_options(parser, command.options, skip=names, keys=keys)
    parser.add_argument(
        "--use",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="Import a schedule, objective, sampler, corpus or tokeniser of your own that a run uses. Files alone "
        "never cause an import.",
    )
    parser.usage = parser.shortened()


def _parse(argv: list[str]) -> argparse.Namespace:
    """Reads a command line; dashes in the names of options are underscores too."""
    end = argv.index("--") if "--" in argv else len(argv)
    for place, word in enumerate(argv[:end]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            argv[place] = f"--{name.replace('-', '_')}{equals}{value}"
    known: tuple[tuple[int, str, Iterable[str]], ...] = ((0, "command", COMMANDS), (1, "measure", MEASURES))
    for place, kind, names in known:
        if argv[place : place + 1] and not argv[place].startswith("-") and argv[:place] in ([], ["eval"]):
            check_one_of(kind, argv[place], list(names))
    import_named(argv[:end])  # before the parser is made: a schedule's parameters become options
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        name, program = unknown[0].partition("=")[0], given.parser.prog
        if name.startswith("-"):
            raise ValueError(f"{name}: {program} has no such option{did_you_mean(name, _names(given))} "
                             f"(see {program} --help)")  # fmt: skip
        raise ValueError(f"unexpected {name!r}: write what is not an option in one place, and quote text with spaces "
                         f"(see {program} --help)")  # fmt: skip
    return given


def _names(given: argparse.Namespace) -> list[str]:
    """The options of the command that was given."""
    return [name for action in given.parser._actions for name in action.option_strings]


def _given_options(command: Command, given: argparse.Namespace) -> Mapping[str, Any]:
    """The options on the command line, in the types of their fields."""
    assert command.options is not None
    fields = {field.name for field in dataclasses.fields(command.options)}
    words = tree({name: value for name, value in vars(given).items() if name.split(".")[0] in fields})
    return checked(command.options, words, "--", words=True)


def _run(given: argparse.Namespace) -> int:
    command: Command = given.run_command
    names = [argument.name.lstrip("-") for argument in command.arguments]
    fields = () if command.options is None else [field.name for field in dataclasses.fields(command.options)]
    arguments = {name: getattr(given, name) for name in names if name not in fields}
    if command.options is None:
        return command.run(**arguments)
    values = _given_options(command, given)
    if command.reads_files:
        return command.run(given=values, **arguments)
    return command.run(options=build(command.options, values), **arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 1 if the work failed; 2 for a mistake in the command or its files; 128 + n after signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words:
            _parser().print_help(sys.stderr)
            return 2
        given = _parse(words)
        with renamed({name[2:]: name for name in _names(given) if name.startswith("--")}):
            return _run(given)
    except KeyboardInterrupt:
        print("sedd: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("SEDD_DEBUG"):
            raise
        # what a file or a name holds must not steer the terminal
        rank = os.environ.get("RANK") or "0"  # of the processes of torchrun
        who = "sedd" if rank == "0" else f"sedd: process {rank}"
        print(f"{who}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
