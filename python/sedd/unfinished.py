"""Partial results of a long evaluation, in a file from which another process can resume."""

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
    """Hash of tensors and settings; different inputs have (almost surely) different hashes."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Unfinished:
    """Stores the first values of a computation on disk.

    Args:
        path: the file. It is written atomically, at most once every ``seconds``.
        identity: hash of everything that the values depend on.
        seconds: minimum time between two writes.

    Raises:
        ValueError: the file exists, but belongs to another computation or is damaged.
    """

    def __init__(self, path: Path, identity: str, seconds: float = 30.0) -> None:
        self.path, self.identity, self.seconds = path, identity, seconds
        self.found: dict[str, Tensor] = {}
        self._written = time.monotonic()
        if path.exists():
            advice = "delete it to start again, or give the same options as before"
            try:
                self.found, metadata = load_tensors(path)
            except ValueError as error:
                raise ValueError(f"{path}: damaged unfinished evaluation ({error}); {advice}") from error
            if metadata.get("identity") != identity or "sha256" not in metadata:
                raise ValueError(
                    f"{path}: expected an unfinished evaluation of the same model, text, options and version, got "
                    f"another one; {advice}"
                )

    def resume(self, values: Tensor) -> int:
        """Copies the stored values. Returns their number."""
        if not self.found:
            return 0
        count = len(self.found["values"])
        values[:count] = self.found["values"].to(values.device)
        return count

    def update(self, values: Tensor) -> None:
        """Records the values so far; writes them if ``seconds`` have passed."""
        self.found = {"values": values}
        if time.monotonic() - self._written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Writes the recorded values.

        Raises:
            OSError: the file cannot be written; an existing one is not changed.
        """
        if self.found:
            save_tensors(self.path, self.found, {"identity": self.identity})
            self._written = time.monotonic()
