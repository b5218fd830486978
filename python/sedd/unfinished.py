"""What a long evaluation has computed so far, in a file that another process can go on from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sedd.files import load_tensors, save_tensors

__all__ = ["Unfinished", "identity"]


def identity(tensors: Iterable[Tensor], settings: str) -> str:
    """A word that (almost surely) differs where a number or a setting does."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Unfinished:
    """Keeps the first so many values of a computation on the disk, with the state of its random numbers.

    Args:
        path: the file. It is written to a temporary name and renamed, at most once in ``seconds``.
        identity: a word that follows from everything that the values depend on.
        seconds: time between two writes.

    Raises:
        ValueError: there is a file of that name that belongs to another computation, or that is damaged.
    """

    def __init__(self, path: Path, identity: str, seconds: float = 30.0) -> None:
        self.path, self.identity, self.seconds = path, identity, seconds
        self.found: dict[str, Tensor] = {}
        self._written = time.monotonic()
        if path.exists():
            advice = f"delete it to begin anew, or give the same options as before: {path}"
            try:
                self.found, metadata = load_tensors(path)
            except ValueError as error:
                raise ValueError(f"an unfinished evaluation lies here and is damaged ({error}); {advice}") from error
            if metadata.get("identity") != identity or "sha256" not in metadata:
                raise ValueError(
                    f"an unfinished evaluation of another model, text, options or version lies here; {advice}"
                )

    def resume(self, values: Tensor, generator: torch.Generator) -> int:
        """Fills in the values that are known, sets the generator to where it was, and returns how many they are."""
        if not self.found:
            return 0
        count = len(self.found["values"])
        values[:count] = self.found["values"].to(values.device)
        generator.set_state(self.found["generator"])
        return count

    def update(self, values: Tensor, generator: Tensor) -> None:
        """Takes the values so far and the generator's state after them; writes them if it is time."""
        self.found = {"values": values, "generator": generator}
        if time.monotonic() - self._written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Writes what is known.

        Raises:
            OSError: the file cannot be written; the one from before stays.
        """
        if self.found:
            save_tensors(self.path, self.found, {"identity": self.identity})
            self._written = time.monotonic()
