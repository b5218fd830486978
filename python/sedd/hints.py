"""Commands in errors and messages, in the form that works in the user's shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["pip_install", "program"]

PACKAGES = {
    "PIL": "pillow",
    "lm_eval": "lm-eval",
    "mauve": "mauve-text",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Package names by module name, where they differ."""


def program() -> str:
    """Returns the command that started this program: ``sedd``, ``.venv/bin/sedd`` or ``python -m sedd``."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "sedd":
        return f"{_command(sys.executable)} -m sedd"
    return _command(sys.argv[0]) if called.name == "sedd" else "sedd"


def pip_install(extra: str, module: str) -> str:
    """Returns the command that installs a missing module.

    Args:
        extra: the extra of this package that contains the module. If this package is installed, the command installs
            the whole extra; if it runs from a source folder, pip does not know the extra.
        module: the name of the module or of one of its submodules.
    """
    name = module.partition(".")[0]
    try:
        wanted = f'"{distribution("sedd_ext").name}[{extra}]"'
    except PackageNotFoundError:
        wanted = PACKAGES.get(name, name)
    return f"{_command(sys.executable)} -m pip install {wanted}"


def _command(path: str) -> str:
    """Name of a program if the shell resolves the name to this path, else the path."""
    found, wanted = shutil.which(Path(path).name), os.path.abspath(path)
    if found is not None and os.path.abspath(found) == wanted:
        return Path(path).name
    short = os.path.relpath(wanted)
    return shlex.quote(wanted if short.startswith("..") else short)
