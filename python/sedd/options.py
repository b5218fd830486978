"""Options as dataclasses, filled from the command line and from files.

Both give plain data: words on the command line, JSON or YAML in a file. Here they are compared with the fields of a
dataclass, whose types may be ``int``, ``float``, ``str``, ``bool``, a ``Literal``, lists, tuples and dictionaries of
these, ``X | None``, and other dataclasses as groups. Whatever else is given is refused; nothing is looked up by name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["add_options", "build", "check_one_of", "checked", "did_you_mean", "prefixed", "renamed", "tree"]

Options = TypeVar("Options")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` with the known name that is most like ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuses a value that is not one of ``allowed``.

    Raises:
        ValueError: ``"NAME: expected one of a, b; got 'c'"``, with the choice that is most like it.
    """
    if value not in allowed:
        raise ValueError(
            f"{name}: expected one of {', '.join(allowed)}; got {value!r}{did_you_mean(str(value), allowed)}"
        )


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Gives an error whose message begins with one of ``names`` and a colon the name that the user knows."""
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
    """Returns the given values, in the types of a dataclass's fields.

    Args:
        kind: the dataclass.
        given: values by field name; fields may be missing. A field that is a dataclass has a dictionary of its own.
        prefix: what stands before a field's name in messages, for example ``"data."``.
        words: values are text of the command line, such as ``"16,64"`` for a list, instead of plain data of a file.

    Raises:
        ValueError: a name is unknown or a value is not of its field's type. The message begins with the name.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'file'}: expected options by name, got {_short(given)}")
    types = get_type_hints(kind)
    result = {}
    for name, value in given.items():
        if name not in types:
            raise ValueError(f"{prefix}{name}: there is no such option{did_you_mean(str(name), types)}")
        if dataclasses.is_dataclass(types[name]):
            result[name] = checked(types[name], value, f"{prefix}{name}.", words)
        else:
            result[name] = _convert(types[name], value, f"{prefix}{name}", words)
    return result


def build(kind: type[Options], values: Mapping[str, Any], prefix: str = "") -> Options:
    """Makes a dataclass of what :func:`checked` returned.

    Raises:
        ValueError: as the dataclass raises it, with ``prefix`` before the name of an option.
    """
    types = get_type_hints(kind)
    given = {
        name: build(types[name], value, f"{prefix}{name}.") if dataclasses.is_dataclass(types[name]) else value
        for name, value in values.items()
    }
    with prefixed(prefix, kind):
        return kind(**given)


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dictionaries in one another for dotted names: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
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
    """Adds an option for each field of a dataclass; the docstrings below the fields are the help.

    What is not given is missing from the parsed namespace, where the values are the words of the command line.

    Args:
        parser: a parser, or a group of one.
        kind: the dataclass. Fields that are dataclasses become groups of options ``--field.name``.
        skip: fields that get no option.
        keys: for a field that is a dictionary, its keys, which become options ``--field.key``, with their help.
        prefix: what stands before a field's name, for example ``"data."``.
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
            for key, help in (keys or {})[field.name].items():
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
    """The docstrings below the fields of a dataclass and of those it inherits from."""
    docs = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docs[field.target.id] = ast.literal_eval(below.value)
    return docs


def _word(kind: Any) -> str:
    """How the value of an option is called in the help."""
    origin, inner = get_origin(kind), [of for of in get_args(kind) if of is not NoneType]
    if origin in (Union, UnionType):
        return "|".join(_word(of) for of in inner)
    if origin is Literal:
        return "{" + ",".join(inner) + "}"
    if origin is dict:
        return _word(inner[1])
    if origin is list:
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
    """A value in the type of a field."""
    origin, inner = get_origin(kind), get_args(kind)
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
    """The value that a word of the command line stands for; the word itself if it stands for none of that type."""
    try:
        return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
    except (ValueError, KeyError):
        return word
