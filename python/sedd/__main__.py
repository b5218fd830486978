"""The command ``sedd``, also ``python -m sedd``."""

import sys

from sedd.hints import pip_install
from sedd.threads import set_defaults


def main() -> int:
    """Runs the command line; returns the exit code."""
    set_defaults()
    try:
        from sedd.cli import main as run
    except ModuleNotFoundError as error:
        print(f"sedd: error: needs {error.name}: {pip_install('train', str(error.name))}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
