"""What a network knows besides tokens: the total noise, the class, and positions in a text or an image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["LabelEmbedding", "LearnedPositions", "Rotary", "SigmaEmbedding"]


class SigmaEmbedding(nn.Module):
    """Conditioning vector of the total noise: silu(MLP(cosines and sines of σ̄ at 128 frequencies))."""

    FREQUENCIES = 128
    MAX_PERIOD = 10_000

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """Vectors [B, cond_dim] of the total noise [B]."""
        exponents = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=sigma.device) / self.FREQUENCIES
        angles = sigma.float()[:, None] * torch.exp(-math.log(self.MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        dtype = next(self.mlp.parameters()).dtype
        return F.silu(self.mlp(waves.to(dtype)))


class LabelEmbedding(nn.Module):
    """Embeddings of the classes, and as the last one of no class, that are added to the conditioning vector."""

    def __init__(self, classes: int, cond_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(classes + 1, cond_dim))
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self, condition: Tensor, labels: Tensor | None) -> Tensor:
        """The vectors [B, cond_dim] with those of the classes [B] added; of no class if ``labels`` is None."""
        return condition + (self.embedding[-1:] if labels is None else self.embedding[labels])


class Rotary(nn.Module):
    """Rotary positions: the angles position / 10000^(2i / d_head), as cosines and sines [L, d_head / 2].

    Positions count from ``start``. For images of a shape (rows, columns, channels), the first half of the angles are
    row / 10000^(4i / d_head) and the second half column / 10000^(4i / d_head). Attention then depends on the distances
    in rows and in columns.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("inv_freq", self.exact(head_dim))
        self.register_load_state_dict_post_hook(restore_frequencies)  # type: ignore[no-untyped-call]  # torch has no types

    def exact(self, head_dim: int) -> Tensor:
        """The angles of neighbouring positions [d_head / 2], in float32."""
        axes = 2 if self.shape else 1
        exponents = torch.arange(0, head_dim, 2 * axes, dtype=torch.float32) / head_dim
        return (10_000.0**-exponents).repeat(axes)

    def forward(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions from ``start`` on."""
        frequencies = self.inv_freq
        places = torch.arange(start, start + length, device=frequencies.device, dtype=torch.float32)
        if frequencies.dtype.itemsize < 4:  # too coarse for the angles; zeros are those of learned positions
            exact = self.exact(2 * len(frequencies)).to(frequencies.device)
            frequencies = exact.where(frequencies != 0, 0.0)
        if self.shape:
            _, columns, channels = self.shape
            pixels = places // channels
            half = len(frequencies) // 2
            angles = torch.cat(
                [torch.outer(axis, frequencies[:half]) for axis in (pixels // columns, pixels % columns)], dim=1
            )
        else:
            angles = torch.outer(places, frequencies)
        return angles.cos(), angles.sin()


def restore_frequencies(rotary: Rotary, keys: Any) -> None:
    """After weights were loaded: frequencies that had been rounded to half precision become exact again."""
    found, exact = rotary.inv_freq, rotary.exact(2 * len(rotary.inv_freq)).to(rotary.inv_freq.device)
    if any(torch.equal(found, exact.to(half).to(found.dtype)) for half in (torch.bfloat16, torch.float16)):
        found.copy_(exact)


class LearnedPositions(nn.Module):
    """Embeddings that are added to those of the tokens: one for each place on each axis of a shape."""

    def __init__(self, shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(sum(shape), dim))
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """The states [B, L, d] of the positions from ``start`` on with their embeddings added."""
        places = torch.arange(start, start + x.shape[1], device=x.device)
        first, stride = 0, math.prod(self.shape)
        for count in self.shape:
            stride //= count
            x = x + self.embedding[first + places // stride % count]
            first += count
        return x
