"""Divides data between training and validation by their content.

A hash decides the split of a document or image. All copies of it are in the same split, on every machine and with every
seed.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["content_key", "validation_cut"]


def content_key(content: bytes) -> int:
    """Hash of the content, uniform over [0, 2⁶³)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def validation_cut(keys: NDArray[np.int64], fraction: float) -> int:
    """The key below which content is validation data.

    Args:
        keys: different keys, sorted, at least two.
        fraction: the fraction of the content that is wanted for validation. Each split gets at least one key.
    """
    return min(max(int(fraction * 2**63), int(keys[0]) + 1), int(keys[-1]))
