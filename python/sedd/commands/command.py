"""Description of a command for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RUN", "Argument", "Command"]


@dataclass(frozen=True)
class Argument:
    """A positional argument such as ``run``, or a flag such as ``--live``.

    Attributes:
        name: the name for ``argparse.add_argument``.
        help: the help text.
        kwargs: other arguments of ``argparse.add_argument``.
    """

    name: str
    help: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command of ``sedd``.

    Attributes:
        name: the name of the command.
        about: the help text: a first line, a description, and a part that begins with "examples".
        run: runs the command and returns the exit code. It is called with the arguments by name and, if there are
            options, with the dataclass as ``options``.
        options: the dataclass of options, with field docstrings as help; None if the command has no options.
        arguments: positional arguments and flags.
        keys: for options that are dictionaries, a function that returns their keys with help, see
            :func:`sedd.options.add_options`.
        reads_files: whether ``run`` is called with ``given``, the options given on the command line, instead of
            ``options``. A command that also reads options from files builds the dataclass itself.
    """

    name: str
    about: str
    run: Callable[..., int]
    options: type | None = None
    arguments: tuple[Argument, ...] = ()
    keys: Mapping[str, Callable[[], Mapping[str, str]]] = field(default_factory=dict)
    reads_files: bool = False


RUN = Argument(
    "run",
    "A run folder (its best checkpoint is used), a checkpoint folder, or a model: a folder, a checkpoint file, or a "
    "repository on the Hugging Face hub (see sedd convert).",
)
"""The model argument of most commands."""
