"""``sedd play``: a local web page on which a model writes and fills texts, and a JSON endpoint beside it."""

from __future__ import annotations

from sedd.commands.play.command import COMMAND

__all__ = ["COMMAND"]
