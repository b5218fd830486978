"""Trains several runs one after another in one process group; started by torchrun from test_parallel.py.

The argument is a JSON file with a list of command lines of ``sedd``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sedd.cli import main

if __name__ == "__main__":
    codes = [main(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    sys.exit(max(codes))
