"""What ``sedd eval`` measures."""

from __future__ import annotations

from sedd.commands import generative, harness, latency, perplexity
from sedd.commands.command import Command

__all__ = ["MEASURES"]

MEASURES: dict[str, Command] = {
    measure.COMMAND.name: measure.COMMAND for measure in (perplexity, generative, harness, latency)
}
"""The commands of ``sedd eval`` by name."""
