"""The forward processes: one rank-one family, in which processes differ only in their stationary distribution.

Every process has the generator ``Q = π 1ᵀ - I`` (columns are "from"), so ``exp(σQ) = a I + (1 - a) π 1ᵀ`` with
``a = exp(-σ)``. Absorbing, uniform and hybrid diffusion differ only in π. So a process is data: a :class:`RankOne`
holds π, and :func:`Absorbing`, :func:`Uniform` and :func:`Hybrid` create one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Absorbing", "Hybrid", "RankOne", "Uniform"]

Family = Literal["absorbing", "uniform", "rank_one"]
_MOST_TOKENS = 2**53  # float64 represents every index up to here
_LEAST = torch.finfo(torch.float32).tiny  # the kernels use π in float32, where smaller numbers lose precision


class RankOne:
    """A diffusion process ``Q = π 1ᵀ - I`` over tokens 0..N-1, given by its stationary distribution π.

    Args:
        stationary: probability vector π, [N], of any floating dtype. Each entry is 0 or at least 1.2e-38, the smallest
            normal number of float32, and the entries sum to 1. Stored in float64.
        mask_id: the MASK token, or None if there is none. The last, denoising reverse step never returns it.

    Raises:
        TypeError: ``stationary`` is not a floating-point tensor, or ``mask_id`` not an int.
        ValueError: ``stationary`` is not such a vector, or ``mask_id`` is not a token.

    Attributes:
        dim: N, the length of the vocabulary axis.
        mask_id: the MASK token, or None.
        family: the shape of π that the kernels are specialised for: ``"absorbing"`` (all of it on the last token),
            ``"uniform"`` (1/N everywhere) or ``"rank_one"`` (a vector).
        neg_entropy: Σ_y π_y log π_y, the constant H of the score-entropy loss.

    Source: SEDD (Lou, Meng & Ermon 2024), section 3.3, generalised from its two matrices to any π.
    """

    dim: int
    mask_id: int | None
    family: Family
    neg_entropy: float

    def __init__(self, stationary: Tensor, *, mask_id: int | None = None) -> None:
        if not isinstance(stationary, Tensor) or not stationary.is_floating_point():
            given = f"a {stationary.dtype} tensor" if isinstance(stationary, Tensor) else type(stationary).__name__
            raise TypeError(f"stationary: expected a floating-point tensor [N], got {given}")
        if stationary.dim() != 1 or stationary.numel() == 0:
            raise ValueError(f"stationary: expected a non-empty vector [N], got shape {list(stationary.shape)}")
        if stationary.is_meta:
            raise ValueError("stationary: expected a tensor with values, got one on the meta device")
        vector = stationary.detach().double().contiguous().clone()
        total = float(vector.sum())
        # not(...) so that NaN fails too; float32 vectors of 50k entries sum to 1 within a few 1e-5
        if not bool((vector >= 0).all()) or not abs(total - 1.0) <= 1e-4:
            raise ValueError(
                f"stationary: expected probabilities ≥ 0 that sum to 1, got minimum {float(vector.min()):.6g} "
                f"and sum {total:.9g}"
            )
        vector /= total
        small = ((vector > 0) & (vector < _LEAST)).nonzero()
        if len(small):
            raise ValueError(
                f"stationary: expected probabilities that are 0 or at least {_LEAST:.3g}, float32's smallest normal "
                f"number, got {float(vector[small[0]]):.3g} at index {int(small[0])}; set it to 0 or raise it"
            )
        dim = vector.numel()
        if mask_id is not None and (isinstance(mask_id, bool) or not isinstance(mask_id, int)):
            raise TypeError(f"mask_id: expected an int, got {type(mask_id).__name__}")
        if mask_id is not None and not 0 <= mask_id < dim:
            raise ValueError(f"mask_id: expected a token in [0, {dim}), got {mask_id}")
        self._set("rank_one", dim, mask_id, float(torch.xlogy(vector, vector).sum()))
        self._stationary: Tensor | None = vector
        self._cumulative: Tensor | None = vector.cumsum(0)

    def _set(self, family: Family, dim: int, mask_id: int | None, neg_entropy: float) -> None:
        self.family, self.dim, self.mask_id, self.neg_entropy = family, dim, mask_id, neg_entropy
        self._copies: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def _closed_form(cls, family: Family, dim: int, mask_id: int | None, neg_entropy: float) -> RankOne:
        """Creates a process whose π is not stored as a vector."""
        process = cls.__new__(cls)
        process._set(family, dim, mask_id, neg_entropy)
        process._stationary = process._cumulative = None
        return process

    @property
    def stationary(self) -> Tensor:
        """π, float64 [N]."""
        if self._stationary is not None:
            return self._stationary
        if self.family == "uniform":
            return torch.full((self.dim,), 1.0 / self.dim, dtype=torch.float64)
        vector = torch.zeros(self.dim, dtype=torch.float64)
        vector[-1] = 1.0
        return vector

    @cached_property
    def uniform_fraction(self) -> float | None:
        """λ of a hybrid process, π = (1 - λ) e_MASK + λ/n on the n tokens, λ < 1; None for other processes."""
        if self.family != "rank_one" or self.mask_id != self.dim - 1:
            return None
        tokens, mask = self.stationary[:-1], float(self.stationary[-1])
        hybrid = mask > 0 and torch.allclose(tokens, tokens.mean().expand_as(tokens), rtol=1e-9, atol=0)
        return 1 - mask if hybrid else None

    @property
    def cumulative(self) -> Tensor:
        """The cumulative sums of π, float64 [N], for draws by inverse CDF."""
        return self._cumulative if self._cumulative is not None else self.stationary.cumsum(0)

    def _copy(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``stationary`` or ``cumulative`` in the given dtype on the given device, cached, because a copy waits."""
        key = (name, dtype, device)
        copy = self._copies.get(key)
        if copy is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"process: expected a copy of the {name} vector of {self} in {dtype} on {device}, got none, and a "
                    "capture of a CUDA graph cannot make one; call the operator once before, with the same dtype"
                )
            with torch.inference_mode(False):  # a backward pass may need the copy later
                copy = getattr(self, name).to(device=device, dtype=dtype)
            if type(copy) is Tensor and not torch.compiler.is_compiling():  # do not cache a traced tensor
                self._copies[key] = copy
        return copy

    def sample_limit(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws tokens from π, the start of the reverse process: x_T ~ π.

        Args:
            shape: shape of the result.
            generator: random number generator; torch's default one if None.
            device: device of the result; if None, the device of the generator, or the CPU without one.

        Returns:
            int64 tensor of the given shape.
        """
        if device is None:
            device = generator.device if generator is not None else "cpu"
        if self.family == "absorbing":
            return torch.full(tuple(shape), self.dim - 1, dtype=torch.int64, device=device)
        if self.family == "uniform":
            return torch.randint(self.dim, tuple(shape), generator=generator, device=device)
        cumulative = self._copy("cumulative", torch.float64, torch.device(device))
        u = torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64)
        # right=True: the first entry above u, so a token with π = 0 is never drawn
        return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp_(max=self.dim - 1)

    def __repr__(self) -> str:
        mask = "" if self.mask_id is None else f", mask_id={self.mask_id}"
        return f"RankOne({self.family}, dim={self.dim}{mask})"


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive number of tokens, got {value}")
    if value > _MOST_TOKENS:
        raise ValueError(f"{name}: expected at most {_MOST_TOKENS} tokens, got {value}")
    return value


def Absorbing(num_tokens: int) -> RankOne:  # noqa: N802 - named like the processes of the field
    """Masked diffusion: every token decays to MASK, an additional id after the vocabulary (π = e_MASK).

    Args:
        num_tokens: n, the size of the vocabulary without MASK.

    Returns:
        A process with ``dim = n + 1`` and ``mask_id = n``.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a positive int up to 2^53.
    """
    n = _positive("num_tokens", num_tokens)
    return RankOne._closed_form("absorbing", n + 1, n, 0.0)


def Uniform(num_tokens: int) -> RankOne:  # noqa: N802
    """Uniform diffusion: every token is replaced by any other at the same rate (π = 1/N).

    Args:
        num_tokens: N, the size of the vocabulary.

    Returns:
        A process with ``dim = N`` and no MASK. Its Q is the paper's Q_uniform times 1/N, as in the released code.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a positive int up to 2^53.
    """
    n = _positive("num_tokens", num_tokens)
    return RankOne._closed_form("uniform", n, None, -math.log(n))


def Hybrid(num_tokens: int, uniform_fraction: float) -> RankOne:  # noqa: N802
    """Combines masking and uniform noise: π = (1 - λ) e_MASK + λ/n on the n tokens.

    Args:
        num_tokens: n, the size of the vocabulary without MASK.
        uniform_fraction: λ in [0, 1], the fraction of the noise that replaces a token by a random one.

    Returns:
        A process with ``dim = n + 1`` and ``mask_id = n``.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a positive int up to 2^53, or λ is not a number in [0, 1].

    Source: generalised interpolating diffusion (GIDD), with constant λ.
    """
    n = _positive("num_tokens", num_tokens)
    if not isinstance(uniform_fraction, (int, float)):
        raise TypeError(f"uniform_fraction: expected a number, got {type(uniform_fraction).__name__}")
    if not 0.0 <= uniform_fraction <= 1.0:
        raise ValueError(f"uniform_fraction: expected a number in [0, 1], got {uniform_fraction}")
    vector = torch.full((n + 1,), uniform_fraction / n, dtype=torch.float64)
    vector[n] = 1.0 - uniform_fraction
    return RankOne(vector, mask_id=n)
