"""Classes from outside the package, as ``module:name`` on the command line.

Schedules, objectives, samplers, corpora and tokenisers are found by name in dictionaries. A class of your own is added
to its dictionary under the name that the command line gives it. Files may contain that name too, but a file never
causes an import: without ``--use`` or the option itself on the command line, the name is unknown.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from sedd.data.corpora import CORPORA
from sedd.data.corpus import Corpus
from sedd.data.tokenizer import TOKENIZERS, Tokenizer
from sedd.diffusion.diffusion import Objective
from sedd.diffusion.objectives import OBJECTIVES
from sedd.diffusion.sampler import Sampler
from sedd.diffusion.samplers import SAMPLERS
from sedd.diffusion.schedule import SCHEDULES, Schedule

__all__ = ["import_named", "import_outside"]

_REGISTRIES: dict[type, dict[str, Any]] = {
    Schedule: SCHEDULES,
    Objective: OBJECTIVES,
    Sampler: SAMPLERS,
    Corpus: CORPORA,
    Tokenizer: TOKENIZERS,
}
_OPTIONS = ("--use", "--schedule", "--objective", "--sampler", "--samplers", "--corpus", "--tokenizer")
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def import_named(words: Sequence[str]) -> None:
    """Imports the classes that the options on a command line name as ``module:name``."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in _OPTIONS:
            value = value if equals else "".join(words[place + 1 : place + 2])
            for name in value.split(","):
                if _NAME.fullmatch(name) or option == "--use":
                    import_outside(name)


def import_outside(name: str) -> None:
    """Imports a class and adds it to the dictionary of its kind, under ``name``.

    Args:
        name: ``module:name``. The module is looked for in the current folder too.

    Raises:
        ValueError: the name has another form, or the class is none of the kinds above.
        ImportError: there is no such module, or no such class in it.
    """
    module, _, attribute = name.partition(":")
    if not _NAME.fullmatch(name):
        raise ValueError(f"use: expected module:name, got {name!r}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        kind = getattr(import_module(module), attribute)
    except AttributeError as error:
        raise ImportError(f"{name}: {module} has no {attribute}") from error
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: cannot import {error.name}; looked in {folder} and Python's own folders") from error
    for base, registry in _REGISTRIES.items():
        if isinstance(kind, type) and issubclass(kind, base):
            registry[name] = kind
            if issubclass(kind, Tokenizer):
                kind.name = name  # by which worker processes and saved models find it
            return
    kinds = ", ".join(base.__name__ for base in _REGISTRIES)
    raise ValueError(f"{name}: expected a subclass of {kinds}, got {kind!r}")
