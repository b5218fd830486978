"""Options as dataclasses, read from the command line and from files.

The input is plain data: words of the command line, or JSON or YAML of a file. It is checked against the fields of a
dataclass, whose types may be ``int``, ``float``, ``str``, ``bool``, a ``Literal``, lists, tuples and dictionaries of
these, ``X | None``, and other dataclasses as groups; the values of a ``dict[str, Any]`` are not checked. Other input is
refused, and no name in it is imported.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "add_options",
    "build",
    "check_choice",
    "check_guidance",
    "check_one_of",
    "check_options",
    "checked",
    "did_you_mean",
    "outside_hint",
    "prefixed",
    "renamed",
    "tree",
]

Options = TypeVar("Options")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` with the known name most similar to ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def outside_hint(name: str) -> str:
    """Returns a hint how to import a class from outside the package, if ``name`` is ``module:name``; else ``""``."""
    outside = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)
    return f"; to import it, name it on the command line: --use {name}" if outside else ""


def check_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Checks that a value is one of ``allowed``.

    Raises:
        ValueError: ``"NAME: expected one of a, b; got 'c'"``, with the most similar choice.
    """
    if value not in allowed:
        hint = did_you_mean(str(value), allowed) or outside_hint(str(value))
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}{hint}")


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Replaces the name at the start of an error message (``name: ...``) by the name that the user gave."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        name, colon, rest = str(error).partition(":")
        if colon and name in names:
            error.args = (f"{names[name]}:{rest}",)
        raise


def prefixed(prefix: str, kind: type) -> AbstractContextManager[None]:
    """:func:`renamed`, with ``prefix`` before the names of a dataclass's fields."""
    return renamed({field.name: prefix + field.name for field in dataclasses.fields(kind)})


