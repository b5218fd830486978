"""Reads untrusted JSON and YAML files as plain data, within limits.

The result consists of dictionaries, lists, strings, numbers, booleans and None. Classes and modules named in a file are
not imported. Very large files, deeply nested ones, and YAML aliases, with which a short file can describe a huge tree,
are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sedd.hints import pip_install

__all__ = ["MAX_BYTES", "MAX_DEPTH", "check_depth", "merged", "read_json", "read_plain"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_TOO_DEEP = f"nested too deeply: expected at most {MAX_DEPTH} levels, got more"


def read_plain(path: Path | str) -> dict[str, Any]:
    """Reads an object with options: JSON if the file name ends in ``.json``, else YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large or nested too deeply, is not JSON or YAML, uses aliases or tags, or does not
            contain an object. The message begins with the path.
        ImportError: the file is YAML and PyYAML is not installed.
    """
    return _read(Path(path), _load_json if Path(path).suffix == ".json" else _load_yaml, MAX_BYTES)


def read_json(path: Path | str, max_bytes: int = 1 << 30) -> dict[str, Any]:
    """Reads an object from a JSON file, such as the results of an evaluation.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_plain`.
    """
    return _read(Path(path), _load_json, max_bytes)


def _read(path: Path, load: Callable[[str], Any], max_bytes: int) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: too large: expected at most {max_bytes:,} bytes, got more")
    try:
        value = load(content.decode("utf-8-sig"))
        check_depth(value)
    except ValueError as error:  # also for invalid UTF-8
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object (names with values), got {type(value).__name__}")
    return value


def check_depth(value: Any) -> None:
    """Checks the nesting of dictionaries and lists.

    Raises:
        ValueError: they are nested more than ``MAX_DEPTH`` levels deep.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        groups = [entry for entry in level if isinstance(entry, (dict, list))]
        if not groups:
            return
        level = [entry for group in groups for entry in (group.values() if isinstance(group, dict) else group)]
    raise ValueError(_TOO_DEEP)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two nested dictionaries; entries of ``above`` take precedence."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(f"damaged or not JSON: {error}") from error


def _load_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading YAML needs PyYAML: {pip_install('train', 'yaml')} (or write JSON)") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Accepts only plain values, and limits the nesting."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("expected no aliases, got one (*name); write the value out")
            self.depth += 1
            if self.depth > MAX_DEPTH + 1:
                raise ValueError(_TOO_DEEP)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    # YAML 1.1 reads 1e-3 as a string, because it has no dot
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"damaged or not YAML: {' '.join(str(error).split())}") from error
