"""The README shows what an example does, and the example works."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_own_trainer_learns() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_trainer.py"))
    first, last = example["train"](steps=300)
    # the bound cannot fall below the entropy of the tokens, 1.208 nats, but for the noise of 50 steps
    assert last < first
    assert last == pytest.approx(1.208, abs=0.06)


def test_readme_shows_the_example() -> None:
    source = (ROOT / "examples" / "own_trainer.py").read_text(encoding="utf-8")
    shown = source.split("# [five lines]\n")[1].split("        # [/five lines]")[0]
    lines = [line.removeprefix("        ") for line in shown.splitlines()]
    assert len(lines) == 5
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")