def checked(kind: type, given: Any, prefix: str = "", words: bool = False) -> dict[str, Any]:
    """Converts values to the types of the fields of a dataclass.

    Args:
        kind: the dataclass.
        given: values by field name; fields may be missing. The value of a dataclass field is a dictionary.
        prefix: prefix of field names in messages, for example ``"data."``.
        words: whether values are words of the command line, such as ``"16,64"`` for a list, instead of plain data.

    Raises:
        ValueError: a name is unknown, or a value does not have the type of its field. The message begins with the name.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'file'}: expected options by name, got {_short(given)}")
    types = get_type_hints(kind)
    result = {}
    for name, value in given.items():
        if name not in types:
            raise ValueError(f"{prefix}{name}: no such option{did_you_mean(str(name), types)}")
        if dataclasses.is_dataclass(types[name]):
            result[name] = checked(types[name], value, f"{prefix}{name}.", words)
        else:
            result[name] = _convert(types[name], value, f"{prefix}{name}", words)
    return result


def build(kind: type[Options], values: Mapping[str, Any], prefix: str = "") -> Options:
    """Creates a dataclass from the result of :func:`checked`.

    Raises:
        ValueError: the dataclass refuses a value. The message begins with ``prefix`` and the name of the option.
    """
    types = get_type_hints(kind)
    given = {
        name: build(types[name], value, f"{prefix}{name}.") if dataclasses.is_dataclass(types[name]) else value
        for name, value in values.items()
    }
    with prefixed(prefix, kind):
        return kind(**given)


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Converts dotted names to nested dictionaries: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = result
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return result


def add_options(
    parser: argparse._ActionsContainer,
    kind: type,
    skip: Collection[str] = (),
    keys: Mapping[str, Mapping[str, str]] | None = None,
    prefix: str = "",
) -> None:
    """Adds an option for each field of a dataclass, with the docstring below the field as its help.

    In the parsed namespace, values are words of the command line, and options that are not given are missing.

    Args:
        parser: a parser or an argument group.
        kind: the dataclass. Fields that are dataclasses become groups of options ``--field.name``.
        skip: fields without an option.
        keys: for each field that is a dictionary, its keys with their help; they become options ``--field.key``. A
            dictionary without keys has no options.
        prefix: prefix of field names, for example ``"data."``.
    """
    types, docs = get_type_hints(kind), _docs(kind)
    for field in dataclasses.fields(kind):
        name, of = prefix + field.name, types[field.name]
        help = " ".join(docs.get(field.name, "").split()).replace("%", "%%")
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(of):
            about = f"{help or field.name} (options --{name}.…)"
            add_options(parser.add_argument_group(about), of, prefix=f"{name}.")  # type: ignore[arg-type]
            continue
        if get_origin(of) is dict:
            for key, help in (keys or {}).get(field.name, {}).items():
                parser.add_argument(f"--{name}.{key}", default=argparse.SUPPRESS, metavar=_word(of), help=help)
            continue
        required = field.default is field.default_factory is dataclasses.MISSING
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "" if required or default in (None, []) else f" (default: {_text(default)})".replace("%", "%%")
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar=_word(of),
            help=f"{help}{shown}",
            required=required,
            **({"nargs": "?", "const": "true"} if of is bool else {}),
        )


def _docs(kind: type) -> dict[str, str]:
    """Docstrings below the fields of a dataclass and of its base classes."""
    docs = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docs[field.target.id] = ast.literal_eval(below.value)
    return docs


def _word(kind: Any) -> str:
    """Placeholder of an option's value in the help."""
    origin, inner = get_origin(kind), [of for of in get_args(kind) if of is not NoneType]
    if origin in (Union, UnionType):
        return "|".join(_word(of) for of in inner)
    if origin is Literal:
        return "{" + ",".join(inner) + "}"
    if origin is dict:
        return _word(inner[1])
    if origin is list or Ellipsis in inner:
        return f"{_word(inner[0])},..."
    if origin is tuple:
        return ",".join(_word(of) for of in inner)
    return _WORDS[kind]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _convert(kind: Any, value: Any, name: str, words: bool) -> Any:
    """Converts a value to the type of a field."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if NoneType in inner and (value is None or (words and value == "null")):
            return None
        *others, last = (of for of in inner if of is not NoneType)
        for of in others:
            try:
                return _convert(of, value, name, words)
            except ValueError:
                continue
        return _convert(last, value, name, words)
    if origin is Literal:
        check_one_of(name, value if isinstance(value, str) else _short(value), inner)
        return value
    if origin in (list, tuple):
        return _sequence(origin, inner, value, name, words)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected names with values, got {_short(value)}")
        return {key: _convert(inner[1], entry, f"{name}.{key}", words) for key, entry in value.items()}
    plain = _parse(kind, value) if words else value
    if kind is float and type(plain) is int and abs(plain) < 1 << 1000:
        return float(plain)
    if type(plain) is not kind:
        raise ValueError(f"{name}: expected {_EXPECTED[kind]}, got {_short(value)}")
    return plain


def _sequence(origin: Any, inner: tuple[Any, ...], value: Any, name: str, words: bool) -> Any:
    if words and isinstance(value, str):
        value = value.strip()
        bracketed = value[:1] + value[-1:] in ("[]", "()")
        parts = (value[1:-1] if bracketed else value).split(",")
        value = [part.strip().strip("'\"") for part in parts] if any(part.strip() for part in parts) else []
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {_short(value)}")
    fixed = origin is tuple and Ellipsis not in inner
    if fixed and len(value) != len(inner):
        raise ValueError(f"{name}: expected {len(inner)} values, got {len(value)}: {_short(value)}")
    kinds = inner if fixed else inner[:1] * len(value)
    return origin(_convert(of, entry, name, words) for of, entry in zip(kinds, value, strict=True))


def _parse(kind: type, word: str) -> Any:
    """Converts a word of the command line to a type; returns the word unchanged if it is not of that type."""
    try:
        return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
    except (ValueError, KeyError):
        return word


def changed(options: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The options that have another value than their default, by name.

    Args:
        options: a dataclass.
        without: names of fields to leave out.
    """
    values = {field.name: (field, getattr(options, field.name)) for field in dataclasses.fields(options)}
    return {name: value for name, (field, value) in values.items() if name not in without and value != _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_options(options: Any, positive: Sequence[str], outputs: Sequence[str] = ()) -> None:
    """Checks positive numbers and output paths before the work begins.

    Args:
        options: a dataclass.
        positive: names of fields whose values must be at least 1 or None.
        outputs: names of fields whose values are output files or None.

    Raises:
        ValueError: a number is too small.
        FileNotFoundError: the folder of an output file does not exist.
        IsADirectoryError: an output file is an existing folder.
        PermissionError: the folder of an output file is not writable.
    """
    for name in positive:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    for name in outputs:
        if getattr(options, name) is None:
            continue
        path = Path(getattr(options, name))
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: cannot write {path}: no such folder {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"{name}: cannot write {path}: expected a file, got a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{name}: cannot write {path}: no write permission for the folder {path.parent}")


def check_choice(temperature: float, top_p: float, guidance: float | None = None) -> None:
    """Checks the sampling parameters.

    Raises:
        ValueError: ``temperature`` is not positive and finite, or ``top_p`` not in (0, 1]; or as
            :func:`check_guidance`.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if guidance is not None:
        check_guidance(guidance)


def check_guidance(guidance: float) -> None:
    """Raises a ValueError if ``guidance`` is not in [-1000, 1000]."""
    if not -1000 <= guidance <= 1000:
        raise ValueError(f"guidance: expected a number from -1000 to 1000, got {guidance}")
