"""The forward process exp(σQ) = a I + (1 - a) π 1ᵀ in closed form: columns, rows and samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dispatch import (
    DTYPES,
    FAMILIES,
    check_process,
    check_tokens,
    contiguous,
    draw_seed,
    fresh,
    kind_of,
    launch,
    per_row,
    raise_fault,
    stationary_for,
)
from ._operators import define
from .process import RankOne

__all__ = ["sample_transition", "transition_column", "transition_row"]


def _launch(
    kernel: str,
    name: str,
    out: Tensor,
    x: Tensor,
    sigma: Tensor,
    stationary: Tensor | None,
    cumulative: Tensor | None,
    seed: Tensor | None,
    family: str,
    dim: int,
    first_row: int = 0,
) -> Tensor:
    status = launch(
        kernel,
        x=x.contiguous(),
        sigma=sigma.contiguous(),
        stationary=contiguous(stationary),
        cumulative=contiguous(cumulative),
        out=out,
        seed=seed,
        rows=x.numel(),
        dim=dim,
        dtype=DTYPES.get(out.dtype, 0),  # samples have no dtype
        family=FAMILIES[family],
        first_row=first_row,
    )
    if status[0]:
        raise_fault(status, {name: x}, dim, ("sigma", sigma))
    return out


def _fake(x: Tensor, sigma: Tensor, stationary: Tensor | None, family: str, dim: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape, dim), dtype=dtype)


def _column(x_0: Tensor, sigma: Tensor, stationary: Tensor | None, family: str, dim: int, dtype: torch.dtype) -> Tensor:
    out = fresh(_fake(x_0, sigma, stationary, family, dim, dtype))
    return _launch("transition_column", "x_0", out, x_0, sigma, stationary, None, None, family, dim)


def _row(x: Tensor, sigma: Tensor, stationary: Tensor | None, family: str, dim: int, dtype: torch.dtype) -> Tensor:
    out = fresh(_fake(x, sigma, stationary, family, dim, dtype))
    return _launch("transition_row", "x", out, x, sigma, stationary, None, None, family, dim)


def _sample_fake(
    x_0: Tensor, sigma: Tensor, cumulative: Tensor | None, family: str, dim: int, seed: Tensor, first_row: int
) -> Tensor:
    return torch.empty_like(x_0, memory_format=torch.contiguous_format)


def _sample(
    x_0: Tensor, sigma: Tensor, cumulative: Tensor | None, family: str, dim: int, seed: Tensor, first_row: int
) -> Tensor:
    out = _sample_fake(x_0, sigma, cumulative, family, dim, seed, first_row)
    return _launch("sample_transition", "x_0", out, x_0, sigma, None, cumulative, seed, family, dim, first_row)


_column_operator = define(
    "transition_column(Tensor x_0, Tensor sigma, Tensor? stationary, str family, int dim, ScalarType dtype) -> Tensor",
    _column,
    _fake,
)
_row_operator = define(
    "transition_row(Tensor x, Tensor sigma, Tensor? stationary, str family, int dim, ScalarType dtype) -> Tensor",
    _row,
    _fake,
)
_sample_operator = define(
    "sample_transition(Tensor x_0, Tensor sigma, Tensor? cumulative, str family, int dim, Tensor seed, int first_row)"
    " -> Tensor",
    _sample,
    _sample_fake,
)


def _probabilities(operator: Any, name: str, x: Tensor, sigma: Tensor | float, process: RankOne) -> Tensor:
    process, x = check_process(process), check_tokens(name, x)
    dtype = torch.float64 if isinstance(sigma, Tensor) and sigma.dtype == torch.float64 else torch.float32
    rows = per_row("sigma", sigma, x.shape, x.device)
    result: Tensor = operator(x, rows, stationary_for(process, dtype, x.device), process.family, process.dim, dtype)
    return result


def transition_column(x_0: Tensor, sigma: Tensor | float, process: RankOne) -> Tensor:
    """Columns of exp(σQ): the distribution p(· | x_0) of the noised token, a [y = x_0] + (1 - a) π_y with a = e^{-σ}.

    Args:
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄ > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.

    Returns:
        Probabilities [*B, N] that sum to 1; float64 if ``sigma`` is a float64 tensor, else float32.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a token lies outside [0, N), or σ̄ does not broadcast, is NaN, infinite or not above 0.

    Source: SEDD (Lou, Meng & Ermon 2024), section 3.3, in closed form for any rank-one process.
    """
    return _probabilities(_column_operator, "x_0", x_0, sigma, process)


def transition_row(x: Tensor, sigma: Tensor | float, process: RankOne) -> Tensor:
    """Rows of exp(σQ): the likelihood p(x | y) of every origin y, a [y = x] + (1 - a) π_x with a = e^{-σ}.

    Args:
        x: noised tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄ > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.

    Returns:
        Likelihoods [*B, N]; float64 if ``sigma`` is a float64 tensor, else float32.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a token lies outside [0, N), or σ̄ does not broadcast, is NaN, infinite or not above 0.

    Source: SEDD (Lou, Meng & Ermon 2024), section 3.3, in closed form for any rank-one process.
    """
    return _probabilities(_row_operator, "x", x, sigma, process)


def sample_transition(
    x_0: Tensor,
    sigma: Tensor | float,
    process: RankOne,
    *,
    generator: torch.Generator | None = None,
    first_row: int = 0,
) -> Tensor:
    """Noises tokens: x_t ~ p(· | x_0). Keeps a token with probability e^{-σ}, else draws it from π.

    Uses one or two random numbers per token and no tensor over the vocabulary. The same generator state gives
    the same tokens, whatever the number of threads.

    Args:
        x_0: clean tokens, [*B], int64, in [0, N).
        sigma: total noise σ̄ > 0, a number or a floating-point tensor that broadcasts to [*B].
        process: the process; ``process.dim`` is N.
        generator: random number generator on the tokens' device; torch's default one if None.
        first_row: place of the first token in a larger batch, ≥ 0. If the parts of a batch are noised separately, each
            with a generator in the same state, the result is that of the whole batch: distributed training needs this.

    Returns:
        Noised tokens, [*B], int64.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a token lies outside [0, N), or σ̄ does not broadcast, is NaN, infinite or not above 0;
            ``first_row`` is negative.

    Source: SEDD (Lou, Meng & Ermon 2024), Algorithm 1.
    """
    if not isinstance(first_row, int) or isinstance(first_row, bool):
        raise TypeError(f"first_row: expected an int, got {kind_of(first_row)}")
    process, x_0 = check_process(process), check_tokens("x_0", x_0)
    rows = per_row("sigma", sigma, x_0.shape, x_0.device)
    vector = process.family == "rank_one"
    cumulative = process._copy("cumulative", torch.float64, x_0.device) if vector else None
    seed = draw_seed(generator, x_0.device)
    result: Tensor = _sample_operator(x_0, rows, cumulative, process.family, process.dim, seed, first_row)
    return result
